"""Mean and variance of each group, in two stages, and how those of parts are merged."""

from typing import Any, NamedTuple

from anynorm.kernels.ops import PURE, Array, Namespace, Ops
from anynorm.kernels.reductions import Reduction, WideReduction


class Stats(NamedTuple):
    """The statistics of each group."""

    mean: Array
    """None where the array is not centred."""
    mean_lo: Array
    """What rounding took from the mean: x less `mean`, and then less this, is exact. None where it is not known."""
    var: Array

    def astype(self, xp: Namespace, dtype: Any) -> "Stats":
        """In another dtype, with all the digits of the mean that it holds."""
        if (
            self.mean is None
            or self.mean_lo is None
            or self.mean.dtype == dtype == self.var.dtype == self.mean_lo.dtype
        ):
            return self
        return Stats(*recast(xp, self.mean, self.mean_lo, dtype), xp.astype(self.var, dtype, copy=False))


NO_STATS = Stats(None, None, None)
"""Where there are none, or they are not kept."""


class Standardized(NamedTuple):
    """An array brought to mean 0 and variance 1 in each of its groups, and what brought it there."""

    xhat: Array
    """Without an rstd, x less its mean; on the way back, y less beta."""
    rstd: Array
    """1 / sqrt(var + eps); where that is 1 / 0, 1. None where nothing is divided by it."""
    stats: Stats
    padding: Array | None = None
    """What becomes of a number that weighs nothing if that is not finite, and 0 elsewhere; its xhat is 0."""


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
    """The array less its mean if it is to be `centred`, and its statistics.

    The mean is taken away in two stages: the second takes away the rounding error of the first. `constant` says in
    which groups all numbers are one and the same, and which: their mean is that number to the last bit, which a
    compiler that divides by multiplying would miss.
    """
    mean = mean_lo = None
    if centred:
        mean = groups.mean(xp, x)
        if constant is not None:
            mean = xp.where(*constant, mean)
        x = ops.subtract(x, mean)
        mean_lo = groups.mean(xp, x)
        x = ops.subtract(x, mean_lo)
    return x, Stats(mean, mean_lo, groups.mean_product(xp, x, x, ops=squares))


def wide_statistics(xp: Namespace, x: Array, *, groups: WideReduction, centred: bool, twice: bool = False) -> Stats:
    """The statistics of numbers in a wide dtype, in which the square of each exists; one pass, or two if `twice`.

    The pivot is one of the numbers of the group, or near the mean: the square of what it leaves of the mean is at most
    as many times the variance as there are numbers. If x was a narrow dtype, that many digits are to spare; else the
    mean that was found is the pivot of a second pass, which tells the rest of it. What weighs nothing may be no number.

    Chan, Golub & LeVeque, "Algorithms for computing the sample variance", 1983, eq. 1.5 to 1.8.
    """
    if groups.each is not None:
        x = xp.where(groups.each > 0, x, xp.zeros_like(x))
    if not centred:
        return Stats(None, None, groups.mean_product(xp, x, x))
    pivot = groups.pivot(xp, x)
    if twice:
        pivot = pivot + groups.mean(xp, x - pivot)
    d = x - pivot
    mean_lo = groups.mean(xp, d)
    var = groups.mean_product(xp, d, d) - mean_lo * mean_lo
    return Stats(pivot, mean_lo, var) if twice else Stats(pivot + mean_lo, None, var)


Pair = tuple[Array, Array]
"""A number and what rounding took from it: together they have twice the digits."""


def recast(xp: Namespace, number: Array, rest: Array, dtype: Any) -> Pair:
    """A number and its rest in another dtype, with as many of their digits as two numbers of it hold."""
    cast = xp.astype(number, dtype, copy=False)
    lost = number - xp.astype(cast, number.dtype, copy=False)
    return renormalized(xp, cast, xp.astype(_finite(xp, lost + rest), dtype, copy=False))


def renormalized(xp: Namespace, mean: Array, mean_lo: Array) -> tuple[Array, Array]:
    """The sum of a mean and its rest, and what rounding took from the sum; Knuth's two-sum, for a rest of any size."""
    whole = mean + mean_lo
    gained = whole - mean
    return whole, _finite(xp, (mean - (whole - gained)) + (mean_lo - gained))


def _finite(xp: Namespace, rest: Array) -> Array:
    """0 beside a mean that is not finite, which it would make NaN."""
    return xp.where(xp.isfinite(rest), rest, xp.zeros_like(rest))
