"""How a large array is cut into blocks that fit into the cache, and how threads share them."""

import math
import os
import threading
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple, TypeVar

from anynorm.kernels import Array

T = TypeVar("T")
R = TypeVar("R")
Block = tuple[slice, ...]
SHORTEST = 256
"""Blocks strewn over memory in runs of fewer numbers than this cost more than a second pass over the array."""
STRETCH = 4
"""How much larger a block may be, if it then holds whole groups."""


class Blocks(NamedTuple):
    """A grid of blocks."""

    groups: list[Block]
    """The parts of the array that hold groups of their own."""
    parts: list[Block]
    """The parts that each of these is divided into, one after another; only one, if groups are whole."""


@lru_cache(maxsize=256)
def blocks(shape: tuple[int, ...], axes: tuple[int, ...], most: int) -> Blocks:
    """Blocks of at most `most` numbers, or little more, of an array that is averaged over `axes`.

    If it can be, they hold whole groups; else they lie in memory in one piece each, and groups are spread over them.
    """
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    steps = _steps(shape, kept, most)
    if math.prod(steps) > STRETCH * most or _run(shape, steps) < SHORTEST:
        steps = _steps(shape, list(range(len(shape))), most)
    whole, rest = list(shape), list(shape)
    for axis in range(len(shape)):
        (rest if axis in axes else whole)[axis] = steps[axis]
    return Blocks(_grid(shape, whole), _grid(shape, rest))


def both(one: Block, other: Block) -> Block:
    """The part that two blocks share, of which one at most divides each axis."""
    return tuple(a if b.start == 0 and a.stop - a.start < b.stop else b for a, b in zip(one, other, strict=True))


def within(array: Array, block: Block) -> Block:
    """Where in an array that broadcasts to the whole a block is."""
    return tuple(slice(None) if n == 1 else each for n, each in zip(array.shape, block, strict=True))


def share(work: Callable[[T], R], items: Iterable[T], threads: int) -> list[R]:
    """The results of `work` on each item, in their order; this thread works too."""
    items = list(items)
    if threads < 2 or len(items) < 2:
        return [work(item) for item in items]
    results: list[Any] = [None] * len(items)
    waiting = iter(range(len(items)))
    lock = threading.Lock()

    def worker() -> None:
        while True:
            with lock:
                i = next(waiting, None)
            if i is None:
                return
            results[i] = work(items[i])

    helpers = _start(worker, min(threads, len(items)) - 1)
    try:
        worker()
    finally:
        with lock:
            waiting = iter(())  # a failure leaves nothing more to do
        for helper in helpers:
            if not helper.cancel():
                helper.result()
    return results


_pools: dict[int, Any] = {}


def _start(worker: Callable[[], None], count: int) -> list[Any]:
    """The worker begun in other threads, which wait from one call to the next; in none once Python shuts down."""
    from concurrent.futures import ThreadPoolExecutor

    if count not in _pools:
        _pools.setdefault(count, ThreadPoolExecutor(count, thread_name_prefix="anynorm"))
    try:
        return [_pools[count].submit(worker) for _ in range(count)]
    except RuntimeError:
        return []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)


def _steps(shape: tuple[int, ...], axes: list[int], most: int) -> list[int]:
    """How far a block reaches along each axis, if only these are divided."""
    steps = list(shape)
    for axis in axes:
        size = math.prod(steps)
        if size > most:
            steps[axis] = max(1, most * steps[axis] // size)
    return steps


def _run(shape: tuple[int, ...], steps: list[int]) -> int:
    """How many numbers of a block lie side by side in memory."""
    run = 1
    for n, step in zip(reversed(shape), reversed(steps), strict=True):
        run *= step
        if step < n:
            break
    return run


def _grid(shape: tuple[int, ...], steps: list[int]) -> list[Block]:
    runs = ([slice(i, min(i + step, n)) for i in range(0, n, step)] for n, step in zip(shape, steps, strict=True))
    return list(product(*runs))
