"""The door: which library an array comes from, which dtype and device it has, and whether it may come in.

Everything that must know one array library from another is here, and array-api-compat is imported nowhere else.
"""

import copyreg
import importlib
import math
import operator
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import array_api_compat
import numpy as np

from anynorm.kernels import PURE, Arithmetic, Array
from anynorm.library import BLOCK, Library
from anynorm.of_cupy import cupy_library
from anynorm.of_jax import jax_library
from anynorm.of_numpy import numpy_library, quiet
from anynorm.of_torch import torch_library

T = TypeVar("T")
PIECE = 2**16
"""So many numbers are looked at in one go."""


class Bits(NamedTuple):
    """An array as it lies in a file, the same for every library."""

    dtype: str
    values: Any
    """A NumPy array in C order: of that dtype, or of uint16 where NumPy has none of the name, bfloat16."""


def library_beside(like: Array | None) -> Library:
    """The library of an array; NumPy where that is None."""
    return library_of("like", np.empty(0) if like is None else like)


def known_library(x: Array) -> Library | None:
    """The library of an array, if one of its type was here before."""
    return _libraries.get(type(x))


def library_of(name: str, x: Array) -> Library:
    """The library of the argument `name`; a TypeError if it is not an array."""
    try:
        return _libraries[type(x)]
    except KeyError:
        return _recognise(name, x)


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


def compute_dtype(library: Library, name: str, x: Array) -> Any:
    """The dtype that the argument `name` is computed in; a TypeError if it is not real and floating, or not plain."""
    check_plain(library, **{name: x})
    if library.traced():  # by a compiler that may not know how to look another library's dtypes up
        return _find_compute_dtype(library, name, x.dtype)
    try:
        return _compute_dtypes[library.name, x.dtype]
    except KeyError:
        return _compute_dtypes.setdefault((library.name, x.dtype), _find_compute_dtype(library, name, x.dtype))


@cache
def name_of(dtype: Any) -> str:
    """The name of a dtype, the same in every library."""
    return _plain(dtype)


def check_plain(library: Library, **arrays: Array) -> None:
    """A TypeError if an argument is an odd array."""
    if library.oddity is not None:
        for name, x in arrays.items():
            if oddity := library.oddity(x):
                plain = f"da.ma.getdata({name})" + f", weights=~da.ma.getmaskarray({name})" * (name == "x")
                way_out = f": write {plain} if that is what you mean" if oddity == "masked" else ""
                raise TypeError(f"{name} must be a plain array, got one that is {oddity}{way_out}")


def check_out(library: Library, name: str, x: Array, out: Array, others: list[Array]) -> None:
    """An error unless the result of x, and of others beside it, can be written to `out`."""
    if known_library(out) is not library:
        one_library(**{name: x}, out=out)
    if out.dtype != x.dtype:
        raise TypeError(f"out must have the dtype of {name}, {x.dtype}, got {out.dtype}")
    if tuple(out.shape) != tuple(x.shape):
        raise ValueError(f"out must have the shape of {name}, {tuple(x.shape)}, got {tuple(out.shape)}")
    check_plain(library, out=out)
    check_device(library, name, x, "out", out)
    if not library.writeable(out):
        raise ValueError(f"out must be writeable, got an array of {library.name} that is not")
    if library.records is not None and library.records([x, out, *others]):
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


def empty(shape: tuple[int, ...], like: Array, dtype: Any) -> Array:
    """An array to be written to, beside `like`."""
    library = library_of("like", like)
    if library.new is not None and library.plain(like):
        return library.new(shape, dtype)
    return library.xp.empty(shape, dtype=dtype, device=library.device(like))


def assign(library: Library, place: Array, values: Array) -> None:
    """Write values to a place, in its dtype."""
    place[...] = values if library.casts else library.xp.astype(values, place.dtype, copy=False)


def adds(library: Library, x: Array, dtype: Any) -> bool:
    """Whether the array can be added up along its rows as it is, in this dtype."""
    return bool(x.dtype == dtype) and library.straight(x)


