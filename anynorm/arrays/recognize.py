"""Which library an array comes from, and which dtype it is computed in."""

import copyreg
import importlib
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import array_api_compat
import numpy as np

from anynorm.arrays.cupy import cupy_library
from anynorm.arrays.jax import jax_library
from anynorm.arrays.library import BLOCK, Library
from anynorm.arrays.numpy import numpy_library, quiet
from anynorm.arrays.pytree import flush_pytrees
from anynorm.arrays.torch import torch_library
from anynorm.kernels import PURE, Array, Ops


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
    return plain_name(dtype)


def check_plain(library: Library, **arrays: Array) -> None:
    """A TypeError if an argument is an odd array."""
    if library.oddity is not None:
        for name, x in arrays.items():
            if oddity := library.oddity(x):
                plain = f"da.ma.getdata({name})" + f", weights=~da.ma.getmaskarray({name})" * (name == "x")
                way_out = f": write {plain} if that is what you mean" if oddity == "masked" else ""
                raise TypeError(f"{name} must be a plain array, got one that is {oddity}{way_out}")


_libraries: dict[type, Library] = {}
_compute_dtypes: dict[tuple[str, Any], Any] = {}


def _of_namespace(namespace: str) -> Library:
    return library_of("x", importlib.import_module(namespace).empty(0))


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


def _into_by_assignment(place: Array) -> Ops:
    def assigning(operation: Callable[..., Array]) -> Callable[..., Array]:
        def assign(*arrays: Array) -> Array:
            place[...] = operation(*arrays)
            return place

        return assign

    return Ops(*(assigning(operation) for operation in PURE))


def plain_name(dtype: Any) -> str:
    """The name of a dtype."""
    name = getattr(dtype, "name", getattr(dtype, "__name__", dtype))  # NumPy's str() of the other byte order has none
    return str(name).rpartition(".")[2]


def _find_compute_dtype(library: Library, name: str, dtype: Any) -> Any:
    plain = plain_name(
        dtype
    )  # the name, as bfloat16 is a foreign dtype to NumPy and CuPy, and their isdtype raises on it
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


# it is full of functions: a copy is the library itself, and a pickle its name
copyreg.pickle(Library, lambda library: (_of_namespace, (library.xp.__name__,)))
