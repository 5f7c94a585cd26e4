"""Numbers of values: whole ones are exact up to 2**53, in float64; without it up to 2**48, as pairs of float32.

A count is a Python number or an array, and its rest what rounding took from it: None, but beside an array of float32.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

from anynorm import kernels
from anynorm.arrays.library import Library
from anynorm.arrays.numbers import split_number
from anynorm.kernels import Array, Namespace, Pair

Count = Any
"""A Python number; or an array, one for each group or one for all of them. Under jax.jit, a traced number."""
Counted = tuple[Count, Array | None]
"""A count and its rest."""
DIGITS = 12
"""So many binary digits of a count are summed over replicas at a time: exactly, of up to 2**12 replicas in float32."""


def is_number(count: Count) -> bool:
    """Whether it is a Python number, and not an array."""
    return isinstance(count, (int, float))


def widened(library: Library, count: Array) -> Counted:
    """An array of counts of any real dtype, as it is kept."""
    xp = library.xp
    if not library.float64(count):
        return pair(xp, count)
    whole = xp.isdtype(count.dtype, "integral")
    return xp.astype(count, xp.int64 if whole else dtype_of(library, count, count.dtype), copy=False), None


def kept(library: Library, count: Array, rest: Array | None) -> Counted:
    """A count that came from elsewhere: in one array, where there is float64."""
    if rest is None or not library.float64(count):
        return count, rest
    count, rest = (library.xp.astype(each, library.xp.float64) for each in (count, rest))
    return count + rest, None


def dtype_of(library: Library, like: Array, dtype: Any) -> Any:
    """The dtype of sums of weights beside an array, for numbers of a floating dtype."""
    xp = library.xp
    if not library.float64(like):
        return xp.float32
    return dtype if str(dtype) in ("float96", "float128") else xp.float64  # a long double stays one


def added(library: Library, one: Counted, other: Counted) -> Counted:
    """Both together."""
    (count, _), (more, _) = one, other
    if is_number(count) and is_number(more):
        return count + more, None
    like = more if is_number(count) else count
    if library.float64(like):
        if all(_whole(library, each) for each in (count, more)):
            return count + more, None
        # the standard lets no integer array into a sum with a fraction
        count, more = (
            float(x) if is_number(x) else library.xp.astype(x, dtype_of(library, x, x.dtype)) for x in (count, more)
        )
        return count + more, None
    return _added(library.xp, *(_beside(library, each, like) for each in (one, other)))


def floating(library: Library, count: Count, dtype: Any) -> Count:
    """A count to compute with: a Python number, or an array of a floating dtype."""
    if is_number(count) or not library.xp.isdtype(count.dtype, "integral"):
        return count
    return library.xp.astype(count, dtype)


def total(library: Library, weights: Array, *, axes: tuple[int, ...], times: int) -> Counted:
    """The sum of weights over axes, which stay with length 1; each of them `times` over."""
    xp = library.xp
    if library.float64(weights):
        wide = xp.astype(weights, dtype_of(library, weights, weights.dtype), copy=False)
        return kernels.total(xp, wide, axes=axes, block=library.block) * times, None
    sums = pair(xp, weights)
    for axis in axes:
        sums = _summed(xp, sums, axis)
    whole = _of_each(xp.zeros_like, sums)
    for bit in range(times.bit_length()):  # each of these products is exact
        if times >> bit & 1:
            whole = _added(xp, whole, (sums[0] * 2.0**bit, sums[1] * 2.0**bit))
    return whole


def parts(xp: Namespace, counted: Counted, dtype: Any) -> list[Array]:
    """What adds up to a count, so that each part may be added up over replicas in this dtype, and nothing is lost."""
    count, rest = counted
    if xp.finfo(dtype).bits >= xp.finfo(count.dtype).bits and rest is None:
        return [count]
    found = [_cut(xp, each, dtype) for each in (count, rest) if each is not None]
    return [reduce(lambda one, other: one + other, same) for same in zip(*found, strict=True)]


def joined(library: Library, found: list[Array], dtype: Any) -> Counted:
    """The count that these parts add up to."""
    xp = library.xp
    if library.float64(found[0]):
        return reduce(lambda one, other: one + other, [xp.astype(each, dtype, copy=False) for each in found]), None
    whole = (xp.zeros_like(found[0]), xp.zeros_like(found[0]))
    return reduce(lambda one, other: _added(xp, one, (other, xp.zeros_like(other))), found, whole)


def _cut(xp: Namespace, count: Array, dtype: Any) -> list[Array]:
    found = []
    for digits in (3 * DIGITS, 2 * DIGITS, DIGITS, 0):
        part = xp.trunc(count / 2.0**digits) * 2.0**digits
        count = xp.where(xp.isfinite(count), count - part, xp.zeros_like(count))
        found.append(xp.astype(part, dtype, copy=False))
    return [*found, xp.astype(count, dtype, copy=False)]


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
    found = None
    for digits in range(0, xp.iinfo(count.dtype).bits - 1, 20):
        part = xp.astype((count // 2**digits) % 2**20, xp.float32) * 2.0**digits
        part = (part, xp.zeros_like(part))
        found = part if found is None else _added(xp, found, part)
    assert found is not None
    return found


def _added(xp: Namespace, one: Pair, other: Pair) -> Pair:
    whole, lost = kernels.renormalized(xp, one[0], other[0])
    return kernels.renormalized(xp, whole, lost + (one[1] + other[1]))


def _summed(xp: Namespace, sums: Pair, axis: int) -> Pair:
    """The sum over an axis, halved again and again."""
    n = sums[0].shape[axis]
    if n == 0:
        return _of_each(lambda x: xp.sum(x, axis=axis, keepdims=True), sums)
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


def _of_each(function: Callable[[Array], Array], sums: Pair) -> Pair:
    return function(sums[0]), function(sums[1])
