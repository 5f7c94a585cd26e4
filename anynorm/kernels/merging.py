"""The statistics of parts together."""

from typing import Any, NamedTuple

from anynorm.kernels.ops import Namespace
from anynorm.kernels.statistics import Pair, Stats, renormalized
from anynorm.kernels.weighting import positive


class PartStats(NamedTuple):
    """The statistics of a part of some groups."""

    stats: Stats
    number: Any
    """The number of values behind them, or in each group the sum of their weights."""


def merge_parts(xp: Any, parts: list[PartStats], divisor: float) -> PartStats:
    """The statistics of parts together, two by two; a divisor of 1 says that they are sums."""
    while len(parts) > 1:
        pairs = [_merge_two(xp, parts[i], parts[i + 1], divisor) for i in range(0, len(parts) - 1, 2)]
        parts = pairs + parts[2 * len(pairs) :]
    return parts[0]


def _merge_two(xp: Any, first: PartStats, second: PartStats, divisor: float) -> PartStats:
    number = divisor if divisor == 1 else first.number + second.number
    whole = positive(xp, number)
    shares = (1.0, 1.0) if divisor == 1 else (first.number / whole, second.number / whole)
    return PartStats(merge(xp, first.stats, second.stats, shares), number)


def merge(xp: Namespace, first: Stats, second: Stats, shares: tuple[Any, Any]) -> Stats:
    """Two sets of values together; `shares` are their parts of the joint count, as 1 - share would lose a small one.

    Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979, eq. 2.1.
    """
    one, other = shares
    if first.mean is None or first.mean_lo is None:
        return Stats(None, None, first.var * one + second.var * other)
    mean, mean_lo = weighted_mean(xp, first[:2], second[:2], shares)
    delta, unit = _difference(xp, first[:2], second[:2])
    between = delta * (one * other) * delta / unit / unit  # in this order: nothing, where one of the two is empty
    nothing = xp.zeros_like(first.var)
    var, lost = weighted_mean(xp, (first.var, nothing), (second.var, nothing), shares)
    return Stats(mean, mean_lo, var + (lost + between))


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
