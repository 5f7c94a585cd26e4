"""The mathematics: pure functions of the array API that name no array library and branch on no value.

Batch, layer, instance, group, RMS and weight normalization are one formula here. They differ in `Groups`, which says
which elements share a mean, and in whether that mean is taken away (`centred`).
"""

import math
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
        return total(xp, x, axes=self.axes, block=self.block) / max(self.divisor, 1)


class Standardized(NamedTuple):
    """An array brought to mean 0 and variance 1 in each of its groups, and what brought it there."""

    xhat: Array
    rstd: Array
    """1 / root, or 1 where the root is 0."""
    root: Array
    """sqrt(var + eps)."""
    mean: Array | None
    """None where the array was not centred."""
    var: Array


def standardize(xp: Namespace, x: Array, *, groups: Groups, eps: float, centred: bool, scaled: bool) -> Standardized:
    """(x - mean) / sqrt(var + eps) in each group; without `centred` the mean is taken to be 0.

    `scaled` takes a power of two out of each group first, so that no square overflows or underflows. It costs a pass,
    and changes nothing where the numbers are of ordinary size.
    """
    unit = power_of_two(xp, x, groups=groups, eps=eps) if scaled else 1.0
    if scaled:
        x = x * unit
    mean = None
    if centred:
        x, mean = centre(xp, x, groups=groups)
    var = groups.mean(xp, x * x)
    root = xp.sqrt(var + eps * unit * unit)
    rstd = 1 / xp.where(root == 0, xp.ones_like(root) * unit, root)
    xhat = x * rstd
    if scaled:
        rstd, root, var = rstd * unit, root / unit, var / unit / unit
        mean = mean / unit if centred else None
    return Standardized(xhat, rstd, root, mean, var)


def standardize_with(xp: Namespace, x: Array, mean: Array, var: Array, *, eps: float) -> Standardized:
    """(x - mean) / sqrt(var + eps) for a mean and a variance that are given: inference."""
    root = xp.sqrt(var + eps)
    rstd = 1 / xp.where(root == 0, xp.ones_like(root), root)
    return Standardized((x - mean) * rstd, rstd, root, mean, var)


def affine(xhat: Array, gamma: Array | None, beta: Array | None) -> Array:
    """xhat * gamma + beta."""
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


def parameter_gradient(xp: Namespace, d: Array, parameter: Array, *, block: int | None) -> Array:
    """The sum of `d` over the axes along which `parameter` was broadcast."""
    spread = tuple(axis for axis, n in enumerate(parameter.shape) if n == 1)
    return total(xp, d, axes=spread, block=block)


def merge(first: tuple[Array, Array], second: tuple[Array, Array], share: Any) -> tuple[Array, Array]:
    """The mean and variance of two sets of values together; `share` is the second's part of the joint count.

    Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979, eq. 2.1.
    """
    (mean, var), (other_mean, other_var) = first, second
    delta = other_mean - mean
    between = delta * (share * (1 - share)) * delta  # in this order: nothing, where one of the two is empty
    return mean + delta * share, var * (1 - share) + other_var * share + between


def centre(xp: Namespace, x: Array, *, groups: Groups) -> tuple[Array, Array]:
    """x less its mean, and the mean, in two stages: the second takes away the rounding error of the first."""
    first = groups.mean(xp, x)
    x = x - first
    second = groups.mean(xp, x)
    return x - second, first + second


def power_of_two(xp: Namespace, x: Array, *, groups: Groups, eps: float) -> Array:
    """For each group 1, or the power of two that makes its numbers safe to square and to add up.

    With tiny = 1 / huge = 2**-42 in float32 (2**-341 in float64), numbers between tiny and huge are left as they are:
    even 2**32 of their squares have a sum, and a spread of one unit in the last place still has a square.
    """
    huge, tiny = limits(xp, x.dtype)
    if math.prod(x.shape) == 0:
        return xp.ones_like(total(xp, x, axes=groups.axes, block=None))
    top = xp.max(x, axis=groups.axes, keepdims=True) if groups.axes else x
    bottom = xp.min(x, axis=groups.axes, keepdims=True) if groups.axes else x
    largest = xp.maximum(top, -bottom)
    one = xp.ones_like(largest)
    unit = xp.where(largest > huge, one * tiny * tiny, one)
    if eps >= tiny * tiny:
        return unit  # beside such an eps the square of a tiny number is nothing, and its underflow does no harm
    return xp.where(largest < tiny, one * huge * huge, unit)


def limits(xp: Namespace, dtype: Any) -> tuple[float, float]:
    """The largest and the smallest magnitude, powers of two, that are squared as they are."""
    exponent = math.frexp(float(xp.finfo(dtype).max))[1] // 3
    return 2.0**exponent, 2.0**-exponent


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
