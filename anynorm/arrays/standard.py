"""The array API standard of 2022.12, as a library has it: later functions made of it, and what is missing by name."""

from typing import Any

from anynorm.kernels import Array, Namespace

NEEDED = (
    *("abs", "all", "any", "asarray", "astype", "broadcast_to", "concat", "empty", "finfo", "float32", "iinfo"),
    *("int32", "isdtype", "isfinite", "max", "mean", "min", "ones", "ones_like", "permute_dims", "reshape", "sqrt"),
    *("squeeze", "stack", "sum", "trunc", "where", "zeros", "zeros_like"),
)
"""What the package calls."""


def completed(name: str, xp: Namespace) -> Namespace:
    """The namespace of the argument `name`, with all that is needed; a TypeError that names what it lacks."""
    missing = [each for each in NEEDED if not hasattr(xp, each)]
    if missing:
        raise TypeError(
            f"{name} must come from a library with the array API standard of 2022.12, "
            f"got one of {xp.__name__}, which lacks {', '.join(missing)}"
        )
    return xp if all(hasattr(xp, each) for each in LATER) else Completed(xp)


class Completed:
    """A namespace, and functions that came later than it."""

    def __init__(self, xp: Namespace) -> None:
        self._xp, self.__name__ = xp, xp.__name__

    def __getattr__(self, name: str) -> Any:
        return getattr(self._xp, name)

    def maximum(self, one: Array, other: Array) -> Array:
        return self.where((one > other) | (one != one), one, other)

    def minimum(self, one: Array, other: Array) -> Array:
        return self.where((one < other) | (one != one), one, other)

    def reciprocal(self, x: Array) -> Array:
        return 1 / x


LATER = ("maximum", "minimum", "reciprocal")
