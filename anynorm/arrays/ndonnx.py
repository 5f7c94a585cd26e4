"""What ndonnx does its own way: arrays hold numbers, or stand for those of an ONNX model."""

from operator import methodcaller
from typing import Any

from anynorm.arrays.library import Library
from anynorm.kernels import Array


class NdonnxLibrary(Library, name="ndonnx"):
    """ndonnx."""

    to_numpy: Any = methodcaller("unwrap_numpy")

    def concrete(self, *arrays: Array) -> bool:
        try:
            for x in arrays:
                x.unwrap_numpy()
        except ValueError:  # a placeholder
            return False
        return True

    def on_host(self, x: Array) -> bool:
        return self.concrete(x)

    def scales(self, x: Array) -> bool:
        return self.concrete(x)  # it would make a model five times as long

    def reshape(self, x: Array, shape: tuple[Any, ...]) -> Array:
        if shape.count(None) < 2:
            return super().reshape(x, shape)
        own = iter(axis for axis, n in enumerate(x.shape) if n is None)
        parts = [
            self.xp.asarray([n]) if n is not None else x.dynamic_shape[(axis := next(own)) : axis + 1] for n in shape
        ]
        return self.xp.reshape(x, self.xp.concat(parts))
