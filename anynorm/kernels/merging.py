"""The statistics of any number of parts together."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from anynorm.kernels import weighting
from anynorm.kernels.ops import Array
from anynorm.kernels.statistics import Stats, merge_stacked


class PartStats(NamedTuple):
    """The statistics of a part of some groups."""

    stats: Stats
    number: Any
    """The number of values behind them, or in each group the sum of their weights."""
    level: Array | None = None
    """For `kernels.merge_stacked`."""


def merge_parts(xp: Any, found: list[PartStats], divisor: float) -> PartStats:
    """The statistics of parts together; a divisor of 1 says that they are sums."""
    number = whole = divisor if divisor == 1 else sum(part_stats.number for part_stats in found)
    if not isinstance(number, (int, float)):
        whole = weighting.positive(xp, number)
    like = found[0].stats.var
    share = xp.stack([xp.ones_like(like) * (part_stats.number / whole) for part_stats in found], axis=0)

    def stack(parts: Iterable[Array | None]) -> Array | None:
        some = [part for part in parts if part is not None]
        return xp.stack(some, axis=0) if some else None

    stacked = Stats(*map(stack, zip(*(part_stats.stats for part_stats in found), strict=True)))
    level = stack([part_stats.level for part_stats in found])
    stats = Stats(
        *(None if each is None else each[0, ...] for each in merge_stacked(xp, stacked, share, axis=0, level=level))
    )
    return PartStats(stats, number, None if level is None else xp.sum(level * share, axis=0))
