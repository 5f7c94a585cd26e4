"""How a large array is cut into blocks that fit into the cache."""

import math
from functools import lru_cache
from itertools import product

from anynorm.kernels import Array

Block = tuple[slice, ...]
WHOLE = slice(None)
SHORTEST = 256
"""Blocks that lie in memory in runs of fewer numbers than this cost more than a second pass over the array."""
DEEP = 256
"""How many numbers of a group a part of it has, so that its statistics are small beside it."""
ROUND = 32
"""Blocks have a multiple of this along an axis, if they have many times as many: their own runs are even then."""
STRETCH = 4
"""How much larger a block may be, if it then holds whole groups."""


@lru_cache(maxsize=256)
def blocks(shape: tuple[int, ...], axes: tuple[int, ...], most: int, largest: int, even: int = 1) -> list[list[Block]]:
    """Blocks of at most `most` numbers of an array that is averaged over `axes`, a multiple of `even` along an axis.

    Those that hold the same groups come together. If it can be, a block holds whole groups, and then up to `largest`;
    else blocks lie in memory in one piece each, or in long runs, and groups are spread over them.
    """
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    steps = _steps(shape, kept, most, even)
    if math.prod(steps) > largest or _run(shape, steps) < SHORTEST:
        few = _steps(
            tuple(1 if axis in axes else n for axis, n in enumerate(shape)), kept, max(SHORTEST, most // DEEP), even
        )
        steps = [n if axis in axes else step for axis, (n, step) in enumerate(zip(shape, few, strict=True))]
        steps = _steps(tuple(steps), list(range(len(shape))), most, even)
    runs = [[slice(i, min(i + step, n)) for i in range(0, n, step)] for n, step in zip(shape, steps, strict=True)]
    groups = product(*([WHOLE] if axis in axes else each for axis, each in enumerate(runs)))
    return [
        list(product(*(runs[axis] if each == WHOLE else [each] for axis, each in enumerate(group)))) for group in groups
    ]


def within(array: Array, block: Block) -> Block:
    """Where in an array that broadcasts to the whole a block is."""
    return tuple([WHOLE if n == 1 else each for n, each in zip(array.shape, block, strict=True)])


def cut(block: Block, *arrays: Array | None) -> list[Array | None]:
    """The parts of arrays that broadcast to the whole which go with a block."""
    return [
        None if x is None else x[tuple([WHOLE if n == 1 else each for n, each in zip(x.shape, block, strict=True)])]
        for x in arrays
    ]


def _steps(shape: tuple[int, ...], axes: list[int], most: int, even: int) -> list[int]:
    """How far a block reaches along each axis, if only these are divided."""
    steps = list(shape)
    for axis in axes:
        size = math.prod(steps)
        if size > most:
            steps[axis] = max(1, most * steps[axis] // size)
            if (length := steps[axis]) > 1:  # as many for each thread
                count = -(-shape[axis] // length)
                steps[axis] = -(-shape[axis] // (-(-count // even) * even))
                rounded = -(-steps[axis] // ROUND) * ROUND
                if 8 * ROUND < rounded <= length:
                    steps[axis] = rounded
    return steps


def _run(shape: tuple[int, ...], steps: list[int]) -> int:
    """How many numbers of a block lie side by side in memory."""
    run = 1
    for n, step in zip(reversed(shape), reversed(steps), strict=True):
        run *= step
        if step < n:
            break
    return run
