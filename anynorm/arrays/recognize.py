"""Which library an array comes from."""

import sys

import array_api_compat
import numpy as np

from anynorm.arrays.library import Library
from anynorm.arrays.pytree import flush_pytrees
from anynorm.arrays.standard import completed
from anynorm.kernels import Array

_libraries: dict[type, Library] = {}


def library_beside(like: Array | None) -> Library:
    """The library of an array; NumPy where that is None."""
    return library_of("like", np.empty(0) if like is None else like)


def known_library(x: Array) -> Library | None:
    """The library of an array, if one of its type was here before."""
    return _libraries.get(type(x))


def is_array(x: object) -> bool:
    """Whether it is an array of some library."""
    return known_library(x) is not None or bool(array_api_compat.is_array_api_obj(x))


def library_of(name: str, x: Array) -> Library:
    """The library of the argument `name`; a TypeError if it is not an array."""
    library = _libraries.get(type(x))
    return _libraries.setdefault(type(x), _recognize(name, x)) if library is None else library


def one_library(**arrays: Array) -> Library:
    """The library that all arguments share; a TypeError that names two that differ."""
    (first, x), *others = arrays.items()
    library = library_of(first, x)
    for name, other in others:
        theirs = library_of(name, other)
        if theirs.name != library.name:
            raise TypeError(
                f"{first} and {name} must come from one array library, got {library.name} and {theirs.name}"
            )
    return library


def leading_library(**arrays: Array) -> Library:
    """The library of the first; a TypeError unless the others are its own, or NumPy's where it takes these."""
    (first, x), *others = arrays.items()
    library = library_of(first, x)
    own = {name: each for name, each in others if not library.takes_numpy or library_of(name, each).name != "numpy"}
    return one_library(**{first: x}, **own)


def _recognize(name: str, x: Array) -> Library:
    flush_pytrees()
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        # by hand and not through array_namespace, whose cache torch.compile warns of when it traces the first call
        from array_api_compat import torch as xp

        return Library.of_namespace(xp)
    if isinstance(x, np.ma.MaskedArray):
        plain = f"{name}.data, weights=~{name}.mask" if name == "x" else f"{name}.data"
        raise TypeError(f"{name} must be a plain array, got MaskedArray: write {plain} if that is what you mean")
    if isinstance(x, np.ndarray) and type(x) not in (np.ndarray, np.memmap):  # a result would have lost what it adds
        raise TypeError(
            f"{name} must be a plain array, got {type(x).__name__}: write np.asarray({name}) if that is what you mean"
        )
    if isinstance(x, type) or not array_api_compat.is_array_api_obj(x):
        advice = f": write {name}.to_numpy()" if hasattr(x, "to_numpy") and not isinstance(x, type) else ""
        raise TypeError(f"{name} must be an array, got {type(x).__name__}{advice}")
    if isinstance(x, (np.ndarray, np.generic)):
        x = np.empty(0)  # array-api-compat takes one of JAX's dtypes for an array of JAX
    return Library.of_namespace(completed(name, array_api_compat.array_namespace(x)))
