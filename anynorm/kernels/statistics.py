"""Mean and variance of each group, in two stages, and how those of parts are merged."""

from typing import Any, NamedTuple

from anynorm.kernels.ops import PURE, Array, Namespace, Ops
from anynorm.kernels.reductions import Reduction, WideReduction


class Stats(NamedTuple):
    """The statistics of each group."""

    mean: Array
    """None where the array is not centred."""
    rest: Array
    """What rounding took from the mean: x less `mean`, and then less this, is exact. None where it is not known."""
    var: Array

    def astype(self, xp: Namespace, dtype: Any) -> "Stats":
        """In another dtype, with all the digits of the mean that it has room for."""
        if self.mean is None or self.rest is None or self.mean.dtype == dtype == self.var.dtype == self.rest.dtype:
            return self
        return Stats(*recast(xp, self.mean, self.rest, dtype), xp.astype(self.var, dtype, copy=False))


NO_STATS = Stats(None, None, None)
"""Where there are none, or they are not kept."""


class Standardized(NamedTuple):
    """An array brought to mean 0 and variance 1 in each of its groups, and what brought it there."""

    xhat: Array
    rstd: Array
    """1 / sqrt(var + eps); where that is 1 / 0, 1."""
    stats: Stats
    padding: Array | None = None
    """What becomes of a number that weighs nothing if that is not finite, and 0 elsewhere; its xhat is 0."""


def wide_statistics(xp: Namespace, x: Array, *, groups: WideReduction, centred: bool, twice: bool = False) -> Stats:
    """The statistics of numbers in a wide dtype, in which the square of each exists; one pass, or two if `twice`.

    The pivot is one of the numbers of the group: the square of what it leaves of the mean is at most as many times the
    variance as there are numbers. If x was a narrow dtype, that many digits are to spare; else the mean that was found
    is the pivot of a second pass, which tells the rest of it.
    """
    pivot = groups.first(x) if centred else None
    _, left, var = shifted(xp, x, pivot, groups=groups, centred=centred)
    if pivot is None:
        return Stats(None, None, var)
    mean = pivot + left
    if not twice:
        return Stats(mean, None, var)
    _, rest, var = shifted(xp, x, mean, groups=groups)
    return Stats(mean, rest, var)


def deviations(
    xp: Namespace,
    x: Array,
    *,
    groups: Reduction,
    centred: bool,
    constant: tuple[Array, Array] | None = None,
    ops: Ops = PURE,
    squares: Ops = PURE,
) -> tuple[Array, Stats]:
    """The array less its mean if it is to be `centred`, and its statistics."""
    mean = rest = None
    if centred:
        x, mean, rest = centre(xp, x, groups=groups, constant=constant, ops=ops)
    return x, Stats(mean, rest, groups.mean_product(xp, x, x, ops=squares))


def shifted(
    xp: Namespace,
    x: Array,
    pivot: Array | None,
    *,
    groups: Reduction,
    centred: bool = True,
    ops: Ops = PURE,
    squares: Ops = PURE,
) -> tuple[Array, Array | None, Array]:
    """The array less a pivot, if there is one; the mean of what is left, if it is to be `centred`; and the variance.

    This takes a pass or two less than `deviations`, and is as exact where the square of that mean is at most the
    variance: the condition number is then at most 2. With the mean for a pivot it is the corrected two-pass algorithm.

    Chan, Golub & LeVeque, "Algorithms for computing the sample variance", 1983, eq. 1.5 to 1.8.
    """
    x = x if pivot is None else ops.subtract(x, pivot)
    if not centred:
        return x, None, groups.mean_product(xp, x, x, ops=squares)
    left = groups.mean(xp, x)
    return x, left, groups.mean_product(xp, x, x, ops=squares) - left * left


def merge(xp: Namespace, first: Stats, second: Stats, shares: tuple[Any, Any]) -> Stats:
    """Two sets of values together; `shares` are their parts of the joint count, as 1 - share would lose a small one.

    Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979, eq. 2.1.
    """
    one, other = shares
    mean, rest = weighted_mean(xp, first[:2], second[:2], shares)
    delta, unit = _difference(xp, first[:2], second[:2])
    between = delta * (one * other) * delta / unit / unit  # in this order: nothing, where one of the two is empty
    nothing = xp.zeros_like(first.var)
    var, lost = weighted_mean(xp, (first.var, nothing), (second.var, nothing), shares)
    return Stats(mean, rest, var + (lost + between))


