"""The weights of a call: their sums, and the unit in which these are in range."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from anynorm import kernels
from anynorm.arrays import counts
from anynorm.arrays.library import Library
from anynorm.calls.blocks import blocks, within
from anynorm.calls.call import Call
from anynorm.calls.plan import Plan
from anynorm.kernels import Array, Namespace, Sums
from anynorm.kernels.weighting import WeightedSums, Weights, positive


def ready(library: Library, weights: Weights, dtype: Any) -> Weights:
    """Each in the dtype of the computation, divided by the unit."""
    each = library.cast(weights.each, dtype)
    return weights._replace(each=each if weights.unit is None else each / positive(library.xp, weights.unit))


def weighed(call: Call) -> Call:
    """The call with the sums of its weights."""
    if call.weights is None or call.weights.sums is not None:
        return call
    with call.plan.library.quiet():
        return call._replace(weights=sum_weights(call.plan, call.weights.each)._replace(total=call.weights.total))


def sum_weights(plan: Plan, each: Array) -> Weights:
    """The weights beside the view and their sums; without a unit, if it turns out that they need none."""
    found: Weights = plan.library.compiled((id(plan), "weigh"), partial(_sum_weights, plan), each)
    return found


def _sum_weights(plan: Plan, each: Array) -> Weights:
    library, xp = plan.library, plan.library.xp
    times = plan.times(each)
    sums = _of_groups(plan, each, Sums.mean, None) * times
    if 0 in library.sizes(each):
        return Weights(each, sums)
    # between these the square of a number that is not scaled, times its weight, is in range
    if library.writable_in_blocks(each) and bool(
        xp.all((sums == 0) | ((sums >= 1) & (sums <= plan.limits.further / 8)))
    ):
        return Weights(each, sums)
    unit = _of_groups(plan, each, _top, None)
    return Weights(each, _of_groups(plan, each, Sums.mean, unit) * times, unit)


def _of_groups(
    plan: Plan,
    weights: Array,
    take: Callable[[Sums, Namespace, Array], Array],
    unit: Array | None,
    dtype: Any = None,
) -> Array:
    """Something of the weights of each group, in this dtype or that of the computation; if they are plain, in parts."""
    xp, groups, shape = plan.library.xp, plan.groups.by(1.0), tuple(weights.shape)
    if dtype is None:
        dtype = plan.dtype
    else:
        groups = Sums(groups.axes, 1.0, groups.block if plan.symbolic else plan.library.block)

    def taken(weights: Array, unit: Array | None) -> Array:
        return take(groups, xp, ready(plan.library, Weights(weights, None, unit), dtype).each)

    if not plan.library.writable_in_blocks(weights):
        return taken(weights, unit)
    most = plan.block_numbers // 4
    if math.prod(shape) <= most:
        return taken(weights, unit)
    every = plan.library.empty(tuple(1 if axis in groups.axes else n for axis, n in enumerate(shape)), weights, dtype)
    for parts in blocks(shape, groups.axes, max(1, most), max(1, most)):
        found = [taken(weights[part], None if unit is None else unit[within(unit, part)]) for part in parts]
        every[within(every, parts[0])] = take(Sums((0,), 1.0, groups.block), xp, xp.stack(found, axis=0))[0, ...]
    return every


def counted(call: Call) -> counts.Counted:
    """The sum of the weights of each group, beside the view."""
    plan, given = call.plan, call.weights
    library, xp, found = plan.library, plan.library.xp, None if given is None else given.total
    if found is None:
        with library.quiet():
            found = count_weights(plan, xp.ones_like(call.x) if given is None else given.each)
    if plan.symbolic:
        return found
    count, rest = (None if each is None else xp.broadcast_to(each, plan.stats.shape) for each in found)
    return count, rest


def count_weights(plan: Plan, weights: Array) -> counts.Counted:
    """The sum of weights beside the view, over each group, as `counts` has it."""
    found: counts.Counted = plan.library.compiled((id(plan), "total"), partial(_count_weights, plan), weights)
    return found


def _count_weights(plan: Plan, weights: Array) -> counts.Counted:
    library, axes, times = plan.library, plan.view.axes, plan.times(weights)
    if not library.has_float64(weights):
        return counts.total(library, weights, axes=axes, times=times, halved=not plan.symbolic)
    dtype = counts.dtype_of(library, weights, weights.dtype)
    return _of_groups(plan, weights, Sums.mean, None, dtype) * times, None


def _top(groups: Sums, xp: Namespace, weights: Array) -> Array:
    """The largest of each group; where its reciprocal would be subnormal, which XLA takes for 0, a smaller one does."""
    top = kernels.extremes(xp, weights, groups=groups)[1]
    return xp.minimum(top, xp.ones_like(top) * (1 / kernels.smallest_normal(xp, top.dtype)))


def weighted_sums(call: Call) -> WeightedSums | None:
    """The elements that share a mean, where they have weights or are spread over replicas."""
    if call.weights is None:
        return None
    given = weighed(call).weights
    assert given is not None
    return WeightedSums(call.plan.groups.by(1.0), ready(call.plan.library, given, call.plan.dtype))
