"""Arrays of one library as those of another, and as they lie in a file."""

import math
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from anynorm.arrays.library import Library
from anynorm.arrays.recognize import library_beside, library_of
from anynorm.kernels import Array


class Bits(NamedTuple):
    """An array as it lies in a file, the same for every library."""

    dtype: str
    values: Any
    """A NumPy array in C order: of that dtype, or of uint16 where NumPy has none of the name, bfloat16."""


SHOWN, ABBREVIATED, LONG = 1000, 10, 120
"""An array of so many numbers is shown; of one of more than the second the first and the last; in so many letters."""


def shown(x: Array, *, root: bool = False) -> str | None:
    """The numbers of a small array as NumPy prints them, or their square roots; None where it is large or not there."""
    try:
        library = library_of("x", x)
        if library.chunked or library.traced() or math.prod(x.shape) > SHOWN:
            return None
        if str(x.dtype).endswith("bfloat16"):  # which NumPy prints as nothing else
            x = library.constant(library.xp.astype(x, library.xp.float32))
        with np.errstate(all="ignore"):
            values = np.asarray(library.to_numpy(x))
            values = np.sqrt(values) if root else values
    except Exception:  # a traced array, and a placeholder that JAX put into a pytree
        return None
    text = " ".join(np.array2string(values, precision=4, threshold=ABBREVIATED).split())
    return text if len(text) <= LONG else None


def moved(name: str, x: Array, like: Array) -> Array:
    """The argument `name` in the library and on the device of `like`, in its own dtype."""
    library, there = library_of(name, x), library_of("like", like)
    if library.name != there.name:
        return from_bits(to_bits(name, x), like)
    device = there.device_for_new(like)
    return x if device is None or device == library.device(x) else array_api_compat.to_device(x, device)


def beside(library: Library, like: Array, name: str, x: Array | None) -> Array | None:
    """The argument `name` beside `like`, an array of the library: one of NumPy as the library's, where it takes it."""
    if x is None or not library.takes_numpy or library_of(name, x).name != "numpy":
        return x
    return library.from_numpy(np.array(x), like)  # a copy, as it may be read only later


def to_bits(name: str, x: Array) -> Bits:
    """A copy of the argument `name`, without its gradient; a TypeError if its dtype is not one for files."""
    library = library_of(name, x)
    with library.quiet():  # Dask computes only now
        values = np.asarray(library.to_numpy(x))
    if str(x.dtype).endswith("bfloat16"):
        return Bits("bfloat16", np.array(values.view(np.uint16), order="C"))
    if values.dtype.name not in FILED:
        raise TypeError(f"{name} must have one of the dtypes {', '.join(FILED)}, got {values.dtype}")
    return Bits(values.dtype.name, np.array(values, dtype=values.dtype.newbyteorder("="), order="C"))


def from_bits(bits: Bits, like: Array | None) -> Array:
    """An array of its own beside `like`; of NumPy where that is None."""
    return library_beside(like).from_numpy(np.array(bits.values), like, bfloat16=bits.dtype == "bfloat16")


def split_bits(bits: Bits) -> tuple[Bits, Bits | None]:
    """Numbers of 8 bytes as those of float32 and what these take from them; narrower ones as they are."""
    if bits.values.itemsize < 8:
        return bits, None
    wide = bits.values.astype(np.longdouble)
    with np.errstate(all="ignore"):
        high = wide.astype(np.float32)
        low = np.where(np.isfinite(high), wide - high, 0).astype(np.float32)
    return Bits("float32", high), Bits("float32", low)


FILED = (
    *("bfloat16", "float16", "float32", "float64"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)
"""The dtypes that a file may hold."""