Pair = tuple[Array, Array]
"""A number and what rounding took from it: together they have twice the digits."""


def weighted_mean(xp: Namespace, first: Pair, second: Pair, shares: tuple[Any, Any]) -> Pair:
    """Two numbers, each times its share.

    It is found from the number of the larger share and the difference of the two, as the sum of both products would be
    off to one side time after time: rounded shares do not add up to 1.
    """
    one, other = (xp.ones_like(first[0]) * share for share in shares)
    larger = one >= other
    near, near_rest = (xp.where(larger, *each) for each in zip(first, second, strict=True))
    delta, unit = _difference(xp, first, second)
    step = xp.where(larger, delta * other, -delta * one)
    mean, rest = renormalized(xp, near * unit, near_rest * unit + step)
    infinite = ~xp.isfinite(delta)
    plain = first[0] * one + second[0] * other
    return xp.where(infinite, plain, mean / unit), xp.where(infinite, xp.zeros_like(rest), rest / unit)


def _difference(xp: Namespace, first: Pair, second: Pair) -> Pair:
    """The second number less the first, times a power of two, which is less than 1 where it would overflow."""
    (one, one_rest), (other, other_rest) = first, second
    large = float(xp.finfo(one.dtype).max) / 4
    unit = xp.ones_like(one)
    unit = xp.where((xp.abs(one) > large) | (xp.abs(other) > large), unit / 4, unit)
    return (other * unit - one * unit) + (other_rest - one_rest) * unit, unit


def recast(xp: Namespace, number: Array, rest: Array, dtype: Any) -> Pair:
    """A number and its rest in another dtype, with as many of their digits as that has room for in both."""
    cast = xp.astype(number, dtype, copy=False)
    lost = number - xp.astype(cast, number.dtype, copy=False)
    return renormalized(xp, cast, xp.astype(_finite(xp, lost + rest), dtype, copy=False))


def renormalized(xp: Namespace, mean: Array, rest: Array) -> tuple[Array, Array]:
    """The sum of a mean and its rest, and what rounding took from the sum; Knuth's two-sum, for a rest of any size."""
    whole = mean + rest
    gained = whole - mean
    return whole, _finite(xp, (mean - (whole - gained)) + (rest - gained))


def _finite(xp: Namespace, rest: Array) -> Array:
    """0 beside a mean that is not finite, which it would make NaN."""
    return xp.where(xp.isfinite(rest), rest, xp.zeros_like(rest))


def centre(
    xp: Namespace,
    x: Array,
    *,
    groups: Reduction,
    constant: tuple[Array, Array] | None = None,
    ops: Ops = PURE,
) -> tuple[Array, Array, Array]:
    """The array less its mean, and the mean, in two stages: the second takes away the rounding error of the first.

    `constant` says in which groups all numbers are one and the same, and which: their mean is that number to the last
    bit, which a compiler that divides by multiplying would miss.
    """
    mean = groups.mean(xp, x)
    if constant is not None:
        mean = xp.where(*constant, mean)
    x = ops.subtract(x, mean)
    rest = groups.mean(xp, x)
    return ops.subtract(x, rest), mean, rest


def merge_stacked(xp: Namespace, parts: Stats, share: Array, *, axis: int, level: Array | None = None) -> Stats:
    """The statistics of all the values of some parts, stacked along `axis`; `share` is the part of the values in each.

    The mean of the means is taken away in two stages, as from the values themselves. Where the variance is a mean of
    products with other values, `level` is the mean of these, whose whole mean is 0.
    """

    def over(values: Array) -> Array:
        return xp.sum(values * share, axis=axis, keepdims=True)

    if parts.mean is None or parts.rest is None:
        return Stats(None, None, over(parts.var))
    mean = over(parts.mean)
    delta = (parts.mean - mean) + parts.rest
    low, high = xp.min(delta, axis=axis, keepdims=True), xp.max(delta, axis=axis, keepdims=True)
    rest = xp.where(low == high, high, over(delta))  # to the last bit: a constant has no spread
    var = over(parts.var + (delta - rest) * (delta - rest if level is None else level))
    return Stats(*renormalized(xp, mean, rest), var)
