"""Numbers of values: whole ones are exact up to 2**53, in float64; without it up to 2**48, as pairs of float32.

A count is a Python number or an array, and its rest what rounding took from it: None, but beside an array of float32.
"""

from functools import partial, reduce
from operator import add
from typing import Any

import numpy as np

from anynorm import kernels
from anynorm.arrays.library import Library
from anynorm.kernels import Array, Namespace, Pair

Count = Any
"""A Python number; or an array, one for each group or one for all of them. Under jax.jit, a traced number."""
Counted = tuple[Count, Array | None]
"""A count and its rest."""
DIGITS = 12
"""So many binary digits of a count are summed over replicas at a time: exactly, of up to 2**12 replicas in float32."""


def split_number(number: float) -> tuple[float, float]:
    """A Python number as one of float32 and what that takes from it."""
    with np.errstate(all="ignore"):
        high = float(np.float32(float(number)))
    return high, float(number - type(number)(high)) if high < float("inf") else 0.0


def is_number(count: Count) -> bool:
    """Whether it is a Python number, and not an array."""
    return isinstance(count, (int, float))


def widened(library: Library, count: Array) -> Counted:
    """An array of counts of any real dtype, as it is kept."""
    xp = library.xp
    if not library.has_float64(count):
        return pair(xp, count)
    integral = xp.isdtype(count.dtype, "integral")
    return xp.astype(count, xp.int64 if integral else dtype_of(library, count, count.dtype), copy=False), None


def kept(library: Library, count: Array, rest: Array | None) -> Counted:
    """A count that came from elsewhere: in one array, where there is float64."""
    if rest is None or not library.has_float64(count):
        return count, rest
    count, rest = (library.xp.astype(x, library.xp.float64) for x in (count, rest))
    return count + rest, None


def dtype_of(library: Library, like: Array, dtype: Any) -> Any:
    """The dtype of sums of weights beside an array, for numbers of a floating dtype."""
    xp = library.xp
    if not library.has_float64(like):
        return xp.float32
    return dtype if str(dtype) in ("float96", "float128") else xp.float64  # a long double stays one


def added(library: Library, one: Counted, other: Counted) -> Counted:
    """Both together."""
    (count, _), (more, _) = one, other
    if is_number(count) and is_number(more):
        return count + more, None
    like = more if is_number(count) else count
    if not library.has_float64(like):
        return _added(library.xp, _beside(library, one, like), _beside(library, other, like))
    if not (_whole(library, count) and _whole(library, more)):
        # the standard lets no integer array into a sum with a fraction
        count, more = (
            float(x) if is_number(x) else library.xp.astype(x, dtype_of(library, x, x.dtype)) for x in (count, more)
        )
    return count + more, None


def scaled(library: Library, counted: Counted, factor: float) -> Counted:
    """A count times a number."""
    count, rest = counted
    if is_number(count):
        return count * factor, None
    if rest is None:
        if isinstance(factor, float):  # the standard multiplies no integer array by one
            count = floating(library, count, dtype_of(library, count, library.xp.float64))
        return count * factor, None
    if isinstance(factor, int):
        return _times(library.xp, (count, rest), factor)
    return kernels.renormalized(library.xp, count * factor, rest * factor)


def floating(library: Library, count: Count, dtype: Any) -> Count:
    """A count to compute with: a Python number, or an array of a floating dtype."""
    if is_number(count) or not library.xp.isdtype(count.dtype, "integral"):
        return count
    return library.xp.astype(count, dtype)


def total(library: Library, weights: Array, *, axes: tuple[int, ...], times: int, halved: bool = True) -> Counted:
    """The sum of weights over axes, which stay with length 1; each of them `times` over.

    Axes whose length is no number are not `halved`, but added as the library does.
    """
    xp = library.xp
    if library.has_float64(weights):
        wide = xp.astype(weights, dtype_of(library, weights, weights.dtype), copy=False)
        return kernels.total(xp, wide, axes=axes, block=library.block) * times, None
    sums = pair(xp, weights)
    for axis in axes if halved else ():
        sums = _summed(xp, sums, axis)
    if not halved:
        sums = kernels.renormalized(xp, *(xp.sum(each, axis=axes, keepdims=True) for each in sums))
    return _times(xp, sums, times)


