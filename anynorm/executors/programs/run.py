"""The programs of a call: which calls they take, and what of the kernels they run.

On a processor everything is computed in float64, but for what x becomes by statistics that are known, in float32.
Numbers of up to four bytes, and their squares, have digits to spare in float64; of numbers of eight the sums are taken
twice, and out of the range of these there is no program.
"""

import math
from typing import Any

from anynorm import kernels
from anynorm.calls import Call, Gradients, Normalized, Plan, Wanted
from anynorm.calls.conditions import in_range, sums_had_room
from anynorm.executors.programs import compiled, cpu_run, cuda_run
from anynorm.executors.programs.cuda_run import apart
from anynorm.executors.programs.stats import (
    SMALL,
    ProgramStats,
    dtype_of_weights,
    find_statistics,
    found_of,
    groups_of,
    is_narrow,
    is_wide,
    kept_fields,
    kept_stats,
    of_replicas,
    statistics_of,
    sum_of_weights,
    sums_in_range,
    takes_two_passes,
    weights_of,
    widened,
)
from anynorm.executors.programs.trace import TracedSums, Written
from anynorm.kernels import NO_STATS, Array, GradientSums, Standardized, Stats, replicas, weighting

BRIEF = 2**13
"""The gradients of parameters of more numbers are added up by programs of their own."""


def supports(call: Call, *beside: Array) -> bool:
    """Whether a call, and what stands beside it, may be run by programs."""
    plan, library = call.plan, call.plan.library
    if library.traced() or library.chunked:
        return False
    engine = plan.settings.engine
    if library.programs == "cuda":
        return engine != "arrays" and cuda_run.supports(call, [*_arrays(call), *beside])
    if engine == "arrays" or (engine == "auto" and not plan.nbytes >= SMALL) or not plan.nbytes > 0:
        return False
    first = beside[0] if call.x is None else call.x  # of given moments a gradient of gamma alone keeps no x
    if library.programs != "cpu" or not (library.one_device or getattr(library.device(first), "type", "cpu") == "cpu"):
        if engine == "numba":
            raise ValueError(
                f"engine='numba' takes arrays of NumPy, PyTorch on a processor and Dask, got {library.name}"
            )
        return False
    state = compiled.state()
    if state.version is None and engine == "numba":
        raise ImportError(f"engine='numba' needs numba, which {state.why}: pip install numba")
    if state.version is None or not plan.view.axes:
        return False
    arrays = [*_arrays(call), *beside]
    if not (library.in_memory or library.writable_in_blocks(*arrays)):
        return False
    # replicas add up no second time: what they begin they can end
    return call.all_reduce is None or all([cpu_run.reads(library, each) for each in arrays])  # noqa: C419


def _arrays(call: Call) -> list[Array]:
    weights = None if call.weights is None else call.weights.each
    arrays = (call.x, call.gamma, call.beta, call.out, weights, *(call.stats or ()))
    return [array for array in arrays if array is not None]


