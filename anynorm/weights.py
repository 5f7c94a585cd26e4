"""Weights: how much each number counts for the mean and the variance of its group, all of which it is normalized by.

A number that weighs nothing may be anything: padding. It touches neither the statistics nor, if nothing depends on what
becomes of it, a gradient.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from anynorm import kernels
from anynorm.kernels import PURE, Arithmetic, Array, Groups, Namespace, Scale, Standardized


class Common(NamedTuple):
    """What replicas know of each other's numbers before they know their mean."""

    scale: Scale
    holders: Array
    """How many of them have a number in each group."""
    level: Array
    """Whether each of these has but one and the same."""


class Weights(NamedTuple):
    """The weights of a call."""

    share: Array
    """The part that a number has in the sum of the weights of its group; 0 where that is 0. It broadcasts to x."""
    count: Array
    """The sum of the weights of each group."""
    common: Common | None = None


class Weighted(NamedTuple):
    """`Groups` in which each number has a weight, and which may be spread over replicas."""

    plain: Groups
    """Whose means are sums: its divisor is 1."""
    weights: Weights
    join: Callable[..., list[Array]] | None = None
    """The sums over all replicas of some arrays."""

    def mean(self, xp: Namespace, x: Array) -> Array:
        """The mean of each group, beside x."""
        return self.sum(xp, x * self.weights.share)

    def mean_product(self, xp: Namespace, x: Array, other: Array, *, ops: Arithmetic = PURE) -> Array:
        """The mean of x * other."""
        return self.sum_product(xp, x * self.weights.share, other, ops=ops)

    def sum(self, xp: Namespace, x: Array) -> Array:
        """The sum of each group."""
        return self._joined(self.plain.mean(xp, x))

    def sum_product(self, xp: Namespace, x: Array, other: Array, *, ops: Arithmetic = PURE) -> Array:
        """The sum of x * other."""
        return self._joined(self.plain.mean_product(xp, x, other, ops=ops))

    def _joined(self, sums: Array) -> Array:
        return sums if self.join is None else self.join(sums)[0]


def weigh(xp: Namespace, weights: Array, shape: tuple[int, ...], *, groups: Groups) -> Weights:
    """Weights of numbers of this shape, to which they broadcast."""
    unit = None
    if math.prod(weights.shape) > 0:  # the sum of weights near the largest number would overflow
        _, unit = kernels.extremes(xp, weights, groups=groups)
        weights = weights / positive(xp, unit)
    sums = summed(xp, weights, shape, groups=groups)
    return Weights(weights / positive(xp, sums), sums if unit is None else sums * unit)


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
    """`kernels.standardize`; 0 in a group without weight.

    Shares add up to 1 but for rounding, which would leave equal numbers a spread: where no eps hides it, they are
    looked for.
    """
    kept = shielded(xp, x, groups.weights)
    if centred and flat is not None and alike is None:
        share, count, _ = groups.weights
        bottom, top = extremes(xp, kept, share > 0, count > 0, groups=groups.plain)
        alike = (bottom == top, top)
    done = kernels.standardize(xp, kept, groups=groups, eps=eps, centred=centred, flat=flat, alike=alike)
    return strayed(xp, x, done, groups.weights)


def standardize_scaled(
    xp: Namespace, x: Array, *, groups: Weighted, eps: float, centred: bool, subnormal: Array | None = None
) -> Standardized:
    """`kernels.standardize_scaled`, where numbers that weigh nothing have no say in the power of two."""
    share, count, _ = groups.weights
    scale = kernels.scale_of(xp, *extremes(xp, x, share > 0, count > 0, groups=groups.plain), eps=eps)
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
    share, count, _ = groups.weights
    g = kernels.affine(dy, gamma, None)
    g = xp.where(count > 0, g, xp.zeros_like(g))
    if centred:
        for _ in range(2):  # as `kernels.centre`
            g = g - share * groups.sum(xp, g)
    return (g - share * of.xhat * groups.sum_product(xp, g, of.xhat)) * of.rstd


def shielded(xp: Namespace, x: Array, weights: Weights) -> Array:
    """x with 0 for what weighs nothing and is not finite, and in a group without weight."""
    share, count, _ = weights
    return xp.where((count > 0) & ((share > 0) | xp.isfinite(x)), x, xp.zeros_like(x))


def strayed(xp: Namespace, x: Array, done: Standardized, weights: Weights) -> Standardized:
    """What `shielded` became, with what x becomes where it weighs nothing and that is not finite."""
    share, count, _ = weights
    raw, nothing = xp.where(xp.isfinite(x), done.xhat, x), xp.zeros_like(x)
    lost = (count > 0) & (share == 0) & ~xp.isfinite(raw)
    return done._replace(xhat=xp.where(lost, nothing, done.xhat), stray=xp.where(lost, raw, nothing))


def extremes(xp: Namespace, x: Array, counts: Array, some: Array, *, groups: Groups) -> tuple[Array, Array]:
    """The smallest and the largest number of each group that `counts`; 0 and 0 unless there is `some`."""
    nothing = xp.zeros_like(xp.astype(some, x.dtype))
    if math.prod(x.shape) == 0:
        return nothing, nothing
    bottom, _ = kernels.extremes(xp, xp.where(counts, x, nothing + math.inf), groups=groups)
    _, top = kernels.extremes(xp, xp.where(counts, x, nothing - math.inf), groups=groups)
    return xp.where(some, bottom, xp.zeros_like(bottom)), xp.where(some, top, xp.zeros_like(top))


def summed(xp: Namespace, weights: Array, shape: tuple[int, ...], *, groups: Groups) -> Array:
    """The sum over each group of weights that broadcast to this shape."""
    times = math.prod([shape[axis] for axis in groups.axes if weights.shape[axis] == 1])
    return kernels.total(xp, weights, axes=groups.axes, block=groups.block) * times


def positive(xp: Namespace, divisor: Array) -> Array:
    """1 in the place of 0."""
    return xp.where(divisor > 0, divisor, xp.ones_like(divisor))
