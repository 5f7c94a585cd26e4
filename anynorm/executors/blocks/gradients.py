"""The gradients of a call block by block, in little memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from anynorm import kernels
from anynorm.arrays.recognize import library_of
from anynorm.calls import Call, Wanted
from anynorm.calls.blocks import Block, blocks, both, within
from anynorm.calls.call import Gradients
from anynorm.calls.conditions import exact_product, in_range, root
from anynorm.calls.weights import weighed
from anynorm.executors.blocks.parts import (
    Workspace,
    cut,
    groups_of,
    numbers,
    repeated,
    shared,
    single,
    stats_within,
    trailing,
    tree_reduce,
    weights_within,
)
from anynorm.executors.parameters import near_power, parameter_gradients, run_of_ones
from anynorm.executors.threads import share
from anynorm.kernels import PURE, Array, GradientSums, Outputs, Reduction, Standardized, Stats, weighting
from anynorm.kernels.weighting import WeightedSums

Parameters = list[Array | None]
"""The gradients of gamma and beta, as far as they are wanted, from some of the values."""
PENDING = 2**17
"""So many numbers of the gradients of parameters wait to be added at a time, in an order that threads do not change."""
TERMS = 64
"""So many of them are added one after another."""
BRIEF = 2**18
"""A parameter of more numbers is large."""
WEIGHTED = 8
"""So many arrays a block takes where there are weights."""


def backward(call: Call, dy: Array, wanted: Wanted, stats: Stats) -> Gradients | None:
    """The gradients; None where the statistics are out of range."""
    call, plan = weighed(call), call.plan
    if not in_range(plan, stats.var):
        return None
    stats, library = stats.astype(plan.library.xp, plan.dtype), plan.library
    with library.quiet():
        rstd, gamma = root(plan, stats), call.gamma
        power = None if call.stats is not None else near_power(call, rstd)
        exact = gamma is not None and exact_product(plan, rstd if power is None else power, library.extent(gamma))
    dx = None if wanted.dtype is None else plan.library.empty(plan.view.shape, dy, wanted.dtype)
    totals = [None if shape is None else _Total(shape, dy, plan.dtype) for shape in wanted.parameters]
    # products with xhat need a place of their own; else they take none, or that of the result
    apart = dx is None or call.weights is not None or plan.inverse or not (library.blas_sums and trailing(plan))
    # a block of dy is copied first where it has another dtype, or its rows are not rows in memory
    copies = not (library.adds(dy, plan.dtype) and library.in_rows(dy))
    casts = dx is not None and dx.dtype != plan.dtype
    copied = copies + (call.x is not None and not library.adds(call.x, plan.dtype))
    arrays, made = (1, 1 + apart + casts + copied) if call.weights is None else (WEIGHTED, WEIGHTED)
    beside = 2 * sum(math.prod(shape) for shape in wanted.parameters if shape is not None)
    averaged = () if call.stats is not None else plan.view.axes
    grid = blocks(plan.view.shape, averaged, *numbers(plan, arrays, made=made, beside=beside))
    largest = max(1, math.prod([each.stop - each.start for each in both(grid.groups[0], grid.parts[0])]))
    workspace, threads = Workspace(largest, dy, plan.dtype), shared(plan, made * largest + beside)
    places = (apart, casts, copies)
    run = _Run(call, dy, wanted, stats, rstd, power, exact, run_of_ones(plan, dy), dx, workspace, *places)
    many = len(grid.groups) >= threads

    def work(group: Block) -> list[tuple[Block, Parameters]]:
        parts = [both(group, part) for part in grid.parts]
        return list(zip(parts, run.groups(parts, 1 if many else threads), strict=True))

    waiting = sum(math.prod(shape) for shape in wanted.within(grid.groups[0]) if shape is not None)
    some = max(threads, PENDING // max(waiting, 1))

    def add(groups: list[Block]) -> None:
        """The gradients of parameters; what is added is let go of before the next."""
        for block, parameters in chain.from_iterable(
            share(work, groups, threads if many else 1, library.block_by_block)
        ):
            for total, each in zip(totals, parameters, strict=True):
                if total is not None:
                    total.add(block, each)

    with library.block_by_block():
        for i in range(0, len(grid.groups), some):
            add(grid.groups[i : i + some])
    return dx, *(None if total is None else total.sum() for total in totals)


class _Total:
    """The sum of the gradients of a parameter from all blocks: of `TERMS`, and then of these sums.

    One after another the terms of a long sum are rounded as often as there are terms. Of a large parameter there are
    few, as each takes much of a block; and a second array of its size would be too much.
    """

    def __init__(self, shape: tuple[int, ...], like: Array, dtype: Any) -> None:
        self._zeros = partial(library_of("like", like).zeros, shape, like, dtype)
        self._part, self._sum, self._terms = self._zeros(), None, 0
        self._many = math.prod(shape) <= BRIEF

    def add(self, block: Block, term: Array) -> None:
        """Add what a block has to say."""
        self._terms += 1
        if self._many and self._terms % TERMS == 0:
            self._part, self._sum = self._zeros(), self.sum()
        self._part[within(self._part, block)] += term

    def sum(self) -> Array:
        return self._part if self._sum is None else self._sum + self._part


class _Run(NamedTuple):
    """The gradients of a call that are computed in blocks."""

    call: Call
    dy: Array
    wanted: Wanted
    stats: Stats
    rstd: Array | None
    power: Array | None
    """For `kernels.input_gradient`."""
    exact: bool
    """For `kernels.scaled`."""
    ones: Array | None
    dx: Array | None
    workspace: Workspace
    apart: bool
    """Whether products with xhat take a place of their own; then whether the result does, and a copy of dy."""
    casts: bool
    copies: bool

    def groups(self, parts: list[Block], threads: int) -> list[Parameters]:
        """The gradient of x in the groups that these parts hold together; those of the parameters, of each part."""
        call, plan = self.call, self.call.plan
        busy = plan.library.block_by_block
        if len(parts) == 1 or self.dx is None or call.stats is not None:

            def of_groups(block: Block) -> Parameters:
                with self.part(block) as part:
                    parameters = part.parameters(self.wanted.within(block), self.ones)
                    if self.dx is not None:
                        part.write_input_gradient(given=call.stats is not None)
                    return parameters

            return share(of_groups, parts, threads, busy)
        parameters: list[Parameters] = []

        def sums_of_part(block: Block) -> tuple[GradientSums, Parameters]:
            with self.part(block) as part:
                made = part.parameters(self.wanted.within(block), self.ones)
                return part.gradient_sums(), made

        def sums_of_parts(some: list[Block]) -> list[GradientSums]:
            sums, made = zip(*share(sums_of_part, some, threads, busy), strict=True)
            parameters.extend(made)
            return list(sums)

        merged = tree_reduce(partial(kernels.merge_gradient_sums, plan.library.xp), sums_of_parts, parts)
        if plan.groups.divisor == 1:  # of sums, whose numbers have no shares
            merged = merged._replace(weight=1.0)

        def apply(block: Block) -> None:
            with self.part(block) as part:
                part.write_input_gradient(merged)

        share(apply, parts, threads, busy)
        return parameters

    @contextmanager
    def part(self, block: Block) -> Iterator["_Part"]:
        """A block, standardized."""
        dy, target = self.dy[block], None if self.dx is None else self.dx[block]
        library, shape = self.call.plan.library, tuple(dy.shape)
        count = 1 + self.apart + self.casts + self.copies
        with self.workspace.take(count, self.call.plan, shape) as free:
            if self.copies:
                place = free.pop()
                library.assign(place, dy)
                dy = place
            places = [library.into(each) for each in free]
            result = PURE if target is None else places.pop() if self.casts else library.into(target)
            yield self._standardized(block, dy, target, Outputs(result, places[0], [result, *places[1:]][-1]))

    def _standardized(self, block: Block, dy: Array, target: Array | None, places: Outputs) -> "_Part":
        call, plan = self.call, self.call.plan
        xp, shape = plan.library.xp, tuple(dy.shape)
        groups: Any = groups_of(plan, shape, repeated=call.weights is None)
        rstd, power = (repeated(plan, cut(each, block), dy) for each in (self.rstd, self.power))
        xhat = None
        if plan.inverse:  # what is added up is the gradient itself, and its products with y less beta
            gamma, beta = (repeated(plan, cut(each, block), dy) for each in (call.gamma, call.beta))
            dy = kernels.unscaled(xp, dy, gamma, rstd, places=Outputs(result=places.result), exact=self.exact)
            if call.x is not None and self.wanted.of_gamma:
                x = plan.library.cast(call.x[block], plan.dtype)
                xhat = x if beta is None else places.xhat.subtract(x, beta)
        elif call.x is not None and (plan.divides or call.weights is not None):
            own = Stats(*(repeated(plan, each, dy) for each in stats_within(self.stats, block)))
            x = plan.library.cast(call.x[block], plan.dtype)
            xhat = kernels.subtract_mean(x, own, ops=places.xhat)
            xhat = xhat if rstd is None else places.xhat.multiply(xhat, rstd)
        if call.weights is not None:
            weights = weights_within(plan, call.weights, block, shape)
            sums = call.weights.sums[within(call.weights.sums, block)]
            if xhat is not None and not bool(xp.all((sums > 0) & xp.isfinite(groups.mean(xp, xhat)))):
                dy, xhat = weighting.gradient_without_padding(xp, dy, xhat, weights.each, sums)
            groups = WeightedSums(groups.by(1.0), weights, places.product)
        last = call.gamma_last
        of = Standardized(xhat if plan.divides else None, rstd, self.stats)
        return _Part(call, target, places, groups, dy, cut(call.gamma, block), last, of, power, self.exact)


class _Part(NamedTuple):
    """A block of a gradient."""

    call: Call
    target: Array | None
    """Where the gradient of x goes."""
    places: Outputs
    sums: Reduction
    dy: Array
    gamma: Array | None
    last: bool
    """Whether gamma is one number for each group, and not only for what the block has of it."""
    of: Standardized
    power: Array | None
    exact: bool

    def parameters(self, shapes: list[tuple[int, ...] | None], ones: Array | None) -> Parameters:
        """The gradients of gamma and beta, of these shapes."""
        plan, places = self.call.plan, self.places
        block = plan.library.eager_block
        return parameter_gradients(plan, self.dy, self.of.xhat, shapes, block=block, ones=ones, places=places)

    def gradient_sums(self) -> GradientSums:
        """What a part of some groups adds to their sums."""
        plan = self.call.plan
        how: dict[str, Any] = {"groups": self.sums, "centred": plan.centred, "places": self.places}
        sums = kernels.gradient_sums(plan.library.xp, self._cotangent(), self.of.xhat, part=True, **how)[1]
        return GradientSums(*single(plan, sums))  # parts may have runs of different lengths

    def write_input_gradient(self, sums: GradientSums | None = None, *, given: bool = False) -> None:
        """Write the gradient of x: by the sums of the groups, of whole groups, or by statistics that are `given`."""
        plan, xp = self.call.plan, self.call.plan.library.xp
        how: dict[str, Any] = {"places": self.places, "exact": self.exact}
        if plan.inverse:
            dx = self.dy
        elif sums is None:
            groups = None if given else self.sums
            how |= {"groups": groups, "centred": plan.centred, "last": self.last, "power": self.power}
            dx = kernels.input_gradient(xp, self.dy, self.gamma, self.of, **how)
        else:
            sums = GradientSums(*(repeated(plan, each, self.dy) if hasattr(each, "shape") else each for each in sums))
            gamma, each = self.gamma if self.last else None, self.sums.each
            g = self._cotangent()
            dx = kernels.input_gradient_of_part(xp, g, sums, self.of, each, gamma, self.power, **how)
        if self.target is not None and dx is not self.target:
            plan.library.assign(self.target, dx)

    def _cotangent(self) -> Array:
        """The gradient of xhat, but for a gamma that is one number for each group."""
        if self.last:
            return self.dy
        places, exact = self.places, self.exact
        return kernels.cotangent(self.call.plan.library.xp, self.dy, self.gamma, self.power, places=places, exact=exact)
