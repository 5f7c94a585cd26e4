"""(x - mean) / sqrt(var + eps), times gamma, plus beta."""

from collections.abc import Callable
from typing import Any, NamedTuple

from anynorm.kernels.ops import PURE, Array, Namespace, Ops, Outputs
from anynorm.kernels.reductions import Sums, WideReduction
from anynorm.kernels.scaling import Scale, extremes, limits, scale_of, smallest_normal, times, unscaled
from anynorm.kernels.statistics import Standardized, Stats, deviations, wide_statistics
from anynorm.kernels.weighting import WeightedSums, apart, with_padding, without_padding


def standardize(
    xp: Namespace,
    x: Array,
    *,
    groups: Sums | WeightedSums,
    eps: float | Array,
    centred: bool,
    rstd_at_zero: float | Array | None = 1.0,
    constant: tuple[Array, Array] | None = None,
    divides: bool = True,
) -> Standardized:
    """(x - mean) / sqrt(var + eps) in each group; without `centred` the mean is taken to be 0.

    What does not `divide` is x - mean, and has no rstd.
    `rstd_at_zero` is what 1 / sqrt(var + eps) becomes where it is 1 / 0, and None where it never is; `constant` is for
    `deviations`. Shares add up to 1 but for rounding, which would leave equal numbers a spread: they are looked for.
    """
    weights = groups.weights if isinstance(groups, WeightedSums) else None
    kept = x if weights is None else without_padding(xp, x, weights)
    if isinstance(groups, WeightedSums) and centred and constant is None:
        bottom, top = groups.bounds(xp, kept)
        constant = (bottom == top, top)
    d, stats = deviations(xp, kept, groups=groups, centred=centred, constant=constant)
    if constant is not None:  # the derivative of a root is infinite beside no eps, and 0 times that is no number
        stats = stats._replace(var=xp.where(stats.var == 0, xp.zeros_like(stats.var), stats.var))
    done = Standardized(d, None, stats)
    if divides:
        rstd = inverse_root(xp, stats.var + eps, rstd_at_zero=rstd_at_zero)
        done = Standardized(d * rstd, rstd, stats)
    return done if weights is None else with_padding(xp, x, done, weights)


def standardize_scaled(
    xp: Namespace,
    x: Array,
    *,
    groups: Sums | WeightedSums,
    eps: float,
    centred: bool,
    subnormal: Array | None = None,
    divides: bool = True,
) -> Standardized:
    """`standardize` for numbers of any size: a power of two is taken out of each group, so that its squares exist.

    It costs a pass for the extremes; where the numbers are of ordinary size the power is 1. `subnormal` holds the
    numbers that the library flushes to 0, times the power of two that is taken out of the smallest.
    """
    ends = groups.bounds(xp, x) if isinstance(groups, WeightedSums) else extremes(xp, x, groups=groups)
    scale = scale_of(xp, *ends, eps=eps, centred=centred)
    x, how = scale.apply(xp, x, subnormal), {"rstd_at_zero": scale.rstd_at_zero, "constant": scale.constant}
    return scale.undo(xp, standardize(xp, x, groups=groups, eps=scale.eps, centred=centred, divides=divides, **how))


def standardize_with(
    xp: Namespace,
    x: Array,
    stats: Stats,
    *,
    eps: float | Array,
    rstd_at_zero: float | Array | None = 1.0,
    divides: bool = True,
) -> Standardized:
    """(x - mean) / sqrt(var + eps) for statistics that are given: inference."""
    d = subtract_mean(x, stats)
    if not divides:
        return Standardized(d, None, stats)
    rstd = inverse_root(xp, stats.var + eps, rstd_at_zero=rstd_at_zero)
    return Standardized(d * rstd, rstd, stats)


def denormalize(
    xp: Namespace,
    y: Array,
    gamma: Array | None,
    beta: Array | None,
    stats: Stats,
    rstd: Array,
    *,
    ops: Ops = PURE,
    exact: bool = False,
) -> Array:
    """(y - beta) / gamma / rstd + mean, the way back from `standardize_with` and `affine`; `exact` as in `unscaled`."""
    y = y if beta is None else ops.subtract(y, beta)
    y = unscaled(xp, y, gamma, rstd, places=Outputs(result=ops), exact=exact)
    for part in (stats.mean_lo, stats.mean):
        y = y if part is None else ops.add(y, part)
    return y


class Standardizer(NamedTuple):
    """Statistics of a wide dtype, as a narrow one holds them: (x * unit - mean - mean_lo) * rstd is xhat."""

    unit: Array
    """A power of two."""
    mean: Array | None
    """Of x * unit; None where x is not centred."""
    mean_lo: Array | None
    rstd: Array
    """Of x * unit."""


