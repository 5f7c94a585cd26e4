"""What NumPy does its own way: warnings, memory that arrays share, and the operations that it is fast at."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from operator import attrgetter, methodcaller
from typing import Any

import numpy as np

from anynorm.arrays.library import Library
from anynorm.kernels import Array, Ops

TRIES = 1000
"""So much work it is worth to find out that two arrays share no memory after all."""


def _is_near() -> bool:
    """Whether the address of an array's numbers follows the head of an object of Python: to ask NumPy takes long.

    It is tried in the one interpreter whose objects lie where their id says.
    """
    if sys.implementation.name != "cpython":
        return False
    probe = np.empty(3)
    address: int = ctypes.c_size_t.from_address(id(probe) + object.__basicsize__).value
    return bool(address == probe.ctypes.data)


NEAR = _is_near()


class NumpyLibrary(Library, name="numpy"):
    """NumPy. What is called most is a function of NumPy or of Python itself."""

    in_memory = True
    blas_sums = True
    one_device = True
    cast_to_float32 = "{}.astype('float32')"
    programs = "cpu"
    offset = object.__basicsize__ if NEAR else 0
    max: Any = methodcaller("max")
    min: Any = methodcaller("min")
    sizes: Any = attrgetter("shape")
    strides: Any = attrgetter("strides")
    memory_key: Any = attrgetter("strides")
    contiguous: Any = attrgetter("flags.c_contiguous")
    aligned: Any = attrgetter("flags.aligned")
    address: Any = staticmethod(id if NEAR else attrgetter("ctypes.data"))
    host_empty: Any = staticmethod(np.empty)
    host_zeros: Any = staticmethod(np.zeros)
    reshape: Any = staticmethod(np.reshape)
    traced: Any = staticmethod(bool)

    def device(self, x: Array) -> Any:
        return None

    def empty(self, shape: Any, like: Array, dtype: Any) -> Array:
        return np.empty(shape, dtype)

    def zeros(self, shape: Any, like: Array, dtype: Any) -> Array:
        return np.zeros(shape, dtype)

    def number(self, value: float, dtype: Any, like: Array) -> Array:
        return np.asarray(value, dtype=dtype)

    def overlap(self, x: Array, out: Array) -> bool:
        work: Any = TRIES  # rows of one array that take turns share nothing
        if np.may_share_memory(x, out, max_work=work):
            return True
        one, other = _map(x), _map(out)
        if one is None or other is None or one._mmap is other._mmap:
            return False
        return None in (files := (_file(one), _file(other))) or files[0] == files[1]

    def same_memory(self, x: Array, out: Array) -> bool:
        (start, _), (first, _) = (array.__array_interface__["data"] for array in (x, out))
        return bool(start == first and x.strides == out.strides)

    def adds(self, x: Array, dtype: Any) -> bool:
        step = x.strides[-1]  # BLAS takes no other, and NumPy's own loop adds one number after another
        return bool(x.dtype == dtype and (x.shape[-1] < 2 or (step > 0 and step % x.itemsize == 0)))

    def into(self, place: Array) -> Ops:
        add, subtract, multiply = (partial(of, out=place) for of in (np.add, np.subtract, np.multiply))
        return Ops(add, subtract, multiply, lambda x, factor, addend: add(multiply(x, factor), addend))

    def block_by_block(self) -> AbstractContextManager[Any]:
        return _short_buffers()

    def in_place(self, x: Array) -> bool:
        return bool(x.dtype.isnative) and all([step % x.itemsize == 0 for step in x.strides])  # noqa: C419 - faster


def _map(x: Any) -> Any:
    """The memory-mapped file that an array is a view of, if it is."""
    while isinstance(x, np.ndarray) and getattr(x, "_mmap", None) is None:
        x = x.base
    return x if isinstance(x, np.memmap) else None


def _file(mapped: Any) -> tuple[int, int] | None:
    """Which file that is, whatever its name; None where it has none."""
    try:
        file = os.stat(mapped.filename)
    except (OSError, TypeError):
        return None
    return file.st_dev, file.st_ino


@contextmanager
def _short_buffers() -> Iterator[None]:
    """Short buffers, as NumPy copies what it broadcasts into a buffer that a run fits into, at double the cost."""
    with np.errstate(all="ignore"):
        before = np.setbufsize(1024)
        try:
            yield
        finally:
            np.setbufsize(before)
