"""How a call is run: whole or in blocks; plainly where its numbers turn out ordinary, else proof to any size."""

import math
from itertools import product
from typing import Any, NamedTuple

from anynorm import compilers, kernels
from anynorm.arrays import Library, empty
from anynorm.calls import Call
from anynorm.kernels import Array, Standardized
from anynorm.layouts import Layout

BLOCK_BYTES = 2**20
"""A block, and the few temporaries that a kernel makes of it, stay in the cache."""


class Normalized(NamedTuple):
    """A call's result, as the caller's x was, and its statistics beside the view."""

    y: Array
    mean: Array | None
    var: Array


def normalize(call: Call) -> Normalized:
    """The result of a call, in blocks of whole groups where the array is large and may be written part by part."""
    compiler = compilers.chosen(call)
    if compiler != "none":
        y, of = compiled(call, compiler)
        return Normalized(restore(call.library, call.layout, y, call.x.dtype), of.mean, of.var)
    blocks = _blocks(call) if call.library.writes else []
    if len(blocks) < 2:
        standardized = standardize(call)
        return Normalized(affine(call, standardized), standardized.mean, standardized.var)
    y = empty(call.x.shape, call.x, call.x.dtype)
    mean, var = (empty(call.layout.keepdims_shape, call.x, call.dtype) for _ in range(2))
    for block in blocks:
        part = _part(call, block)
        standardized = standardize(part)
        y[block] = affine(part, standardized, view=True)
        if standardized.mean is not None:
            mean[_within(mean, block)] = standardized.mean
        var[_within(var, block)] = standardized.var
    return Normalized(call.library.xp.reshape(y, call.layout.shape), mean if call.centred else None, var)


def compiled(call: Call, compiler: str, *, keep: bool = False) -> tuple[Array, Standardized]:
    """`compilers.normalize`, scaled as in `standardize`; and always by XLA, which divides by multiplying."""
    least = kernels.limits(call.library.xp, call.dtype).eps
    with call.library.quiet():
        if call.mean is not None or (compiler == "torch" and call.library.readable(call.x)):
            plain = compilers.normalize(call, compiler, scaled=False, keep=keep)
            if call.mean is not None or _ordinary(call, plain[1].var, least=least if call.eps < least else 0.0):
                return plain
        return compilers.normalize(call, compiler, scaled=True, keep=keep)


def standardize(call: Call) -> Standardized:
    """The kernel's result. An eager array is scaled only if it turns out that it must be; any other always is."""
    library, xp = call.library, call.library.xp
    limits = kernels.limits(xp, call.dtype)
    tiny = call.eps < limits.eps
    with library.quiet():
        x = xp.astype(call.x, call.dtype, copy=False)
        if call.mean is not None:
            return kernels.standardize_with(xp, x, call.mean, call.var, eps=call.eps)
        vacant = not math.prod(x.shape) > 0  # NaN is a size that Dask does not know: there it takes no minimum
        if vacant or library.readable(x):
            plain = kernels.standardize(
                xp, x, groups=call.groups, eps=call.eps, centred=call.centred, flat=1.0 if tiny else None
            )
            if vacant or _ordinary(call, plain.var, least=limits.eps if tiny else 0.0):
                return plain
        subnormal = library.subnormal(x, limits.step * limits.further) if tiny and library.subnormal else None
        return kernels.standardize_scaled(
            xp, x, groups=call.groups, eps=call.eps, centred=call.centred, subnormal=subnormal
        )


def affine(call: Call, standardized: Standardized, *, view: bool = False) -> Array:
    """The normalized array in the dtype, and unless a `view` is asked for the shape, of the caller's x."""
    with call.library.quiet():
        y = kernels.affine(standardized.xhat, call.gamma, call.beta)
        if view:
            return call.library.xp.astype(y, call.x.dtype, copy=False)
        return restore(call.library, call.layout, y, call.x.dtype)


def length(call: Call) -> Array:
    """The norm of each group of `calls.direction`, beside the view: v along its own direction."""
    with call.library.quiet():
        return call.groups.mean(call.library.xp, standardize(call).xhat * call.x)


def enter(library: Library, layout: Layout, value: Array, dtype: Any) -> Array:
    """An array of the caller's shape in the view and this dtype."""
    value = library.xp.astype(value, dtype, copy=False)
    return value if layout.channel is None else library.xp.reshape(value, layout.view(layout.shape))


def restore(library: Library, layout: Layout, value: Array, dtype: Any) -> Array:
    """An array of the view in the caller's shape and this dtype."""
    if layout.channel is not None:
        value = library.xp.reshape(value, layout.shape)
    return library.xp.astype(value, dtype, copy=False)


def statistic(call: Call, value: Any) -> Array:
    """A mean, a variance or a norm, of the shape that the caller sees, as a constant."""
    return call.library.constant(call.library.xp.squeeze(value, axis=call.groups.axes))


def _blocks(call: Call) -> list[tuple[slice, ...]]:
    """Blocks of whole groups, none much larger than BLOCK_BYTES if that can be; none at all where the array is not.

    An axis that comes after all that are averaged over is not divided: its parts would be strewn over memory.
    """
    shape, averaged = call.x.shape, () if call.mean is not None else call.groups.axes
    size = math.prod(shape) * call.library.xp.finfo(call.dtype).bits // 8
    if size <= BLOCK_BYTES:
        return []
    steps = list(shape)
    for axis in range(max(averaged, default=len(shape) - 1)):
        if size > BLOCK_BYTES and axis not in averaged:
            each = size // shape[axis]
            steps[axis] = max(1, BLOCK_BYTES // each)
            size = each * steps[axis]
    runs = ([slice(i, min(i + step, n)) for i in range(0, n, step)] for n, step in zip(shape, steps, strict=True))
    return list(product(*runs))


def _part(call: Call, block: tuple[slice, ...]) -> Call:
    """The call for a block of x."""

    def cut(whole: Array | None) -> Array | None:
        return None if whole is None else whole[_within(whole, block)]

    return call._replace(
        x=cut(call.x), gamma=cut(call.gamma), beta=cut(call.beta), mean=cut(call.mean), var=cut(call.var)
    )


def _within(part: Array, block: tuple[slice, ...]) -> tuple[slice, ...]:
    """Where in `part`, which broadcasts to x, the block is."""
    return tuple(slice(None) if n == 1 else each for n, each in zip(part.shape, block, strict=True))


def _ordinary(call: Call, var: Array, *, least: float) -> bool:
    """Whether no square overflowed, and none that matters underflowed."""
    xp, var = call.library.xp, call.library.constant(var)
    try:
        return float(xp.max(var)) < math.inf and (not least or float(xp.min(var)) >= least)
    except RuntimeError:  # torch.func.vmap and fake tensors: a number that cannot be read
        return False
