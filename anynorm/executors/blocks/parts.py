"""How many numbers a block has, which of the call goes with it, and how what is found of parts is merged."""

import math
from collections.abc import Callable
from typing import TypeVar

from anynorm.arrays import zeros
from anynorm.arrays.blocks import STRETCH, Block, within
from anynorm.calls import Call, Plan, ready
from anynorm.executors.blocks.tail import cut, interleaved
from anynorm.kernels import Array, Stats, Sums, weighting
from anynorm.kernels.merging import PartStats, merge_parts
from anynorm.kernels.weighting import Weights
from anynorm.settings import current, default_threads

T = TypeVar("T")
SHARED = 2**22
"""So many bytes are worth a thread."""
SHORT = 16
"""The sums of runs of fewer numbers are not small beside them."""
EVEN = 4
"""Threads share so many blocks evenly, if they are no more."""
PENDING = 16
"""So many parts of a group are merged at a time, and then so many of these: few roundings follow each other."""


def numbers(plan: Plan, arrays: int, *, made: int = 0, beside: int = 0) -> tuple[int, int, int]:
    """How many numbers of a block there may be; how many if they are whole groups; what their number is a multiple of.

    Each block is so many arrays of its size, and a library that has threads of its own shares one among them; those of
    these arrays that are made for it take, in as many threads as there are by default, little more than `block_bytes`,
    with the numbers that each thread makes `beside` them.
    Of the threads in force the blocks, and so the last bits of a result, know nothing.
    """
    numbers_of_block = plan.block_numbers
    together = min(default_threads(), STRETCH) if plan.library.threaded else 1
    most, largest = together * numbers_of_block // arrays, STRETCH * numbers_of_block // arrays
    if made:
        spare = numbers_of_block * 5 // 4 // (default_threads() if plan.library.products else 1)
        spare = max(spare - beside, spare // 2) // made
        most, largest = min(most, spare), min(largest, spare)
    return max(1, most), max(1, largest), EVEN if plan.library.products else 1


def plain_groups(plan: Plan, *, divisor: float) -> Sums:
    """Those of a plan, for arrays that are worked on in blocks."""
    return plan.groups.by(divisor)._replace(block=plan.library.plain_block, norm=plan.library.norm)


def added(plan: Plan) -> bool:
    """Whether squares take no place, as they are added as they are made."""
    trailing = plan.view.axes[-1:] == (len(plan.view.shape) - 1,) and not interleaved(plan)
    return trailing and (plan.library.products or plan.library.norm is not None)


def shared(plan: Plan, made: int) -> int:
    """How many threads share a call; each makes so many numbers, all together less than twice `block_bytes`."""
    if not plan.library.products:
        return 1
    return max(1, min(current().threads, int(plan.nbytes // SHARED), plan.block_numbers * 7 // 4 // max(made, 1)))


def tree_reduce(join: Callable[[list[T]], T], each: Callable[[list[Block]], list[T]], parts: list[Block]) -> T:
    """What is found of all parts, joined; only some of it is pending at a time."""
    if len(parts) <= PENDING:
        found = each(parts)
    else:
        step = PENDING
        while step * PENDING < len(parts):
            step *= PENDING
        found = [tree_reduce(join, each, parts[i : i + step]) for i in range(0, len(parts), step)]
    return found[0] if len(found) == 1 else join(found)


def merged(plan: Plan, each: Callable[[list[Block]], list[PartStats]], parts: list[Block]) -> Stats:
    """The statistics of all parts together."""
    return tree_reduce(lambda found: merge_parts(plan.library.xp, found, plan.groups.divisor), each, parts).stats


def weights_within(plan: Plan, given: Weights, block: Block, shape: tuple[int, ...]) -> Weights:
    """The weights that go with a block of this shape, ready, and their own sums."""
    xp, groups = plan.library.xp, plan.groups
    found = ready(plan.library, Weights(*(cut(each, block) for each in given[:3])), plan.dtype)
    if math.prod([shape[axis] for axis in groups.axes]) == groups.divisor:
        return found
    return found._replace(sums=weighting.summed(xp, found.each, shape, groups=groups))


def only(plan: Plan, x: Array, kept: Array | None) -> Array:
    """x, with 0 where it is not to be kept."""
    return x if kept is None else plan.library.xp.where(kept, x, zeros((1,) * x.ndim, x, plan.dtype))


def present(plan: Plan, given: Weights, block: Block) -> Array | None:
    """Which groups of a block have a weight; None for all."""
    some = given.sums[within(given.sums, block)] > 0
    return None if bool(plan.library.xp.all(some)) else some


def stats_within(stats: Stats, block: Block) -> Stats:
    """The statistics that go with a block."""
    return Stats(*(cut(each, block) for each in stats))


SMALL = 2**16
"""An array of fewer bytes is not worth the trouble of writing in place."""


def supports(call: Call, *beside: Array) -> bool:
    """Whether what is computed of a call, and of what stands beside it, is large and may be written part by part."""
    plan = call.plan
    if call.all_reduce is not None:  # replicas wait for each other
        return False
    if plan.library.traced():  # by a compiler that cannot follow into the settings
        return False
    return plan.nbytes >= min(SMALL, current().block_bytes) and plan.library.plain(*_arrays(call), *beside)


def _arrays(call: Call) -> list[Array]:
    """All arrays of a call."""
    arrays = (call.x, call.gamma, call.beta, call.out, *(call.stats or ()))
    return [array for array in arrays if array is not None]
