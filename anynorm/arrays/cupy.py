"""What CuPy does its own way: programs of its own, memory that arrays share, and no subnormal numbers."""

import sys
from typing import Any

import numpy as np

from anynorm.arrays.library import Library, Programs
from anynorm.kernels import Array


def cupy_library(lazy: Library) -> Library:
    """CuPy, of what every library is like whose numbers cannot be read."""
    return lazy._replace(
        kind=lambda x: x.device.id,
        contiguous=lambda x: x.flags.c_contiguous,
        overlap=lambda x, out: bool(sys.modules["cupy"].may_share_memory(x, out)),
        same=lambda x, out: x.data.ptr == out.data.ptr and x.strides == out.strides,
        subnormal=_subnormal,
        float64=lambda x: True,
        programs=Programs(_launch, aligned=lambda x: x.data.ptr % 16 == 0, on=lambda x: x.device),
        host=lambda x: x.get(),
    )


def _launch(
    text: str,
    grid: tuple[int, int],
    threads: int,
    arrays: list[Array],
    sizes: tuple[int, int, float],
    large: bool,
) -> None:
    cupy = sys.modules["cupy"]
    kernel = _kernels.get(text)
    if kernel is None:
        kernel = _kernels.setdefault(text, cupy.RawKernel(text, "normalized", options=("--std=c++17",)))
    index = np.int64 if large else np.int32
    arguments = (*arrays, index(sizes[0]), index(sizes[1]), np.float64(sizes[2]))
    kernel(grid, (threads,), arguments)


def _subnormal(x: Array, power: float) -> Array:
    """Read from the bits: CuPy's own kernels take a subnormal number of float32 for 0."""
    cupy = sys.modules["cupy"]
    if x.dtype != cupy.float32:
        return cupy.zeros_like(x)
    bits = x.view(cupy.int32)
    magnitude = bits & 0x7FFFFFFF
    value = magnitude.astype(cupy.float32) * cupy.float32(2.0**-149 * power)
    return cupy.where(magnitude < 2**23, cupy.where(bits < 0, -value, value), cupy.float32(0))


_kernels: dict[str, Any] = {}
