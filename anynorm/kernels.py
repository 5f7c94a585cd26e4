"""The mathematics: pure functions of the array API that name no array library and branch on no value.

Batch, layer, instance, group, RMS and weight normalization are one formula here. They differ in `Groups`, which says
which elements share a mean, and in whether that mean is taken away (`centred`).
"""

import math
import operator
import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

Array = Any
Namespace = Any


class Arithmetic(NamedTuple):
    """Where the arrays of x's size go that a kernel makes one of another: each is new, or all have one place.

    A kernel therefore makes no use of such an array once it has made the next of it.
    """

    add: Callable[[Array, Array], Array]
    subtract: Callable[[Array, Array], Array]
    multiply: Callable[[Array, Array], Array]
    multiply_add: Callable[[Array, Array, Array], Array]
    """x * factor + addend, in one pass where the library can; the addend is not in the place of the result."""


def multiply_add(x: Array, factor: Array, addend: Array) -> Array:
    """`x * factor + addend`."""
    return x * factor + addend


PURE = Arithmetic(operator.add, operator.sub, operator.mul, multiply_add)


class Places(NamedTuple):
    """Where a gradient's arrays of x's size go: the result; xhat, which is used up; products, which are added up."""

    result: Arithmetic = PURE
    xhat: Arithmetic = PURE
    product: Arithmetic = PURE


NEW = Places()


class Means(Protocol):
    """How the mean of each group is taken."""

    def mean(self, xp: Namespace, x: Array) -> Array:
        """Of x, beside x."""

    def mean_product(self, xp: Namespace, x: Array, other: Array, *, ops: Arithmetic = PURE) -> Array:
        """Of x * other."""


