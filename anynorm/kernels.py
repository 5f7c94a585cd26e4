"""The mathematics: pure functions of the array API that name no array library and branch on no value.

Batch, layer, instance, group, RMS and weight normalization are one formula here. They differ in `Groups`, which says
which elements share a mean, and in whether that mean is taken away (`centred`).
"""

import math
import sys
from typing import Any, NamedTuple

Array = Any
Namespace = Any


class Groups(NamedTuple):
    """The elements that share one mean and one variance: all those along `axes`."""

    axes: tuple[int, ...]
    divisor: int
    """What a sum is divided by: the number of elements; 1 for weight normalization, whose norm is a plain sum."""
    block: int | None
    """The longest run of elements added in one go, or None to leave the order of a sum to the array library."""

    def mean(self, xp: Namespace, x: Array) -> Array:
        """The mean of each group, beside x."""
        return total(xp, x, axes=self.axes, block=self.block) / float(max(self.divisor, 1))


class Standardized(NamedTuple):
    """An array brought to mean 0 and variance 1 in each of its groups, and what brought it there."""

    xhat: Array
    rstd: Array
    """1 / sqrt(var + eps); where that is 1 / 0, 1."""
    mean: Array | None
    """None where the array was not centred."""
    var: Array


class Limits(NamedTuple):
    """The magnitudes, powers of two, between which numbers of a dtype are squared and added up as they are."""

    large: float
    """2**31 squares of this have a sum."""
    small: float
    """A spread of one unit in its last place still has a square."""
    step: float
    """What larger numbers are divided by, and smaller ones multiplied with."""
    further: float
    """And again, those that are too large or too small even so."""
    eps: float
    """Beside an eps this large the square of a small number is nothing, and its underflow does no harm."""


def standardize(
    xp: Namespace,
    x: Array,
    *,
    groups: Groups,
    eps: float | Array,
    centred: bool,
    flat: float | Array | None = 1.0,
    alike: tuple[Array, Array] | None = None,
) -> Standardized:
    """(x - mean) / sqrt(var + eps) in each group; without `centred` the mean is taken to be 0.

    `flat` is what 1 / sqrt(var + eps) becomes where it is 1 / 0, and None where it never is; `alike` is for `centre`.
    """
    mean = None
    if centred:
        x, mean = centre(xp, x, groups=groups, alike=alike)
    var = groups.mean(xp, x * x)
    rstd = inverse_root(xp, var + eps, flat=flat)
    return Standardized(x * rstd, rstd, mean, var)


def standardize_scaled(
    xp: Namespace, x: Array, *, groups: Groups, eps: float, centred: bool, subnormal: Array | None = None
) -> Standardized:
    """`standardize` for numbers of any size: a power of two is taken out of each group, so that its squares exist.

    It costs a pass for the extremes; where the numbers are of ordinary size the power is 1. `subnormal` holds the
    numbers that the library flushes to 0, times the power of two that is taken out of the smallest.
    """
    bottom, top = extremes(xp, x, groups=groups)
    unit, scaled_eps = power_of_two(xp, xp.maximum(top, -bottom), eps=eps)
    x = x * unit
    if subnormal is not None:
        x = x + xp.where(unit > limits(xp, x.dtype).step, subnormal, xp.zeros_like(subnormal))
    most = xp.ones_like(unit) * float(xp.finfo(x.dtype).max)
    # where eps itself is lost beside the numbers, it is still the variance, as far as its inverse root has room
    flat = xp.minimum(1 / unit / (math.sqrt(eps) or 1.0), most)
    scaled = standardize(
        xp, x, groups=groups, eps=scaled_eps, centred=centred, flat=flat, alike=(top == bottom, top * unit)
    )
    mean = None if scaled.mean is None else scaled.mean / unit
    return Standardized(scaled.xhat, xp.minimum(scaled.rstd * unit, most), mean, scaled.var * (1 / unit) * (1 / unit))


def standardize_with(xp: Namespace, x: Array, mean: Array, var: Array, *, eps: float) -> Standardized:
    """(x - mean) / sqrt(var + eps) for a mean and a variance that are given: inference."""
    rstd = inverse_root(xp, var + eps, flat=1.0)
    return Standardized((x - mean) * rstd, rstd, mean, var)


def inverse_root(xp: Namespace, square: Array, *, flat: float | Array | None) -> Array:
    """1 / sqrt(square), or `flat` where the square is 0 or too small to tell; its derivative is finite there too."""
    if flat is None:
        return 1 / xp.sqrt(square)
    lost = square < float(xp.finfo(square.dtype).smallest_normal)
    one = xp.ones_like(square)
    return xp.where(lost, one * flat, 1 / xp.sqrt(xp.where(lost, one, square)))


def affine(xhat: Array, gamma: Array | None, beta: Array | None) -> Array:
    """`xhat * gamma + beta`."""
    y = xhat if gamma is None else xhat * gamma
    return y if beta is None else y + beta