def standardize_wide(
    xp: Namespace,
    x: Array,
    *,
    groups: WideReduction,
    eps: float,
    centred: bool,
    dtype: Any,
    divides: bool = True,
    once: Callable[[Array], Array] | None = None,
) -> Standardized:
    """`standardize` for numbers of any size, by sums in a wide dtype, which the statistics are of.

    What there is for each group goes through `once`, if there is one, before it goes with its numbers.
    """
    weights = groups.weights if isinstance(groups, WeightedSums) else None
    stats = wide_statistics(xp, xp.astype(x, dtype), groups=groups, centred=centred)
    if stats.mean is not None:
        stats = stats._replace(mean_lo=xp.zeros_like(stats.mean))
    rstd = inverse_root(xp, stats.var + eps, rstd_at_zero=1.0) if divides else xp.ones_like(stats.var)
    own = standardizer(xp, stats, rstd, x.dtype)
    if once is not None:
        own = Standardizer(*[each if each is None else once(each) for each in own])
    done = Standardized(by(xp, x, own), rstd, stats)
    return done if weights is None else apart(xp, done, weights)


def standardizer(xp: Namespace, stats: Stats, rstd: Array, dtype: Any) -> Standardizer:
    """What a narrow dtype is standardized by."""
    step, one = limits(xp, dtype).step, xp.ones_like(rstd)
    large, small = rstd > step, rstd < 1 / step
    if stats.mean is not None:  # of numbers that are not small themselves they are all the same
        large = large & (stats.mean < 1) & (stats.mean > -1)
    unit, inverse = (xp.where(large, one * factor, xp.where(small, one / factor, one)) for factor in (step, 1 / step))
    mean = mean_lo = None
    if stats.mean is not None:
        whole = stats.mean * unit
        mean = xp.astype(whole, dtype)
        mean_lo = xp.astype(whole - xp.astype(mean, rstd.dtype), dtype)
    rstd = xp.minimum(rstd * inverse, one * float(xp.finfo(dtype).max))
    return Standardizer(xp.astype(unit, dtype), mean, mean_lo, xp.astype(rstd, dtype))


def by(xp: Namespace, x: Array, of: Standardizer, subnormal: Array | None = None) -> Array:
    """xhat."""
    return subtract_mean(times(xp, x, of.unit, subnormal), Stats(of.mean, of.mean_lo, of.rstd)) * of.rstd


def standardizer_in_scale(
    xp: Namespace, x: Array, scale: Scale | None, *, groups: Sums, eps: float, centred: bool, subnormal: Array | None
) -> tuple[Standardizer, Standardized]:
    """What x is standardized by in this scale, or in the one that its `extremes` ask for; and what to, but for xhat.

    The pivot is one of the numbers, so that equal ones have no spread, however a compiler divides.
    """
    if scale is None:
        scale = scale_of(xp, *extremes(xp, x, groups=groups), eps=eps, centred=centred)
    stats = wide_statistics(xp, scale.apply(xp, x, subnormal), groups=groups, centred=centred, twice=True)
    rstd = inverse_root(xp, stats.var + scale.eps, rstd_at_zero=scale.rstd_at_zero)
    own = Standardizer(scale.unit, stats.mean, stats.mean_lo, rstd)
    return own, Standardized(None, scale.undo_rstd(xp, rstd), scale.undo_stats(stats))


def derivative(xp: Namespace, dx: Array, of: Standardized, *, groups: Sums, centred: bool) -> Standardized:
    """What xhat and rstd change by where x does by dx, for statistics that are constants.

    It is linear in dx, and so built that a compiler may turn it round, for a gradient: the mean is taken away first and
    last, so that neither a dx nor a dy that is nearly all mean loses its digits.
    """
    some = of.rstd > 0

    def centre(t: Array) -> Array:
        # chosen, as a compiler that fuses division and difference in one place only would leave what it rounds
        mean = groups.mean(xp, xp.where(some, t, xp.zeros_like(t)))
        return t - xp.where(some, mean, xp.zeros_like(mean))

    t = centre(dx * of.rstd) if centred else dx * of.rstd
    product = groups.mean_product(xp, t, of.xhat)
    t = t - of.xhat * product
    unchanged = Stats(*[None if each is None else xp.zeros_like(each) for each in of.stats])
    return Standardized(centre(t) if centred else t, -of.rstd * product, unchanged)


def subtract_mean(x: Array, stats: Stats, *, ops: Ops = PURE) -> Array:
    """The array less a mean that is given."""
    for part in (stats.mean, stats.mean_lo):
        if part is not None:
            x = ops.subtract(x, part)
    return x


def inverse_root(xp: Namespace, square: Array, *, rstd_at_zero: float | Array | None) -> Array:
    """1 / sqrt(square), or `rstd_at_zero` where the square is 0 or too small to tell; its derivative is finite."""
    if rstd_at_zero is None:
        return xp.reciprocal(xp.sqrt(square))
    lost = (square < smallest_normal(xp, square.dtype)) & (square >= 0)
    one = xp.ones_like(square)
    return xp.where(lost, one * rstd_at_zero, xp.reciprocal(xp.sqrt(xp.where(lost, one, square))))


def affine(xhat: Array, gamma: Array | None, beta: Array | None, *, ops: Ops = PURE) -> Array:
    """`xhat * gamma + beta`."""
    if gamma is None:
        return xhat if beta is None else ops.add(xhat, beta)
    return ops.multiply(xhat, gamma) if beta is None else ops.multiply_add(xhat, gamma, beta)
