"""Arguments that may not be: an error of one sentence for each, before anything is computed."""

import operator
from contextlib import suppress
from functools import cache
from typing import Any

import array_api_compat
import numpy as np

from anynorm.arrays.library import Library
from anynorm.arrays.recognize import known_library, one_library
from anynorm.kernels import Array

_compute_dtypes: dict[tuple[str, Any], Any] = {}


def compute_dtype(library: Library, name: str, x: Array) -> Any:
    """The dtype that the argument `name` is computed in; a TypeError if it is not real and floating, or not plain."""
    library.check_supported(name, x)
    if library.traced():  # by a compiler that may not know how to look another library's dtypes up
        return _find_compute_dtype(library, name, x.dtype)
    found = _compute_dtypes.get((library.name, x.dtype))
    if found is None:
        found = _compute_dtypes[library.name, x.dtype] = _find_compute_dtype(library, name, x.dtype)
    return found


def _find_compute_dtype(library: Library, name: str, dtype: Any) -> Any:
    if plain_name(dtype) in ("float16", "bfloat16"):
        return library.xp.float32
    if not is_floating(library, dtype):
        cast = library.cast_to_float32.format(f"{name}.real" if "complex" in str(dtype) else name)
        raise TypeError(f"{name} must have a real floating dtype, got {dtype}: write {cast} if that is what you mean")
    return dtype


def is_floating(library: Library, dtype: Any) -> bool:
    """Whether a dtype is real, floating and of at least two bytes."""
    plain = plain_name(dtype)
    if plain in ("float16", "bfloat16"):  # the latter is foreign to NumPy and CuPy, and their isdtype raises on it
        return True
    try:
        floating = bool(library.xp.isdtype(dtype, "real floating"))
    except (AttributeError, TypeError):  # it is none of the library
        return False
    return floating and plain.partition("_")[0] not in ("float4", "float6", "float8")


def dtype_of_call(library: Library, name: str, x: Array, result: Any, *, integers: bool) -> Any:
    """The dtype that a call on the argument `name` is computed in: the wider of x's own and the `result`'s, if given.

    Where `integers` are taken, and bools, those of up to 16 bits are computed in float32, and longer ones in float64;
    where there is none in float32, if a `result` is asked for.
    """
    own, bits = None, _bits_of_integer(library, x.dtype) if integers else None
    if bits is None:
        own = compute_dtype(library, name, x)
    else:
        library.check_supported(name, x)
        own = library.xp.float32
        if bits > 16 and library.has_float64(x):
            own = library.xp.float64
        elif bits > 16 and result is None:
            raise ValueError(
                f"{name} of {x.dtype} has moments in float64, which {library.name} has not here: "
                "give dtype='float32' if that is what you mean"
            )
    if result is None:
        return own
    other = _find_compute_dtype(library, "out", result)
    return own if library.xp.finfo(own).bits >= library.xp.finfo(other).bits else other


def _bits_of_integer(library: Library, dtype: Any) -> int | None:
    """How many bits an integer of a dtype has, or a bool; None where it is of another kind."""
    try:
        if library.xp.isdtype(dtype, "bool"):
            return 1
        return int(library.xp.iinfo(dtype).bits) if library.xp.isdtype(dtype, "integral") else None
    except TypeError:  # a dtype that is foreign to the library, as bfloat16 to NumPy
        return None


def check_dtype(library: Library, name: str, dtype: Any, like: Array) -> Any:
    """A real floating dtype that there may be beside an array, from itself or its name; an error if it is none."""
    plain = dtype if isinstance(dtype, str) else "float64" if dtype is float else plain_name(dtype)
    found = getattr(library.xp, plain, None)
    if found is not None and is_floating(library, found) and (plain != "float64" or library.has_float64(like)):
        return found
    if plain in ("float16", "bfloat16", "float32", "float64"):
        raise ValueError(f"{name} must be one that {library.name} has here, got {plain}")
    raise TypeError(f"{name} must be a real floating dtype of {library.name} or the name of one, got {dtype!r:.60}")