def forward(call: Call, *, keep: bool) -> Normalized | None:
    """The result of a call, in `out` where there is one; and its statistics, if they are to be kept."""
    plan, out = call.plan, call.out
    if plan.library.programs == "cuda":
        with plan.library.on_device(call.x):
            return cuda_run.forward(call, keep=keep)
    careful, weights, fields = takes_two_passes(call), weights_of(call), kept_fields(call)
    narrow, place, in_place = is_narrow(call), None, False
    what = ("forward", careful, dtype_of_weights(call), narrow)
    if out is not None and apart(call, out):
        place = plan.to_view(out)
        in_place = plan.library.overlap(call.x, out)
    known = None if call.stats is None else ProgramStats(*call.stats)
    # nothing is written before they are known to be in range; and replicas have them before they can go on
    if known is None and (call.all_reduce is not None or (careful and out is not None)):
        known = find_statistics(call)
        if known is None:
            return None
    y = plan.library.host_empty(plan.view.shape, plan.result) if place is None else place

    def body(xp: Any, numbers: list[Any], sums: TracedSums) -> Written:
        x, gamma, beta, each, *given = numbers
        found = ProgramStats(*given) if given else statistics_of(call, xp, x, each, sums)
        stats, eps = Stats(*found[:3]), sums.tracer.eps
        if plan.inverse:
            rstd = kernels.inverse_root(xp, stats.var + eps, rstd_at_zero=1.0)
            return Written([kernels.denormalize(xp, x, gamma, beta, stats, rstd, exact=not is_wide(plan))])
        if narrow:
            rstd = kernels.inverse_root(xp, stats.var + eps, rstd_at_zero=1.0)
            x, gamma, beta = (each if each is None else xp.astype(each, xp.float32) for each in (x, gamma, beta))
            if call.stats is not None:  # xhat may leave the range where y does not
                mean = stats.mean if stats.mean_lo is None else stats.mean + stats.mean_lo
                own = kernels.standardizer(xp, stats._replace(mean=mean), rstd, xp.float32)
                factor = own.rstd if gamma is None else gamma * own.rstd
                return Written([kernels.affine(kernels.subtract_mean(x, Stats(*own[1:])), factor, beta)])
            xhat = kernels.by(xp, x, kernels.standardizer(xp, stats, rstd, xp.float32))
        else:
            xhat = kernels.standardize_with(xp, x, stats, eps=eps, divides=plan.divides).xhat
        if found.weight is not None:  # a group without weight is all beta
            xhat = xp.where(found.weight > 0, xhat, xp.zeros_like(xhat))
        kept = [] if given else [getattr(found, name) for name in fields]
        return Written([kernels.affine(xhat, gamma, beta)], kept)

    def written(known: ProgramStats | None) -> Any:
        inputs = (call.x, call.gamma, call.beta, None if known else weights, *(known or ()))
        how: dict[str, Any] = {"of_groups": 0 if known else len(fields), "keep": keep or careful, "in_place": in_place}
        axes = None if known is None else _along_memory(plan)
        return cpu_run.run(plan, (*what, known is None), inputs, (y,), (), body, axes=axes, **how)

    ran = written(known)
    if ran is None and in_place and known is None:  # parts share a group, and one may write before another has read
        known = find_statistics(call)
        ran = None if known is None else written(known)
    if ran is None:
        return None
    stats = call.stats or NO_STATS
    if call.stats is None and (keep or careful):
        found = known or found_of(call, ran[0])
        if known is None and not sums_in_range(call, found):
            return None
        stats = kept_stats(plan, found)
    if out is None:
        return Normalized(plan.from_view(y), stats)
    if place is None:
        out[...] = plan.from_view(y)
    return Normalized(out, stats)


def _along_memory(plan: Plan) -> tuple[int, ...]:
    """The axes that are gone through together where nothing is added up: x is read in its order."""
    axes, last = plan.view.axes, len(plan.view.shape) - 1
    return (last,) if last in axes and not plan.interleaved else axes


def statistics(call: Call) -> Stats | None:
    """The statistics of a call."""
    plan = call.plan
    if plan.library.programs == "cuda":
        with plan.library.on_device(call.x):
            return cuda_run.statistics(call)
    found = find_statistics(call)
    return None if found is None else kept_stats(plan, found)


