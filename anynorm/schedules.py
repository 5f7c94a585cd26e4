"""How a call is run: plainly where its numbers can be looked at and turn out ordinary, else proof to any size."""

import math
from typing import Any

from anynorm import kernels
from anynorm.calls import Call
from anynorm.kernels import Array, Standardized


def standardize(call: Call) -> Standardized:
    """The kernel's result. An eager array is scaled only if it turns out that it must be; any other always is."""
    library, xp, x = call.library, call.library.xp, call.x
    limits = kernels.limits(xp, x.dtype)
    tiny = call.eps < limits.eps
    with library.quiet():
        if call.mean is not None:
            return kernels.standardize_with(xp, x, call.mean, call.var, eps=call.eps)
        empty = not math.prod(x.shape) > 0  # NaN is a size that Dask does not know: there it takes no minimum
        if empty or library.readable(x):
            plain = kernels.standardize(
                xp, x, groups=call.groups, eps=call.eps, centred=call.centred, flat=1.0 if tiny else None
            )
            if empty or _ordinary(call, plain.var, least=limits.eps if tiny else 0.0):
                return plain
        subnormal = library.subnormal(x, limits.step * limits.further) if tiny and library.subnormal else None
        return kernels.standardize_scaled(
            xp, x, groups=call.groups, eps=call.eps, centred=call.centred, subnormal=subnormal
        )


def affine(call: Call, standardized: Standardized) -> Array:
    """The normalized array, as the caller's x was: shape and dtype."""
    with call.library.quiet():
        y = kernels.affine(standardized.xhat, call.gamma, call.beta)
        return restore(call, y)


def length(call: Call) -> Array:
    """The norm of each group of `calls.direction`, beside the view: v along its own direction."""
    with call.library.quiet():
        return call.groups.mean(call.library.xp, standardize(call).xhat * call.x)


def restore(call: Call, value: Array) -> Array:
    """An array of the view, in the compute dtype, as the caller's x was."""
    if call.layout.channel is not None:
        value = call.library.xp.reshape(value, call.layout.shape)
    return call.library.xp.astype(value, call.dtype, copy=False)


def statistic(call: Call, value: Any) -> Array:
    """A mean, a variance or a norm, of the shape that the caller sees, as a constant."""
    return call.library.constant(call.library.xp.squeeze(value, axis=call.groups.axes))


def _ordinary(call: Call, var: Array, *, least: float) -> bool:
    """Whether no square overflowed, and none that matters underflowed."""
    xp, var = call.library.xp, call.library.constant(var)
    try:
        return float(xp.max(var)) < math.inf and (not least or float(xp.min(var)) >= least)
    except RuntimeError:  # torch.func.vmap and fake tensors: a number that cannot be read
        return False