class WideMeans(Means, Protocol):
    """The same, of numbers in a wide dtype, which are added up about one of them."""

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of a group."""

    def first(self, x: Array) -> Array:
        """One number of each group, beside x."""


class Groups(NamedTuple):
    """The elements that share one mean and one variance: all those along `axes`."""

    axes: tuple[int, ...]
    divisor: float
    """What a sum is divided by: the number of elements, or 1 if there are none; 1 for weight normalization, whose norm
    is a plain sum."""
    block: int | None
    """The longest run of elements added in one go, or None where the array library adds any along one axis exactly."""
    ones: Array | None = None
    """A run of ones, where the library adds fastest by multiplying with them."""
    norm: Callable[[Array], Array] | None = None
    """The norm along the last axis, where the library adds squares fastest as those of the norms of short runs."""
    number: Array | None = None
    """The divisor as an array, where the library divides faster by one."""
    strewn: bool = False
    """Whether a group lies in memory in short runs among those of others: rows of all are then added first."""
    spelt: bool = False
    """Whether the mean of such a group is as long as a run, as it then goes with many of them at once."""

    def by(self, divisor: float) -> "Groups":
        """These, with another divisor."""
        return self if divisor == self.divisor else self._replace(divisor=divisor, number=None)

    def first(self, x: Array) -> Array:
        """The first number of each group, beside x."""
        index: list[Any] = [slice(None)] * len(x.shape)
        for axis in self.axes:
            index[axis] = slice(0, 1)
        return x[tuple(index)]

    def mean(self, xp: Namespace, x: Array) -> Array:
        """The mean of each group, beside x."""
        if self.strewn:
            rows = total(xp, x, axes=self.axes[:-1], block=self.block)
            mean = self._shared(xp.sum(rows, axis=-1, keepdims=True))
            return mean + xp.zeros_like(rows) if self.spelt else mean
        if self.ones is not None:
            if self.axes == (x.ndim - 1,) and self.ones.shape[0] == x.shape[-1]:
                return self._shared(_dot(xp, x, self.ones))
        elif self.block is not None and self.number is None:
            n = math.prod([x.shape[axis] for axis in self.axes])
            if n == self.divisor <= self.block and self.axes:
                return xp.mean(x, axis=self.axes, keepdims=True)
        return self._shared(total(xp, x, axes=self.axes, block=self.block, ones=self.ones))

    def dots(self, x: Array) -> bool:
        """Whether products are added as they are made."""
        return self.ones is not None and self._trailing(x)

    def _shared(self, sums: Array) -> Array:
        """Sums, divided; where there is nothing to add they are the array itself."""
        if self.divisor == 1 and self.axes:
            return sums
        return sums / (self.divisor if self.number is None else self.number)

    def _trailing(self, x: Array) -> bool:
        return self.axes[-1:] == (x.ndim - 1,) and not self.strewn

    def mean_product(self, xp: Namespace, x: Array, other: Array, *, ops: Arithmetic = PURE) -> Array:
        """The mean of x * other."""
        if other is x and self.norm is not None and self._trailing(x):
            return self._shared(total(xp, _squares(xp, x, self.norm), axes=self.axes, block=self.block))
        if not self.dots(x):
            return self.mean(xp, ops.multiply(x, other))
        products = _dot(xp, x, other)
        if len(self.axes) > 1:
            products = total(xp, products, axes=self.axes[:-1], block=self.block)
        return self._shared(products)


class Spread(NamedTuple):
    """The statistics of each group."""

    mean: Array
    """None where the array is not centred."""
    rest: Array
    """What rounding took from the mean: x less `mean`, and then less this, is exact. None where it is not known."""
    var: Array

    def astype(self, xp: Namespace, dtype: Any) -> "Spread":
        """In another dtype, with all the digits of the mean that it has room for."""
        if self.mean is None or self.rest is None or self.mean.dtype == dtype == self.var.dtype == self.rest.dtype:
            return self
        return Spread(*recast(xp, self.mean, self.rest, dtype), xp.astype(self.var, dtype, copy=False))


class Standardized(NamedTuple):
    """An array brought to mean 0 and variance 1 in each of its groups, and what brought it there."""

    xhat: Array
    rstd: Array
    """1 / sqrt(var + eps); where that is 1 / 0, 1."""
    spread: Spread
    stray: Array | None = None
    """What becomes of a number that weighs nothing if that is not finite, and 0 elsewhere; its xhat is 0."""


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
    groups: Means,
    eps: float | Array,
    centred: bool,
    flat: float | Array | None = 1.0,
    alike: tuple[Array, Array] | None = None,
) -> Standardized:
    """(x - mean) / sqrt(var + eps) in each group; without `centred` the mean is taken to be 0.

    `flat` is what 1 / sqrt(var + eps) becomes where it is 1 / 0, and None where it never is; `alike` is for `centre`.
    """
    d, spread = deviations(xp, x, groups=groups, centred=centred, alike=alike)
    if alike is not None:  # the derivative of a root is infinite beside no eps, and 0 times that is no number
        spread = spread._replace(var=xp.where(spread.var == 0, xp.zeros_like(spread.var), spread.var))
    rstd = inverse_root(xp, spread.var + eps, flat=flat)
    return Standardized(d * rstd, rstd, spread)


def standardize_scaled(
    xp: Namespace, x: Array, *, groups: Groups, eps: float, centred: bool, subnormal: Array | None = None
) -> Standardized:
    """`standardize` for numbers of any size: a power of two is taken out of each group, so that its squares exist.

    It costs a pass for the extremes; where the numbers are of ordinary size the power is 1. `subnormal` holds the
    numbers that the library flushes to 0, times the power of two that is taken out of the smallest.
    """
    scale = scale_of(xp, *extremes(xp, x, groups=groups), eps=eps, centred=centred)
    x = scale.enter(xp, x, subnormal)
    return scale.leave(
        xp, standardize(xp, x, groups=groups, eps=scale.eps, centred=centred, flat=scale.flat, alike=scale.alike)
    )


def standardize_with(xp: Namespace, x: Array, spread: Spread, *, eps: float | Array) -> Standardized:
    """(x - mean) / sqrt(var + eps) for statistics that are given: inference."""
    rstd = inverse_root(xp, spread.var + eps, flat=1.0)
    return Standardized(less(x, spread) * rstd, rstd, spread)


class Narrow(NamedTuple):
    """Statistics of a wide dtype, as a narrow one has room for them: (x * unit - mean - rest) * rstd is xhat."""

    unit: Array
    """A power of two."""
    mean: Array | None
    """Of x * unit; None where x is not centred."""
    rest: Array | None
    rstd: Array
    """Of x * unit."""


def standardize_wide(
    xp: Namespace, x: Array, *, groups: WideMeans, eps: float, centred: bool, dtype: Any
) -> Standardized:
    """`standardize` for numbers of any size, by sums in a wide dtype, which the statistics are of."""
    spread = wide_statistics(xp, xp.astype(x, dtype), groups=groups, centred=centred)
    if spread.mean is not None:
        spread = spread._replace(rest=xp.zeros_like(spread.mean))
    rstd = inverse_root(xp, spread.var + eps, flat=1.0)
    return Standardized(by(x, narrow(xp, spread, rstd, x.dtype)), rstd, spread)


def wide_statistics(xp: Namespace, x: Array, *, groups: WideMeans, centred: bool, twice: bool = False) -> Spread:
    """The statistics of numbers in a wide dtype, in which the square of each exists; one pass, or two if `twice`.

    The pivot is one of the numbers of the group: the square of what it leaves of the mean is at most as many times the
    variance as there are numbers. If x was a narrow dtype, that many digits are to spare; else the mean that was found
    is the pivot of a second pass, which tells the rest of it.
    """
    pivot = groups.first(x) if centred else None
    _, left, var = shifted(xp, x, pivot, groups=groups, centred=centred)
    if pivot is None:
        return Spread(None, None, var)
    mean = pivot + left
    if not twice:
        return Spread(mean, None, var)
    _, rest, var = shifted(xp, x, mean, groups=groups)
    return Spread(mean, rest, var)


def narrow(xp: Namespace, spread: Spread, rstd: Array, dtype: Any) -> Narrow:
    """What a narrow dtype is standardized by."""
    step, one = limits(xp, dtype).step, xp.ones_like(rstd)
    large, small = rstd > step, rstd < 1 / step
    if spread.mean is not None:  # of numbers that are not small themselves they are all the same
        large = large & (spread.mean < 1) & (spread.mean > -1)
    unit, inverse = (xp.where(large, one * factor, xp.where(small, one / factor, one)) for factor in (step, 1 / step))
    mean = rest = None
    if spread.mean is not None:
        whole = spread.mean * unit
        mean = xp.astype(whole, dtype)
        rest = xp.astype(whole - xp.astype(mean, rstd.dtype), dtype)
    rstd = xp.minimum(rstd * inverse, one * float(xp.finfo(dtype).max))
    return Narrow(xp.astype(unit, dtype), mean, rest, xp.astype(rstd, dtype))


def by(x: Array, of: Narrow) -> Array:
    """xhat."""
    return less(x * of.unit, Spread(of.mean, of.rest, of.rstd)) * of.rstd


def deviations(
    xp: Namespace,
    x: Array,
    *,
    groups: Means,
    centred: bool,
    alike: tuple[Array, Array] | None = None,
    ops: Arithmetic = PURE,
    squares: Arithmetic = PURE,
) -> tuple[Array, Spread]:
    """The array less its mean if it is to be `centred`, and its statistics."""
    mean = rest = None
    if centred:
        x, mean, rest = centre(xp, x, groups=groups, alike=alike, ops=ops)
    return x, Spread(mean, rest, groups.mean_product(xp, x, x, ops=squares))


def shifted(
    xp: Namespace,
    x: Array,
    pivot: Array | None,
    *,
    groups: Means,
    centred: bool = True,
    ops: Arithmetic = PURE,
    squares: Arithmetic = PURE,
) -> tuple[Array, Array | None, Array]:
    """The array less a pivot, if there is one; the mean of what is left, if it is to be `centred`; and the variance.

    This takes a pass or two less than `deviations`, and is as exact where the square of that mean is at most the
    variance: the condition number is then at most 2. With the mean for a pivot it is the corrected two-pass algorithm.

    Chan, Golub & LeVeque, "Algorithms for computing the sample variance", 1983, eq. 1.5 to 1.8.
    """
    x = x if pivot is None else ops.subtract(x, pivot)
    if not centred:
        return x, None, groups.mean_product(xp, x, x, ops=squares)
    left = groups.mean(xp, x)
    return x, left, groups.mean_product(xp, x, x, ops=squares) - left * left


def less(x: Array, spread: Spread, *, ops: Arithmetic = PURE) -> Array:
    """The array less a mean that is given."""
    for part in (spread.mean, spread.rest):
        if part is not None:
            x = ops.subtract(x, part)
    return x


def inverse_root(xp: Namespace, square: Array, *, flat: float | Array | None) -> Array:
    """1 / sqrt(square), or `flat` where the square is 0 or too small to tell; its derivative is finite there too."""
    if flat is None:
        return xp.reciprocal(xp.sqrt(square))
    lost = (square < smallest_normal(xp, square.dtype)) & (square >= 0)
    one = xp.ones_like(square)
    return xp.where(lost, one * flat, xp.reciprocal(xp.sqrt(xp.where(lost, one, square))))


def affine(xhat: Array, gamma: Array | None, beta: Array | None, *, ops: Arithmetic = PURE) -> Array:
    """`xhat * gamma + beta`."""
    if gamma is None:
        return xhat if beta is None else ops.add(xhat, beta)
    return ops.multiply(xhat, gamma) if beta is None else ops.multiply_add(xhat, gamma, beta)


def factors(xp: Namespace, one: Array, other: Array) -> tuple[Array, Array]:
    """Two factors to multiply with in turn, so that x * one * other has all its digits if it has them in the end.

    Their product, and 1, where that has all its digits; else both, as they make x larger, or smaller, both.
    """
    both = one * other
    size = xp.abs(both)
    whole = (size >= smallest_normal(xp, both.dtype)) & ~(size > float(xp.finfo(both.dtype).max))
    return xp.where(whole, both, one), xp.where(whole, xp.ones_like(both), other)


def scaled(
    xp: Namespace, x: Array, gamma: Array | None, rstd: Array, *, places: Places = NEW, exact: bool = False
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


def power_of_two(xp: Namespace, x: Array) -> Array:
    """The largest power of two in a normal number above 0, by operations that are rounded as IEEE 754 has it.

    Rump, Ogita & Oishi, "Accurate floating-point summation", 2008, algorithm 3.5.
    """
    half, large, one = (
        float(xp.finfo(x.dtype).eps) / 2,
        x > 1,
        xp.ones_like(x),
    )  # a long double has more digits than 1.0
    step = limits(xp, x.dtype).further  # so that what comes has room
    q = xp.where(large, x * (1 / step), x) * (one * (1 / (2 * half)) + one)
    unit = q - q * (one - half)
    return xp.where(large, unit * step, unit)


def cotangent(
    xp: Namespace,
    dy: Array,
    gamma: Array | None,
    power: Array | None,
    *,
    places: Places = NEW,
    exact: bool = False,
) -> Array:
    """The gradient of xhat, for a gamma that varies within the groups; times a power of two, if there is one."""
    if power is None or gamma is None:
        return affine(dy, gamma, None, ops=places.result)
    return scaled(xp, dy, gamma, power, places=places, exact=exact)


def input_gradient(
    xp: Namespace,
    dy: Array,
    gamma: Array | None,
    of: Standardized,
    *,
    groups: Groups | None,
    centred: bool,
    places: Places = NEW,
    power: Array | None = None,
    exact: bool = False,
) -> Array:
    """The gradient of `affine(standardize(x))` with respect to x; without `groups`, of `standardize_with`.

    rstd * (g - mean(g) - xhat * mean(g * xhat)), where g = dy * gamma; the mean of g stays where x was not centred.
    A `power` of two near rstd goes to g first, where gamma varies: so g has all its digits if the gradient has.
    """
    if groups is None:
        return scaled(xp, dy, gamma, of.rstd, places=places, exact=exact)
    last = gamma if alone(gamma, groups.axes) else None
    g = dy if last is not None else cotangent(xp, dy, gamma, power, places=places, exact=exact)
    g, leaning = lean(xp, g, of.xhat, groups=groups, centred=centred, places=places)
    return upright(xp, g, leaning, of, last, power, places=places, exact=exact)


def input_gradient_wide(
    xp: Namespace,
    dy: Array,
    x: Array,
    gamma: Array | None,
    of: Standardized,
    own: Narrow,
    *,
    groups: WideMeans,
    centred: bool,
) -> Array:
    """`input_gradient` by sums in the wide dtype of the statistics, of numbers of any size."""
    if alone(gamma, groups.axes):
        return input_gradient_wide(xp, dy, x, None, of, own, groups=groups, centred=centred) * gamma
    g, dtype, pivot = affine(dy, gamma, None), of.rstd.dtype, None
    wide = xp.astype(g, dtype)
    if centred and gamma is None:  # where all are the same nothing is left
        pivot = groups.first(wide)
        wide = wide - pivot
    slope = groups.mean_product(xp, wide, less(xp.astype(x, dtype), of.spread) * of.rstd)
    if centred:
        whole = groups.mean(xp, wide) if pivot is None else groups.mean(xp, wide) + pivot
        mean = xp.astype(whole, g.dtype)
        g = g - mean - xp.astype(whole - xp.astype(mean, dtype), g.dtype)
    return (g - of.xhat * xp.astype(slope, g.dtype)) * own.rstd * own.unit


def wide_input_gradient(
    xp: Namespace,
    dy: Array,
    gamma: Array | None,
    of: Standardized,
    *,
    groups: WideMeans,
    centred: bool,
    twice: bool = False,
) -> Array:
    """`input_gradient` of numbers in a wide dtype, for statistics of `wide_statistics`, in as many passes."""
    last = gamma if alone(gamma, groups.axes) else None
    power = power_of_two(xp, of.rstd) if twice and gamma is not None and last is None else None
    g = dy if last is not None else cotangent(xp, dy, gamma, power)
    if not centred:
        leaning = Spread(None, None, groups.mean_product(xp, g, of.xhat))
        return upright(xp, g, leaning, of, last, power)
    pivot = groups.first(g)
    d = g - pivot
    mean, slope = pivot + groups.mean(xp, d), groups.mean_product(xp, d, of.xhat)
    d = g - mean
    if twice:
        rest, slope = groups.mean(xp, d), groups.mean_product(xp, d, of.xhat)
        d = d - rest
    return upright(xp, d, Spread(mean, None, slope), of, last, power)


def alone(gamma: Array | None, axes: tuple[int, ...]) -> bool:
    """Whether gamma is one number for each group: a dy that is nearly all mean loses that before gamma rounds it."""
    return gamma is not None and all([gamma.shape[axis] == 1 for axis in axes])  # noqa: C419 - Dynamo takes no generator


def lean(
    xp: Namespace, g: Array, xhat: Array, *, groups: Groups, centred: bool, places: Places = NEW
) -> tuple[Array, Spread]:
    """g less its mean if x was `centred`, and its statistics; beside the mean not its variance, but mean(g * xhat)."""
    mean = rest = None
    if centred:
        g, mean, rest = centre(xp, g, groups=groups, ops=places.result)
    return g, Spread(mean, rest, groups.mean_product(xp, g, xhat, ops=places.product))


def upright(
    xp: Namespace,
    g: Array,
    leaning: Spread,
    of: Standardized,
    gamma: Array | None,
    power: Array | None,
    *,
    places: Places = NEW,
    exact: bool = False,
) -> Array:
    """rstd * (g - xhat * mean(g * xhat)), for a g whose mean was taken away, and which has the `power`.

    A gamma that is one number for each group comes last.
    """
    g = places.result.subtract(g, places.xhat.multiply(of.xhat, leaning.var))
    rstd = of.rstd if power is None else of.rstd / power
    return scaled(xp, g, gamma, rstd, places=places._replace(product=PURE), exact=exact)


def parameter_gradient(
    xp: Namespace,
    dy: Array,
    factor: Array | None,
    shape: tuple[int, ...],
    *,
    block: int | None,
    ones: Array | None = None,
    ops: Arithmetic = PURE,
) -> Array:
    """The gradient of a parameter of this shape: the sum of dy * factor over the axes that it was broadcast along."""
    groups = Groups(tuple(axis for axis, n in enumerate(shape) if n == 1), 1.0, block, ones)
    if not groups.axes:
        return dy * (1.0 if factor is None else factor)  # never the caller's own array
    return groups.mean(xp, dy) if factor is None else groups.mean_product(xp, dy, factor, ops=ops)


def merge(xp: Namespace, first: Spread, second: Spread, shares: tuple[Any, Any]) -> Spread:
    """Two sets of values together; `shares` are their parts of the joint count, as 1 - share would lose a small one.

    Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979, eq. 2.1.
    """
    one, other = shares
    mean, rest = weighted_mean(xp, first[:2], second[:2], shares)
    delta, unit = _difference(xp, first[:2], second[:2])
    between = delta * (one * other) * delta / unit / unit  # in this order: nothing, where one of the two is empty
    nothing = xp.zeros_like(first.var)
    var, lost = weighted_mean(xp, (first.var, nothing), (second.var, nothing), shares)
    return Spread(mean, rest, var + (lost + between))


Pair = tuple[Array, Array]
"""A number and what rounding took from it: together they have twice the digits."""


def weighted_mean(xp: Namespace, first: Pair, second: Pair, shares: tuple[Any, Any]) -> Pair:
    """Two numbers, each times its share.

    It is found from the number of the larger share and the difference of the two, as the sum of both products would be
    off to one side time after time: rounded shares do not add up to 1.
    """
    one, other = (xp.ones_like(first[0]) * share for share in shares)
    larger = one >= other
    near, near_rest = (xp.where(larger, *each) for each in zip(first, second, strict=True))
    delta, unit = _difference(xp, first, second)
    step = xp.where(larger, delta * other, -delta * one)
    mean, rest = renormalized(xp, near * unit, near_rest * unit + step)
    infinite = ~xp.isfinite(delta)
    plain = first[0] * one + second[0] * other
    return xp.where(infinite, plain, mean / unit), xp.where(infinite, xp.zeros_like(rest), rest / unit)


def _difference(xp: Namespace, first: Pair, second: Pair) -> Pair:
    """The second number less the first, times a power of two, which is less than 1 where it would overflow."""
    (one, one_rest), (other, other_rest) = first, second
    large = float(xp.finfo(one.dtype).max) / 4
    unit = xp.ones_like(one)
    unit = xp.where((xp.abs(one) > large) | (xp.abs(other) > large), unit / 4, unit)
    return (other * unit - one * unit) + (other_rest - one_rest) * unit, unit


def recast(xp: Namespace, number: Array, rest: Array, dtype: Any) -> Pair:
    """A number and its rest in another dtype, with as many of their digits as that has room for in both."""
    cast = xp.astype(number, dtype, copy=False)
    lost = number - xp.astype(cast, number.dtype, copy=False)
    return renormalized(xp, cast, xp.astype(_finite(xp, lost + rest), dtype, copy=False))


def renormalized(xp: Namespace, mean: Array, rest: Array) -> tuple[Array, Array]:
    """The sum of a mean and its rest, and what rounding took from the sum; Knuth's two-sum, for a rest of any size."""
    whole = mean + rest
    gained = whole - mean
    return whole, _finite(xp, (mean - (whole - gained)) + (rest - gained))


