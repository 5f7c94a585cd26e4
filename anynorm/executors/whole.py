"""The kernels on whole arrays."""

import math
from functools import partial
from typing import Any

from anynorm import kernels
from anynorm.calls import Call, Plan, Wanted, compiled, weighed, weighted_sums
from anynorm.calls.call import Gradients, Normalized
from anynorm.calls.conditions import in_range, near_power, root, squares_in_range
from anynorm.kernels import NO_STATS, Array, Scale, Standardized, Stats, Sums, WideSums, replicas, weighting
from anynorm.kernels.weighting import WeightedSums, Weights, WideWeightedSums


def forward(call: Call) -> Normalized:
    """The result of a call, and its statistics."""
    y, of = standardized(call)
    if call.out is None:
        return Normalized(y, of.stats)
    call.out[...] = y
    return Normalized(call.out, of.stats)


def statistics(call: Call) -> Stats:
    """The statistics of a call."""
    stats: Stats = compiled(call, "statistics", lambda call: standardize(call).stats)
    return stats


def backward(call: Call, dy: Array, wanted: Wanted, of: Standardized | None) -> Gradients:
    """The gradients of a call; without `of`, what x was standardized to, all is done in arithmetic to be recorded."""
    gradients: Gradients = compiled(weighed(call), ("gradients", wanted), partial(_gradients, wanted), dy, of)
    return gradients


def _gradients(wanted: Wanted, call: Call, dy: Array, of: Standardized | None) -> Gradients:
    plan = call.plan
    if of is None and (call.x is None or not (call.reads_x or wanted.of_gamma)):  # nothing that is wanted depends on x
        stats = call.stats or NO_STATS
        of = Standardized(None, None if call.stats is None else root(plan, stats), stats)
    elif of is None:
        of = standardize(call)
    xp = plan.library.xp
    wide = of.xhat is not None and of.xhat.dtype != plan.dtype
    dy = plan.library.cast(dy, plan.dtype)
    if of.padding is not None:
        dy = xp.where(of.padding != 0, xp.zeros_like(dy), dy)
    dy = xp.astype(dy, of.xhat.dtype) if wide else dy
    sums: dict[str, Any] = {"block": math.inf if wide else plan.groups.block, "ones": plan.groups.ones}
    if plan.inverse:
        dx = kernels.unscaled(xp, dy, call.gamma, of.rstd)
        parameters = kernels.parameter_gradients(xp, dx, of.xhat, wanted.parameters, **sums)
        return None if wanted.dtype is None else xp.astype(dx, wanted.dtype, copy=False), *parameters
    parameters = kernels.parameter_gradients(xp, dy, of.xhat, wanted.parameters, **sums)
    if wide:
        parameters = [None if each is None else xp.astype(each, plan.dtype) for each in parameters]
    if wanted.dtype is None:
        return None, *parameters
    if not plan.divides:
        of = of._replace(xhat=None, rstd=None)
    power = None
    if call.gamma is not None and plan.library.on_host(dy):
        power = near_power(call, plan.library.constant(of.rstd))
    weighted, groups = weighted_sums(call), None
    if call.stats is None:
        groups = plan.groups if weighted is None else weighted._replace(join=call.join)
        groups = _wide_sums(call, dy.dtype) if wide else groups
    how: dict[str, Any] = {"centred": plan.centred, "last": call.gamma_last, "power": power}
    dx = kernels.input_gradient(xp, dy, call.gamma, of, groups=groups, **how)
    return xp.astype(dx, wanted.dtype, copy=False), *parameters


def standardized(call: Call) -> tuple[Array, Standardized]:
    """The result of a call, and what x was standardized to."""
    found: tuple[Array, Standardized] = compiled(weighed(call), "standardized", _standardized)
    return found


def _standardized(call: Call) -> tuple[Array, Standardized]:
    of = standardize(call)
    return affine(call, of), of


def standardize(call: Call) -> Standardized:
    """The kernel's result. An array is scaled only if it turns out that it must be; where nothing can tell, always."""
    call, plan = weighed(call), call.plan
    library, xp = plan.library, plan.library.xp
    x = library.cast(call.x, plan.dtype)
    if plan.inverse:
        assert call.stats is not None
        return Standardized(x if call.beta is None else x - call.beta, root(plan, call.stats), call.stats)
    if call.stats is not None:
        return kernels.standardize_with(xp, x, call.stats, eps=plan.addend, divides=plan.divides)
    subnormal = library.subnormal(x, plan.limits.step * plan.limits.further) if plan.tiny else None
    weighted, join = weighted_sums(call), call.join
    if weighted is not None and join is not None:
        how: dict[str, Any] = {"eps": plan.eps, "join": join, "constant": library.constant, "subnormal": subnormal}
        return replicas.standardize(xp, x, groups=weighted, divides=plan.divides, **how)
    groups = weighted or plan.groups
    # NaN is a size that is not known, and may be 0, of which there is no minimum: but for a symbol of a compiler
    vacant = not (plan.nbytes > 0 or (plan.nbytes != 0 and library.symbols)) or not library.scales(x)
    rstd_at_zero, how = 1.0 if plan.tiny else None, {"centred": plan.centred, "divides": plan.divides}
    if library.branches and weighted is None and plan.divides and not vacant:
        both = partial(_branching, plan), partial(_derivative, plan)
        found: Standardized = library.differentiated(id(plan), *both, x)
        return found
    if not vacant and (wide := library.wide(x)) is not None:
        how |= {"groups": _wide_sums(call, wide), "eps": plan.eps, "dtype": wide, "once": library.once}
        return kernels.standardize_wide(xp, x, **how)
    if vacant or library.on_host(x):
        done = kernels.standardize(xp, x, groups=groups, eps=plan.addend, rstd_at_zero=rstd_at_zero, **how)
        if vacant or in_range(plan, done.stats.var):
            return done
    return kernels.standardize_scaled(xp, x, groups=groups, eps=plan.eps, subnormal=subnormal, **how)