def backward(call: Call, dy: Array, wanted: Wanted, stats: Stats) -> Gradients | None:
    """The gradients of a call with respect to x and its parameters, beside the view; None where they are not wanted."""
    plan, given, weights = call.plan, call.stats is not None, weights_of(call)
    if plan.library.programs == "cuda":
        with plan.library.on_device(dy):
            return cuda_run.backward(call, dy, wanted, stats)
    twice, of_x, last, weight, here = is_wide(plan), wanted.dtype is not None, call.gamma_last, None, None
    # statistics of programs are wider, if they can be
    if not given and stats.var.dtype == plan.dtype and not in_range(plan, stats.var):
        return None
    if weights is not None:
        here = sum_of_weights(call)
        if here is None:
            return None
        weight = here if call.all_reduce is None or call.weights is None else widened(call, call.weights.unit)[0]
    wide = stats.mean is not None and not twice and stats.mean.dtype != plan.dtype
    stats = stats._replace(mean_lo=None if wide else stats.mean_lo)  # a wide mean has all digits

    def gradients(xp: Any, numbers: list[Any], sums: TracedSums, *, of_x: bool = False) -> tuple[Any, list[Any]]:
        """The gradient of x if it is asked for, and what those of gamma and beta are the sums of."""
        dy, x, gamma, *known, each, weight, beta = numbers
        if plan.inverse:
            rstd = kernels.inverse_root(xp, known[-1] + sums.tracer.eps, rstd_at_zero=1.0)
            dx = kernels.unscaled(xp, dy, gamma, rstd, exact=not twice)
            d = x if beta is None else x - beta
            return dx if of_x else None, [None if d is None else dx * d, dx]
        dy, of = _standardized(xp, dy, x, Stats(*known), each, weight, sums.tracer.eps, divides=plan.divides)
        dx, groups = None, groups_of(sums, each, weight, twice=twice)
        if of_x and given:
            dx = kernels.affine(dy, gamma, None) * (1.0 if of.rstd is None else of.rstd)
        elif of_x:
            power = kernels.power_of_two(xp, of.rstd) if twice and gamma is not None and not last else None
            how: dict[str, Any] = {"centred": plan.centred, "last": last, "power": power}
            dx = kernels.input_gradient(xp, dy, gamma, of, groups=groups, **how)
        return dx, [None if of.xhat is None else dy * of.xhat, dy]

    def run(what: str, of_x: bool, these: list[int], *others: Any, **how: Any) -> Any:
        # weights are there to know what weighs nothing and is no number
        reads_x = 0 in these or (of_x and call.reads_x) or weights is not None
        scales = plan.inverse or (of_x and plan.divides)
        known = stats if scales or reads_x else NO_STATS
        beside = (call.gamma if scales else None, *known, weights, weight, call.beta if reads_x else None)
        inputs = (dy, call.x if reads_x else None, *beside)
        key = (what, dy.dtype, dtype_of_weights(call), wide, given, of_x, *these)  # in whatever byte order
        axes = _along_memory(plan) if given else None
        return cpu_run.run(plan, key, inputs, *others, **{"axes": axes, **how})

    dx = plan.library.empty(plan.view.shape, dy, wanted.dtype) if of_x else None
    if dx is not None and call.all_reduce is not None and not given:
        _joined_input_gradient(call, dx, dy, stats, here)
        of_x = False
    shapes = wanted.parameters
    brief = [i for i, shape in enumerate(shapes) if shape is not None and math.prod(shape) <= BRIEF]

    def body(xp: Any, numbers: list[Any], sums: TracedSums) -> Written:
        dx, products = gradients(xp, numbers, sums, of_x=of_x)
        return Written([] if dx is None else [dx], (), [products[i] for i in brief])

    found: list[Array | None] = [None for _ in shapes]
    if of_x or brief:
        ran = run("backward", of_x, brief, [dx] if of_x else [], [shapes[i] for i in brief], body)
        if ran is None:
            return None
        if twice and of_x and dx is not None and not given and not sums_had_room(plan, dx):
            return None
        for i, total in zip(brief, ran[1], strict=True):
            found[i] = plan.library.xp.astype(total, plan.dtype, copy=False)
    for i, shape in enumerate(shapes):
        if shape is not None and i not in brief:
            found[i] = _parameter(plan, shape, i, dy, gradients, run)
            if found[i] is None:
                return None
    return dx, *found