def _finite(xp: Namespace, rest: Array) -> Array:
    """0 beside a mean that is not finite, which it would make NaN."""
    return xp.where(xp.isfinite(rest), rest, xp.zeros_like(rest))


def centre(
    xp: Namespace,
    x: Array,
    *,
    groups: Means,
    alike: tuple[Array, Array] | None = None,
    ops: Arithmetic = PURE,
) -> tuple[Array, Array, Array]:
    """The array less its mean, and the mean, in two stages: the second takes away the rounding error of the first.

    `alike` says in which groups all numbers are one and the same, and which: their mean is that number to the last
    bit, which a compiler that divides by multiplying would miss.
    """
    mean = groups.mean(xp, x)
    if alike is not None:
        mean = xp.where(*alike, mean)
    x = ops.subtract(x, mean)
    rest = groups.mean(xp, x)
    return ops.subtract(x, rest), mean, rest


def pool(xp: Namespace, parts: Spread, share: Array, *, axis: int, level: Array | None = None) -> Spread:
    """The statistics of all the values of some parts, stacked along `axis`; `share` is the part of the values in each.

    The mean of the means is taken away in two stages, as from the values themselves. Where the variance is a mean of
    products with other values, `level` is the mean of these, whose whole mean is 0.
    """

    def over(values: Array) -> Array:
        return xp.sum(values * share, axis=axis, keepdims=True)

    if parts.mean is None or parts.rest is None:
        return Spread(None, None, over(parts.var))
    mean = over(parts.mean)
    delta = (parts.mean - mean) + parts.rest
    low, high = xp.min(delta, axis=axis, keepdims=True), xp.max(delta, axis=axis, keepdims=True)
    rest = xp.where(low == high, high, over(delta))  # to the last bit: a constant has no spread
    var = over(parts.var + (delta - rest) * (delta - rest if level is None else level))
    return Spread(*renormalized(xp, mean, rest), var)