def plain_name(dtype: Any) -> str:
    """The name of a dtype, the same in every library."""
    name = getattr(dtype, "name", getattr(dtype, "__name__", dtype))  # NumPy's str() of the other byte order has none
    return str(name).rpartition(".")[2]


name_of = cache(plain_name)
"""The same, where no compiler follows."""


def check_dtype_of_out(library: Library, name: str, x: Array, out: Array) -> None:
    """An error unless `out` is an array of x's library that a result can be rounded to."""
    one_library(**{name: x}, out=out)
    if not is_floating(library, out.dtype):
        raise TypeError(f"out must have a real floating dtype, got {out.dtype}")


def check_out(library: Library, name: str, x: Array, out: Array, others: list[Array]) -> None:
    """An error unless the result of x, and of others beside it, can be written to `out`."""
    if known_library(out) is not library:
        one_library(**{name: x}, out=out)
    if tuple(out.shape) != tuple(x.shape):
        raise ValueError(f"out must have the shape of {name}, {tuple(x.shape)}, got {tuple(out.shape)}")
    library.check_supported("out", out)
    check_device(library, name, x, "out", out)
    if not library.writeable(out):
        raise ValueError(f"out must be writeable, got an array of {library.name} that is not")
    if library.records([x, out, *others]):
        raise ValueError("out must not be given while autograd records: leave it out, or call under torch.no_grad()")


def check_device(library: Library, name: str, x: Array, other_name: str, other: Array) -> None:
    """A ValueError if the two arguments live on different devices."""
    here, there = library.device(x), library.device(other)
    if here is not None and there is not None and here != there:
        raise ValueError(f"{other_name} must be on the device of {name}, {_show(here)}, got {_show(there)}")


def check_known_sizes(library: Library, **arrays: Array | None) -> None:
    """A ValueError if an argument of a gradient has sizes that Dask does not know."""
    for name, x in arrays.items() if library.chunked else ():
        if x is not None and any(n != n for n in x.shape):
            raise ValueError(
                f"{name} must have known sizes for a gradient, got shape {tuple(x.shape)}: "
                f"call {name}.compute_chunk_sizes() first"
            )


