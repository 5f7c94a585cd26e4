"""How a call is run: the kernels over the whole array, plainly where numbers can be looked at, else proof to any size."""

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


def restore(call: Call, value: Array) -> Array:
    """An array of the view, in the compute dtype, as the caller's x was."""
    if tuple(value.shape) != call.layout.shape:
        value = call.library.xp.reshape(value, call.layout.shape)
    return call.library.xp.astype(value, call.dtype, copy=False)


def statistic(call: Call, value: Any) -> Array:
    """A mean, a variance or a norm, of the shape that the caller sees, as a constant."""
    return call.library.constant(call.library.xp.reshape(value, call.layout.kept_shape))


def _standardize(call: Call, *, scaled: bool) -> Standardized:
    return kernels.standardize(
        call.library.xp, call.x, groups=call.groups, eps=call.eps, centred=call.centred, scaled=scaled
    )


def _ordinary(call: Call, var: Array) -> bool:
    """Whether no square overflowed, and none that matters underflowed."""
    xp, var = call.library.xp, call.library.constant(var)
    if math.prod(var.shape) == 0:
        return True
    _, tiny = kernels.limits(xp, var.dtype)
    try:
        if not float(xp.max(var)) < math.inf:
            return False
        return call.eps >= tiny * tiny or float(xp.min(var)) >= tiny * tiny
    except RuntimeError:  # torch.func.vmap and fake tensors: a number that cannot be read
        return False
