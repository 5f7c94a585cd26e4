"""The statistics of a call by programs: what is found of each group, whether it is in range, and that of replicas."""

from collections.abc import Callable
from typing import Any, NamedTuple

from anynorm import kernels
from anynorm.arrays.checks import name_of
from anynorm.calls import Call, Plan
from anynorm.calls.conditions import exact_product, in_range, root
from anynorm.executors.programs import cpu_run
from anynorm.executors.programs.trace import TracedSums, TracedWeightedSums, Written
from anynorm.kernels import Array, Stats, replicas, weighting
from anynorm.kernels.weighting import Weights

SMALL = 2**20
"""A call of fewer bytes is no program, unless one is asked for."""
LEAST, MOST = 1e-100, 1e200
"""Sums of weights between these leave their products with squares in range."""


class ProgramStats(NamedTuple):
    """The statistics of each group, as arrays or as numbers of a program."""

    mean: Any = None
    mean_lo: Any = None
    """None where the mean has all digits."""
    var: Any = None
    weight: Any = None
    """The sum of the weights, where there are any."""


def find_statistics(call: Call) -> ProgramStats | None:
    """Those of all replicas, where there are any; None where they are out of range here."""

    def body(xp: Any, numbers: list[Any], sums: TracedSums) -> Written:
        x, each = numbers
        found = statistics_of(call, xp, x, each, sums)
        return Written(of_groups=[getattr(found, name) for name in kept_fields(call)])

    made = kept_of_groups(call, ("statistics", takes_two_passes(call)), len(kept_fields(call)), body)
    found = None if made is None else found_of(call, made)
    if found is None or not sums_in_range(call, found):
        return None
    return found if call.all_reduce is None else _joined(call, found)


def statistics_of(call: Call, xp: Any, x: Any, each: Any, sums: TracedSums) -> ProgramStats:
    """The kernel of the statistics, on numbers of a program."""
    groups = groups_of(sums, each, None)
    stats = kernels.wide_statistics(xp, x, groups=groups, centred=call.plan.centred, twice=takes_two_passes(call))
    return ProgramStats(*stats, None if each is None else groups.weight)


def _joined(call: Call, own: ProgramStats) -> ProgramStats:
    """The statistics of all replicas."""
    xp, (weights, join) = call.plan.library.xp, of_replicas(call)
    assert weights.common is not None
    scale, constant = weights.common.scale, call.plan.library.constant
    unit, weight = widened(call, scale.unit, weights.unit)
    scaled = Stats(own.mean * unit, None if own.mean_lo is None else own.mean_lo * unit, own.var * unit * unit)
    here = float(call.plan.layout.group_size) if own.weight is None else own.weight
    share = here / weighting.positive(xp, weight)
    stats = scale.undo_stats(replicas.joined_statistics(xp, scaled, share, weights, join, constant))
    mean, mean_lo, var = widened(call, *stats)
    pair = (mean, mean_lo) if is_wide(call.plan) else (mean + mean_lo, None)
    return ProgramStats(pair[0], pair[1], var, weights.sums)


def of_replicas(call: Call) -> tuple[Weights, Callable[..., list[Array]]]:
    """What replicas know of each other, and how they add up: in the dtype of the computation, as all of them do."""
    weights, join = call.weights, call.join
    assert weights is not None
    assert join is not None

    def narrowed(*sums: Array) -> list[Array]:
        xp, dtype = call.plan.library.xp, call.plan.dtype
        return widened(call, *join(*(xp.astype(each, dtype, copy=False) for each in sums)))

    return weights, narrowed


def widened(call: Call, *arrays: Array) -> list[Array]:
    """Arrays in float64, which programs compute in."""
    xp = call.plan.library.xp
    return [xp.astype(each, xp.float64, copy=False) for each in arrays]


