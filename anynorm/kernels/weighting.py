"""Weights: how much each number counts for the mean and the variance of its group, all of which it is normalized by.

A number that weighs nothing may be anything: padding. It touches neither the statistics nor, if nothing depends on what
becomes of it, a gradient.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from anynorm.kernels.ops import PURE, Array, Namespace, Ops
from anynorm.kernels.reductions import Sums
from anynorm.kernels.scaling import Scale, smallest_normal
from anynorm.kernels.scaling import extremes as _extremes
from anynorm.kernels.statistics import Standardized


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
    sums: Any
    """Their sum over each group, divided by its unit; None until they are `calls.weighed`."""
    unit: Array | None = None
    """What those of each group are divided by, where their own sums and products might overflow or underflow."""
    common: Common | None = None
    total: tuple[Array, Array | None] | None = None
    """Their sum over each group and all replicas, and its rest, as `counts` has them."""


Join = Callable[..., list[Array]]
"""The sums over all replicas of some arrays."""


class WeightedSums(NamedTuple):
    """`Sums` in which each number has a weight, and which may be spread over replicas: a `Reduction`."""

    plain: Sums
    """Its divisor is 1."""
    weights: Weights
    """That are `ready`."""
    product: Ops = PURE
    """Where the numbers times their weights go."""
    join: Join | None = None
    """Sums arrays over all replicas, where there are any, whose weights these are together."""

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of a group."""
        return self.plain.axes

    @property
    def each(self) -> Array:
        """The weights, beside x."""
        return self.weights.each

    @property
    def weight(self) -> Any:
        """Their sums."""
        return self.weights.sums

    def mean(self, xp: Namespace, x: Array) -> Array:
        """The mean of each group, beside x; 0 in one without weight."""
        if self.plain.block == math.inf or self.each.shape[-1] == x.shape[-1]:
            sums = self.total_product(xp, x, self.each, ops=self.product)
        else:
            sums = self.total(xp, self.product.multiply(x, self.each))
        return sums / positive(xp, self.weight)

    def mean_product(self, xp: Namespace, x: Array, other: Array, *, ops: Ops = PURE) -> Array:
        """The mean of x * other."""
        # the weight comes first: 0 times a square that overflowed is no number
        weighed = ops.multiply(x, self.each)
        return self.total_product(xp, weighed, other, ops=ops) / positive(xp, self.weight)

    def total(self, xp: Namespace, x: Array) -> Array:
        """The sum of each group, also of what has no weight."""
        return self._joined(self.plain.mean(xp, x))

    def total_product(self, xp: Namespace, x: Array, other: Array, *, ops: Ops = PURE) -> Array:
        """The sum of x * other."""
        return self._joined(self.plain.mean_product(xp, x, other, ops=ops))

    def _joined(self, sums: Array) -> Array:
        return sums if self.join is None else self.join(sums)[0]

    def anchor(self, xp: Namespace, g: Array) -> Array:
        """The sum of g over that of the weights; 0 where a part of a group has next to none."""
        least = smallest_normal(xp, self.weight.dtype) / float(xp.finfo(self.weight.dtype).eps)
        mean = self.total(xp, g) / positive(xp, self.weight)
        return xp.where((self.weight >= least) & xp.isfinite(mean), mean, xp.zeros_like(mean))

    def of_part(self, xp: Namespace, x: Array) -> "WeightedSums":
        """The same for x, a part of the groups, by the sums of its own weights."""
        sums = xp.broadcast_to(summed(xp, self.each, x.shape, groups=self.plain), self.weight.shape)
        return self._replace(weights=self.weights._replace(sums=sums))

    def bounds(self, xp: Namespace, x: Array) -> tuple[Array, Array]:
        """The `extremes` of each group; 0 and 0 in one without weight."""
        return found(xp, *extremes(xp, x, self.weights, groups=self.plain), self.weight > 0)


class WideWeightedSums(WeightedSums):
    """The same of numbers whose dtype has digits to spare, also beside a large mean."""

    __slots__ = ()

    def pivot(self, xp: Namespace, x: Array) -> Array:
        """The mean; of equal numbers, of which it may be rounded, one of them."""
        bottom, top = self.bounds(xp, x)
        return xp.where(bottom == top, top, self.mean(xp, x))

    def anchor(self, xp: Namespace, g: Array) -> None:
        """None."""


def without_padding(xp: Namespace, x: Array, weights: Weights) -> Array:
    """x with 0 for what weighs nothing and is not finite, and in a group without weight."""
    return xp.where((weights.sums > 0) & ((weights.each > 0) | xp.isfinite(x)), x, xp.zeros_like(x))


def with_padding(xp: Namespace, x: Array, done: Standardized, weights: Weights) -> Standardized:
    """What `without_padding` became, with what x becomes where it weighs nothing and that is not finite."""
    taken = (weights.each > 0) | xp.isfinite(x)
    return apart(xp, done._replace(xhat=xp.where(taken, done.xhat, x)), weights)


def apart(xp: Namespace, done: Standardized, weights: Weights, dtype: Any = None) -> Standardized:
    """What x became, and apart from it what weighs nothing and is not finite; 0 in a group without weight.

    `dtype` is that of the result, where xhat is in a wider one.
    """
    xhat, some, nothing = done.xhat, weights.sums > 0, xp.zeros_like(done.xhat)
    lost = some & (weights.each == 0) & ~xp.isfinite(xhat if dtype is None else xp.astype(xhat, dtype, copy=False))
    return done._replace(xhat=xp.where(some & ~lost, xhat, nothing), padding=xp.where(lost, xhat, nothing))


def gradient_without_padding(xp: Namespace, dy: Array, xhat: Array, each: Array, sums: Array) -> tuple[Array, Array]:
    """dy and xhat with 0 where xhat weighs nothing and is not finite; and xhat with 0 in a group without weight."""
    nothing, some = xp.zeros_like(xhat), sums > 0
    fine = (each > 0) | xp.isfinite(xhat)
    return xp.where(fine | ~some, dy, nothing), xp.where(fine & some, xhat, nothing)


def extremes(xp: Namespace, x: Array, weights: Weights, *, groups: Sums) -> tuple[Array, Array]:
    """The smallest and the largest number of each group that have a weight; infinite, if there is none."""
    far = xp.zeros_like(weights.sums) + math.inf
    if 0 in x.shape:
        return far, -far
    bottom, _ = _extremes(xp, xp.where(weights.each > 0, x, far), groups=groups)
    _, top = _extremes(xp, xp.where(weights.each > 0, x, -far), groups=groups)
    return bottom, top


def found(xp: Namespace, bottom: Array, top: Array, some: Array) -> tuple[Array, Array]:
    """These `extremes`; 0 and 0 unless there is `some`."""
    return xp.where(some, bottom, xp.zeros_like(bottom)), xp.where(some, top, xp.zeros_like(top))


def summed(xp: Namespace, weights: Array, shape: tuple[int, ...], *, groups: Sums) -> Array:
    """The sum over each group of weights that broadcast to this shape."""
    times = math.prod([shape[axis] for axis in groups.axes if weights.shape[axis] == 1])
    return groups.by(1.0).mean(xp, weights) * times


def positive(xp: Namespace, divisor: Any) -> Any:
    """1 in the place of 0; a Python number is never 0."""
    return divisor if isinstance(divisor, (int, float)) else xp.where(divisor > 0, divisor, xp.ones_like(divisor))
