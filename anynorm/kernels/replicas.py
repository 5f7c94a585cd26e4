"""Replicas: processes or devices that hold samples of one batch, each its own, and a function that sums over them.

All replicas call that function equally often and with arrays of equal shape, whatever their numbers are. They agree
upon the power of two that is taken out of a group before they know its mean.
"""

import math
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

from anynorm import kernels
from anynorm.kernels.ops import Array, Namespace
from anynorm.kernels.reductions import Sums
from anynorm.kernels.statistics import Standardized, Stats
from anynorm.kernels.weighting import (
    Common,
    WeightedSums,
    Weights,
    extremes,
    found,
    positive,
    summed,
    with_padding,
    without_padding,
)

Join = Callable[..., list[Array]]


def joining(xp: Namespace, all_reduce: Callable[[Array], Any]) -> Join:
    """The function that sums some arrays over all replicas, in one call of `all_reduce` with an array of one axis."""

    def join(*sums: Array) -> list[Array]:
        rstd_at_zero = xp.concat([xp.reshape(each, (-1,)) for each in sums])
        whole = all_reduce(rstd_at_zero)
        whole = rstd_at_zero if whole is None else whole  # it was summed in place
        if (
            not hasattr(whole, "shape")
            or tuple(whole.shape) != tuple(rstd_at_zero.shape)
            or whole.dtype != rstd_at_zero.dtype
        ):
            given, got = (
                f"{tuple(each.shape)} {each.dtype}" if hasattr(each, "shape") else type(each).__name__
                for each in (rstd_at_zero, whole)
            )
            raise TypeError(f"all_reduce must return an array as it is given, {given}, got {got}")
        found, start = [], 0
        for each in sums:
            n = math.prod(each.shape)
            found.append(xp.reshape(whole[start : start + n], each.shape))
            start += n
        return found

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
    flags = [*kernels.reached(xp, bottom, top), present, top != bottom]
    joint = join(*parts, *(xp.astype(each & present, x.dtype) for each in flags))
    parts, (*sizes, holders, unlike) = joint[: len(parts)], joint[len(parts) :]
    count = _sum(parts)
    scale = kernels.scale_for(xp, [each > 0 for each in sizes], xp.ones_like(count), eps=eps)
    return Weights(weights, xp.astype(count > 0, x.dtype), count, Common(scale, holders, unlike == 0)), parts


def _sum(parts: list[Array]) -> Array:
    """The smallest are added first."""
    return reduce(operator.add, reversed(parts))


def standardize(
    xp: Namespace,
    x: Array,
    *,
    groups: WeightedSums,
    constant: Callable[[Array], Array],
    subnormal: Array | None = None,
) -> Standardized:
    """`weights.standardize_scaled` of the numbers of all replicas.

    Where a group has one number alone, all deviations must be 0, which rounding makes of none: each replica compares
    its number with the common mean, and if these differences are equal, so that their squares are as large as they can
    be, the deviations are taken for 0.
    """
    each, common, join = groups.weights.each, groups.weights.common, groups.join
    assert common is not None
    assert join is not None
    scale = common.scale
    x = scale.apply(xp, x, subnormal)
    kept = without_padding(xp, x, groups.weights)
    mean = groups.mean(xp, kept)
    d = kept - mean
    present = xp.broadcast_to(summed(xp, each, x.shape, groups=groups.plain), mean.shape) > 0
    _, top = extremes(xp, constant(kept), groups.weights, groups=groups.plain)
    apart = xp.where(present, top - constant(mean), xp.zeros_like(mean))
    rest, sums, squares = join(groups.plain.mean(xp, d * each), apart, apart * apart)
    d = d - rest
    alike = common.level & (common.holders * squares == sums * sums)
    d = xp.where(alike, d - constant(d), d)  # their derivative is not 0
    number = mean + sums / positive(xp, common.holders)
    stats = Stats(
        xp.where(alike, number, mean), xp.where(alike, xp.zeros_like(rest), rest), groups.mean_product(xp, d, d)
    )
    rstd = kernels.inverse_root(xp, stats.var + scale.eps, rstd_at_zero=scale.rstd_at_zero)
    return scale.undo(xp, with_padding(xp, x, Standardized(d * rstd, rstd, stats), groups.weights))


def joined_statistics(xp: Namespace, own: Stats, share: Array, weights: Weights, join: Join) -> Stats:
    """The statistics of the numbers of all replicas, from those of this one's, by the sums that `standardize` asks for.

    `share` is the part of all weight that is here. Where a group has one number alone, it is as there.
    """
    common = weights.common
    assert common is not None
    nothing, mean = xp.zeros_like(own.mean), join(own.mean * share)[0] / positive(xp, weights.sums)
    d = own.mean - mean if own.rest is None else (own.mean - mean) + own.rest
    apart = xp.where(share > 0, d, nothing)
    rest, sums, squares = join(d * share, apart, apart * apart)
    d, alike = d - rest, common.level & (common.holders * squares == sums * sums)
    var = join(xp.where(alike, nothing, (own.var + d * d) * share))[0] / positive(xp, weights.sums)
    number = mean + sums / positive(xp, common.holders)
    return common.scale.undo_stats(Stats(xp.where(alike, number, mean), xp.where(alike, nothing, rest), var))


def joined_gradient_sums(
    xp: Namespace, of_g: Array, of_product: Array, of_xhat: Array, share: Array, weights: Weights, join: Join
) -> tuple[Array, Array]:
    """What of g is taken away, times the shares, and of g * xhat: by the sums that `weights.gradient_sums` asks for.

    Of this replica there are the sums of g, of g * xhat, and of xhat times the shares of its numbers.
    """
    mean = join(of_g)[0] / positive(xp, weights.sums)
    mean = xp.where(xp.isfinite(mean), mean, xp.zeros_like(mean))
    rest = join(of_g - mean * share)[0]
    return mean + rest, join(of_product - (mean + rest) * of_xhat)[0]