def _wide_sums(call: Call, dtype: Any) -> WideSums | WideWeightedSums:
    """The elements that share a mean, added up in this dtype in one go, which is one loop to a compiler."""
    plan, xp = call.plan, call.plan.library.xp
    if call.weights is None:
        return WideSums(plan.view.axes, plan.groups.divisor, math.inf)
    plain, each = Sums(plan.view.axes, 1.0, math.inf), xp.astype(call.weights.each, dtype)
    sums = plain.mean(xp, each) * plan.times(each)
    return WideWeightedSums(plain, Weights(each, sums))


def _branching(plan: Plan, x: Array) -> Standardized:
    """`standardize` of an array whose numbers cannot be read: in both ways, of which one is computed."""
    library, xp = plan.library, plan.library.xp
    subnormal = library.subnormal(x, plan.limits.step * plan.limits.further) if plan.tiny else None
    how: dict[str, Any] = {"groups": plan.groups, "eps": plan.eps, "centred": plan.centred, "subnormal": subnormal}
    one = xp.ones_like(plan.groups.first(x))
    own = Scale(one, one * plan.eps, 1.0 if plan.tiny else None, None)
    plain = kernels.standardizer_in_scale(xp, x, own, **how)
    fine = squares_in_range(plan, plain[1].stats.var)
    by, of = library.branch(fine, lambda: plain, lambda: kernels.standardizer_in_scale(xp, x, None, **how))
    standardized: Standardized = of._replace(xhat=kernels.by(xp, x, by, subnormal))
    return standardized


def _derivative(plan: Plan, of: Standardized, dx: Array) -> Standardized:
    return kernels.derivative(plan.library.xp, dx, of, groups=plan.groups, centred=plan.centred)


def standardize_by(call: Call, stats: Stats) -> Standardized | None:
    """What x was standardized to by its statistics, which are known; None where it is to be found again."""
    plan = call.plan
    if call.stats is not None or call.x is None:
        return None
    xp, wide = plan.library.xp, plan.library.wide(call.x)
    groups: WideSums | WeightedSums | None
    if call.all_reduce is None and wide is not None and stats.var.dtype == wide:
        x, stats = xp.astype(plan.library.cast(call.x, plan.dtype), wide), stats._replace(mean_lo=None)
        groups = _wide_sums(call, wide)
    # to find them again replicas would sum again, and those that run programs do not
    elif call.all_reduce is not None and in_range(plan, stats.var):
        x, stats, groups = plan.library.cast(call.x, plan.dtype), stats.astype(xp, plan.dtype), weighted_sums(call)
    else:
        return None
    with plan.library.quiet():
        done = kernels.standardize_with(xp, x, stats, eps=plan.eps, divides=plan.divides)
        return weighting.apart(xp, done, groups.weights, plan.dtype) if isinstance(groups, WeightedSums) else done


def affine(call: Call, of: Standardized) -> Array:
    """The normalized array in the dtype and the shape of the caller's x."""
    if call.plan.inverse:
        y = kernels.denormalize(call.plan.library.xp, of.xhat, call.gamma, None, of.stats, of.rstd)
        return call.plan.from_view(y, call.plan.result)
    y = _without_xhat(call, of)
    if y is None:
        y = kernels.affine(of.xhat, call.gamma, call.beta, ops=call.plan.library.ops)
    if of.padding is not None:
        constant = call.plan.library.constant
        padding, *parameters = (
            None if each is None else constant(each) for each in (of.padding, call.gamma, call.beta)
        )
        y = call.plan.library.xp.where(padding != 0, kernels.affine(padding, *parameters), y)
    return call.plan.from_view(y, call.plan.result)


def _without_xhat(call: Call, of: Standardized) -> Array | None:
    """The normalized array where it may have digits that xhat cannot hold: beside a large eps, or given moments."""
    plan, xp = call.plan, call.plan.library.xp
    if call.gamma is None or not plan.library.on_host(call.x) or (call.stats is None and plan.eps <= 1):
        return None
    d = kernels.subtract_mean(plan.library.cast(call.x, plan.dtype), of.stats)
    if call.weights is not None and of.padding is not None:
        d = xp.where((call.weights.sums > 0) & (of.padding == 0), d, xp.zeros_like(d))
    return kernels.affine(kernels.scaled(xp, d, call.gamma, of.rstd), None, call.beta)


def length(call: Call) -> Array:
    """The norm of each group of a call of `DIRECTION`, beside the view: v along its own direction."""

    def work(call: Call) -> Array:
        return call.plan.groups.mean(call.plan.library.xp, standardize(call).xhat * call.x)

    return compiled(call, "length", work)
