"""What JAX does its own way: tracers, devices, and no subnormal numbers."""

import sys
from contextlib import nullcontext
from typing import Any

from anynorm.kernels import Array
from anynorm.library import Library


def jax_library(lazy: Library) -> Library:
    """JAX, of what every library is like whose numbers cannot be read."""
    return lazy._replace(
        present=lambda *arrays: not any(isinstance(x, sys.modules["jax"].core.Tracer) for x in arrays),
        constant=sys.modules["jax"].lax.stop_gradient,
        device=_devices,
        kind=_devices,
        quiet=nullcontext,
        float64=lambda x: bool(sys.modules["jax"].config.jax_enable_x64),
        subnormal=_subnormal,
        writeable=lambda out: False,
    )


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
