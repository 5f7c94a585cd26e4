"""What makes the result of x, once the statistics are known."""

import math
from typing import NamedTuple

from anynorm import kernels
from anynorm.arrays.blocks import Block, within
from anynorm.calls import Call, Plan
from anynorm.kernels import Array

RUN = 32
"""Groups in shorter runs are interleaved."""
ROWS = 16
"""Beside so many rows, what there is for each group is small."""


class Tail(NamedTuple):
    """What makes the result of x, once the statistics are known: less means, times rstd and gamma, plus beta."""

    means: list[Array]
    factors: list[Array]
    beta: Array | None

    @property
    def one_pass(self) -> bool:
        """Whether it takes no more, where a library multiplies and adds in one."""
        return not self.means and len(self.factors) == 1

    def repeated(self, plan: Plan, x: Array) -> "Tail":
        """With its values `repeated` beside x."""
        means, factors = ([repeated(plan, each, x) for each in some] for some in (self.means, self.factors))
        return Tail(means, factors, repeated(plan, self.beta, x))

    def within(self, block: Block) -> "Tail":
        """That of a block."""
        means, factors = ([each[within(each, block)] for each in some] for some in (self.means, self.factors))
        return Tail(means, factors, cut(self.beta, block))


def make_tail(
    call: Call,
    means: list[Array],
    rstd: Array,
    slight: list[Array],
    gamma: Array | None,
    beta: Array | None,
    *,
    folds: bool,
) -> Tail:
    """Of these means, and of slight ones: beside the spread they are so small that beta loses nothing by them."""
    plan = call.plan
    if not folds and gamma is not None and (call.stats is not None or plan.eps > 1):
        # what lies between may be out of range
        return Tail(means + slight, [*kernels.factors(plan.library.xp, gamma, rstd)], beta)
    if not folds:
        return Tail(means + slight, [rstd] if gamma is None else [rstd, gamma], beta)
    scale = rstd if gamma is None else rstd * gamma
    for mean in slight:
        beta = -(mean * scale) if beta is None else beta - mean * scale
    return Tail(means, [scale], beta)


def interleaved(plan: Plan) -> bool:
    """Whether groups lie in memory in short runs among those of others.

    So they do in group norm with channels last, and in batch norm of few places.
    """
    axes, shape = plan.view.axes, plan.view.shape
    last = len(shape) - 1
    if len(axes) < 2 or axes[-1] != last or axes[-2] == last - 1 or shape[last] >= RUN:
        return False
    return math.prod([shape[axis] for axis in axes[:-1]]) >= ROWS


def repeated(plan: Plan, value: Array | None, x: Array) -> Array | None:
    """A value for each group, as long as a run of x where these are interleaved: it goes with many of them at once."""
    if value is None or value.shape[-1] != 1 or not interleaved(plan):
        return value
    return value * plan.library.xp.ones(x.shape[-1], dtype=plan.dtype, device=plan.library.device(x))


def cut(array: Array | None, block: Block) -> Array | None:
    """The part of an array that broadcasts to the whole which goes with a block."""
    return None if array is None else array[within(array, block)]