def memory_order(library: Library, x: Array) -> tuple[int, ...] | None:
    """The axes as they follow each other in memory, () for their own order; None if they do not."""
    if library.contiguous(x):
        return ()
    steps = library.strides(x)
    own = tuple(range(len(steps)))
    order = tuple(sorted(own, key=lambda axis: -steps[axis]))
    return order if order != own and library.contiguous(library.xp.permute_dims(x, order)) else None


def in_rows(library: Library, x: Array) -> bool:
    """Whether no numbers are nearer in memory than neighbours along the last axis."""
    steps = [abs(step) for step, n in zip(library.strides(x), x.shape, strict=True) if step and n != 1]
    return not steps or steps[-1] == min(steps)


def cast(library: Library, x: Array, dtype: Any) -> Array:
    """The array, or a copy, that `adds` in this dtype."""
    return x if adds(library, x, dtype) else library.xp.astype(x, dtype)


def full_chunks(x: Array) -> Array:
    """An array of Dask without the empty chunks that are known, which Dask neither reshapes nor broadcasts."""
    if 0 in x.shape:  # then one chunk is all that can be reshaped
        return in_chunks(x, tuple((sum(own),) if sum(own) == sum(own) else own for own in x.chunks))
    return in_chunks(x, tuple(tuple(n for n in own if n) for own in x.chunks))


def in_chunks(x: Array, chunks: tuple[tuple[Any, ...], ...]) -> Array:
    """An array of Dask in other chunks; sizes that are not known are the same."""
    if x.chunks == chunks:
        return x
    if 0 in x.shape and all(n == n for n in x.shape):  # of which Dask may leave the chunks as they are
        return library_of("x", x).xp.zeros_like(x, chunks=chunks)
    return x.rechunk(chunks)


def zeros(shape: int | tuple[int, ...], like: Array, dtype: Any) -> Array:
    """Zeros, beside `like`."""
    library = library_of("like", like)
    return library.xp.zeros(shape, dtype=dtype, device=_home(library, like))


def extent(library: Library, x: Array) -> tuple[float, float]:
    """The smallest magnitude in a plain array, but for 0, and the largest; it takes little memory."""
    least, most = np.inf, 0.0
    for part in np.nditer(library.host(x), ("external_loop", "buffered"), buffersize=PIECE):
        sizes = np.abs(part)
        most = np.maximum(most, sizes.max())  # NaN, if there is one
        least = np.min(sizes, where=sizes > 0, initial=least)
    return float(min(least, most)), float(most)


def moved(name: str, x: Array, like: Array) -> Array:
    """The argument `name` in the library and on the device of `like`, in its own dtype."""
    library, there = library_of(name, x), library_of("like", like)
    if library.name != there.name:
        return from_bits(to_bits(name, x), like)
    device = _home(there, like)
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
    made = library.xp.asarray(values, device=_home(library, like))
    if values.dtype.kind in "iu" and np.any(values > library.xp.iinfo(made.dtype).max):
        return library.xp.asarray(values.astype(np.float64), device=_home(library, like))  # JAX made int32 of int64
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


