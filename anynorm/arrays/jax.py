"""What JAX does its own way: tracers, devices, compiled functions, and no subnormal numbers."""

import sys
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from anynorm.arrays.library import Library
from anynorm.kernels import Array, Namespace

MOST = 1024
"""So many functions are kept."""
_compiled: dict[Hashable, Any] = {}
_differentiated: dict[Hashable, Any] = {}


class JaxLibrary(Library, name="jax"):
    """JAX. Outside of `jax.jit` a call is one compiled function."""

    symbols = True
    compiles = True
    takes_numpy = True
    branches = True
    cast_to_float32 = "{}.astype('float32')"

    def __init__(self, name: str, xp: Namespace) -> None:
        super().__init__(name, xp)
        self.jax = sys.modules["jax"]

    def device(self, x: Array) -> frozenset[Any] | None:
        return frozenset(x.devices()) if self.concrete(x) and getattr(x, "committed", False) else None

    def device_key(self, x: Array) -> Any:
        return self.device(x), self.jax.config.jax_enable_x64

    def device_for_new(self, like: Array) -> Any:
        devices = self.device(like)  # those that the array is spread over
        return min(devices, key=str) if devices is not None and len(devices) == 1 else None

    def has_float64(self, x: Array) -> bool:
        return bool(self.jax.config.jax_enable_x64)

    def concrete(self, *arrays: Array) -> bool:
        return not any(isinstance(x, self.jax.core.Tracer) for x in arrays)

    def any_negative(self, x: Array) -> bool:
        return self.concrete(x) and bool(np.any(np.asarray(x) < 0))  # an operation of JAX might be traced, by jax.jit

    def constant(self, x: Array) -> Array:
        return self.jax.lax.stop_gradient(x)

    def subnormal(self, x: Array, power: float) -> Array:
        """Read from the bits: XLA takes a subnormal number for 0 in every operation on a CPU."""
        lax, jnp = self.jax.lax, self.jax.numpy
        x, info = lax.stop_gradient(x), jnp.finfo(x.dtype)
        bits = lax.bitcast_convert_type(x, jnp.int32 if info.bits == 32 else jnp.int64)
        magnitude = bits & jnp.iinfo(bits.dtype).max
        value = magnitude.astype(x.dtype) * (2.0 ** (info.minexp - info.nmant) * power)
        flushed = (magnitude < 2**info.nmant) & (x * power == 0)
        return jnp.where(flushed, jnp.where(bits < 0, -value, value), 0)

    def compiled(self, key: Hashable, function: Callable[..., Any], *arrays: Any) -> Any:
        """As one operation, unless somebody traces already: alone each would be compiled by itself, for every shape."""
        if not self.concrete(*self.jax.tree_util.tree_leaves(arrays)):
            return function(*arrays)
        return _kept(_compiled, key, lambda: self.jax.jit(function))(*arrays)

    def branch(self, which: Array, one: Callable[[], Any], other: Callable[[], Any]) -> Any:
        return self.jax.lax.cond(which, one, other)

    def differentiated(
        self, key: Hashable, function: Callable[[Array], Any], derivative: Callable[[Any, Array], Any], x: Array
    ) -> Any:
        """Both compiled, as `jax.grad` and others trace a function and not what it does to single arrays."""

        def made() -> Any:
            ruled, along = self.jax.custom_jvp(self.jax.jit(function)), self.jax.jit(derivative)

            @ruled.defjvp  # type: ignore[untyped-decorator]
            def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Any, Any]:
                result = ruled(*primals)
                return result, along(result, *tangents)

            return ruled

        return _kept(_differentiated, key, made)(x)


def _kept(functions: dict[Hashable, Any], key: Hashable, make: Callable[[], Any]) -> Any:
    """The function of a key, made if it is not there."""
    if key not in functions:
        if len(functions) >= MOST:
            functions.clear()
        functions[key] = make()
    return functions[key]
