"""How a call is run: whole or in blocks; plainly where its numbers turn out ordinary, else proof to any size."""

from typing import Any, NamedTuple

from anynorm import kernels, passes, replicas, weights
from anynorm.arrays import adds, cast, empty
from anynorm.calls import Call, Plan, at_once, weighed
from anynorm.executors import programs
from anynorm.kernels import Array, Spread, Standardized
from anynorm.passes import ordinary
from anynorm.settings import current

SMALL = 2**16
"""An array of fewer bytes is not worth the trouble of writing in place."""


class Normalized(NamedTuple):
    """A call's result, as the caller's x was, and its statistics beside the view."""

    y: Array
    spread: Spread
    """Empty where they are not to be kept: of short groups they are nearly as large as the array."""


def normalize(call: Call, *, keep: bool = True) -> Normalized:
    """The result of a call: a program on a GPU; in blocks if it is large and may be written so; else whole."""
    out = call.out
    if programs.supports(call) and (found := programs.forward(call, keep=keep)) is not None:
        return Normalized(*found)
    if in_blocks(call):
        return _in_blocks(call, keep)
    y, of = whole(weighed(call))
    if out is not None:
        out[...] = y
    return Normalized(y if out is None else out, of.spread)


def whole(call: Call) -> tuple[Array, Standardized]:
    """The result of a call, and what x was standardized to."""

    def work(call: Call) -> tuple[Array, Standardized]:
        of = standardize(call)
        return affine(call, of), of

    found: tuple[Array, Standardized] = at_once(call, "whole", work)
    return found


def survey(call: Call) -> Spread:
    """The statistics of a call alone."""
    if programs.supports(call) and (spread := programs.statistics(call)) is not None:
        return spread
    if in_blocks(call):
        return passes.run(weighed(call), None, False, True)
    whole: Spread = at_once(call, "statistics", lambda call: standardize(call).spread)
    return whole


def in_blocks(call: Call, *beside: Array) -> bool:
    """Whether what is computed of a call, and of what stands beside it, is large and may be written part by part."""
    plan = call.plan
    if call.all_reduce is not None:  # replicas wait for each other
        return False
    if plan.library.traced():  # by a compiler that cannot follow into the settings
        return False
    return plan.nbytes >= min(SMALL, current().block_bytes) and plan.library.plain(*arrays(call), *beside)


def standardize(call: Call) -> Standardized:
    """The kernel's result. An eager array is scaled only if it turns out that it must be; any other always is."""
    call, plan = weighed(call), call.plan
    library, xp = plan.library, plan.library.xp
    x = cast(library, call.x, plan.dtype)
    if call.spread is not None:
        return kernels.standardize_with(xp, x, call.spread, eps=plan.addend)
    subnormal = None
    if plan.tiny and library.subnormal:
        subnormal = library.subnormal(x, plan.limits.step * plan.limits.further)
    weighted = call.weighted
    if weighted is not None and weighted.join is not None:
        return replicas.standardize(xp, x, groups=weighted, constant=library.constant, subnormal=subnormal)
    room: Any = kernels if weighted is None else weights
    groups = weighted or plan.groups
    vacant = not plan.nbytes > 0  # NaN is a size that Dask does not know: there it takes no minimum
    flat = 1.0 if plan.tiny else None
    done: Standardized
    if vacant or library.readable(x):
        done = room.standardize(xp, x, groups=groups, eps=plan.addend, centred=plan.centred, flat=flat)
        if vacant or ordinary(plan, done.spread.var):
            return done
    done = room.standardize_scaled(xp, x, groups=groups, eps=plan.eps, centred=plan.centred, subnormal=subnormal)
    return done


def standardize_by(call: Call, spread: Spread) -> Standardized:
    """What x of one of several replicas is standardized to by the statistics of all, which are known."""
    plan, weighted = call.plan, call.weighted
    assert weighted is not None
    xp, x = plan.library.xp, cast(plan.library, call.x, plan.dtype)
    with plan.library.quiet():
        kept = weights.shielded(xp, x, weighted.weights)
        done = kernels.standardize_with(xp, kept, spread, eps=plan.addend)
        return weights.strayed(xp, x, done, weighted.weights)