def extremes(xp: Namespace, x: Array, *, groups: Groups) -> tuple[Array, Array]:
    """The smallest and the largest number of each group."""
    if not groups.axes:
        return x, x
    return xp.min(x, axis=groups.axes, keepdims=True), xp.max(x, axis=groups.axes, keepdims=True)


class Scale(NamedTuple):
    """A power of two for each group that makes its numbers safe to square, and what goes with it."""

    unit: Array
    eps: Array
    """eps times the square of the unit."""
    flat: Array
    """What 1 / sqrt(var + eps) becomes where eps itself is lost beside the numbers."""
    alike: Any
    """In which groups all numbers are one and the same, and which, times the unit; None where it is not known."""

    def enter(self, xp: Namespace, x: Array, subnormal: Array | None) -> Array:
        """x * unit, for the `subnormal` of `standardize_scaled`."""
        x = x * self.unit
        if subnormal is None:
            return x
        return x + xp.where(self.unit > limits(xp, x.dtype).step, subnormal, xp.zeros_like(subnormal))

    def leave(self, xp: Namespace, scaled: Standardized) -> Standardized:
        """What x is standardized to, from what x * unit is."""
        return scaled._replace(rstd=self.restore_rstd(xp, scaled.rstd), spread=self.restore(scaled.spread))

    def restore(self, spread: Spread) -> Spread:
        """The statistics of x, from those of x * unit."""
        mean, rest = (None if each is None else each / self.unit for each in (spread.mean, spread.rest))
        one = 1 / self.unit
        return Spread(mean, rest, spread.var * one * one)

    def restore_rstd(self, xp: Namespace, rstd: Array) -> Array:
        """1 / sqrt(var + eps), from that of x * unit, as far as there is room for it."""
        return xp.minimum(rstd * self.unit, xp.ones_like(rstd) * float(xp.finfo(rstd.dtype).max))