def check_axes(name: str, axis: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`axis`, an int, a tuple of ints or None for all axes, as a sorted tuple of indices into `shape`."""
    if axis is None:
        return tuple(range(len(shape)))
    axes = axis if isinstance(axis, tuple) else (axis,)
    if not axes:
        raise ValueError(f"{name} must name at least one axis, got ()")
    indices = set()
    for value in axes:
        index = check_int(name, value, "an int or a tuple of ints")
        if not -len(shape) <= index < len(shape):
            raise ValueError(f"{name} must be in [-{len(shape)}, {len(shape)}) for shape {shape}, got {axis}")
        indices.add(index % len(shape))
    if len(indices) < len(axes):
        raise ValueError(f"{name} must name each axis once, got {axis} for shape {shape}")
    return tuple(sorted(indices))


def as_ints(axis: Any) -> Any:
    """An axis that was checked, or several or None, in Python's ints."""
    if isinstance(axis, tuple):
        return tuple(map(operator.index, axis))
    return None if axis is None else operator.index(axis)


def check_int(name: str, value: Any, rule: str = "an int") -> int:
    """`value` as an int; a TypeError if it is none."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be {rule}, got {value!r}")


def check_real(name: str, value: Any, *, least: float, most: float = float("inf")) -> Any:
    """`value` as a Python number, finite and in [least, most]."""
    value = python_number(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int that no float can hold
        value = number = float("inf")
    if not least <= number <= most or number == float("inf"):
        bounds = f"finite and at least {least:g}" if most == float("inf") else f"in [{least:g}, {most:g}]"
        raise ValueError(f"{name} must be {bounds}, got {value!s:.20}")
    return value


def check_bool(name: str, value: Any) -> None:
    """An error unless `value` is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


def python_number(value: Any) -> Any:
    """A real scalar of NumPy, which another library would not take or which has a say in dtypes, as a Python number."""
    return int(value) if isinstance(value, np.integer) else float(value) if isinstance(value, np.floating) else value


def check_count(name: str, count: Any, mean: Array) -> Any:
    """Numbers of values: a Python number, or an array beside `mean`."""
    count = python_number(count)
    known = known_library(count) is not None  # array-api-compat asks a cache, which torch.compile warns of
    if isinstance(count, (int, float)) or not (known or array_api_compat.is_array_api_obj(count)):
        check_real(name, count, least=0)
        return count
    library = one_library(mean=mean, **{name: count})
    if not library.xp.isdtype(count.dtype, "integral"):
        compute_dtype(library, name, count)
    check_device(library, "mean", mean, name, count)
    check_variance(library, name, count)
    with suppress(RuntimeError), library.quiet():
        if library.on_host(count) and not bool(library.xp.all(count >= 0)):
            raise ValueError(f"{name} must be at least 0 everywhere, got an array with NaN")
    return count


def check_variance(library: Library, name: str, var: Array) -> None:
    """A ValueError if a number in it is negative, where it can be read; NaN passes."""
    with suppress(RuntimeError), library.quiet():  # torch.func.vmap and fake tensors: numbers that cannot be read
        if library.any_negative(var):
            raise ValueError(f"{name} must be at least 0 everywhere, got an array with less")


def check_nonzero(library: Library, name: str, x: Array) -> None:
    """A ValueError if a number in it is 0, where it can be read."""
    x = library.constant(x)
    if not library.concrete(x):
        return
    with suppress(RuntimeError, TypeError), library.quiet():  # as in `check_weights`
        if not bool(library.xp.all(x != 0)):
            raise ValueError(f"{name} must be other than 0 everywhere, got an array with 0")


def check_weights_dtype(library: Library, weights: Array) -> None:
    """A TypeError unless it is a bool, an integer or a real floating one."""
    try:
        if library.xp.isdtype(weights.dtype, ("bool", "integral")):
            return
    except TypeError:  # a dtype that is foreign to the library, as bfloat16 to NumPy
        pass
    library.check_supported("weights", weights)
    try:
        compute_dtype(library, "weights", weights)
    except TypeError:
        raise TypeError(f"weights must have a bool, integer or real floating dtype, got {weights.dtype}") from None


def check_weights(library: Library, weights: Array, dtype: Any) -> None:
    """A ValueError if one of them is negative or not finite, or all are out of this dtype, where they can be read."""
    if "bool" in str(weights.dtype) or not library.concrete(weights):
        return
    xp = library.xp
    if str(weights.dtype).endswith("bfloat16"):
        weights = xp.astype(weights, xp.float32)
    with suppress(RuntimeError, TypeError), library.quiet():  # torch.func.vmap, fake tensors, a constant under jax.jit
        if 0 in weights.shape:
            return
        least, most = xp.min(weights), xp.max(weights)  # NaN, if there is one
        if not bool((least >= 0) & (most - most == 0)):
            raise ValueError("weights must be finite and at least 0 everywhere, got an array with others")
        info, most = xp.finfo(dtype), float(most)
        if most and not float(info.smallest_normal) <= most <= float(info.max):
            raise ValueError(f"weights must have their largest in the range of {plain_name(dtype)}, got {most:g}")


def _show(device: Any) -> str:
    return ", ".join(sorted(map(str, device))) if isinstance(device, frozenset) else str(device)


def same_shape(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two shapes are the same; a size that Dask does not know, NaN, may be any other."""
    return len(one) == len(other) and all(m == n or m != m or n != n for m, n in zip(one, other, strict=True))
