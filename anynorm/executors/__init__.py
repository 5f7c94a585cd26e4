"""How a call is run: on whole arrays, by programs, in blocks, chunk by chunk, as a node of autograd.

Others use the functions below; `eager` chooses between the executors of arrays that are there now.
"""

from typing import Any

from anynorm import calls
from anynorm.calls import Call, Gradients, Normalized, Wanted
from anynorm.executors import eager, torch_autograd, whole
from anynorm.executors.dask import chunks
from anynorm.kernels import Array, Standardized, Stats


def _in_chunks(call: Call) -> bool:
    """Whether Dask's chunks are run one by one; those of one of several replicas are not."""
    return call.plan.library.chunked and call.all_reduce is None


def forward(call: Call, *, keep: bool = True) -> Normalized:
    """The result of a call, as the caller's x was, and its statistics beside the view if they are to be kept."""
    if _in_chunks(call):
        return chunks.forward(call)
    if call.plan.library.autograd:
        return torch_autograd.forward(call, keep=keep)
    return eager.forward(call, keep=keep)


def statistics(call: Call) -> Stats:
    """The statistics of a call, beside the view."""
    return chunks.statistics(call) if _in_chunks(call) else eager.statistics(call)


def count(call: Call) -> Any:
    """How many numbers each group has, or the sum of their weights and what rounding took from it, beside the view."""
    if _in_chunks(call):
        return chunks.count(call), None
    return calls.counted(call)


def length(call: Call) -> Array:
    """The norm of each group of a call of `calls.layouts.DIRECTION`, beside the view."""
    return chunks.length(call) if _in_chunks(call) else whole.length(call)


def linearize(call: Call) -> tuple[Normalized, Call, Standardized | Stats]:
    """The result of a call, and what `backward` needs of it: the call, and its statistics or what x became.

    Of all arrays but x the call that is returned has copies.
    """
    plan, xp = call.plan, call.plan.library.xp
    weights, stats = call.weights, call.stats
    if weights is not None and not plan.library.chunked:
        weights = weights._replace(each=xp.asarray(weights.each, copy=True))
    if stats is not None:
        stats = Stats(*[None if array is None else array * 1.0 for array in stats])
    beta = call.beta if plan.inverse else None  # the gradients of others do not depend on it
    gamma, beta = (None if array is None else array * 1.0 for array in (call.gamma, beta))
    call = call._replace(stats=stats, weights=weights)
    of: Standardized | Stats
    if _in_chunks(call):
        done = chunks.forward(call)
        x, of = call.x, done.stats
    else:
        done, x, of = eager.linearize(call)
    return done, call._replace(x=x, gamma=gamma, beta=beta, out=None), of


def backward(call: Call, dy: Array, wanted: Wanted, of: Standardized | Stats) -> Gradients:
    """The gradients of sum(y * dy), dy as y is: of x as it was, those of the parameters beside the view."""
    plan = call.plan
    if _in_chunks(call):
        dx, *parameters = chunks.backward(call, plan.to_view(dy, plan.dtype), wanted)
        return chunks.from_view(plan, dx, wanted.dtype, call.chunks), *parameters
    dx, *parameters = eager.backward(call, plan.to_view(dy), wanted, of)
    return None if dx is None else plan.from_view(dx, wanted.dtype), *parameters
