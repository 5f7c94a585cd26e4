"""Powers of two, which bring numbers of any size to one whose square exists."""

import math
import sys
from typing import Any, NamedTuple

from anynorm.kernels.ops import NEW, Array, Namespace, Outputs
from anynorm.kernels.reductions import Sums
from anynorm.kernels.statistics import Standardized, Stats


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


def factors(xp: Namespace, one: Array, other: Array) -> tuple[Array, Array]:
    """Two factors to multiply with in turn, so that x * one * other has all its digits if it has them in the end.

    Their product, and 1, where that has all its digits; else both, as they make x larger, or smaller, both.
    """
    both = one * other
    size = xp.abs(both)
    whole = (size >= smallest_normal(xp, both.dtype)) & ~(size > float(xp.finfo(both.dtype).max))
    return xp.where(whole, both, one), xp.where(whole, xp.ones_like(both), other)


def scaled(
    xp: Namespace, x: Array, gamma: Array | None, rstd: Array, *, places: Outputs = NEW, exact: bool = False
) -> Array:
    """x * gamma * rstd, for numbers of any size; `exact` says that gamma * rstd has all its digits everywhere."""
    multiply = places.result.multiply
    if gamma is None:
        return multiply(x, rstd)
    if not exact:
        one, other = factors(xp, gamma, rstd)
        return multiply(multiply(x, one), other)
    within = [n == max(sizes) for n, *sizes in zip(x.shape, gamma.shape, rstd.shape, strict=True)]
    return multiply(x, places.product.multiply(gamma, rstd) if all(within) else gamma * rstd)


def unscaled(
    xp: Namespace, x: Array, gamma: Array | None, rstd: Array, *, places: Outputs = NEW, exact: bool = False
) -> Array:
    """x / gamma / rstd, the way back from `scaled`; `exact` says that 1 / gamma, times 1 / rstd, has all its digits."""
    multiply = places.result.multiply
    if gamma is None:
        return multiply(x, xp.reciprocal(rstd))
    if exact:
        return multiply(x, xp.reciprocal(gamma) * xp.reciprocal(rstd))
    one, other = inverse_factors(xp, gamma, rstd)
    return multiply(multiply(x, one), other)


def inverse_factors(xp: Namespace, gamma: Array, rstd: Array) -> tuple[Array, Array]:
    """`factors` of 1 / gamma and 1 / rstd, which is a root and in the middle of the range.

    It stays in range times a power of two that the reciprocal of a very large or small gamma needs.
    """
    both = gamma * rstd
    one, least, step = xp.ones_like(both), smallest_normal(xp, both.dtype), float(xp.finfo(both.dtype).eps) / 2
    whole = _within(xp, both, least)
    power = xp.where(xp.abs(gamma) > 1, one * step, one / step)
    power = xp.where(_within(xp, gamma, least), one, power)
    root = power / rstd
    other = xp.reciprocal(xp.where(whole, one, gamma * power))
    return xp.where(whole, xp.reciprocal(xp.where(whole, both, one)), root), other


def _within(xp: Namespace, x: Array, least: float) -> Array:
    """Whether a number and its reciprocal have all their digits."""
    size = xp.abs(x)
    return (size >= least) & ~(size > 1 / least)


def power_of_two(xp: Namespace, x: Array) -> Array:
    """The largest power of two in a normal number above 0, by operations that are rounded as IEEE 754 has it.

    Rump, Ogita & Oishi, "Accurate floating-point summation", 2008, algorithm 3.5.
    """
    half, large, one = (
        float(xp.finfo(x.dtype).eps) / 2,
        x > 1,
        xp.ones_like(x),
    )  # a long double has more digits than 1.0
    step = limits(xp, x.dtype).further  # so that nothing that follows overflows
    q = xp.where(large, x * (1 / step), x) * (one * (1 / (2 * half)) + one)
    unit = q - q * (one - half)
    return xp.where(large, unit * step, unit)


def extremes(xp: Namespace, x: Array, *, groups: Sums) -> tuple[Array, Array]:
    """The smallest and the largest number of each group."""
    if not groups.axes:
        return x, x
    return xp.min(x, axis=groups.axes, keepdims=True), xp.max(x, axis=groups.axes, keepdims=True)