def scale_of(xp: Namespace, bottom: Array, top: Array, *, eps: float, centred: bool) -> Scale:
    """1, or the power of two that makes numbers from `bottom` to `top` safe to square and add up; and eps so scaled.

    Large ones that are equal leave nothing to square where they are `centred`, and eps may have no room for the power.
    """
    sizes, one = reached(xp, bottom, top), xp.ones_like(top)
    if not centred:
        return scale_for(xp, sizes, one, eps=eps)
    alike, (large, larger, *small) = top == bottom, sizes
    scale = scale_for(xp, [large & ~alike, larger & ~alike, *small], one, eps=eps)
    return scale._replace(alike=(alike, top * scale.unit))


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
    # where eps itself is lost beside the numbers, it is still the variance, as far as its inverse root has room
    flat = xp.minimum(1 / unit / (math.sqrt(eps) or 1.0), one * float(xp.finfo(one.dtype).max))
    return Scale(unit, scaled_eps, flat, None)


def limits(xp: Namespace, dtype: Any) -> Limits:
    """In float32 2**48, 2**-25, 2**64, 2**32 and 2**-85; in float64 2**384, 2**-204, 2**512, 2**256 and 2**-682."""
    largest = min(float(xp.finfo(dtype).max), sys.float_info.max)  # a long double is scaled as a double
    e = math.frexp(largest)[1]
    return Limits(2.0 ** (3 * e // 8), 2.0 ** -(e // 5), 2.0 ** (e // 2), 2.0 ** (e // 4), 2.0 ** -(2 * e // 3))


def smallest_normal(xp: Namespace, dtype: Any) -> Any:
    """The smallest number with all its digits."""
    least = xp.finfo(dtype).smallest_normal
    return float(least) or least  # that of a long double is none to a float


def total(xp: Namespace, x: Array, *, axes: tuple[int, ...], block: int | None, ones: Array | None = None) -> Array:
    """The sum over `axes`, which stay with length 1; at most `block` numbers are added in one go.

    Some libraries add one number after another, and the rounding error grows with their number: NumPy over any axis
    but the last in memory, PyTorch over the second of two. In blocks it grows with the block. A product with `ones`
    adds at the speed of BLAS.
    """
    if not axes:
        return x
    if ones is not None:
        last = axes[-1]
        x = _total_along(xp, x, last, _longest(tuple(x.shape), last), ones)
        return x if len(axes) == 1 else total(xp, x, axes=axes[:-1], block=block)
    if (block is None and len(axes) == 1) or math.prod([x.shape[axis] for axis in axes]) <= LEADING:
        return xp.sum(x, axis=axes, keepdims=True)
    for axis in axes if block is None and x.shape[axes[-1]] < SHORT else reversed(axes):
        x = _total_along(xp, x, axis, block)
    return x


RUN = 2**11
"""The longest run that BLAS adds in one go along the last axis; it adds in many lanes."""
LEADING = 256
"""The longest run that is added along any axis but the last, where BLAS adds one number after another."""
LOCKED = 500
"""NumPy lets other threads run only while it makes more products of runs than that."""
WORTH = 2**16
"""So many numbers are worth that other threads run."""
SHORT = 128
"""Rows shorter than this are added to each other before their own numbers are, where a library adds by single axes."""


NORMED = 128
"""The longest run whose norm is as exact as its squares are."""
FOLD = 8
"""rstd * gamma is made first where it is so many times smaller than x."""


@lru_cache(maxsize=256)
def _longest(shape: tuple[int, ...], axis: int) -> int:
    """The length of the runs that BLAS adds along an axis."""
    n, rows = shape[axis], math.prod(shape[:axis])
    if axis < len(shape) - 1:
        return even_run(n, 1, LEADING)
    return even_run(n, 1 if rows > LOCKED or rows * n < WORTH else LOCKED // rows + 1, RUN)


def even_run(n: int, pieces: int, most: int) -> int:
    """The length, at most that, of so many equal runs of n numbers, or of a few more; `most` if there are none such."""
    pieces = max(pieces, -(-n // most))
    return next((n // k for k in range(pieces, min(4 * pieces, n // 16) + 1) if n % k == 0), most)


def _total_along(xp: Namespace, x: Array, axis: int, block: int | None, ones: Array | None = None) -> Array:
    n = x.shape[axis]
    if block is None or n <= block:
        return _run(xp, x, axis, ones)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    whole = n - n % block
    head = xp.reshape(x[cut(axis, 0, whole)], (*before, n // block, block, *after))
    sums = xp.squeeze(_run(xp, head, axis + 1, ones), axis=axis + 1)
    if whole < n:
        tail = _run(xp, x[cut(axis, whole, n)], axis, ones)
        sums = xp.concat([sums, tail], axis=axis)
    return _total_along(xp, sums, axis, block, ones if axis == x.ndim - 1 else None)


def _run(xp: Namespace, x: Array, axis: int, ones: Array | None) -> Array:
    """The sum along one axis, which stays with length 1."""
    if ones is None or axis < x.ndim - 2:
        return xp.sum(x, axis=axis, keepdims=True)
    if ones.shape[0] != x.shape[axis]:
        ones = ones[: x.shape[axis]]
    return xp.vecdot(x, ones)[..., None] if axis == x.ndim - 1 else xp.matmul(ones[None, :], x)


def _dot(xp: Namespace, x: Array, other: Array) -> Array:
    """The sum of x * other over the last axis, in runs that BLAS adds."""
    n, run = x.shape[-1], _longest(tuple(x.shape), x.ndim - 1)
    if n <= run:
        return xp.vecdot(x, other)[..., None]
    whole = n - n % run
    runs = (xp.reshape(each[..., :whole], (*each.shape[:-1], n // run, run)) for each in (x, other))
    sums = xp.vecdot(*runs)
    if whole < n:
        sums = xp.concat([sums, xp.vecdot(x[..., whole:], other[..., whole:])[..., None]], axis=-1)
    return total(xp, sums, axes=(x.ndim - 1,), block=LEADING)


def _squares(xp: Namespace, x: Array, norm: Callable[[Array], Array]) -> Array:
    """The sum of squares of each run along the last axis; in runs so short it is as exact as adding them one by one."""
    n = x.shape[-1]
    run = min(even_run(n, 1, NORMED), n)
    whole = n - n % run
    norms = norm(xp.reshape(x[..., :whole], (*x.shape[:-1], n // run, run)))
    if whole < n:
        norms = xp.concat([norms, norm(x[..., whole:])[..., None]], axis=-1)
    return norms * norms


def cut(axis: int, start: int, stop: int) -> tuple[Any, ...]:
    """The index of part of an axis."""
    return (slice(None),) * axis + (slice(start, stop), ...)