def _standardized(
    xp: Any, dy: Any, x: Any, stats: Stats, each: Any, weight: Any, eps: Any, *, divides: bool = True
) -> tuple[Any, Standardized]:
    """dy, and what x was standardized to, without padding."""
    rstd = None if stats.var is None or not divides else kernels.inverse_root(xp, stats.var + eps, rstd_at_zero=1.0)
    xhat = None if x is None else kernels.subtract_mean(x, stats)
    xhat = xhat if xhat is None or rstd is None else xhat * rstd
    if each is not None and xhat is not None:
        dy, xhat = weighting.gradient_without_padding(xp, dy, xhat, each, weight)
    return dy, Standardized(xhat if divides else None, rstd, stats)


def _joined_input_gradient(call: Call, dx: Array, dy: Array, stats: Stats, here: Array | None) -> None:
    """Write the gradient of x for statistics of all replicas: the sums here, those of all, and what they make.

    `here` is the sum of the weights of each group in this one.
    """
    plan, (weights, join), each = call.plan, of_replicas(call), weights_of(call)
    last = call.gamma_last

    def gradient(xp: Any, numbers: list[Any], sums: TracedSums) -> tuple[Any, Standardized, TracedSums]:
        """That of xhat, xhat, and the sums over a group."""
        dy, x, gamma, *known, weight, each = numbers[:8]
        dy, of = _standardized(xp, dy, x, Stats(*known), each, weight, sums.tracer.eps, divides=plan.divides)
        return kernels.affine(dy, None if last else gamma, None), of, groups_of(sums, each, None)

    def local(xp: Any, numbers: list[Any], sums: TracedSums) -> Written:
        g, of, groups = gradient(xp, numbers, sums)
        _, own = kernels.gradient_sums(xp, g, of.xhat, groups=groups, centred=True, part=True)
        return Written(of_groups=[part for part in own._replace(weight=None) if part is not None])

    def apply(xp: Any, numbers: list[Any], sums: TracedSums) -> Written:
        (g, of, groups), gamma, weight = gradient(xp, numbers, sums), numbers[2], numbers[6]
        mean, rest, *product = numbers[8:]
        joined = GradientSums(mean, rest, product[0] if product else None, weight)
        dx = kernels.input_gradient_of_part(xp, g, joined, of, groups.each, gamma if last else None, None)
        return Written([dx])

    (weight,) = widened(call, weights.unit)
    inputs: tuple[Any, ...] = (dy, call.x, call.gamma, *stats, weight, each)
    key = (dy.dtype, stats.var.dtype, dtype_of_weights(call))
    fields = ["mean"] if each is None else []  # beside weights g has no anchor
    fields += ["rest", "product", "level"] if plan.divides else ["rest"]
    ran = cpu_run.run(plan, ("sums of a replica", *key), inputs, (), (), local, of_groups=len(fields))
    assert ran is not None, "what supports took can be read"
    here = float(plan.layout.group_size) if here is None else here
    own = GradientSums(None, None, None, here)._replace(**dict(zip(fields, ran[0], strict=True)))
    joined = replicas.joined_gradient_sums(plan.library.xp, own, weight, join)[:3]
    inputs += tuple(part for part in joined if part is not None)
    cpu_run.run(plan, ("input gradient of a replica", *key), inputs, (dx,), (), apply)


def _parameter(plan: Plan, shape: tuple[int, ...], i: int, dy: Array, gradients: Any, run: Any) -> Array | None:
    """The gradient of a large parameter: the sum over the axes that it was broadcast along is that over a group."""
    axes = tuple(axis for axis, n in enumerate(shape) if n == 1 < plan.view.shape[axis])

    def total(xp: Any, numbers: list[Any], sums: TracedSums) -> Written:
        return Written(of_groups=[sums.total(xp, gradients(xp, numbers, sums)[1][i])])

    def each(xp: Any, numbers: list[Any], sums: TracedSums) -> Written:
        return Written([gradients(xp, numbers, sums)[1][i]])

    if axes:
        ran = run("parameter", False, [i], (), (), total, axes=axes, of_groups=1, dtype=plan.dtype)
        return None if ran is None else ran[0][0]
    made = plan.library.empty(plan.view.shape, dy, plan.dtype)
    return None if run("products", False, [i], (made,), (), each) is None else made