class Scale(NamedTuple):
    """A power of two for each group that makes its numbers safe to square, and what goes with it."""

    unit: Array
    eps: Array
    """eps times the square of the unit."""
    rstd_at_zero: Array | float | None
    """What 1 / sqrt(var + eps) becomes where eps itself is lost beside the numbers."""
    constant: Any
    """In which groups all numbers are one and the same, and which, times the unit; None where it is not known."""

    def apply(self, xp: Namespace, x: Array, subnormal: Array | None) -> Array:
        """x * unit, for the `subnormal` of `standardize_scaled`."""
        return times(xp, x, self.unit, subnormal)

    def undo(self, xp: Namespace, scaled: Standardized) -> Standardized:
        """What x is standardized to, from what x * unit is."""
        stats = self.undo_stats(scaled.stats)
        if scaled.rstd is None:
            return scaled._replace(xhat=scaled.xhat / self.unit, stats=stats)
        return scaled._replace(rstd=self.undo_rstd(xp, scaled.rstd), stats=stats)

    def undo_stats(self, stats: Stats) -> Stats:
        """The statistics of x, from those of x * unit."""
        mean, mean_lo = (None if each is None else each / self.unit for each in (stats.mean, stats.mean_lo))
        one = 1 / self.unit
        return Stats(mean, mean_lo, stats.var * one * one)

    def undo_rstd(self, xp: Namespace, rstd: Array) -> Array:
        """1 / sqrt(var + eps), from that of x * unit, as far as the dtype holds it."""
        return at_most_largest(xp, rstd * self.unit)


def scale_of(xp: Namespace, bottom: Array, top: Array, *, eps: float, centred: bool) -> Scale:
    """1, or the power of two that makes numbers from `bottom` to `top` safe to square and add up; and eps so scaled.

    Large ones that are equal leave nothing to square where they are `centred`, and eps times the power may overflow.
    """
    sizes, one = reached(xp, bottom, top), xp.ones_like(top)
    if not centred:
        return scale_for(xp, sizes, one, eps=eps)
    constant, (large, larger, *small) = top == bottom, sizes
    scale = scale_for(xp, [large & ~constant, larger & ~constant, *small], one, eps=eps)
    return scale._replace(constant=(constant, top * scale.unit))


def times(xp: Namespace, x: Array, unit: Array, subnormal: Array | None) -> Array:
    """x * unit, for the `subnormal` of `standardize_scaled`."""
    x = x * unit
    if subnormal is None:
        return x
    return x + xp.where(unit > limits(xp, x.dtype).step, subnormal, xp.zeros_like(subnormal))


def reached(xp: Namespace, bottom: Array, top: Array) -> list[Array]:
    """Whether a number from `bottom` to `top` is too large, even by far; and whether one is not too small, by far."""
    largest = xp.maximum(top, -bottom)
    large, small, step, _, _ = limits(xp, largest.dtype)
    return [largest > large, largest > large * step, largest >= small, largest >= small / step]


def scale_for(xp: Namespace, sizes: list[Array], one: Array, *, eps: float) -> Scale:
    """The scale of numbers of which `reached` is known; `one` is a 1 for each group.

    Both are chosen among constants: a compiler may put the factors of a product in an order that overflows.
    """
    _, _, step, further, enough = limits(xp, one.dtype)
    large, larger, not_small, not_smaller = sizes
    levels = [(large, 1 / step), (larger, 1 / step / further)]
    if eps < enough:
        levels += [(~not_small, step), (~not_smaller, step * further)]
    unit, scaled_eps = one, one * eps
    for beyond, factor in levels:
        unit = xp.where(beyond, one * factor, unit)
        scaled_eps = xp.where(beyond, one * (eps * factor * factor), scaled_eps)
    # where eps itself is lost beside the numbers, it is still the variance, as far as its inverse root is in range
    return Scale(unit, scaled_eps, at_most_largest(xp, 1 / unit / (math.sqrt(eps) or 1.0)), None)


def at_most_largest(xp: Namespace, x: Array) -> Array:
    """x, or the largest number of its dtype where it is infinite."""
    half = float(xp.finfo(x.dtype).max) / 2  # NumPy 1 takes the largest float32 itself for a float64
    return xp.minimum(x, xp.ones_like(x) * half * 2)


def limits(xp: Namespace, dtype: Any) -> Limits:
    """In float32 2**48, 2**-25, 2**64, 2**32 and 2**-85; in float64 2**384, 2**-204, 2**512, 2**256 and 2**-682."""
    largest = min(float(xp.finfo(dtype).max), sys.float_info.max)  # a long double is scaled as a double
    e = math.frexp(largest)[1]
    return Limits(2.0 ** (3 * e // 8), 2.0 ** -(e // 5), 2.0 ** (e // 2), 2.0 ** (e // 4), 2.0 ** -(2 * e // 3))


def smallest_normal(xp: Namespace, dtype: Any) -> Any:
    """The smallest number with all its digits."""
    least = xp.finfo(dtype).smallest_normal
    return float(least) or least  # that of a long double is none to a float
