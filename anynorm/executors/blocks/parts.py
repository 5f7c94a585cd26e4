"""What blocks have in common: which calls they take, how an array is divided, and the memory they are worked on in."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

from anynorm.calls import Call, Plan, ready
from anynorm.calls.blocks import STRETCH, Block, blocks
from anynorm.kernels import Array, Sums, weighting
from anynorm.kernels.weighting import Weights
from anynorm.settings import default_threads

T = TypeVar("T")
SMALL = 2**16
"""An array of fewer bytes is not worth the trouble of writing in place."""
SHARED = 2**22
"""So many bytes are worth a thread."""
EVEN = 4
"""Threads share so many blocks evenly, if they are no more."""
PENDING = 16
"""So many parts of a group are merged at a time, and then so many of these: few roundings follow each other."""


def supports(call: Call, *beside: Array) -> bool:
    """Whether what is computed of a call, and of what stands beside it, is large and may be written part by part."""
    plan = call.plan
    if call.all_reduce is not None:  # replicas wait for each other
        return False
    if not plan.nbytes >= min(SMALL, plan.settings.block_bytes):
        return False
    if plan.library.in_memory:
        return True
    weights = None if call.weights is None else call.weights.each
    arrays = (call.x, call.gamma, call.beta, call.out, weights, *(call.stats or ()), *beside)
    return plan.library.writable_in_blocks(*[array for array in arrays if array is not None])


class Division(NamedTuple):
    """How an array is divided into blocks, and these among threads."""

    blocks: list[list[Block]]
    """Those that hold the same groups together; only one, if it holds whole groups."""
    numbers: int
    """How many numbers a block has at most."""
    outer: int
    """How many threads share these lists,"""
    inner: int
    """or the blocks of each, if they are few."""


def divide(plan: Plan, axes: tuple[int, ...], arrays: int, *, made: int, beside: int = 0) -> Division:
    """Blocks of an array that is averaged over `axes`.

    Each block is so many arrays of its size, and a library that has threads of its own shares one among them; those of
    these arrays that are `made` for it take, in as many threads as there are by default, little more than
    `block_bytes`, with the numbers that each thread makes `beside` them. Of the threads in force the blocks, and so the
    last bits of a result, know nothing.
    """
    own, even = plan.library.blas_sums, EVEN if plan.library.blas_sums else 1
    together = min(default_threads(), STRETCH) if plan.library.threaded else 1
    most, largest = together * plan.block_numbers // arrays, STRETCH * plan.block_numbers // arrays
    if made:
        spare = plan.block_numbers * 5 // 4 // (default_threads() if own else 1)
        spare = max(spare - beside, spare // 2) // made
        most, largest = min(most, spare), min(largest, spare)
    found = blocks(plan.view.shape, axes, max(1, most), max(1, largest), even)
    numbers = max(1, math.prod([each.stop - each.start for each in found[0][0]]))
    threads = 1
    if own:  # all of them together make less than twice `block_bytes`
        room = plan.block_numbers * 7 // 4 // max(made * numbers + beside, 1)
        threads = max(1, min(plan.settings.threads, int(plan.nbytes // SHARED), room))
    many = len(found) >= threads
    return Division(found, numbers, threads if many else 1, 1 if many else threads)


class Workspace:
    """Arrays to work in, of so many numbers, that no block is worked on in now."""

    def __init__(self, numbers: int, plan: Plan, like: Array) -> None:
        self._new: Callable[[], Array] = partial(plan.library.empty, (numbers,), like, plan.dtype)
        self._free: list[Array] = []

    @contextmanager
    def part(self, call: Call, block: Block, count: int) -> Iterator[tuple[Call, Sums, list[Array]]]:
        """A block of a call, the groups that it has, or has a part of, and so many arrays to work in."""
        plan, shape, taken = call.plan, tuple([each.stop - each.start for each in block]), list[Array]()
        try:
            for _ in range(count):
                try:
                    taken.append(self._free.pop())
                except IndexError:  # and no look beforehand: another thread may be faster
                    taken.append(self._new())
            places = [plan.library.xp.reshape(each[: math.prod(shape)], shape) for each in taken]
            yield call.within(block), _groups(call, shape), places
        finally:
            self._free.extend(taken)


def _groups(call: Call, shape: tuple[int, ...]) -> Sums:
    """The groups of a call, or the part of them that a block of this shape has."""
    plan, groups = call.plan, call.plan.groups
    number = float(math.prod([shape[axis] for axis in groups.axes]))
    groups = groups.by(number) if number < groups.divisor else groups
    repeated = call.weights is None
    return groups._replace(block=plan.library.eager_block, interleaved=plan.interleaved, repeated=repeated)


def tree_reduce(merge: Callable[[list[T]], T], each: Callable[[list[Block]], list[T]], parts: list[Block]) -> T:
    """What `each` makes of all parts, merged; only some of it is pending at a time."""
    if len(parts) <= PENDING:
        made = each(parts)
    else:
        step = PENDING
        while step * PENDING < len(parts):
            step *= PENDING
        made = [tree_reduce(merge, each, parts[i : i + step]) for i in range(0, len(parts), step)]
    return made[0] if len(made) == 1 else merge(made)


def repeated(plan: Plan, values: tuple[Any, ...], x: Array) -> tuple[Any, ...]:
    """Values for each group, as long as a run of x where these are interleaved: they go with many of them at once."""
    if not plan.interleaved:
        return values
    ones = plan.library.xp.ones(x.shape[-1], dtype=plan.dtype, device=plan.library.device(x))
    return tuple(each * ones if hasattr(each, "shape") and each.shape[-1] == 1 else each for each in values)


def single(plan: Plan, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Such values as one number for each group again."""
    return tuple(each[..., :1] if plan.interleaved and hasattr(each, "shape") else each for each in values)


def part_weights(call: Call, shape: tuple[int, ...]) -> Weights:
    """The weights of a call in a block of this shape, ready, and their own sums."""
    plan = call.plan
    assert call.weights is not None
    weights = ready(plan.library, call.weights, plan.dtype)
    if math.prod([shape[axis] for axis in plan.view.axes]) == plan.groups.divisor:
        return weights
    return weights._replace(sums=weighting.summed(plan.library.xp, weights.each, shape, groups=plan.groups))
