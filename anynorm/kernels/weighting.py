"""Weights: how much each number counts for the mean and the variance of its group, all of which it is normalized by.

A number that weighs nothing may be anything: padding. It touches neither the statistics nor, if nothing depends on what
becomes of it, a gradient.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from anynorm import kernels
from anynorm.kernels.ops import NEW, PURE, Array, Namespace, Ops, Outputs
from anynorm.kernels.reductions import Sums, WideReduction
from anynorm.kernels.scaling import Scale
from anynorm.kernels.statistics import Standardized, Stats


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


class WeightedSums(NamedTuple):
    """`Sums` in which each number has a weight, and which may be spread over replicas."""

    plain: Sums
    """Whose means are sums: its divisor is 1."""
    weights: Weights
    """That are `ready`."""
    join: Callable[..., list[Array]] | None = None
    """The sums over all replicas of some arrays."""
    product: Ops = PURE
    """Where the numbers times their weights go."""

    def mean(self, xp: Namespace, x: Array) -> Array:
        """The mean of each group, beside x."""
        each = self.weights.each
        if each.shape[-1] == x.shape[-1]:
            return self._mean(xp, self.plain.mean_product(xp, x, each, ops=self.product))
        return self._mean(xp, self.plain.mean(xp, self.product.multiply(x, each)))

    def mean_product(self, xp: Namespace, x: Array, other: Array, *, ops: Ops = PURE) -> Array:
        """The mean of x * other."""
        # the weight comes first: 0 times a square that overflowed is no number
        weighed = ops.multiply(x, self.weights.each)
        return self._mean(xp, self.plain.mean_product(xp, weighed, other, ops=ops))

    def _mean(self, xp: Namespace, sums: Array) -> Array:
        return self._joined(sums) / positive(xp, self.weights.sums)

    def sum(self, xp: Namespace, x: Array) -> Array:
        """The sum of each group."""
        return self._joined(self.plain.mean(xp, x))

    def sum_product(self, xp: Namespace, x: Array, other: Array, *, ops: Ops = PURE) -> Array:
        """The sum of x * other."""
        return self._joined(self.plain.mean_product(xp, x, other, ops=ops))

    def _joined(self, sums: Array) -> Array:
        return sums if self.join is None else self.join(sums)[0]


class GradientSums(NamedTuple):
    """What g, the gradient of xhat, adds up to over some of the values of each group."""

    mean: Array | None
    """Its sum divided by that of their weights; None where x was not centred."""
    rest: Array | None
    """The sum of what the mean times the weights leaves of g: of all of it, where nothing weighs anything."""
    product: Array
    """The sum of what is left in the end, times xhat.

    Over a whole group that is the sum of g * xhat, as the weights times xhat add up to 0; but a g that is nearly all
    mean would lose there what else it has to say.
    """
    weight: Array
    """The sum of their weights."""
    level: Array | None = None
    """The mean of xhat, of part of a group."""


def standardize(
    xp: Namespace,
    x: Array,
    *,
    groups: WeightedSums,
    eps: float | Array,
    centred: bool,
    rstd_at_zero: float | Array | None = 1.0,
    constant: tuple[Array, Array] | None = None,
) -> Standardized:
    """`kernels.standardize`; 0 in a group without weight.

    Shares add up to 1 but for rounding, which would leave equal numbers a spread: they are looked for.
    """
    kept = without_padding(xp, x, groups.weights)
    if centred and constant is None:
        bottom, top = bounds(xp, kept, groups)
        constant = (bottom == top, top)
    done = kernels.standardize(
        xp, kept, groups=groups, eps=eps, centred=centred, rstd_at_zero=rstd_at_zero, constant=constant
    )
    return with_padding(xp, x, done, groups.weights)


def standardize_scaled(
    xp: Namespace, x: Array, *, groups: WeightedSums, eps: float, centred: bool, subnormal: Array | None = None
) -> Standardized:
    """`kernels.standardize_scaled`, where numbers that weigh nothing have no say in the power of two."""
    scale = kernels.scale_of(xp, *bounds(xp, x, groups), eps=eps, centred=centred)
    return kernels.standardize_in_scale(xp, x, scale, standardize, groups=groups, centred=centred, subnormal=subnormal)


def input_gradient(
    xp: Namespace,
    dy: Array,
    gamma: Array | None,
    of: Standardized,
    *,
    groups: WeightedSums,
    centred: bool,
    places: Outputs = NEW,
    power: Array | None = None,
    exact: bool = False,
) -> Array:
    """The gradient of `affine(standardize(x))` with respect to x, for a dy that is 0 in a group without weight.

    rstd * (g - p * sum(g) - p * xhat * sum(g * xhat)), where p is the share of a number in the weight of its group, and
    the sums are over all numbers, also without weight.
    """
    weights, last = groups.weights, gamma if kernels.one_per_group(gamma, groups.plain.axes) else None
    g = dy if last is not None else kernels.cotangent(xp, dy, gamma, power, places=places, exact=exact)
    share = weights.each / positive(xp, weights.sums)
    g, sums_of_g = gradient_sums(xp, g, of.xhat, share, groups=groups, centred=centred, places=places)
    return input_gradient_by_sums(xp, g, sums_of_g, of, share, last, power, places=places, exact=exact)


def wide_statistics(
    xp: Namespace, x: Array, each: Array, *, groups: WideReduction, centred: bool, twice: bool
) -> Stats:
    """`kernels.wide_statistics` of numbers with weights, which `groups` have as well; 0 and 0 in a group without."""
    kept = xp.where(each > 0, x, xp.zeros_like(x))
    return kernels.wide_statistics(xp, kept, groups=groups, centred=centred, twice=twice)


def wide_input_gradient(
    xp: Namespace,
    dy: Array,
    gamma: Array | None,
    of: Standardized,
    each: Array,
    weight: Array,
    *,
    groups: WideReduction,
    centred: bool,
    twice: bool,
) -> Array:
    """`input_gradient` of numbers in a wide dtype, in one pass or two; the `groups` add up without weights."""
    last = gamma if kernels.one_per_group(gamma, groups.axes) else None
    power = kernels.power_of_two(xp, of.rstd) if twice and gamma is not None and last is None else None
    g = dy if last is not None else kernels.cotangent(xp, dy, gamma, power)
    share = each / positive(xp, weight)

    def total(values: Array) -> Array:
        return xp.sum(values, axis=groups.axes, keepdims=True)

    if not centred:
        return input_gradient_by_sums(
            xp, g, GradientSums(None, None, total(g * of.xhat), weight), of, share, last, power
        )
    if twice:
        g = g - each * (total(g) / positive(xp, weight))
    rest, product = total(g), total(g * of.xhat)
    return input_gradient_by_sums(
        xp, g - share * rest, GradientSums(None, None, product, weight), of, share, last, power
    )


def gradient_sums(
    xp: Namespace, g: Array, xhat: Array, share: Array, *, groups: WeightedSums, centred: bool, places: Outputs = NEW
) -> tuple[Array, GradientSums]:
    """g less its sum times the shares if x was `centred`, and what it adds up to over all of each group."""
    each, sums = groups.weights.each, groups.weights.sums
    mean = rest = None
    if centred:  # as `kernels.centre`
        mean = groups.sum(xp, g) / positive(xp, sums)
        mean = xp.where(xp.isfinite(mean), mean, xp.zeros_like(mean))  # the rest is divided after the weights
        g = places.result.subtract(g, each * mean)
        rest = groups.sum(xp, g)
        g = places.result.subtract(g, share * rest)
    return g, GradientSums(mean, rest, groups.sum_product(xp, g, xhat, ops=places.product), sums)


def gradient_sums_of_part(
    xp: Namespace, g: Array, xhat: Array, *, groups: WeightedSums, centred: bool, places: Outputs = NEW
) -> GradientSums:
    """What g adds up to over a part of each group, whose own the sums of the weights are."""
    each, sums = groups.weights.each, groups.weights.sums
    least = kernels.smallest_normal(xp, sums.dtype) / float(xp.finfo(sums.dtype).eps)
    sums = xp.where(sums >= least, sums, xp.zeros_like(sums))  # less is nothing beside the other parts
    groups = groups._replace(weights=groups.weights._replace(sums=sums))
    share, level = each / positive(xp, sums), groups.mean(xp, xhat) if centred else None
    return gradient_sums(xp, g, xhat, share, groups=groups, centred=centred, places=places)[1]._replace(level=level)


def merge_gradient_sums(xp: Namespace, found: list[GradientSums]) -> GradientSums:
    """What g adds up to over parts of the groups, together."""
    weight = sum(each.weight for each in found)
    shares = [each.weight / positive(xp, weight) for each in found]
    product = sum(each.product for each in found)
    if found[0].level is None:
        return GradientSums(None, None, product, weight)
    mean = sum(share * each.mean for share, each in zip(shares, found, strict=True))
    more = [each.weight * (each.mean - mean) + each.rest for each in found]
    rest = sum(more)
    for share, each, own in zip(shares, found, more, strict=True):
        product = product + (own - share * rest) * each.level
    level = sum(share * each.level for share, each in zip(shares, found, strict=True))
    return GradientSums(mean, rest, product, weight, level)


def input_gradient_of_part(
    xp: Namespace,
    g: Array,
    sums_of_g: GradientSums,
    of: Standardized,
    each: Array,
    gamma: Array | None,
    power: Array | None,
    *,
    places: Outputs = NEW,
    exact: bool = False,
) -> Array:
    """`rstd * (g - p * sum(g) - p * xhat * sum(g * xhat))`, by the sums over all parts of the groups."""
    ops, share = places.result, each / positive(xp, sums_of_g.weight)
    if sums_of_g.mean is not None:
        g = ops.subtract(ops.subtract(g, each * sums_of_g.mean), share * sums_of_g.rest)
    return input_gradient_by_sums(xp, g, sums_of_g, of, share, gamma, power, places=places, exact=exact)


def input_gradient_by_sums(
    xp: Namespace,
    g: Array,
    sums_of_g: GradientSums,
    of: Standardized,
    share: Array,
    gamma: Array | None,
    power: Array | None,
    *,
    places: Outputs = NEW,
    exact: bool = False,
) -> Array:
    """`rstd * (g - p * xhat * sum(g * xhat))`, for a g whose sum was taken away, and which has the `power`."""
    of = of._replace(xhat=places.xhat.multiply(of.xhat, share))
    sums_over_all = Stats(None, None, sums_of_g.product)
    return kernels.input_gradient_by_sums(xp, g, sums_over_all, of, gamma, power, places=places, exact=exact)


def without_padding(xp: Namespace, x: Array, weights: Weights) -> Array:
    """x with 0 for what weighs nothing and is not finite, and in a group without weight."""
    return xp.where((weights.sums > 0) & ((weights.each > 0) | xp.isfinite(x)), x, xp.zeros_like(x))


def with_padding(xp: Namespace, x: Array, done: Standardized, weights: Weights) -> Standardized:
    """What `without_padding` became, with what x becomes where it weighs nothing and that is not finite."""
    raw, nothing = xp.where(xp.isfinite(x), done.xhat, x), xp.zeros_like(x)
    lost = (weights.sums > 0) & (weights.each == 0) & ~xp.isfinite(raw)
    return done._replace(xhat=xp.where(lost, nothing, done.xhat), padding=xp.where(lost, raw, nothing))


def extremes(xp: Namespace, x: Array, weights: Weights, *, groups: Sums) -> tuple[Array, Array]:
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


def bounds(xp: Namespace, x: Array, groups: WeightedSums) -> tuple[Array, Array]:
    """The `extremes` of each group; 0 and 0 in one without weight."""
    return found(xp, *extremes(xp, x, groups.weights, groups=groups.plain), groups.weights.sums > 0)


def summed(xp: Namespace, weights: Array, shape: tuple[int, ...], *, groups: Sums) -> Array:
    """The sum over each group of weights that broadcast to this shape."""
    times = math.prod([shape[axis] for axis in groups.axes if weights.shape[axis] == 1])
    return groups.by(1.0).mean(xp, weights) * times


def positive(xp: Namespace, divisor: Array) -> Array:
    """1 in the place of 0."""
    return xp.where(divisor > 0, divisor, xp.ones_like(divisor))
