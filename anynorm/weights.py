"""Weights: how much each number counts for the mean and the variance of its group, all of which it is normalized by.

A number that weighs nothing may be anything: padding. It touches neither the statistics nor, if nothing depends on what
becomes of it, a gradient.
"""

import math
from typing import NamedTuple

from anynorm import kernels
from anynorm.kernels import PURE, Arithmetic, Array, Groups, Namespace, Standardized


class Weights(NamedTuple):
    """The weights of a call."""

    share: Array
    """The part that a number has in the sum of the weights of its group; 0 where that is 0. It broadcasts to x."""
    count: Array
    """The sum of the weights of each group."""


class Weighted(NamedTuple):
    """`Groups` in which each number has a weight."""

    plain: Groups
    """Whose means are sums: its divisor is 1."""
    weights: Weights

    @property
    def axes(self) -> tuple[int, ...]:
        """Those whose elements share a mean and a variance."""
        return self.plain.axes

    def mean(self, xp: Namespace, x: Array) -> Array:
        """The mean of each group, beside x."""
        return self.plain.mean(xp, x * self.weights.share)

    def mean_product(self, xp: Namespace, x: Array, other: Array, *, ops: Arithmetic = PURE) -> Array:
        """The mean of x * other."""
        return self.plain.mean_product(xp, x * self.weights.share, other, ops=ops)


def weigh(xp: Namespace, weights: Array, shape: tuple[int, ...], *, groups: Groups) -> Weights:
    """Weights of numbers of this shape, to which they broadcast."""
    unit = None
    if math.prod(weights.shape) > 0:  # the sum of weights near the largest number would overflow
        _, unit = kernels.extremes(xp, weights, groups=groups)
        weights = weights / _positive(xp, unit)
    times = math.prod([shape[axis] for axis in groups.axes if weights.shape[axis] == 1])
    sums = kernels.total(xp, weights, axes=groups.axes, block=groups.block) * times
    return Weights(weights / _positive(xp, sums), sums if unit is None else sums * unit)


def standardize(
    xp: Namespace,
    x: Array,
    *,
    groups: Weighted,
    eps: float | Array,
    centred: bool,
    flat: float | Array | None = 1.0,
    alike: tuple[Array, Array] | None = None,
) -> Standardized:
    """`kernels.standardize`; 0 in a group without weight."""
    share, count = groups.weights
    seen = x
    x = xp.where((count > 0) & ((share > 0) | xp.isfinite(x)), x, xp.zeros_like(x))
    done = kernels.standardize(xp, x, groups=groups, eps=eps, centred=centred, flat=flat, alike=alike)
    nothing = xp.zeros_like(x)
    raw = xp.where(xp.isfinite(seen), done.xhat, seen)
    lost = (count > 0) & (share == 0) & ~xp.isfinite(raw)
    return done._replace(xhat=xp.where(lost, nothing, done.xhat), stray=xp.where(lost, raw, nothing))


def standardize_scaled(
    xp: Namespace, x: Array, *, groups: Weighted, eps: float, centred: bool, subnormal: Array | None = None
) -> Standardized:
    """`kernels.standardize_scaled`, where numbers that weigh nothing have no say in the power of two."""
    scale = kernels.scale_of(xp, *_extremes(xp, x, groups=groups), eps=eps)
    x = scale.enter(xp, x, subnormal)
    alike = scale.alike if centred else None
    return scale.leave(
        xp, standardize(xp, x, groups=groups, eps=scale.eps, centred=centred, flat=scale.flat, alike=alike)
    )


def input_gradient(
    xp: Namespace, dy: Array, gamma: Array | None, of: Standardized, *, groups: Weighted, centred: bool
) -> Array:
    """The gradient of `affine(standardize(x))` with respect to x.

    rstd * (g - p * sum(g) - p * xhat * sum(g * xhat)), where g = dy * gamma and p is the share; the sum of g stays
    where x was not centred. Sums are over all numbers, also those that weigh nothing.
    """
    share, count = groups.weights
    g = kernels.affine(dy, gamma, None)
    g = xp.where(count > 0, g, xp.zeros_like(g))
    if centred:
        for _ in range(2):  # as `kernels.centre`
            g = g - share * groups.plain.mean(xp, g)
    return (g - share * of.xhat * groups.plain.mean_product(xp, g, of.xhat)) * of.rstd


def _positive(xp: Namespace, divisor: Array) -> Array:
    """1 in the place of 0."""
    return xp.where(divisor > 0, divisor, xp.ones_like(divisor))


def _extremes(xp: Namespace, x: Array, *, groups: Weighted) -> tuple[Array, Array]:
    """The smallest and the largest number of each group that weighs something; 0 and 0 if there is none."""
    share, count = groups.weights
    bottom, _ = kernels.extremes(xp, xp.where(share > 0, x, xp.zeros_like(share) + math.inf), groups=groups.plain)
    _, top = kernels.extremes(xp, xp.where(share > 0, x, xp.zeros_like(share) - math.inf), groups=groups.plain)
    bottom, top = (xp.where(count > 0, each, xp.zeros_like(each)) for each in (bottom, top))
    return bottom, top
