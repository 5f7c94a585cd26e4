"""The arguments of each norm as a call: all of them checked before anything is computed."""

from collections.abc import Callable
from typing import Any

from anynorm.arrays import cast, check_out, check_weights, counts, full_chunks, library_of, zeros
from anynorm.calls import layouts
from anynorm.calls.call import Call
from anynorm.calls.layouts import Layout
from anynorm.calls.plan import Fit, Plan, plan_of
from anynorm.calls.weights import count_weights, sum_weights
from anynorm.kernels import Array, Stats, replicas
from anynorm.kernels.replicas import joining
from anynorm.kernels.weighting import Weights
from anynorm.statistics import Statistics, stats_of


def over(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    axis: Any,
    eps: float,
    weights: Array | None = None,
    moments: Any = None,
    out: Array | None = None,
) -> Call:
    """`normalize`, `layer_norm`, `moments`."""
    return _prepare(layouts.over, (axis,), x, gamma, beta, eps, weights, moments, out)


def rms(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    axis: Any,
    eps: float,
    weights: Array | None = None,
    out: Array | None = None,
) -> Call:
    """`rms_norm`."""
    return _prepare(layouts.over, (axis,), x, gamma, beta, eps, weights, None, out, False)


def chunk(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    axes: tuple[int, ...],
    eps: float,
    weights: Array | None,
    centred: bool,
    divisor: int | None,
) -> Call:
    """A part of an array that is run by itself."""
    return _prepare(layouts.chunk, (axes,), x, gamma, beta, eps, weights, None, None, centred, divisor)


def batch(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    channel_axis: Any,
    eps: float,
    weights: Array | None = None,
    moments: Any = None,
    out: Array | None = None,
    all_reduce: Callable[[Array], Any] | None = None,
) -> Call:
    """`batch_norm`."""
    if all_reduce is not None and not callable(all_reduce):
        raise TypeError(f"all_reduce must be a function of an array, got {type(all_reduce).__name__}")
    call = _prepare(layouts.batch, (channel_axis,), x, gamma, beta, eps, weights, moments, out)
    return call if all_reduce is None else _of_replicas(call, weights, all_reduce)


def instance(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    channel_axis: Any,
    eps: float,
    weights: Array | None = None,
    out: Array | None = None,
) -> Call:
    """`instance_norm`."""
    return _prepare(layouts.instance, (channel_axis,), x, gamma, beta, eps, weights, None, out)


def group(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    groups: Any,
    channel_axis: Any,
    eps: float,
    weights: Array | None = None,
    out: Array | None = None,
) -> Call:
    """`group_norm`."""
    return _prepare(layouts.group, (groups, channel_axis), x, gamma, beta, eps, weights, None, out)


def weight(v: Array, g: Array, *, axis: Any, out: Array | None = None) -> Call:
    """Weight normalization is RMS normalization with a sum in place of the mean, no eps, and g for gamma."""
    library_of("g", g)
    return direction(v, g, axis=axis, out=out)


def direction(v: Array, g: Array | None = None, *, axis: Any, out: Array | None = None, name: str = "v") -> Call:
    """`v`, in an argument of this name, brought to length 1."""
    return _prepare(layouts.weight, (axis,), v, g, None, 0.0, None, None, out, False, 1, (name, "g"))


def _prepare(
    layout_of: Callable[..., Layout],
    options: tuple[Any, ...],
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    weights: Array | None,
    moments: Any,
    out: Array | None,
    centred: bool = True,
    divisor: int | None = None,
    names: tuple[str, str] = ("x", "gamma"),
) -> Call:
    mean = var = None
    if moments is not None:
        if not isinstance(moments, Statistics):
            raise TypeError(f"moments must be Moments or RunningStats, got {type(moments).__name__}")
        mean, var = moments.mean, moments.var
    arrays = (x, gamma, beta, mean, var, weights)
    plan = plan_of(layout_of, options, arrays, names, out=out, eps=eps, centred=centred, divisor=divisor)
    if out is not None:
        check_out(plan.library, names[0], x, out, [each for each in (gamma, beta, mean, var) if each is not None])
    chunks = x.chunks if plan.library.chunked else None
    x = plan.to_view(x)
    given = None if moments is None else _given(plan, moments)
    params, found = (_ready(plan, gamma, plan.gamma), _ready(plan, beta, plan.beta)), None
    if weights is not None:
        check_weights(plan.library, weights, plan.dtype)
        if not plan.given:  # to moments that are given they make no difference
            with plan.library.quiet():
                found = _placed(plan, plan.library.constant(weights))
    return Call(plan, x, *params, given, out, found, None, chunks)


def _given(plan: Plan, moments: Statistics[Any]) -> Stats:
    """The statistics that were given, and as a rest what the dtype of the computation has no room for of their mean."""
    return Stats(*(_ready(plan, each, plan.stats) for each in stats_of(moments, plan.dtype)))


def _placed(plan: Plan, weights: Array) -> Weights:
    """The weights of a call beside the view; not yet added up where a program may do that as it goes."""
    assert plan.weights is not None
    if plan.library.plain(weights):
        return Weights(plan.library.xp.reshape(weights, plan.weights.shape), None)
    return sum_weights(plan, _ready(plan, weights, plan.weights))


def _of_replicas(call: Call, weights: Array | None, all_reduce: Callable[[Array], Any]) -> Call:
    """The call of one of several replicas."""
    plan = call.plan
    library, xp = plan.library, plan.library.xp
    sums = library.summing(all_reduce)
    found = call.weights
    if not plan.given:
        with plan.library.quiet():
            x = cast(library, library.constant(call.x), plan.dtype)
            if weights is None:
                ready = zeros((1,) * len(plan.view.shape), x, plan.dtype) + 1.0
            else:
                ready = _ready(plan, library.constant(weights), plan.weights)
            count, rest = count_weights(plan, ready if call.weights is None else call.weights.each)
            parts = counts.parts(xp, (count, rest), plan.dtype)
            parts = [xp.broadcast_to(part, plan.stats.shape) for part in parts]
            join = joining(xp, sums)
            found, parts = replicas.weigh(xp, x, ready, parts, groups=plan.groups, eps=plan.eps, join=join)
            found = found._replace(total=counts.joined(library, parts, count.dtype))
    # not by `_replace`: a compiler must build it again where the sum over replicas breaks its graph
    return Call(plan, call.x, call.gamma, call.beta, call.stats, call.out, found, sums)


def _ready(plan: Plan, array: Array | None, fit: Fit | None) -> Array | None:
    """An argument beside x, in the view and the dtype of the computation."""
    if array is None or fit is None:
        return None
    if array.dtype != plan.dtype:
        array = plan.library.astype(array, plan.dtype)
    if plan.library.chunked:
        array = full_chunks(array)
    return plan.library.xp.reshape(array, fit.shape) if fit.axes is None else array[fit.axes]
