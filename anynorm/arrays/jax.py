"""What JAX does its own way: tracers, devices, and no subnormal numbers."""

import sys
from collections.abc import Callable, Hashable
from typing import Any

from anynorm.arrays.library import Library
from anynorm.kernels import Array


def jax_library(lazy: Library) -> Library:
    """JAX, of what every library is like whose numbers cannot be read."""
    return lazy._replace(
        present=lambda *arrays: not any(isinstance(x, sys.modules["jax"].core.Tracer) for x in arrays),
        constant=sys.modules["jax"].lax.stop_gradient,
        device=_devices,
        kind=_devices,
        float64=lambda x: bool(sys.modules["jax"].config.jax_enable_x64),
        subnormal=_subnormal,
        writeable=lambda out: False,
        jit=_jit,
    )


MOST = 1024
"""So many functions are kept."""
_compiled: dict[Hashable, Any] = {}


def _jit(key: Hashable, function: Callable[..., Any], arrays: tuple[Any, ...]) -> Any:
    """As one operation, unless somebody traces already: alone each would be compiled by itself, for every shape."""
    jax = sys.modules["jax"]
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree_util.tree_leaves(arrays)):
        return function(*arrays)
    if key not in _compiled:
        if len(_compiled) >= MOST:
            _compiled.clear()
        _compiled[key] = jax.jit(function)
    return _compiled[key](*arrays)


def _devices(x: Array) -> frozenset[Any] | None:
    traced = isinstance(x, sys.modules["jax"].core.Tracer)
    return None if traced or not x.committed else frozenset(x.devices())


def _subnormal(x: Array, power: float) -> Array:
    """Read from the bits: XLA takes a subnormal number for 0 in every operation on a CPU."""
    lax, jnp = sys.modules["jax"].lax, sys.modules["jax"].numpy
    x, info = lax.stop_gradient(x), jnp.finfo(x.dtype)
    bits = lax.bitcast_convert_type(x, jnp.int32 if info.bits == 32 else jnp.int64)
    magnitude = bits & jnp.iinfo(bits.dtype).max
    value = magnitude.astype(x.dtype) * (2.0 ** (info.minexp - info.nmant) * power)
    flushed = (magnitude < 2**info.nmant) & (x * power == 0)
    return jnp.where(flushed, jnp.where(bits < 0, -value, value), 0)
