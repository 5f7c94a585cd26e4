"""Weights: how much each number counts for the mean and the variance of its group, all of which it is normalized by.

A number that weighs nothing may be anything: padding. It touches neither the statistics nor, if nothing depends on what
becomes of it, a gradient.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from anynorm import kernels
from anynorm.kernels import NEW, PURE, Arithmetic, Array, Groups, Namespace, Places, Scale, Spread, Standardized


class Common(NamedTuple):
    """What replicas know of each other's numbers before they know their mean."""

    scale: Scale
    holders: Array
    """How many of them have a number in each group."""
    level: Array
    """Whether each of these has but one and the same."""


class Weights(NamedTuple):
    """The weights of a call."""

    each: Array
    """As they were given, of any dtype; they broadcast to x."""
    sums: Array
    """Their sum over each group, divided by its unit."""
    unit: Array | None = None
    """What those of each group are divided by, where their own sums and products might overflow or underflow."""
    common: Common | None = None

    @property
    def count(self) -> Array:
        """Their sum over each group."""
        return self.sums if self.unit is None else self.sums * self.unit


class Weighted(NamedTuple):
    """`Groups` in which each number has a weight, and which may be spread over replicas."""

    plain: Groups
    """Whose means are sums: its divisor is 1."""
    weights: Weights
    """That are `ready`."""
    join: Callable[..., list[Array]] | None = None
    """The sums over all replicas of some arrays."""
    product: Arithmetic = PURE
    """Where the numbers times their weights go."""

    def mean(self, xp: Namespace, x: Array) -> Array:
        """The mean of each group, beside x."""
        each = self.weights.each
        if each.shape[-1] == x.shape[-1]:
            return self._mean(xp, self.plain.mean_product(xp, x, each, ops=self.product))
        return self._mean(xp, self.plain.mean(xp, self.product.multiply(x, each)))

    def mean_product(self, xp: Namespace, x: Array, other: Array, *, ops: Arithmetic = PURE) -> Array:
        """The mean of x * other."""
        # the weight comes first: 0 times a square that overflowed is no number
        weighed = ops.multiply(x, self.weights.each)
        return self._mean(xp, self.plain.mean_product(xp, weighed, other, ops=ops))

    def _mean(self, xp: Namespace, sums: Array) -> Array:
        return self._joined(sums) / positive(xp, self.weights.sums)

    def sum(self, xp: Namespace, x: Array) -> Array:
        """The sum of each group."""
        return self._joined(self.plain.mean(xp, x))

    def sum_product(self, xp: Namespace, x: Array, other: Array, *, ops: Arithmetic = PURE) -> Array:
        """The sum of x * other."""
        return self._joined(self.plain.mean_product(xp, x, other, ops=ops))

    def _joined(self, sums: Array) -> Array:
        return sums if self.join is None else self.join(sums)[0]


def ready(xp: Namespace, weights: Weights, dtype: Any) -> Weights:
    """Each in the dtype of the computation, divided by the unit."""
    each = xp.astype(weights.each, dtype, copy=False)
    return weights._replace(each=each if weights.unit is None else each / positive(xp, weights.unit))


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
        bottom, top = bounds(xp, kept, groups)
        alike = (bottom == top, top)
    done = kernels.standardize(xp, kept, groups=groups, eps=eps, centred=centred, flat=flat, alike=alike)
    return strayed(xp, x, done, groups.weights)


def standardize_scaled(
    xp: Namespace, x: Array, *, groups: Weighted, eps: float, centred: bool, subnormal: Array | None = None
) -> Standardized:
    """`kernels.standardize_scaled`, where numbers that weigh nothing have no say in the power of two."""
    scale = kernels.scale_of(xp, *bounds(xp, x, groups), eps=eps)
    x = scale.enter(xp, x, subnormal)
    alike = scale.alike if centred else None
    return scale.leave(
        xp, standardize(xp, x, groups=groups, eps=scale.eps, centred=centred, flat=scale.flat, alike=alike)
    )


