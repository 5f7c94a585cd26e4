"""The arguments of a norm as a call: all of them checked before anything is computed."""

from collections.abc import Callable
from typing import Any

from anynorm.arrays import counts
from anynorm.arrays.checks import check_dtype, check_nonzero, check_out, check_weights
from anynorm.arrays.convert import beside
from anynorm.arrays.dask import full_chunks
from anynorm.arrays.recognize import library_of
from anynorm.calls.call import Call
from anynorm.calls.layouts import DENORMALIZE, Norm
from anynorm.calls.plan import Fit, Plan, plan_of
from anynorm.calls.weights import count_weights, sum_weights
from anynorm.kernels import Array, Stats, replicas
from anynorm.kernels.replicas import joining
from anynorm.kernels.weighting import Weights
from anynorm.statistics import Statistics, stats_of


def prepare(
    norm: Norm,
    options: tuple[Any, ...],
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 0.0,
    weights: Array | None = None,
    moments: Any = None,
    out: Array | None = None,
    all_reduce: Callable[[Array], Any] | None = None,
    dtype: Any = None,
) -> Call:
    """A call of the norm with these values of `norm.options`; an error where an argument does not fit.

    `dtype` is that of the moments, where these are all that is asked for.
    """
    if all_reduce is not None and not callable(all_reduce):
        raise TypeError(f"all_reduce must be a function of an array, got {type(all_reduce).__name__}")
    if norm.gamma_required:
        library_of(norm.names[1], gamma)
    mean = var = None
    if moments is not None or norm is DENORMALIZE:
        if not isinstance(moments, Statistics):
            raise TypeError(f"moments must be Moments or RunningStats, got {type(moments).__name__}")
        mean, var = moments.mean, moments.var
    if dtype is not None:
        dtype = check_dtype(library_of(norm.names[0], x), "dtype", dtype, x)
    plan = plan_of(norm, options, (x, gamma, beta, mean, var, weights), eps=eps, out=out, dtype=dtype)
    if out is not None:
        check_out(
            plan.library, norm.names[0], x, out, [array for array in (gamma, beta, mean, var) if array is not None]
        )
    if plan.library.takes_numpy:
        given = {norm.names[1]: gamma, "beta": beta, "weights": weights}
        gamma, beta, weights = (beside(plan.library, x, *each) for each in given.items())
    chunks = x.chunks if plan.library.chunked else None
    x = plan.to_view(x)
    stats = None if moments is None else _given(plan, moments, x)
    gamma_beside, beta_beside = _ready(plan, gamma, plan.gamma), _ready(plan, beta, plan.beta)
    if plan.inverse and gamma_beside is not None:
        check_nonzero(plan.library, "gamma", gamma_beside)
    weights_beside = None
    if weights is not None:
        check_weights(plan.library, weights, plan.dtype)
        if not plan.given:  # to moments that are given they make no difference
            with plan.library.quiet():
                weights_beside = _placed(plan, plan.library.constant(weights), x)
    call = Call(plan, x, gamma_beside, beta_beside, stats, out, weights_beside, None, chunks)
    return call if all_reduce is None else _of_replicas(call, weights, all_reduce)


def _given(plan: Plan, moments: Statistics[Any], x: Array) -> Stats:
    """The statistics that were given, and as a rest what the dtype of the computation cannot hold of their mean."""
    parts = [beside(plan.library, x, "moments", each) for each in stats_of(moments, plan.dtype)]
    return Stats(*(_ready(plan, each, plan.stats) for each in parts))


def _placed(plan: Plan, weights: Array, x: Array) -> Weights:
    """The weights of a call beside the view; not yet added up where a program may do that as it goes."""
    assert plan.weights is not None
    if plan.library.writable_in_blocks(weights):
        return Weights(plan.library.xp.reshape(weights, plan.weights.shape), None)
    return sum_weights(plan, _weights_beside(plan, weights, x))


def _weights_beside(plan: Plan, weights: Array, x: Array) -> Array:
    """In the view and the dtype of the computation; as many as numbers of x, where sizes are not numbers."""
    ready = _ready(plan, weights, plan.weights)
    return ready + plan.library.xp.zeros_like(x) if plan.symbolic else ready


def _of_replicas(call: Call, weights: Array | None, all_reduce: Callable[[Array], Any]) -> Call:
    """The call of one of several replicas."""
    plan = call.plan
    library, xp = plan.library, plan.library.xp
    sums = library.summing(all_reduce)
    found = call.weights
    if not plan.given:
        with plan.library.quiet():
            x = library.cast(library.constant(call.x), plan.dtype)
            if plan.symbolic and weights is None:
                ready = xp.ones_like(x)
            elif weights is None:
                ready = library.zeros((1,) * len(plan.view.shape), x, plan.dtype) + 1.0
            else:
                ready = _weights_beside(plan, library.constant(weights), x)
            count, rest = count_weights(plan, ready if call.weights is None else call.weights.each)
            parts = counts.parts(xp, (count, rest), plan.dtype)
            if not plan.symbolic:
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
    if fit.axes is None and plan.symbolic and len(array.shape) == len(plan.layout.shape):
        return plan.beside(array)
    return plan.library.xp.reshape(array, fit.shape) if fit.axes is None else array[fit.axes]
