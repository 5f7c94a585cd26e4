"""What MLX does its own way: it is lazy, its arrays have no device, and its functions not all arguments."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from anynorm.arrays.library import Library
from anynorm.arrays.standard import Completed
from anynorm.kernels import Array, Namespace


class MlxLibrary(Library, name="mlx"):
    """MLX."""

    cast_to_float32 = "{}.astype(mlx.core.float32)"

    def __init__(self, name: str, xp: Namespace) -> None:
        super().__init__(name, _Mlx(xp))

    def concrete(self, *arrays: Array) -> bool:
        try:
            self.xp.eval(*arrays)
        except ValueError:  # under `mx.compile` and `mx.vmap`
            return False
        return True

    def to_numpy(self, x: Array) -> Any:
        return np.asarray(x.view(self.xp.uint16) if x.dtype == self.xp.bfloat16 else x)


class _Mlx(Completed):
    """`mlx.core`, with the arguments of the standard."""

    def astype(self, x: Array, dtype: Any, /, *, copy: bool = True) -> Array:
        return x.astype(dtype)

    def asarray(self, x: Array, /, *, dtype: Any = None, device: Any = None, copy: Any = None) -> Array:
        if dtype is None and isinstance(x, (np.ndarray, np.generic)):  # of whose float64 it would make float32
            dtype = getattr(self, x.dtype.name.replace("bool", "bool_"))
        return self.array(x, dtype)

    def iinfo(self, dtype: Any, /) -> Any:
        info = self._xp.iinfo(dtype)
        return SimpleNamespace(bits=8 * dtype.size, min=info.min, max=info.max)

    def ones(self, shape: Any, *, dtype: Any = None, device: Any = None) -> Array:
        return self._xp.ones(shape, dtype)

    def zeros(self, shape: Any, *, dtype: Any = None, device: Any = None) -> Array:
        return self._xp.zeros(shape, dtype)

    empty = zeros