def input_gradient(
    xp: Namespace, dy: Array, gamma: Array | None, of: Standardized, *, groups: Weighted, centred: bool
) -> Array:
    """The gradient of `affine(standardize(x))` with respect to x; sums are over all numbers, also without weight."""
    weights = groups.weights
    if kernels.alone(gamma, groups.plain.axes):
        return input_gradient(xp, dy, None, of, groups=groups, centred=centred) * gamma
    share = weights.each / positive(xp, weights.sums)
    g = kernels.affine(dy, gamma, None)
    g = xp.where(weights.sums > 0, g, xp.zeros_like(g))
    sums = rest = None
    if centred:  # as `kernels.centre`
        sums = groups.sum(xp, g)
        rest = groups.sum(xp, g - share * sums)
    return upright(g, Spread(sums, rest, groups.sum_product(xp, g, of.xhat)), of, share)


def lean(xp: Namespace, g: Array, xhat: Array, *, groups: Groups, centred: bool, places: Places = NEW) -> Spread:
    """The mean of g, if x was centred, and that of g * xhat.

    The mean is taken from no product: one with a number that weighs nothing would drown what the others add.
    """
    product, mean, rest = groups.mean_product(xp, g, xhat, ops=places.product), None, None
    if centred:
        _, mean, rest = kernels.centre(xp, g, groups=groups, ops=places.result)
    return Spread(mean, rest, product)


def upright(g: Array, leaning: Spread, of: Standardized, share: Array, *, places: Places = NEW) -> Array:
    """rstd * (g - p * sum(g) - p * xhat * sum(g * xhat)), where p is the share of a number in the weight of its group.

    In place of sums and shares, both may be means and shares times the number of values.
    """
    mean, rest = (None if each is None else share * each for each in (leaning.mean, leaning.rest))
    g = kernels.less(g, Spread(mean, rest, leaning.var), ops=places.result)
    return kernels.upright(g, leaning, of._replace(xhat=places.xhat.multiply(of.xhat, share)), places=places)


def shielded(xp: Namespace, x: Array, weights: Weights) -> Array:
    """x with 0 for what weighs nothing and is not finite, and in a group without weight."""
    return xp.where((weights.sums > 0) & ((weights.each > 0) | xp.isfinite(x)), x, xp.zeros_like(x))


def strayed(xp: Namespace, x: Array, done: Standardized, weights: Weights) -> Standardized:
    """What `shielded` became, with what x becomes where it weighs nothing and that is not finite."""
    raw, nothing = xp.where(xp.isfinite(x), done.xhat, x), xp.zeros_like(x)
    lost = (weights.sums > 0) & (weights.each == 0) & ~xp.isfinite(raw)
    return done._replace(xhat=xp.where(lost, nothing, done.xhat), stray=xp.where(lost, raw, nothing))


def extremes(xp: Namespace, x: Array, weights: Weights, *, groups: Groups) -> tuple[Array, Array]:
    """The smallest and the largest number of each group that have a weight; infinite, if there is none."""
    far = xp.zeros_like(weights.sums) + math.inf
    if math.prod(x.shape) == 0:
        return far, -far
    bottom, _ = kernels.extremes(xp, xp.where(weights.each > 0, x, far), groups=groups)
    _, top = kernels.extremes(xp, xp.where(weights.each > 0, x, -far), groups=groups)
    return bottom, top


def found(xp: Namespace, bottom: Array, top: Array, some: Array) -> tuple[Array, Array]:
    """These `extremes`; 0 and 0 unless there is `some`."""
    return xp.where(some, bottom, xp.zeros_like(bottom)), xp.where(some, top, xp.zeros_like(top))


def bounds(xp: Namespace, x: Array, groups: Weighted) -> tuple[Array, Array]:
    """The `extremes` of each group; 0 and 0 in one without weight."""
    return found(xp, *extremes(xp, x, groups.weights, groups=groups.plain), groups.weights.sums > 0)


def summed(xp: Namespace, weights: Array, shape: tuple[int, ...], *, groups: Groups) -> Array:
    """The sum over each group of weights that broadcast to this shape."""
    times = math.prod([shape[axis] for axis in groups.axes if weights.shape[axis] == 1])
    return groups._replace(divisor=1.0).mean(xp, weights) * times


def positive(xp: Namespace, divisor: Array) -> Array:
    """1 in the place of 0."""
    return xp.where(divisor > 0, divisor, xp.ones_like(divisor))
