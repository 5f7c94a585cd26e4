"""What MLX does its own way: it is lazy, its arrays have no device, and its functions not all arguments."""

from typing import Any

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


class _Mlx(Completed):
    """`mlx.core`, with the arguments of the standard."""

    def astype(self, x: Array, dtype: Any, /, *, copy: bool = True) -> Array:
        return x.astype(dtype)

    def asarray(self, x: Array, /, *, dtype: Any = None, device: Any = None, copy: Any = None) -> Array:
        own = isinstance(x, self.array)  # of NumPy's float64 it would make float32
        return self.array(x, dtype or (x.dtype if own else getattr(self, x.dtype.name.replace("bool", "bool_"))))

    def ones(self, shape: Any, *, dtype: Any = None, device: Any = None) -> Array:
        return self._xp.ones(shape, dtype)

    def zeros(self, shape: Any, *, dtype: Any = None, device: Any = None) -> Array:
        return self._xp.zeros(shape, dtype)

    empty = zeros
