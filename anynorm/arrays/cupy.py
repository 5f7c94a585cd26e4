"""What CuPy does its own way: programs of its own, memory that arrays share, and no subnormal numbers."""

import sys
from operator import attrgetter, methodcaller
from typing import Any

import numpy as np

from anynorm.arrays.library import Library
from anynorm.kernels import Array, Namespace

_kernels: dict[str, Any] = {}


class CupyLibrary(Library, name="cupy"):
    """CuPy."""

    programs = "cuda"
    cast_to_float32 = "{}.astype('float32')"
    to_numpy: Any = methodcaller("get")
    contiguous: Any = attrgetter("flags.c_contiguous")
    on_device: Any = attrgetter("device")

    def __init__(self, name: str, xp: Namespace) -> None:
        super().__init__(name, xp)
        self.cupy = sys.modules["cupy"]

    def subnormal(self, x: Array, power: float) -> Array:
        """Read from the bits: CuPy's own kernels take a subnormal number of float32 for 0."""
        cupy = self.cupy
        if x.dtype != cupy.float32:
            return cupy.zeros_like(x)
        bits = x.view(cupy.int32)
        magnitude = bits & 0x7FFFFFFF
        value = magnitude.astype(cupy.float32) * cupy.float32(2.0**-149 * power)
        return cupy.where(magnitude < 2**23, cupy.where(bits < 0, -value, value), cupy.float32(0))

    def overlap(self, x: Array, out: Array) -> bool:
        return bool(self.cupy.may_share_memory(x, out))

    def same_memory(self, x: Array, out: Array) -> bool:
        return bool(x.data.ptr == out.data.ptr and x.strides == out.strides)

    def aligned(self, x: Array) -> bool:
        return x.data.ptr % 16 == 0  # type: ignore[no-any-return]

    def launch(self, text: str, grid: Any, threads: int, arrays: list[Array], sizes: Any, large: bool) -> None:
        kernel = _kernels.get(text)
        if kernel is None:
            kernel = _kernels.setdefault(text, self.cupy.RawKernel(text, "normalized", options=("--std=c++17",)))
        index = np.int64 if large else np.int32
        kernel(grid, (threads,), (*arrays, index(sizes[0]), index(sizes[1]), np.float64(sizes[2])))
