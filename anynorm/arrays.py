"""The door: which library an array comes from, which dtype and device it has, and whether it may come in.

Everything that must know one array library from another is here, and array-api-compat is imported nowhere else.
"""

import operator
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any, NamedTuple, TypeVar

import array_api_compat
import numpy as np

from anynorm.kernels import Array, Namespace

T = TypeVar("T")


class Library(NamedTuple):
    """What the rest of the house needs to know of an array library."""

    name: str
    xp: Namespace
    readable: Callable[[Array], bool]
    """Whether a number can be read out of the array now, at no cost: it is neither traced, nor lazy, nor on a GPU."""
    present: Callable[[Array], bool]
    """Whether the numbers are there to be handed to a compiler: neither traced nor lazy."""
    writes: bool
    """Whether a result may be written part by part: arrays are eager, and nothing records how they came about."""
    constant: Callable[[Array], Array]
    """The array as a constant, to which no gradient flows."""
    block: int | None
    """The longest run of numbers that this library is trusted to add in one go; None where it blocks its own sums."""
    device: Callable[[Array], Any]
    """The device, or None where there is but one or the library itself is the better judge."""
    quiet: Callable[[], AbstractContextManager[Any]]
    """Silences the library's warnings of overflow and invalid values, which the results show."""
    oddity: Callable[[Array], str] | None = None
    """What keeps an array of this library from being a plain one: "" for a plain one."""
    subnormal: Callable[[Array, float], Array] | None = None
    """The subnormal numbers of an array times a power of two, and 0 elsewhere, if the library flushes them to 0."""


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
    if library.oddity is not None and (oddity := library.oddity(x)):
        raise TypeError(f"{name} must be a plain array, got one that is {oddity}")
    try:
        return _compute_dtypes[library.name, x.dtype]
    except KeyError:
        return _compute_dtypes.setdefault((library.name, x.dtype), _find_compute_dtype(library, name, x.dtype))


def check_device(library: Library, name: str, x: Array, other_name: str, other: Array) -> None:
    """A ValueError if the two arguments live on different devices."""
    here, there = library.device(x), library.device(other)
    if here is not None and there is not None and here != there:
        raise ValueError(f"{other_name} must be on the device of {name}, {_show(here)}, got {_show(there)}")


def empty(shape: tuple[int, ...], like: Array, dtype: Any) -> Array:
    """An array to be written to, beside `like`."""
    library = library_of("like", like)
    return library.xp.empty(shape, dtype=dtype, device=library.device(like))


def writeable(x: Array) -> Array:
    """A NumPy array, or one more of the same memory that may be written to: some libraries take no other."""
    return x if x.flags.writeable else np.asarray(_Writeable(x))


def move(x: Array, like: Array) -> Array:
    """The array on the device of `like`."""
    here, there = array_api_compat.device(x), array_api_compat.device(like)
    return x if here == there else array_api_compat.to_device(x, there)


def zeros(n: int, like: Array, dtype: Any) -> Array:
    """`n` zeros, beside `like`."""
    library = library_of("like", like)
    device = library.device(like)
    if isinstance(device, frozenset):  # JAX spreads an array over several
        device = min(device, key=str) if len(device) == 1 else None
    return library.xp.zeros(n, dtype=dtype, device=device)


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


def check_int(name: str, value: Any, rule: str = "an int") -> int:
    """`value` as an int; a TypeError if it is none."""
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be {rule}, got {value!r}")


def check_real(name: str, value: Any, *, least: float, most: float = float("inf")) -> float:
    """`value` as a finite float in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int that no float can hold
        number = float("inf")
    if not least <= number <= most or number == float("inf"):
        bounds = f"finite and at least {least:g}" if most == float("inf") else f"in [{least:g}, {most:g}]"
        raise ValueError(f"{name} must be {bounds}, got {value!s:.20}")
    return number


def check_count(name: str, count: Any) -> Any:
    """A number of values: a Python number, or one of JAX's, which may be traced."""
    if isinstance(count, (np.integer, np.floating)):
        count = count.item()
    if isinstance(count, (int, float)) or not array_api_compat.is_jax_array(count):
        check_real(name, count, least=0)
    return count


