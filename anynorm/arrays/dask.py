"""What Dask does its own way: its arrays are lazy, and in chunks, which are arrays of another library."""

import sys
from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from anynorm.arrays.library import Library
from anynorm.arrays.recognize import library_of
from anynorm.kernels import Array

Function = Callable[..., tuple[Array, ...]]


class DaskLibrary(Library, name="dask"):
    """Dask."""

    chunked = True
    cast_to_float32 = "{}.astype('float32')"
    block = None  # a reshape across chunks would gather them

    def check_supported(self, name: str, x: Array) -> None:
        if self.device_key(x):
            plain = f"da.ma.getdata({name})" + f", weights=~da.ma.getmaskarray({name})" * (name == "x")
            raise TypeError(
                f"{name} must be a plain array, got one that is masked: write {plain} if that is what you mean"
            )

    def device(self, x: Array) -> Any:
        return None

    def device_key(self, x: Array) -> bool:
        """Whether its chunks are masked arrays."""
        return isinstance(x._meta, np.ma.MaskedArray)

    def concrete(self, *arrays: Array) -> bool:
        return False

    def to_numpy(self, x: Array) -> Any:
        x = x.compute()
        return library_of("x", x).to_numpy(x)

    def writeable(self, x: Array) -> bool:
        return False

    def quietly(self, function: Function, *arrays: Array) -> tuple[Array, ...]:
        """A function of the chunks, which broadcast to each other."""
        da, axes = sys.modules["dask.array"], tuple(range(max(x.ndim for x in arrays)))
        work = partial(_of_chunks, function)
        metas = work(*(x._meta for x in arrays))
        pairs = chain.from_iterable((x, axes[len(axes) - x.ndim :]) for x in arrays)
        results = da.blockwise(work, axes, *pairs, meta=metas[0], token="anynorm")
        return tuple(da.blockwise(_nth, axes, results, axes, n=n, meta=meta) for n, meta in enumerate(metas))


def _of_chunks(function: Function, *chunks: Array) -> tuple[Array, ...]:
    return library_of("chunk", chunks[0]).quietly(function, *chunks)


def _nth(results: tuple[Array, ...], *, n: int) -> Array:
    return results[n]


def full_chunks(x: Array) -> Array:
    """The array without the empty chunks that are known, which Dask neither reshapes nor broadcasts."""
    if 0 in x.shape:  # then one chunk is all that can be reshaped
        return in_chunks(x, tuple((sum(sizes),) if sum(sizes) == sum(sizes) else sizes for sizes in x.chunks))
    return in_chunks(x, tuple(tuple(n for n in sizes if n) for sizes in x.chunks))


def in_chunks(x: Array, chunks: tuple[tuple[Any, ...], ...]) -> Array:
    """The array in other chunks; sizes that are not known are the same."""
    if x.chunks == chunks:
        return x
    if 0 in x.shape and all(n == n for n in x.shape):  # of which Dask may leave the chunks as they are
        return library_of("x", x).xp.zeros_like(x, chunks=chunks)
    return x.rechunk(chunks)
