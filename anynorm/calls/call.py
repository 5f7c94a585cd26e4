"""A call of a norm: its arrays in the view of its plan."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from anynorm.calls.blocks import Block, cut
from anynorm.calls.plan import Plan
from anynorm.kernels import Array, Stats
from anynorm.kernels.replicas import joining
from anynorm.kernels.weighting import Join, Weights


class Call(NamedTuple):
    """What an executor runs: the arrays in the view of the plan; a `stats` where moments were given."""

    plan: Plan
    x: Array
    gamma: Array | None
    beta: Array | None
    stats: Stats | None
    out: Array | None
    """Where the caller wants the result, as it came."""
    weights: Weights | None = None
    all_reduce: Callable[[Array], Any] | None = None
    chunks: Any = None
    """Those of Dask that x came in, and its result goes out in."""

    @property
    def join(self) -> Join | None:
        """Sums arrays over all replicas, where there are any."""
        return None if self.all_reduce is None else joining(self.plan.library.xp, self.all_reduce)

    @property
    def gamma_last(self) -> bool:
        """Whether gamma is one number for each group, in all replicas: a gradient is multiplied by it last."""
        plan = self.plan
        return plan.gamma_last and (self.all_reduce is None or plan.short[0])  # other replicas may have more samples

    @property
    def reads_x(self) -> bool:
        """Whether the gradient of x depends on x itself; where it is only centred, padding alone is looked for."""
        return self.stats is None and (self.plan.divides or self.weights is not None)

    def within(self, block: Block) -> "Call":
        """The same in a block of the view: x, and what goes with that part of it."""
        stats, weights = self.stats, self.weights
        x, gamma, beta = cut(block, self.x, self.gamma, self.beta)
        return self._replace(
            x=x,
            gamma=gamma,
            beta=beta,
            stats=stats and Stats(*cut(block, *stats)),
            weights=weights and Weights(*cut(block, *weights[:3])),
        )

    def statistic(self, value: Array) -> Array:
        """A mean, a variance or a norm beside the view, of the shape that the caller sees, as a constant."""
        plan, xp = self.plan, self.plan.library.xp
        value = plan.library.constant(xp.squeeze(value, axis=plan.view.axes))
        return xp.reshape(value, plan.layout.kept_shape) if plan.view.merged else value


Gradients = tuple[Array | None, ...]
"""With respect to x, gamma and beta, beside the view; None where it is not wanted."""


class Normalized(NamedTuple):
    """A call's result, as the caller's x was, and its statistics beside the view."""

    y: Array
    stats: Stats
    """Empty where they are not to be kept: of short groups they are nearly as large as the array."""


class Wanted(NamedTuple):
    """Which gradients of a call there are to be."""

    dtype: Any
    """That of x and of its gradient, or None if that is not wanted."""
    parameters: tuple[tuple[int, ...] | None, ...]
    """The shapes, beside the view, of gamma and beta, or None."""

    @property
    def of_gamma(self) -> bool:
        """Whether that of gamma is."""
        return len(self.parameters) > 0 and self.parameters[0] is not None

    def within(self, block: Block) -> list[tuple[int, ...] | None]:
        """The shapes beside a block."""
        return [
            None
            if shape is None
            else tuple(1 if n == 1 else each.stop - each.start for n, each in zip(shape, block, strict=True))
            for shape in self.parameters
        ]


def compiled(call: Call, what: Hashable, work: Callable[..., Any], *others: Any) -> Any:
    """`work(call, *others)`, as one function where the library compiles; `what` says all that is not in the plan."""
    plan = call.plan
    with plan.library.quiet():
        if not plan.library.compiles or call.all_reduce is not None:  # that is the caller's function
            return work(call, *others)

        def of_arrays(x: Array, gamma: Array, beta: Array, stats: Any, weights: Any, *others: Any) -> Any:
            return work(Call(plan, x, gamma, beta, stats, None, weights), *others)

        arrays = (call.x, call.gamma, call.beta, call.stats, call.weights)
        return plan.library.compiled((id(plan), what), of_arrays, *arrays, *others)
