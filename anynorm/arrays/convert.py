"""Arrays of one library as those of another, and as they lie in a file."""

import sys
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from anynorm.arrays.memory import home_of
from anynorm.arrays.numpy import quiet
from anynorm.arrays.recognize import library_beside, library_of
from anynorm.kernels import Array


class Bits(NamedTuple):
    """An array as it lies in a file, the same for every library."""

    dtype: str
    values: Any
    """A NumPy array in C order: of that dtype, or of uint16 where NumPy has none of the name, bfloat16."""


def moved(name: str, x: Array, like: Array) -> Array:
    """The argument `name` in the library and on the device of `like`, in its own dtype."""
    library, there = library_of(name, x), library_of("like", like)
    if library.name != there.name:
        return from_bits(to_bits(name, x), like)
    device = home_of(there, like)
    return x if device is None or device == library.device(x) else array_api_compat.to_device(x, device)


def to_bits(name: str, x: Array) -> Bits:
    """A copy of the argument `name`, without its gradient; a TypeError if its dtype is not one for files."""
    library = library_of(name, x)
    with library.quiet():  # Dask computes only now
        values = np.asarray(library.host(x))
    if str(x.dtype).endswith("bfloat16"):
        return Bits("bfloat16", np.array(values.view(np.uint16), order="C"))
    if values.dtype.name not in FILED:
        raise TypeError(f"{name} must have one of the dtypes {', '.join(FILED)}, got {values.dtype}")
    return Bits(values.dtype.name, np.array(values, dtype=values.dtype.newbyteorder("="), order="C"))


def from_bits(bits: Bits, like: Array | None) -> Array:
    """An array of its own beside `like`; of NumPy where that is None."""
    library, values = library_beside(like), np.array(bits.values)
    if library.name == "torch":
        tensor = sys.modules["torch"].from_numpy(values.view(np.int16) if bits.dtype == "bfloat16" else values)
        return (tensor.view(library.xp.bfloat16) if bits.dtype == "bfloat16" else tensor).to(library.device(like))
    if bits.dtype == "bfloat16":
        values = values.view(_bfloat16())
    if library.name == "numpy":
        return values
    made = library.xp.asarray(values, device=home_of(library, like))
    if values.dtype.kind in "iu" and np.any(values > library.xp.iinfo(made.dtype).max):
        return library.xp.asarray(values.astype(np.float64), device=home_of(library, like))  # JAX made int32 of int64
    return made


def split_bits(bits: Bits) -> tuple[Bits, Bits | None]:
    """Numbers of 8 bytes as those of float32 and what these take from them; narrower ones as they are."""
    if bits.values.itemsize < 8:
        return bits, None
    wide = bits.values.astype(np.longdouble)
    with quiet():
        high = wide.astype(np.float32)
        low = np.where(np.isfinite(high), wide - high, 0).astype(np.float32)
    return Bits("float32", high), Bits("float32", low)


FILED = (
    *("bfloat16", "float16", "float32", "float64"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)
"""The dtypes that a file may hold."""


def _bfloat16() -> Any:
    try:
        from ml_dtypes import bfloat16
    except ImportError as error:
        raise ImportError("arrays of bfloat16 outside PyTorch need ml_dtypes: pip install ml_dtypes") from error
    return bfloat16