def pytree(*leaves: str) -> Callable[[type[T]], type[T]]:
    """Make a frozen dataclass a JAX pytree, as soon as JAX is there, of these fields; the others are static.

    A Python int among the leaves crosses as a float, which loses digits where int32 would overflow.
    """

    def register(kind: type[T]) -> type[T]:
        static = tuple(field.name for field in fields(kind) if field.name not in leaves)  # type: ignore[arg-type]

        def flatten(value: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            parts = (getattr(value, name) for name in leaves)
            children = tuple(float(part) if isinstance(part, int) else part for part in parts)
            return children, tuple(getattr(value, name) for name in static)

        def unflatten(options: tuple[Any, ...], children: tuple[Any, ...]) -> T:
            value = object.__new__(kind)  # unchecked: JAX also passes placeholders
            for name, part in zip((*leaves, *static), (*children, *options), strict=True):
                whole = isinstance(part, float) and name in leaves and part.is_integer()
                object.__setattr__(value, name, int(part) if whole else part)
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


class _Writeable:
    """The memory of an array under other terms."""

    def __init__(self, x: Array) -> None:
        self.owner = x
        self.__array_interface__ = x.__array_interface__ | {"data": (x.__array_interface__["data"][0], False)}


_libraries: dict[type, Library] = {}
_compute_dtypes: dict[tuple[str, Any], Any] = {}
_pytrees: list[tuple[type, Callable[..., Any], Callable[..., Any]]] = []
_pytrees_lock = threading.Lock()

_BLOCK = 256


def _recognise(name: str, x: Array) -> Library:
    flush_pytrees()
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(x, torch.Tensor):
        return _libraries.setdefault(type(x), _torch_library())
    if isinstance(x, (np.ma.MaskedArray, np.matrix)):
        raise TypeError(f"{name} must be a plain array, got {type(x).__name__}")
    if isinstance(x, type) or not array_api_compat.is_array_api_obj(x):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}")
    # by type, as array-api-compat takes an ndarray of one of JAX's dtypes for an array of JAX
    return _libraries.setdefault(type(x), _library(np.empty(0) if isinstance(x, (np.ndarray, np.generic)) else x))


def _torch_library() -> Library:
    # by hand and not through array_namespace, whose cache torch.compile warns of when it traces the first call
    from array_api_compat import torch as xp

    return Library(
        name="torch",
        xp=xp,
        readable=_torch_readable,
        present=_torch_present,
        writes=False,
        constant=lambda x: x.detach(),
        block=_BLOCK,
        device=lambda x: x.device,
        quiet=nullcontext,
        oddity=lambda x: "" if x.layout is sys.modules["torch"].strided else f"{x.layout}".removeprefix("torch."),
    )


def _torch_readable(x: Array) -> bool:
    torch = sys.modules["torch"]
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not torch.jit.is_tracing()


def _torch_present(x: Array) -> bool:
    torch = sys.modules["torch"]
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type == "meta":
        return False
    # no subclass, which may be traced; nor a tensor of torch.func or of forward-mode differentiation
    plain = type(x) in (torch.Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    return plain and torch.autograd.forward_ad._current_level < 0


def _library(x: Array) -> Library:
    xp = array_api_compat.array_namespace(x)
    eager = Library(
        name=xp.__name__.removeprefix("array_api_compat.").partition(".")[0],
        xp=xp,
        readable=lambda x: True,
        present=lambda x: True,
        writes=True,
        constant=lambda x: x,
        block=_BLOCK,
        device=array_api_compat.device,
        quiet=lambda: np.errstate(all="ignore"),
    )
    if array_api_compat.is_numpy_array(x):
        return eager._replace(device=lambda x: None)
    if eager.name == "array_api_strict":
        return eager
    unreadable = eager._replace(readable=lambda x: False, writes=False)
    if array_api_compat.is_jax_array(x):
        return unreadable._replace(
            present=lambda x: not isinstance(x, sys.modules["jax"].core.Tracer),
            constant=sys.modules["jax"].lax.stop_gradient,
            device=_jax_devices,
            quiet=nullcontext,
            subnormal=_jax_subnormal,
        )
    if array_api_compat.is_dask_array(x):
        # a reshape across chunks would gather them
        return unreadable._replace(
            present=lambda x: False,
            block=None,
            device=lambda x: None,
            oddity=lambda x: "masked" if isinstance(x._meta, np.ma.MaskedArray) else "",
        )
    return unreadable


def _jax_devices(x: Array) -> frozenset[Any] | None:
    traced = isinstance(x, sys.modules["jax"].core.Tracer)
    return None if traced or not x.committed else frozenset(x.devices())


def _jax_subnormal(x: Array, power: float) -> Array:
    """Read from the bits: XLA takes a subnormal number for 0 in every operation on a CPU."""
    lax, jnp = sys.modules["jax"].lax, sys.modules["jax"].numpy
    x, info = lax.stop_gradient(x), jnp.finfo(x.dtype)
    bits = lax.bitcast_convert_type(x, jnp.int32 if info.bits == 32 else jnp.int64)
    magnitude = bits & jnp.iinfo(bits.dtype).max
    value = magnitude.astype(x.dtype) * (2.0 ** (info.minexp - info.nmant) * power)
    flushed = (magnitude < 2**info.nmant) & (x * power == 0)
    return jnp.where(flushed, jnp.where(bits < 0, -value, value), 0)


def _find_compute_dtype(library: Library, name: str, dtype: Any) -> Any:
    # str(), as bfloat16 is a foreign dtype to NumPy and CuPy, and their isdtype raises on it
    plain = str(dtype).rpartition(".")[2]
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
