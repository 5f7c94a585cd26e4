"""How arrays lie in memory, and where new ones are made."""

from typing import Any

import numpy as np

from anynorm.arrays.library import Library
from anynorm.arrays.recognize import library_of
from anynorm.kernels import Array

PIECE = 2**16
"""So many numbers are looked at in one go."""


def empty(shape: tuple[int, ...], like: Array, dtype: Any) -> Array:
    """An array to be written to, beside `like`."""
    library = library_of("like", like)
    if library.new is not None and library.plain(like):
        return library.new(shape, dtype)
    return library.xp.empty(shape, dtype=dtype, device=library.device(like))


def assign(library: Library, place: Array, values: Array) -> None:
    """Write values to a place, in its dtype."""
    place[...] = values if library.casts else library.xp.astype(values, place.dtype, copy=False)


def adds(library: Library, x: Array, dtype: Any) -> bool:
    """Whether the array can be added up along its rows as it is, in this dtype."""
    return bool(x.dtype == dtype) and library.straight(x)


def memory_order(library: Library, x: Array) -> tuple[int, ...] | None:
    """The axes as they follow each other in memory, () for their own order; None if they do not."""
    if library.contiguous(x):
        return ()
    steps = library.strides(x)
    own = tuple(range(len(steps)))
    order = tuple(sorted(own, key=lambda axis: -steps[axis]))
    return order if order != own and library.contiguous(library.xp.permute_dims(x, order)) else None


def in_rows(library: Library, x: Array) -> bool:
    """Whether no numbers are nearer in memory than neighbours along the last axis."""
    steps = [abs(step) for step, n in zip(library.strides(x), x.shape, strict=True) if step and n != 1]
    return not steps or steps[-1] == min(steps)


def cast(library: Library, x: Array, dtype: Any) -> Array:
    """The array, or a copy, that `adds` in this dtype."""
    return x if adds(library, x, dtype) else library.xp.astype(x, dtype)


def full_chunks(x: Array) -> Array:
    """An array of Dask without the empty chunks that are known, which Dask neither reshapes nor broadcasts."""
    if 0 in x.shape:  # then one chunk is all that can be reshaped
        return in_chunks(x, tuple((sum(own),) if sum(own) == sum(own) else own for own in x.chunks))
    return in_chunks(x, tuple(tuple(n for n in own if n) for own in x.chunks))


def in_chunks(x: Array, chunks: tuple[tuple[Any, ...], ...]) -> Array:
    """An array of Dask in other chunks; sizes that are not known are the same."""
    if x.chunks == chunks:
        return x
    if 0 in x.shape and all(n == n for n in x.shape):  # of which Dask may leave the chunks as they are
        return library_of("x", x).xp.zeros_like(x, chunks=chunks)
    return x.rechunk(chunks)


def zeros(shape: int | tuple[int, ...], like: Array, dtype: Any) -> Array:
    """Zeros, beside `like`."""
    library = library_of("like", like)
    return library.xp.zeros(shape, dtype=dtype, device=home_of(library, like))


def extent(library: Library, x: Array) -> tuple[float, float]:
    """The smallest magnitude in a plain array, but for 0, and the largest; it takes little memory."""
    least, most = np.inf, 0.0
    for part in np.nditer(library.host(x), ("external_loop", "buffered"), buffersize=PIECE):
        sizes = np.abs(part)
        most = np.maximum(most, sizes.max())  # NaN, if there is one
        least = np.min(sizes, where=sizes > 0, initial=least)
    return float(min(least, most)), float(most)


def home_of(library: Library, like: Array) -> Any:
    """The device on which an array beside `like` is made; None leaves it to the library."""
    device = library.device(like)
    if isinstance(device, frozenset):  # JAX spreads an array over several
        return min(device, key=str) if len(device) == 1 else None
    return device
