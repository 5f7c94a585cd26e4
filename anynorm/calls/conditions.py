"""What the numbers of a call allow: whether they are in range, and which of them matter beside others."""

import math

from anynorm import kernels
from anynorm.calls.call import Call
from anynorm.calls.plan import Plan
from anynorm.kernels import Array, Scale, Stats


def root(plan: Plan, stats: Stats, scale: Scale | None = None) -> Array | None:
    """1 / sqrt(var + eps), of numbers times the unit of the scale; None for 1, where nothing is divided."""
    xp = plan.library.xp
    if not plan.divides:
        return None if scale is None else 1 / scale.unit
    if scale is not None:
        return kernels.inverse_root(xp, stats.var + scale.eps, rstd_at_zero=scale.rstd_at_zero)
    return kernels.inverse_root(xp, stats.var + plan.addend, rstd_at_zero=1.0 if plan.tiny else None)


def near_power(call: Call, rstd: Array) -> Array | None:
    """The `power` of `kernels.input_gradient`; sums of what it makes do not overflow."""
    if call.gamma is None or call.gamma_last:
        return None
    xp, limits = call.plan.library.xp, call.plan.limits
    power = kernels.power_of_two(xp, rstd)
    return xp.minimum(power, xp.ones_like(power) * (limits.step * limits.further))


def within_spread(plan: Plan, mean: Array, var: Array) -> bool:
    """Whether a mean is nowhere larger than the spread; one whose square may underflow is taken for none."""
    library, least = plan.library, plan.limits.eps
    if not library.max(mean * mean - var) <= 0:  # a NaN is not within it
        return False
    return library.min(var) >= least or bool(library.xp.all((mean == 0) | (var >= least)))


def in_range(plan: Plan, var: Array) -> bool:
    """Whether no square overflowed, and none that matters underflowed."""
    try:
        return plan.library.max(var) < math.inf and (not plan.tiny or plan.library.min(var) >= plan.limits.eps)
    except RuntimeError:  # torch.func.vmap and fake tensors: a number that cannot be read
        return False


def squares_in_range(plan: Plan, var: Array) -> Array:
    """The same, of numbers that cannot be read: as an array."""
    xp = plan.library.xp
    fine = xp.all(var < math.inf)
    return fine & xp.all(var >= plan.limits.eps) if plan.tiny else fine


def sums_had_room(plan: Plan, dx: Array) -> bool:
    """Whether no sum over a group overflowed in a gradient of x, which the first number of each group tells."""
    return bool(plan.library.xp.all(plan.library.xp.isfinite(plan.groups.first(dx))))


def resolved(plan: Plan, stats: Stats) -> bool:
    """Whether no spread may be rounding of the mean alone, which shares leave that do not quite add up to 1."""
    if stats.mean is None:
        return True
    xp = plan.library.xp
    rounding = stats.mean * (2 * float(xp.finfo(plan.dtype).eps))
    return not bool(xp.any((stats.var > 0) & (stats.var < rounding * rounding)))


def exact_product(plan: Plan, rstd: Array, extent: tuple[float, float]) -> bool:
    """Whether numbers of this extent, as they are and times rstd, and their reciprocals have all their digits."""
    library, xp, (low, high) = plan.library, plan.library.xp, extent
    if high == 0:
        return True
    # in this order, as NaN stays NaN
    most, least = max(float(library.max(rstd)), 1) * high, min(float(library.min(rstd)), 1) * low
    normal = kernels.smallest_normal(xp, plan.dtype)
    return bool(most <= 1 / normal and least >= normal)