def check_axes(name: str, axis: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`axis`, an int, a tuple of ints or None for all axes, as a sorted tuple of indices into `shape`."""
    if axis is None:
        return tuple(range(len(shape)))
    axes = axis if isinstance(axis, tuple) else (axis,)
    if not axes:
        raise ValueError(f"{name} must name at least one axis, got ()")
    found = []
    for each in axes:
        index = check_int(name, each, "an int or a tuple of ints")
        if not -len(shape) <= index < len(shape):
            raise ValueError(f"{name} must be in [-{len(shape)}, {len(shape)}) for shape {shape}, got {axis}")
        found.append(index % len(shape))
    if len(set(found)) < len(found):
        raise ValueError(f"{name} must name each axis once, got {axis} for shape {shape}")
    return tuple(sorted(found))


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


def python_number(value: Any) -> Any:
    """A real scalar of NumPy, which another library would not take or which has a say in dtypes, as a Python number."""
    return int(value) if isinstance(value, np.integer) else float(value) if isinstance(value, np.floating) else value


def split_number(number: float) -> tuple[float, float]:
    """A Python number as one of float32 and what that takes from it."""
    with quiet():
        high = float(np.float32(float(number)))
    return high, float(number - type(number)(high)) if high < float("inf") else 0.0


def check_bool(name: str, value: Any) -> None:
    """An error unless `value` is True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")


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
    if library.readable(count):
        with suppress(RuntimeError), library.quiet():  # torch.func.vmap and fake tensors: numbers that cannot be read
            if not bool(library.xp.all(count >= 0)):
                wrong = "less" if bool(library.xp.any(count < 0)) else "NaN"
                raise ValueError(f"{name} must be at least 0 everywhere, got an array with {wrong}")
    return count


def check_variance(library: Library, name: str, var: Array) -> None:
    """A ValueError if a number in it is negative, where it can be read; NaN passes."""
    with suppress(RuntimeError), library.quiet():  # as above
        if library.name == "jax" and library.present(var):
            negative = bool(np.any(np.asarray(var) < 0))  # an operation of JAX might be traced, as by jax.jit
        else:
            negative = library.readable(var) and bool(library.xp.any(var < 0))
        if negative:
            raise ValueError(f"{name} must be at least 0 everywhere, got an array with less")


def check_weights_dtype(library: Library, weights: Array) -> None:
    """A TypeError unless it is a bool, an integer or a real floating one."""
    try:
        if library.xp.isdtype(weights.dtype, ("bool", "integral")):
            return
    except TypeError:  # a dtype that is foreign to the library, as bfloat16 to NumPy
        pass
    try:
        compute_dtype(library, "weights", weights)
    except TypeError:
        if library.oddity is not None and library.oddity(weights):
            raise
        raise TypeError(f"weights must have a bool, integer or real floating dtype, got {weights.dtype}") from None


def check_weights(library: Library, weights: Array, dtype: Any) -> None:
    """A ValueError if one of them is negative or not finite, or all are out of this dtype, where they can be read."""
    if "bool" in str(weights.dtype) or not library.present(weights):
        return
    xp = library.xp
    if str(weights.dtype).endswith("bfloat16"):
        weights = xp.astype(weights, xp.float32)
    with suppress(RuntimeError, TypeError), library.quiet():  # torch.func.vmap, fake tensors, a constant under jax.jit
        if math.prod(weights.shape) == 0:
            return
        least, most = xp.min(weights), xp.max(weights)  # NaN, if there is one
        if not bool((least >= 0) & (most - most == 0)):
            raise ValueError("weights must be finite and at least 0 everywhere, got an array with others")
        info, most = xp.finfo(dtype), float(most)
        if most and not float(info.smallest_normal) <= most <= float(info.max):
            raise ValueError(f"weights must have their largest in the range of {_plain(dtype)}, got {most:g}")


def pytree(*leaves: str) -> Callable[[type[T]], type[T]]:
    """Make a frozen dataclass a JAX pytree, as soon as JAX is there, of these fields; the others are static.

    A count that is a Python number crosses as a float, as int32 would overflow; without float64 as two of float32.
    """

    def register(kind: type[T]) -> type[T]:
        static = tuple(field.name for field in fields(kind) if field.name not in leaves)  # type: ignore[arg-type]

        def flatten(value: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            parts = {name: getattr(value, name) for name in leaves}
            if isinstance(count := parts.get("count"), (int, float)):
                wide = sys.modules["jax"].config.jax_enable_x64
                parts["count"], parts["_count_rest"] = (float(count), None) if wide else split_number(count)
            return tuple(parts.values()), tuple(getattr(value, name) for name in static)

        def unflatten(options: tuple[Any, ...], children: tuple[Any, ...]) -> T:
            value = object.__new__(kind)  # unchecked: JAX also passes placeholders
            parts = dict(zip((*leaves, *static), (*children, *options), strict=True))
            if isinstance(count := parts.get("count"), float):
                halves = [count, parts["_count_rest"] or 0.0]
                whole = all(half.is_integer() for half in halves)
                parts["count"], parts["_count_rest"] = sum(map(int, halves)) if whole else sum(halves), None
            for name, part in parts.items():
                object.__setattr__(value, name, part)
            return value

        _pytrees.append((kind, flatten, unflatten))
        flush_pytrees()
        return kind

    return register


def flush_pytrees() -> None:
    """Register with JAX what still waits for it; JAX is never imported for it."""
    if _pytrees and sys.modules.get("jax") is not None:
        with _pytrees_lock:
            while _pytrees:
                sys.modules["jax"].tree_util.register_pytree_node(*_pytrees.pop())


_libraries: dict[type, Library] = {}
_compute_dtypes: dict[tuple[str, Any], Any] = {}
_pytrees: list[tuple[type, Callable[..., Any], Callable[..., Any]]] = []
_pytrees_lock = threading.Lock()

FILED = (
    *("bfloat16", "float16", "float32", "float64"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)
"""The dtypes that a file may hold."""


def _of_namespace(namespace: str) -> Library:
    return library_of("x", importlib.import_module(namespace).empty(0))


# it is full of functions: a copy is the library itself, and a pickle its name
copyreg.pickle(Library, lambda library: (_of_namespace, (library.xp.__name__,)))


def _recognise(name: str, x: Array) -> Library:
    flush_pytrees()
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        # by hand and not through array_namespace, whose cache torch.compile warns of when it traces the first call
        from array_api_compat import torch as xp

        return _libraries.setdefault(type(x), torch_library(xp))
    if isinstance(x, np.ma.MaskedArray):
        plain = f"{name}.data, weights=~{name}.mask" if name == "x" else f"{name}.data"
        raise TypeError(f"{name} must be a plain array, got MaskedArray: write {plain} if that is what you mean")
    if isinstance(x, np.matrix):
        raise TypeError(f"{name} must be a plain array, got {type(x).__name__}")
    if isinstance(x, type) or not array_api_compat.is_array_api_obj(x):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}")
    # by type, as array-api-compat takes an ndarray of one of JAX's dtypes for an array of JAX
    return _libraries.setdefault(type(x), _library(np.empty(0) if isinstance(x, (np.ndarray, np.generic)) else x))


def _library(x: Array) -> Library:
    xp = array_api_compat.array_namespace(x)
    eager = Library(
        name=xp.__name__.removeprefix("array_api_compat.").partition(".")[0],
        xp=xp,
        readable=lambda x: True,
        constant=lambda x: x,
        most=lambda x: float(xp.max(x)),
        least=lambda x: float(xp.min(x)),
        block=BLOCK,
        plain_block=BLOCK,
        device=array_api_compat.device,
        kind=array_api_compat.device,
        quiet=quiet,
        writeable=array_api_compat.is_writeable_array,
        plain=lambda *arrays: True,
        busy=quiet,
        float64=partial(_has_float64, xp),
    )
    if array_api_compat.is_numpy_array(x):
        return numpy_library(eager)
    if eager.name == "array_api_strict":
        return eager._replace(
            contiguous=lambda x: True,
            products=True,
            number=lambda value, dtype, like: xp.asarray(value, dtype=dtype, device=like.device),
            into=_into_by_assignment,
            casts=False,
            host=lambda x: np.asarray(x.to_device(xp.Device("CPU_DEVICE"))),
        )
    unreadable = eager._replace(readable=lambda x: False, plain=lambda *arrays: False)
    if array_api_compat.is_jax_array(x):
        return jax_library(unreadable)
    if array_api_compat.is_dask_array(x):
        # a reshape across chunks would gather them
        return unreadable._replace(
            present=lambda *arrays: False,
            chunked=True,
            block=None,
            device=lambda x: None,
            kind=_masked,
            oddity=_masked,
            writeable=lambda out: False,
            host=lambda x: _host(x.compute()),
            float64=lambda x: True,
            lazily=_by_chunks,
        )
    if array_api_compat.is_cupy_array(x):
        return cupy_library(unreadable)
    return unreadable


def _masked(x: Array) -> str:
    return "masked" if isinstance(x._meta, np.ma.MaskedArray) else ""


def _by_chunks(function: Callable[..., tuple[Array, ...]], arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """A function of Dask's chunks, which broadcast to each other."""
    da, inds = sys.modules["dask.array"], tuple(range(max(x.ndim for x in arrays)))
    work = partial(_quiet_chunk, function)
    metas = work(*(x._meta for x in arrays))
    pairs = [each for x in arrays for each in (x, inds[len(inds) - x.ndim :])]
    whole = da.blockwise(work, inds, *pairs, meta=metas[0], token="anynorm")
    return tuple(da.blockwise(_nth, inds, whole, inds, n=n, meta=meta) for n, meta in enumerate(metas))


def _quiet_chunk(function: Callable[..., tuple[Array, ...]], *chunks: Array) -> tuple[Array, ...]:
    return library_of("chunk", chunks[0]).quietly(function, *chunks)


def _nth(chunk: tuple[Array, ...], *, n: int) -> Array:
    return chunk[n]


def _has_float64(xp: Any, x: Array) -> bool:
    try:
        info = xp.__array_namespace_info__()
        return "float64" in info.dtypes(device=array_api_compat.device(x), kind="real floating")
    except Exception:  # a library before that part of the standard
        return hasattr(xp, "float64")


def _host(x: Array) -> Any:
    return library_of("x", x).host(x)


def _home(library: Library, like: Array) -> Any:
    """The device on which an array beside `like` is made; None leaves it to the library."""
    device = library.device(like)
    if isinstance(device, frozenset):  # JAX spreads an array over several
        return min(device, key=str) if len(device) == 1 else None
    return device


def _bfloat16() -> Any:
    try:
        from ml_dtypes import bfloat16
    except ImportError as error:
        raise ImportError("arrays of bfloat16 outside PyTorch need ml_dtypes: pip install ml_dtypes") from error
    return bfloat16


def _into_by_assignment(place: Array) -> Arithmetic:
    def assigning(operation: Callable[..., Array]) -> Callable[..., Array]:
        def assign(*arrays: Array) -> Array:
            place[...] = operation(*arrays)
            return place

        return assign

    return Arithmetic(*(assigning(operation) for operation in PURE))


def _plain(dtype: Any) -> str:
    """The name of a dtype."""
    name = getattr(dtype, "name", getattr(dtype, "__name__", dtype))  # NumPy's str() of the other byte order has none
    return str(name).rpartition(".")[2]


def _find_compute_dtype(library: Library, name: str, dtype: Any) -> Any:
    plain = _plain(dtype)  # the name, as bfloat16 is a foreign dtype to NumPy and CuPy, and their isdtype raises on it
    if plain in ("float16", "bfloat16"):
        return library.xp.float32
    try:
        floating = library.xp.isdtype(dtype, "real floating")
    except TypeError:
        floating = False
    if not floating or plain.partition("_")[0] in ("float4", "float6", "float8"):
        raise TypeError(
            f"{name} must have a real floating dtype, got {dtype}: "
            f"write {_cast(library, name, dtype)} if that is what you mean"
        )
    return dtype


def _cast(library: Library, name: str, dtype: Any) -> str:
    part = f"{name}.real" if "complex" in str(dtype) else name
    casts = {"torch": f"{part}.to(torch.float32)", "array_api_strict": f"xp.astype({part}, xp.float32)"}
    return casts.get(library.name, f"{part}.astype('float32')")


def _show(device: Any) -> str:
    return ", ".join(sorted(map(str, device))) if isinstance(device, frozenset) else str(device)