def sum_of_weights(call: Call) -> Array | None:
    """That of each group; None where it is out of range."""

    def body(xp: Any, numbers: list[Any], sums: TracedSums) -> Written:
        return Written(of_groups=[sums.total(xp, numbers[1])])

    made = kept_of_groups(call, ("weight",), 1, body)
    return made[0] if made is not None and sums_in_range(call, ProgramStats(weight=made[0])) else None


def kept_of_groups(call: Call, what: tuple[Any, ...], number: int, body: Any) -> list[Array] | None:
    """What a body finds of x and the weights, so many numbers for each group."""
    key, inputs = (*what, dtype_of_weights(call)), (call.x, weights_of(call))
    ran = cpu_run.run(call.plan, key, inputs, (), (), body, of_groups=number)
    return None if ran is None else ran[0]


def kept_fields(call: Call) -> list[str]:
    """Which statistics are kept; the mean of narrower numbers has no `mean_lo`."""
    plan = call.plan
    mean = ["mean", "mean_lo"][: 1 + is_wide(plan)] if plan.centred else []
    return [*mean, "var"] if weights_of(call) is None else [*mean, "var", "weight"]


def found_of(call: Call, made: list[Array]) -> ProgramStats:
    """Statistics of the arrays that were kept."""
    return ProgramStats(**dict(zip(kept_fields(call), made, strict=False)))


def kept_stats(plan: Plan, found: ProgramStats) -> Stats:
    """With a `mean_lo` of 0 where the mean has all digits."""
    if found.mean is None or found.mean_lo is not None:
        return Stats(*found[:3])
    return Stats(found.mean, plan.library.host_zeros(tuple(found.mean.shape), found.mean.dtype), found.var)


def sums_in_range(call: Call, found: ProgramStats) -> bool:
    """Whether no sum overflowed, and none that matters underflowed."""
    if is_wide(call.plan) and found.var is not None and not in_range(call.plan, found.var):
        return False
    weight = found.weight if takes_two_passes(call) else None
    if weight is None:
        return True
    return bool(call.plan.library.xp.all((weight == 0) | ((weight > LEAST) & (weight < MOST))))


def groups_of(sums: TracedSums, each: Any, weight: Any, *, twice: bool = False) -> TracedSums:
    """How the numbers of a group are added up, with weights where there are any."""
    if each is None:
        return TracedSums(sums.tracer, twice=twice)
    return TracedWeightedSums(sums.tracer, each, weight, twice=twice)


def weights_of(call: Call) -> Array | None:
    """The weights of a call, which make no difference to statistics that are given."""
    if call.weights is None or call.stats is not None or call.plan.weights is None:  # the last of replicas without
        return None
    each: Array = call.weights.each
    return each


def dtype_of_weights(call: Call) -> str | None:
    """Replicas have them in that of the computation, others as they were given: the plan does not tell."""
    weights = weights_of(call)
    return None if weights is None else name_of(weights.dtype)


def is_wide(plan: Plan) -> bool:
    """Whether numbers are as wide as the sums of programs."""
    return name_of(plan.dtype) == "float64"


def is_narrow(call: Call) -> bool:
    """Whether y has digits enough in float32: all that it is made of is in range, and not small beside a large eps."""
    plan, library, stats = call.plan, call.plan.library, call.stats
    if is_wide(plan) or plan.inverse or not plan.divides:
        return False
    if stats is None:
        return plan.eps <= 1
    if plan.nbytes < SMALL:  # to look at the moments that were given takes longer
        return False
    with library.quiet():
        rstd, step = root(plan, stats), plan.limits.step
        if not 1 / step <= library.min(rstd) <= library.max(rstd) <= step:
            return False
        return call.gamma is None or exact_product(plan, rstd, library.extent(call.gamma))


def takes_two_passes(call: Call) -> bool:
    """Whether sums may leave the range of float64, and are taken twice for their last digits."""
    return is_wide(call.plan) or dtype_of_weights(call) not in (None, "bool")