def affine(call: Call, standardized: Standardized) -> Array:
    """The normalized array in the dtype and the shape of the caller's x."""
    y = _without_xhat(call, standardized)
    if y is None:
        y = kernels.affine(standardized.xhat, call.gamma, call.beta, ops=call.plan.library.arithmetic)
    if standardized.stray is not None:
        constant = call.plan.library.constant
        stray, *parameters = (
            None if each is None else constant(each) for each in (standardized.stray, call.gamma, call.beta)
        )
        y = call.plan.library.xp.where(stray != 0, kernels.affine(stray, *parameters), y)
    return restore(call.plan, y, call.x.dtype)


def _without_xhat(call: Call, of: Standardized) -> Array | None:
    """The normalized array where it may have digits that xhat has no room for: beside a large eps, or given moments."""
    plan, xp = call.plan, call.plan.library.xp
    if call.gamma is None or not plan.library.readable(call.x) or (call.spread is None and plan.eps <= 1):
        return None
    d = kernels.less(cast(plan.library, call.x, plan.dtype), of.spread)
    if call.weights is not None and of.stray is not None:
        d = xp.where((call.weights.sums > 0) & (of.stray == 0), d, xp.zeros_like(d))
    return kernels.affine(kernels.scaled(xp, d, call.gamma, of.rstd), None, call.beta)


def length(call: Call) -> Array:
    """The norm of each group of `calls.direction`, beside the view: v along its own direction."""

    def work(call: Call) -> Array:
        return call.plan.groups.mean(call.plan.library.xp, standardize(call).xhat * call.x)

    return at_once(call, "length", work)


def enter(plan: Plan, value: Array, *, dtype: Any) -> Array:
    """An array of the caller's shape in the view and this dtype."""
    return plan.enter(plan.library.astype(value, dtype))


def restore(plan: Plan, value: Array, dtype: Any) -> Array:
    """An array of the view in the caller's shape and this dtype."""
    return plan.library.astype(plan.leave(value), dtype)


def statistic(call: Call, value: Any) -> Array:
    """A mean, a variance or a norm, of the shape that the caller sees, as a constant."""
    plan = call.plan
    xp = plan.library.xp
    value = plan.library.constant(xp.squeeze(value, axis=plan.view.axes))
    return xp.reshape(value, plan.layout.kept_shape) if plan.view.joined else value


def _in_blocks(call: Call, keep: bool) -> Normalized:
    """Block by block, each into its place in the result."""
    call, plan, out = weighed(call), call.plan, call.out
    library = plan.library
    target, y = out, None
    if out is not None:
        call, y = _apart(call, out), plan.enter(out)
    if y is None or (library.overlap(call.x, y) and not library.same(call.x, y)):
        y = empty(plan.view.shape, call.x, call.x.dtype)
        target = plan.leave(y)
    in_place = adds(library, call.x, plan.dtype) and adds(library, y, plan.dtype)
    in_place = in_place and (target is not out or not library.overlap(call.x, y))
    spread = passes.run(call, y, in_place, keep)
    if out is not None and target is not out:
        out[...] = target
    return Normalized(target if out is None else out, spread)


def _apart(call: Call, out: Array) -> Call:
    """The call with copies of what `out` shares memory with, but for x."""

    def copied(array: Array | None) -> Array | None:
        return array * 1.0 if array is not None and call.plan.library.overlap(array, out) else array

    spread = None if call.spread is None else Spread(*map(copied, call.spread))
    given = call.weights
    if given is not None and call.plan.library.overlap(given.each, out):
        given = given._replace(each=call.plan.library.xp.asarray(given.each, copy=True))
    return call._replace(gamma=copied(call.gamma), beta=copied(call.beta), spread=spread, weights=given)


def arrays(call: Call) -> list[Array]:
    """All arrays of a call."""
    arrays = (call.x, call.gamma, call.beta, call.out, *(call.spread or ()))
    return [array for array in arrays if array is not None]
