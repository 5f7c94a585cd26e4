"""What NumPy does its own way: warnings, memory that arrays share, and the operations that it is fast at."""

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np

from anynorm.arrays.library import Library
from anynorm.kernels import Array, Ops

SHORT = 512
"""Shorter rows are joined."""
TRIES = 1000
"""So much work it is worth to find out that two arrays share no memory after all."""


def numpy_library(eager: Library) -> Library:
    """NumPy, of what every eager library is like."""
    return eager._replace(
        device=lambda x: None,
        kind=None,
        most=lambda x: x.max(),
        least=lambda x: x.min(),
        contiguous=lambda x: x.flags.c_contiguous,
        strides=attrgetter("strides"),
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
        address=id if _is_near() else lambda x: x.ctypes.data,
        offset=object.__basicsize__ if _is_near() else 0,
        aligned=lambda x: x.flags.aligned,
        in_place=_in_place,
        new=np.empty,
        nothing=np.zeros,
        float64=lambda x: True,
    )


def quiet() -> AbstractContextManager[Any]:
    """No warnings of what the results show."""
    return np.errstate(all="ignore")


def _straight(x: Array) -> bool:
    step = x.strides[-1]  # BLAS takes no other, and NumPy's own loop adds one number after another
    return bool(x.shape[-1] < 2 or (step > 0 and step % x.itemsize == 0))


def _is_near() -> bool:
    """Whether the address of an array's numbers follows the head of an object of Python: to ask NumPy takes long.

    It is tried in the one interpreter whose objects lie where their id says.
    """
    if sys.implementation.name != "cpython":
        return False
    probe = np.empty(3)
    found: int = ctypes.c_size_t.from_address(id(probe) + object.__basicsize__).value
    return bool(found == probe.ctypes.data)


def _in_place(x: Array) -> bool:
    return bool(x.dtype.isnative) and all(step % x.itemsize == 0 for step in x.strides)


def _overlap(x: Array, out: Array) -> bool:
    work: Any = TRIES  # rows of one array that take turns share nothing
    if np.may_share_memory(x, out, max_work=work):
        return True
    one, other = _map(x), _map(out)
    if one is None or other is None or one._mmap is other._mmap:
        return False
    return None in (files := (_file(one), _file(other))) or files[0] == files[1]


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


def _into(place: Array) -> Ops:
    add, subtract, multiply = (partial(_by_long_rows, each, place) for each in (np.add, np.subtract, np.multiply))
    return Ops(add, subtract, multiply, lambda x, factor, addend: add(multiply(x, factor), addend))


def _by_long_rows(operation: Any, place: Array, x: Array, other: Array) -> Array:
    """The operation, with short rows joined: NumPy begins each row anew where all are combined with one."""
    n = x.shape[-1]
    if n < SHORT and other.shape[-1] == other.size == n and x.flags.c_contiguous and place.flags.c_contiguous:
        joined = math.gcd(x.size // n, 2 * SHORT // n)
        rows = (x.size // n // joined, joined * n)
        operation(x.reshape(rows), np.tile(other.reshape(n), joined), out=place.reshape(rows))
        return place
    return operation(x, other, out=place)