def _times(xp: Namespace, counted: Pair, times: int) -> Pair:
    """A whole number of times a count: each of the products is exact."""
    result = (xp.zeros_like(counted[0]), xp.zeros_like(counted[1]))
    for bit in range(times.bit_length()):
        if times >> bit & 1:
            result = _added(xp, result, (counted[0] * 2.0**bit, counted[1] * 2.0**bit))
    return result


def parts(xp: Namespace, counted: Counted, dtype: Any) -> list[Array]:
    """What adds up to a count, so that each part may be added up over replicas in this dtype, and nothing is lost."""
    count, rest = counted
    if xp.finfo(dtype).bits >= xp.finfo(count.dtype).bits and rest is None:
        return [count]
    pieces = _cut(xp, count, dtype)
    return pieces if rest is None else list(map(add, pieces, _cut(xp, rest, dtype)))


def joined(library: Library, parts: list[Array], dtype: Any) -> Counted:
    """The count that these parts add up to."""
    xp = library.xp
    if library.has_float64(parts[0]):
        return reduce(add, [xp.astype(part, dtype, copy=False) for part in parts]), None
    return reduce(partial(_added, xp), [(part, xp.zeros_like(part)) for part in parts])


def _cut(xp: Namespace, count: Array, dtype: Any) -> list[Array]:
    pieces = []
    for digits in (3 * DIGITS, 2 * DIGITS, DIGITS, 0):
        part = xp.trunc(count / 2.0**digits) * 2.0**digits
        count = xp.where(xp.isfinite(count), count - part, xp.zeros_like(count))
        pieces.append(xp.astype(part, dtype, copy=False))
    return [*pieces, xp.astype(count, dtype, copy=False)]


def _whole(library: Library, count: Count) -> bool:
    if is_number(count):
        return isinstance(count, int) and count < 2**63
    return bool(library.xp.isdtype(count.dtype, "integral"))


def _beside(library: Library, counted: Counted, like: Array) -> Pair:
    count, rest = counted
    if is_number(count):
        zeros = library.xp.zeros_like(like)
        high, low = split_number(count)
        return zeros + high, zeros + low
    return pair(library.xp, count) if rest is None else (count, rest)


def pair(xp: Namespace, count: Array) -> Pair:
    """Numbers of any real dtype, or bools, as pairs of float32."""
    if xp.isdtype(count.dtype, "bool"):
        count = xp.astype(count, xp.int32)
    if not xp.isdtype(count.dtype, "integral"):
        high = xp.astype(count, xp.float32, copy=False)
        low = count - xp.astype(high, count.dtype, copy=False)
        return high, xp.astype(xp.where(xp.isfinite(low), low, xp.zeros_like(low)), xp.float32, copy=False)
    if xp.iinfo(count.dtype).bits < 32:
        count = xp.astype(count, xp.int32)
    digits = range(0, xp.iinfo(count.dtype).bits - 1, 20)
    pieces = [xp.astype((count // 2**low) % 2**20, xp.float32) * 2.0**low for low in digits]
    return reduce(partial(_added, xp), [(piece, xp.zeros_like(piece)) for piece in pieces])


def _added(xp: Namespace, one: Pair, other: Pair) -> Pair:
    total, lost = kernels.renormalized(xp, one[0], other[0])
    return kernels.renormalized(xp, total, lost + (one[1] + other[1]))


def _summed(xp: Namespace, sums: Pair, axis: int) -> Pair:
    """The sum over an axis, halved again and again."""
    n = sums[0].shape[axis]
    if n == 0:
        return xp.sum(sums[0], axis=axis, keepdims=True), xp.sum(sums[1], axis=axis, keepdims=True)
    while n > 1:
        half = n // 2
        first, second, left = (
            (sums[0][kernels.cut(axis, *ends)], sums[1][kernels.cut(axis, *ends)])
            for ends in ((0, half), (half, 2 * half), (2 * half, n))
        )
        sums = _added(xp, first, second)
        if n % 2:
            sums = xp.concat([sums[0], left[0]], axis=axis), xp.concat([sums[1], left[1]], axis=axis)
        n -= half
    return sums
