"""What NumPy does its own way: warnings, memory that arrays share, and the operations that it is fast at."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache, partial
from typing import Any

import numpy as np

from anynorm.kernels import Arithmetic, Array
from anynorm.library import Library

SHORT = 512
"""Shorter rows are joined."""
TRIES = 1000
"""So much work it is worth to find out that two arrays share no memory after all."""
MARKED = 256
"""So many numbers are looked at to see whether an array is what it was."""
FEW = 32
"""Of so many numbers Python finds the largest before NumPy has begun."""


def numpy_library(eager: Library) -> Library:
    """NumPy, of what every eager library is like."""
    return eager._replace(
        device=lambda x: None,
        kind=None,
        most=lambda x: _extreme(max, x) if x.size <= FEW else x.max(),
        least=lambda x: _extreme(min, x) if x.size <= FEW else x.min(),
        contiguous=lambda x: x.flags.c_contiguous,
        strides=lambda x: x.strides,
        straight=_straight,
        writeable=lambda x: x.flags.writeable,
        products=True,
        overlap=_overlap,
        same=lambda x, out: (
            x.__array_interface__["data"] == out.__array_interface__["data"] and x.strides == out.strides
        ),
        number=lambda value, dtype, like: np.asarray(value, dtype=dtype),
        into=_into,
        busy=_busy,
        float64=lambda x: True,
        mark=_mark,
    )


def quiet() -> AbstractContextManager[Any]:
    """No warnings of what the results show."""
    return np.errstate(all="ignore")


def _extreme(of: Callable[[list[float]], float], x: Array) -> float:
    values = x.ravel().tolist()
    total = sum(values)
    return of(values) if total == total else total  # NaN, wherever it is


def _straight(x: Array) -> bool:
    step = x.strides[-1]  # BLAS takes no other, and NumPy's own loop adds one number after another
    return bool(x.shape[-1] < 2 or (step > 0 and step % x.itemsize == 0))


def _overlap(x: Array, out: Array) -> bool:
    work: Any = TRIES  # rows of one array that take turns share nothing
    if np.may_share_memory(x, out, max_work=work):
        return True
    one, other = _map(x), _map(out)
    if one is None or other is None or one._mmap is other._mmap:
        return False
    return None in (files := (_file(one), _file(other))) or files[0] == files[1]


def _mark(x: Array) -> bytes:
    return bytes(x[_scattered(x.shape)].tobytes())


@lru_cache(maxsize=64)
def _scattered(shape: tuple[int, ...]) -> tuple[Array, ...]:
    """Where some of the numbers are, the same each time; any order in them some shape would be in step with."""
    return np.unravel_index(np.random.default_rng(0).integers(math.prod(shape), size=MARKED), shape)


def _map(x: Any) -> Any:
    """The memory-mapped file that an array is a view of, if it is."""
    while isinstance(x, np.ndarray) and getattr(x, "_mmap", None) is None:
        x = x.base
    return x if isinstance(x, np.memmap) else None


def _file(mapped: Any) -> tuple[int, int] | None:
    """Which file that is, whatever its name; None where it has none."""
    try:
        found = os.stat(mapped.filename)
    except (OSError, TypeError):
        return None
    return found.st_dev, found.st_ino


@contextmanager
def _busy() -> Iterator[None]:
    """Short buffers, as NumPy copies what it broadcasts into a buffer that a run fits into, at double the cost."""
    with np.errstate(all="ignore"):
        before = np.setbufsize(1024)
        try:
            yield
        finally:
            np.setbufsize(before)


def _into(place: Array) -> Arithmetic:
    add, subtract, multiply = (partial(_by_long_rows, each, place) for each in (np.add, np.subtract, np.multiply))
    return Arithmetic(add, subtract, multiply, lambda x, factor, addend: add(multiply(x, factor), addend))


def _by_long_rows(operation: Any, place: Array, x: Array, other: Array) -> Array:
    """The operation, with short rows joined: NumPy begins each row anew where all are combined with one."""
    n = x.shape[-1]
    if n < SHORT and other.shape[-1] == other.size == n and x.flags.c_contiguous and place.flags.c_contiguous:
        joined = math.gcd(x.size // n, 2 * SHORT // n)
        rows = (x.size // n // joined, joined * n)
        operation(x.reshape(rows), np.tile(other.reshape(n), joined), out=place.reshape(rows))
        return place
    return operation(x, other, out=place)
