"""Replicas: processes or devices that hold samples of one batch, each its own, and a function that sums over them.

All replicas call that function equally often and with arrays of equal shape, whatever their numbers are. They agree
upon the power of two that is taken out of a group before they know its mean.
"""

import math
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

from anynorm.kernels.gradients import GradientSums
from anynorm.kernels.ops import Array, Namespace
from anynorm.kernels.reductions import Sums
from anynorm.kernels.scaling import reached, scale_for, smallest_normal
from anynorm.kernels.standardizing import standardize_with
from anynorm.kernels.statistics import Standardized, Stats, deviations
from anynorm.kernels.weighting import (
    Common,
    Join,
    WeightedSums,
    Weights,
    extremes,
    found,
    positive,
    with_padding,
    without_padding,
)


def joining(xp: Namespace, all_reduce: Callable[[Array], Any]) -> Join:
    """The function that sums some arrays over all replicas, in one call of `all_reduce` with an array of one axis."""

    def join(*parts: Array) -> list[Array]:
        local = xp.concat([xp.reshape(part, (-1,)) for part in parts])
        sums = all_reduce(local)
        sums = local if sums is None else sums  # it was summed in place
        if not hasattr(sums, "shape") or tuple(sums.shape) != tuple(local.shape) or sums.dtype != local.dtype:
            given, got = (
                f"{tuple(each.shape)} {each.dtype}" if hasattr(each, "shape") else type(each).__name__
                for each in (local, sums)
            )
            raise TypeError(f"all_reduce must return an array as it is given, {given}, got {got}")
        joined, start = [], 0
        for part in parts:
            n = math.prod(part.shape)
            joined.append(xp.reshape(sums[start : start + n], part.shape))
            start += n
        return joined

    return join


def weigh(
    xp: Namespace, x: Array, weights: Array, parts: list[Array], *, groups: Sums, eps: float, join: Join
) -> tuple[Weights, list[Array]]:
    """The weights of all replicas, and what else these must know before they begin; the sums of `parts` of a count.

    The parts of the own count are as large as they can be added up exactly, the largest first.
    """
    local = _sum(parts)
    present = local > 0
    bottom, top = found(xp, *extremes(xp, x, Weights(weights, local), groups=groups), present)
    flags = [*reached(xp, bottom, top), present, top != bottom]
    joint = join(*parts, *(xp.astype(each & present, x.dtype) for each in flags))
    parts, (*sizes, holders, unlike) = joint[: len(parts)], joint[len(parts) :]
    count = _sum(parts)
    scale = scale_for(xp, [each > 0 for each in sizes], xp.ones_like(count), eps=eps)
    return Weights(weights, xp.astype(count > 0, x.dtype), count, Common(scale, holders, unlike == 0)), parts


def _sum(parts: list[Array]) -> Array:
    """The smallest are added first."""
    return reduce(operator.add, reversed(parts))


def standardize(
    xp: Namespace,
    x: Array,
    *,
    groups: WeightedSums,
    eps: float,
    join: Join,
    constant: Callable[[Array], Array],
    subnormal: Array | None = None,
    divides: bool = True,
) -> Standardized:
    """`standardize_scaled` by the statistics of the numbers of all replicas."""
    weights = groups.weights
    assert weights.common is not None
    scale = weights.common.scale
    x = scale.apply(xp, x, subnormal)
    kept = without_padding(xp, x, weights)
    local = groups.of_part(xp, x)
    bottom, top = local.bounds(xp, kept)
    _, stats = deviations(xp, kept, groups=local, centred=True, constant=(bottom == top, top))
    stats = joined_statistics(xp, stats, local.weight, weights, join, constant)
    done = standardize_with(xp, kept, stats, eps=scale.eps, rstd_at_zero=scale.rstd_at_zero, divides=divides)
    done = scale.undo(xp, with_padding(xp, x, done, weights))
    if not divides or eps < smallest_normal(xp, x.dtype):
        return done
    # of equal numbers it is known without the power of two, with which it may overflow
    rstd_of_constant = xp.zeros_like(done.rstd) + 1 / math.sqrt(eps)
    return done._replace(rstd=xp.where(stats.var == 0, rstd_of_constant, done.rstd))


def joined_statistics(
    xp: Namespace, own: Stats, share: Array, weights: Weights, join: Join, constant: Callable[[Array], Array]
) -> Stats:
    """The statistics of the numbers of all replicas, from those of this one's, times the unit of the scale of all.

    `share` is the part of all weight that is here. Where a group has one number alone, all deviations must be 0, which
    rounding makes of none: each replica compares its number with the common mean, and if these differences are equal,
    so that their squares are as large as they can be, the deviations are taken for 0.
    """
    common = weights.common
    assert common is not None
    nothing, mean = xp.zeros_like(own.mean), join(own.mean * share)[0] / positive(xp, weights.sums)
    d = own.mean - mean if own.mean_lo is None else (own.mean - mean) + own.mean_lo
    apart = constant(xp.where(share > 0, d, nothing))
    rest, sums, squares = join(d * share, apart, apart * apart)
    d, same = d - rest, common.level & (common.holders * squares == sums * sums)
    var = join(xp.where(same, nothing, (own.var + d * d) * share))[0] / positive(xp, weights.sums)
    number = mean + sums / positive(xp, common.holders)
    return Stats(xp.where(same, number, mean), xp.where(same, xp.zeros_like(rest), rest), var)


def joined_gradient_sums(xp: Namespace, own: GradientSums, weight: Array, join: Join) -> GradientSums:
    """What g adds up to over all replicas, whose weights are `weight` together, from what it does over this `own`."""
    nothing = xp.zeros_like(own.rest)
    anchor = nothing if own.mean is None else own.mean
    mean = join(own.rest + own.weight * anchor)[0] / positive(xp, weight)
    mean = xp.where(xp.isfinite(mean), mean, nothing)
    moved = own.weight * (anchor - mean)
    (rest,) = join(own.rest + moved)
    product = None if own.product is None else join(own.product + moved * own.level)[0]
    return GradientSums(mean, rest, product, weight)
