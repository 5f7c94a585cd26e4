"""What blocks have in common: which calls they take, how many numbers each has, and the memory it is worked on in."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from anynorm.arrays.recognize import library_of
from anynorm.calls import Call, Plan, ready
from anynorm.calls.blocks import STRETCH, Block, within
from anynorm.kernels import Array, Stats, Sums, weighting
from anynorm.kernels.weighting import Weights
from anynorm.settings import default_threads

T = TypeVar("T")
SMALL = 2**16
"""An array of fewer bytes is not worth the trouble of writing in place."""
SHARED = 2**22
"""So many bytes are worth a thread."""
SHORT = 16
"""The sums of runs of fewer numbers are not small beside them."""
EVEN = 4
"""Threads share so many blocks evenly, if they are no more."""
PENDING = 16
"""So many parts of a group are merged at a time, and then so many of these: few roundings follow each other."""
RUN = 32
"""Groups in shorter runs are interleaved."""
ROWS = 16
"""Beside so many rows, what there is for each group is small."""


def supports(call: Call, *beside: Array) -> bool:
    """Whether what is computed of a call, and of what stands beside it, is large and may be written part by part."""
    plan = call.plan
    if call.all_reduce is not None:  # replicas wait for each other
        return False
    if not plan.nbytes >= min(SMALL, plan.settings.block_bytes):
        return False
    if plan.library.in_memory:
        return True
    arrays = (call.x, call.gamma, call.beta, call.out, *(call.stats or ()), *beside)
    return plan.library.writable_in_blocks(*[array for array in arrays if array is not None])


class Workspace:
    """Arrays to work in, of so many numbers, that no block is worked on in now."""

    def __init__(self, numbers: int, like: Array, dtype: Any) -> None:
        self._new: Callable[[], Array] = partial(library_of("like", like).empty, (numbers,), like, dtype)
        self._free: list[Array] = []

    @contextmanager
    def take(self, count: int, plan: Plan, shape: tuple[int, ...]) -> Iterator[list[Array]]:
        """So many of them, in this shape."""
        taken: list[Array] = []
        try:
            for _ in range(count):
                try:
                    taken.append(self._free.pop())
                except IndexError:  # and no look beforehand: another thread may be faster
                    taken.append(self._new())
            yield [plan.library.xp.reshape(each[: math.prod(shape)], shape) for each in taken]
        finally:
            self._free.extend(taken)


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
        spare = numbers_of_block * 5 // 4 // (default_threads() if plan.library.blas_sums else 1)
        spare = max(spare - beside, spare // 2) // made
        most, largest = min(most, spare), min(largest, spare)
    return max(1, most), max(1, largest), EVEN if plan.library.blas_sums else 1


def shared(plan: Plan, made: int) -> int:
    """How many threads share a call; each makes so many numbers, all together less than twice `block_bytes`."""
    if not plan.library.blas_sums:
        return 1
    return max(1, min(plan.settings.threads, int(plan.nbytes // SHARED), plan.block_numbers * 7 // 4 // max(made, 1)))


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


def groups_of(plan: Plan, shape: tuple[int, ...], *, repeated: bool) -> Sums:
    """The groups of a plan, or the part of them that a block of this shape has."""
    number = math.prod([shape[axis] for axis in plan.view.axes])
    groups = plan.groups.by(min(plan.groups.divisor, float(number)))
    return groups._replace(block=plan.library.eager_block, interleaved=interleaved(plan), repeated=repeated)


def trailing(plan: Plan) -> bool:
    """Whether groups are rows in memory."""
    return plan.view.axes[-1:] == (len(plan.view.shape) - 1,) and not interleaved(plan)


def interleaved(plan: Plan) -> bool:
    """Whether groups lie in memory in short runs among those of others.

    So they do in group norm with channels last, and in batch norm of few places.
    """
    axes, shape = plan.view.axes, plan.view.shape
    last = len(shape) - 1
    if len(axes) < 2 or axes[-1] != last or axes[-2] == last - 1 or shape[last] >= RUN:
        return False
    return math.prod([shape[axis] for axis in axes[:-1]]) >= ROWS


def repeated(plan: Plan, value: Array | None, x: Array) -> Array | None:
    """A value for each group, as long as a run of x where these are interleaved: it goes with many of them at once."""
    if value is None or value.shape[-1] != 1 or not interleaved(plan):
        return value
    return value * plan.library.xp.ones(x.shape[-1], dtype=plan.dtype, device=plan.library.device(x))


def single(plan: Plan, values: tuple[Any, ...]) -> list[Any]:
    """Such values as one number for each group again."""
    short = interleaved(plan)
    return [each[..., :1] if short and hasattr(each, "shape") else each for each in values]


def cut(array: Array | None, block: Block) -> Array | None:
    """The part of an array that broadcasts to the whole which goes with a block."""
    return None if array is None else array[within(array, block)]


def stats_within(stats: Stats, block: Block) -> Stats:
    """The statistics that go with a block."""
    return Stats(*(cut(each, block) for each in stats))


def weights_within(plan: Plan, given: Weights, block: Block, shape: tuple[int, ...]) -> Weights:
    """The weights that go with a block of this shape, ready, and their own sums."""
    xp, groups = plan.library.xp, plan.groups
    weights = ready(plan.library, Weights(*(cut(each, block) for each in given[:3])), plan.dtype)
    if math.prod([shape[axis] for axis in groups.axes]) == groups.divisor:
        return weights
    return weights._replace(sums=weighting.summed(xp, weights.each, shape, groups=groups))


def only(plan: Plan, x: Array, kept: Array) -> Array:
    """x, with 0 where it is not to be kept."""
    return plan.library.xp.where(kept, x, plan.library.zeros((1,) * x.ndim, x, plan.dtype))