def input_gradient(
    xp: Namespace, dy: Array, gamma: Array | None, of: Standardized, *, groups: Groups | None, centred: bool
) -> Array:
    """The gradient of `affine(standardize(x))` with respect to x; without `groups`, of `standardize_with`.

    rstd * (g - mean(g) - xhat * mean(g * xhat)), where g = dy * gamma; the mean of g stays where x was not centred.
    """
    g = affine(dy, gamma, None)
    if groups is None:
        return g * of.rstd
    if centred:
        g, _ = centre(xp, g, groups=groups)
    return (g - of.xhat * groups.mean(xp, g * of.xhat)) * of.rstd


def parameter_gradient(xp: Namespace, d: Array, shape: tuple[int, ...], *, block: int | None) -> Array:
    """The sum of `d` over the axes along which a parameter of this shape was broadcast."""
    spread = tuple(axis for axis, n in enumerate(shape) if n == 1)
    return total(xp, d, axes=spread, block=block) if spread else d * 1.0  # never the caller's own array


def merge(first: tuple[Array, Array], second: tuple[Array, Array], share: Any) -> tuple[Array, Array]:
    """The mean and variance of two sets of values together; `share` is the second's part of the joint count.

    Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979, eq. 2.1.
    """
    (mean, var), (other_mean, other_var) = first, second
    delta = other_mean - mean
    between = delta * (share * (1 - share)) * delta  # in this order: nothing, where one of the two is empty
    return mean + delta * share, var * (1 - share) + other_var * share + between


def centre(xp: Namespace, x: Array, *, groups: Groups, alike: tuple[Array, Array] | None = None) -> tuple[Array, Array]:
    """The array less its mean, and the mean, in two stages: the second takes away the rounding error of the first.

    `alike` says in which groups all numbers are one and the same, and which: their mean is that number to the last
    bit, which a compiler that divides by multiplying would miss.
    """
    first = groups.mean(xp, x)
    if alike is not None:
        first = xp.where(*alike, first)
    x = x - first
    second = groups.mean(xp, x)
    return x - second, first + second


def extremes(xp: Namespace, x: Array, *, groups: Groups) -> tuple[Array, Array]:
    """The smallest and the largest number of each group."""
    if not groups.axes:
        return x, x
    return xp.min(x, axis=groups.axes, keepdims=True), xp.max(x, axis=groups.axes, keepdims=True)


def power_of_two(xp: Namespace, largest: Array, *, eps: float) -> tuple[Array, Array]:
    """1, or the power of two that makes numbers up to `largest` safe to square and to add up; and eps so scaled.

    Both are chosen among constants: a compiler may put the factors of a product in an order that overflows.
    """
    large, small, step, further, enough = limits(xp, largest.dtype)
    levels = [(largest > large, 1 / step), (largest > large * step, 1 / step / further)]
    if eps < enough:
        levels += [(largest < small, step), (largest < small / step, step * further)]
    one = xp.ones_like(largest)
    unit, scaled_eps = one, one * eps
    for beyond, factor in levels:
        unit = xp.where(beyond, one * factor, unit)
        scaled_eps = xp.where(beyond, one * (eps * factor * factor), scaled_eps)
    return unit, scaled_eps


def limits(xp: Namespace, dtype: Any) -> Limits:
    """In float32 2**48, 2**-25, 2**64, 2**32 and 2**-85; in float64 eight times these exponents, but 2**-204."""
    largest = min(float(xp.finfo(dtype).max), sys.float_info.max)  # a long double is scaled as a double
    e = math.frexp(largest)[1]
    return Limits(2.0 ** (3 * e // 8), 2.0 ** -(e // 5), 2.0 ** (e // 2), 2.0 ** (e // 4), 2.0 ** -(2 * e // 3))


def total(xp: Namespace, x: Array, *, axes: tuple[int, ...], block: int | None) -> Array:
    """The sum over `axes`, which stay with length 1; at most `block` numbers are added in one go.

    Some libraries add one number after another, and the rounding error grows with their number: NumPy over any axis
    but the last in memory. In blocks it grows with the block.
    """
    if block is None or math.prod([x.shape[axis] for axis in axes]) <= block:
        return xp.sum(x, axis=axes, keepdims=True) if axes else x
    for axis in reversed(axes):
        x = _total_along(xp, x, axis, block)
    return x


def _total_along(xp: Namespace, x: Array, axis: int, block: int) -> Array:
    n = x.shape[axis]
    if n <= block:
        return xp.sum(x, axis=axis, keepdims=True)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    whole = n - n % block
    head = xp.reshape(x[_cut(axis, 0, whole)], (*before, n // block, block, *after))
    sums = xp.sum(head, axis=axis + 1)
    if whole < n:
        tail = xp.sum(x[_cut(axis, whole, n)], axis=axis, keepdims=True)
        sums = xp.concat([sums, tail], axis=axis)
    return _total_along(xp, sums, axis, block)


def _cut(axis: int, start: int, stop: int) -> tuple[Any, ...]:
    return (slice(None),) * axis + (slice(start, stop), ...)
