"""PyTorch's autograd without the memory: one node of its graph, which keeps x and nothing else of its size.

Its backward standardizes x again. Where a derivative of that is asked for in turn, it does so in primitives that
autograd records, so that derivatives of any order are right.
"""

import sys
from typing import Any

from anynorm.calls import Call, Wanted
from anynorm.calls.call import Normalized
from anynorm.executors import eager
from anynorm.kernels import Array, Stats


def forward(call: Call, *, keep: bool) -> Normalized:
    """`eager.forward`; as one node of the graph, where autograd records and nothing else transforms."""
    given, library = call.stats or (), call.plan.library
    arrays = [each for each in (call.x, call.gamma, call.beta, *given) if each is not None]
    differentiated = any([each is not None and each.requires_grad for each in given])  # noqa: C419 - as Dynamo
    if differentiated or _compiled(call) or not library.records(arrays):
        return eager.forward(_shared(call), keep=keep)
    _make()
    y, *stats = _nodes["normalize"].apply(call.x, call.gamma, call.beta, call._replace(x=None, gamma=None, beta=None))
    return Normalized(y, call.stats or Stats(*stats))


def _compiled(call: Call) -> bool:
    """Whether it is left to a compiler to differentiate the call: all but those that it adds up in a wide dtype."""
    library, plain = call.plan.library, call.stats is None and call.all_reduce is None
    return library.traced() and not (plain and library.wide(call.x) is not None)


def _shared(call: Call) -> Call:
    """The call with gamma and beta as what all replicas share, where they do: their gradients are summed over all."""
    if call.all_reduce is None:
        return call
    library, short = call.plan.library, call.plan.short
    gamma, beta = (
        library.shared(each, call.all_reduce) if each is not None and one_for_all else each
        for each, one_for_all in zip((call.gamma, call.beta), short, strict=True)
    )
    return call._replace(gamma=gamma, beta=beta)


_nodes: dict[str, Any] = {}


def _make() -> bool:
    """Make the `torch.autograd.Function` when it is first needed: PyTorch is not imported here."""
    if not _nodes:
        methods = {"forward": staticmethod(_forward), "backward": staticmethod(_backward)}
        _nodes["normalize"] = type("Normalize", (sys.modules["torch"].autograd.Function,), methods)
    return True


# as `torch.compiler.assume_constant_result` does: a compiler calls it, and does not follow it
_make._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _forward(ctx: Any, x: Array, gamma: Array | None, beta: Array | None, bare: Call) -> tuple[Array | None, ...]:
    """y and the statistics, unless they were given; what `ctx` saves is watched for changes."""
    call = bare._replace(x=x, gamma=gamma, beta=beta)
    y, stats = eager.forward(call)
    given, (of_x, of_gamma, of_beta, _) = bare.stats is not None, ctx.needs_input_grad
    keeps_x, inverse = of_gamma or (of_x and call.reads_x), bare.plan.inverse
    weights = bare.weights
    each = None if weights is None else weights.each
    kept = (x if keeps_x else None, gamma if of_x or inverse else None, beta if of_gamma and inverse else None)
    ctx.save_for_backward(*kept, each, *stats)
    bare = bare._replace(stats=None, weights=None if weights is None else weights._replace(each=None))
    ctx.call, ctx.given = bare, given
    parameters = ((gamma, of_gamma), (beta, of_beta))
    shapes = tuple(tuple(each.shape) if each is not None and of else None for each, of in parameters)
    ctx.wanted = Wanted(x.dtype if of_x else None, shapes)
    ctx.set_materialize_grads(False)
    y = bare.plan.library.constant(y)  # where it is a view, autograd would not let the caller write to it
    if given:
        return y, None, None, None
    ctx.mark_non_differentiable(*(each for each in stats if each is not None))
    return y, *stats


def _backward(ctx: Any, dy: Array | None, *_: None) -> tuple[Array | None, ...]:
    """The gradients with respect to x, gamma and beta as they stand in the call."""
    if dy is None:
        return (None,) * 4
    x, gamma, beta, each, *stats = ctx.saved_tensors
    weights = None if each is None else ctx.call.weights._replace(each=each)
    call = ctx.call._replace(x=x, gamma=gamma, beta=beta, stats=Stats(*stats) if ctx.given else None, weights=weights)
    recorded = sys.modules["torch"].is_grad_enabled() and not call.plan.library.traced()
    dy = call.plan.to_view(dy)
    return *eager.backward(call, dy, ctx.wanted, None if recorded else Stats(*stats)), None
