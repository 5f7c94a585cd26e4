"""How a call is run: plainly where its numbers can be looked at and turn out ordinary, else proof to any size."""

import math
from typing import Any

from anynorm import kernels
from anynorm.calls import Call
from anynorm.kernels import Array, Standardized


def standardize(call: Call) -> Standardized:
    """The kernel's result. An eager array is scaled only if it turns out that it must be; any other always is."""
    with call.library.quiet():
        if call.mean is not None:
            return kernels.standardize_with(call.library.xp, call.x, call.mean, call.var, eps=call.eps)
        if call.library.readable(call.x):
            plain = _standardize(call, scaled=False)
            if _ordinary(call, plain.var):
                return plain
        return _standardize(call, scaled=True)


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


def _standardize(call: Call, *, scaled: bool) -> Standardized:
    library, subnormal = call.library, None
    if scaled and library.subnormal is not None:
        limits = kernels.limits(library.xp, call.x.dtype)
        subnormal = library.subnormal(call.x, limits.step * limits.further) if call.eps < limits.eps else None
    return kernels.standardize(
        library.xp,
        call.x,
        groups=call.groups,
        eps=call.eps,
        centred=call.centred,
        scaled=scaled,
        subnormal=subnormal,
    )


def _ordinary(call: Call, var: Array) -> bool:
    """Whether no square overflowed, and none that matters underflowed."""
    xp, var = call.library.xp, call.library.constant(var)
    if math.prod(var.shape) == 0:
        return True
    enough = kernels.limits(xp, var.dtype).eps
    try:
        return float(xp.max(var)) < math.inf and (call.eps >= enough or float(xp.min(var)) >= enough)
    except RuntimeError:  # torch.func.vmap and fake tensors: a number that cannot be read
        return False
