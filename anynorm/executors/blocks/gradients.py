"""The gradients of a call block by block, in little memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from anynorm import kernels
from anynorm.arrays.library import Library
from anynorm.calls import Call, Wanted
from anynorm.calls.blocks import Block, cut, within
from anynorm.calls.call import Gradients
from anynorm.calls.conditions import exact_product, in_range, near_power, root
from anynorm.calls.weights import weighed
from anynorm.executors.blocks.parts import Workspace, divide, part_weights, repeated, single, tree_reduce
from anynorm.executors.threads import share
from anynorm.kernels import NO_STATS, PURE, Array, GradientSums, Outputs, Standardized, Stats, weighting
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
    call, plan, library, given = weighed(call), call.plan, call.plan.library, call.stats is not None
    if not in_range(plan, stats.var):
        return None
    stats = stats.astype(library.xp, plan.dtype)
    with library.quiet():
        rstd, gamma = root(plan, stats), call.gamma
        power = None if given else near_power(call, rstd)
        exact = gamma is not None and exact_product(plan, rstd if power is None else power, library.extent(gamma))
    dx = None if wanted.dtype is None else library.empty(plan.view.shape, dy, wanted.dtype)
    totals = [None if shape is None else _Total(library, shape, dy, plan.dtype) for shape in wanted.parameters]
    # products with xhat need a place of their own; else they take none, or that of the result
    apart = dx is None or plan.inverse or not (plan.adds_products and call.weights is None)
    # a block of dy is copied first where it has another dtype, or its rows are not rows in memory
    copies = not (library.adds(dy, plan.dtype) and library.in_rows(dy))
    casts = dx is not None and dx.dtype != plan.dtype
    copied = copies + (call.x is not None and not library.adds(call.x, plan.dtype))
    arrays, made = (1, 1 + apart + casts + copied) if call.weights is None else (WEIGHTED, WEIGHTED)
    terms = 2 * sum(math.prod(shape) for shape in wanted.parameters if shape is not None)
    division = divide(plan, () if given else plan.view.axes, arrays, made=made, beside=terms)
    workspace = Workspace(division.numbers, plan, dy)
    beside: tuple[Any, ...] = (call.gamma, call.beta, rstd, power, *stats)
    if plan.interleaved:
        beside = repeated(plan, beside, dy)
    gamma, beta, rstd, power, *every = beside
    known = call._replace(gamma=gamma, beta=beta, stats=Stats(*every))
    own = _Places(apart, casts, copies)
    run = _Run(known, given, plan.gamma_last, dy, wanted, rstd, power, exact, dx, workspace, own)

    def work(parts: list[Block]) -> list[tuple[Block, Parameters]]:
        return list(zip(parts, run.groups(parts, division.inner), strict=True))

    parts = division.blocks[0]
    waiting = len(parts) * sum(math.prod(shape) for shape in wanted.within(parts[0]) if shape is not None)
    some = max(division.outer, division.inner, PENDING // max(waiting, 1))
    with library.block_by_block():
        for i in range(0, len(division.blocks), some):  # what is added is let go of before the next
            done = share(work, division.blocks[i : i + some], division.outer, library.block_by_block)
            for block, parameters in chain.from_iterable(done):
                for total, each in zip(totals, parameters, strict=True):
                    if total is not None:
                        total.add(block, each)
            del done
    return dx, *(None if total is None else total.sum() for total in totals)


class _Total:
    """The sum of the gradients of a parameter from all blocks: of `TERMS`, and then of these sums.

    One after another the terms of a long sum are rounded as often as there are terms. Of a large parameter there are
    few, as each takes much of a block; and a second array of its size would be too much.
    """

    def __init__(self, library: Library, shape: tuple[int, ...], like: Array, dtype: Any) -> None:
        self._zeros = partial(library.zeros, shape, like, dtype)
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


class _Places(NamedTuple):
    """What takes memory of its own in a block."""

    products: bool
    """Those with xhat."""
    result: bool
    dy: bool
    """A copy of it."""


class _Run(NamedTuple):
    """The gradients of a call that are computed in blocks."""

    call: Call
    """With the statistics of each group."""
    given: bool
    """Whether these were given."""
    last: bool
    """Whether gamma is one number for each group, and not only for what a block has of it."""
    dy: Array
    wanted: Wanted
    rstd: Array | None
    power: Array | None
    """For `kernels.input_gradient`."""
    exact: bool
    """For `kernels.scaled`."""
    dx: Array | None
    workspace: Workspace
    places: _Places

    def groups(self, parts: list[Block], threads: int) -> list[Parameters]:
        """The gradient of x in the groups that these parts hold together; those of the parameters, of each part."""
        plan, busy = self.call.plan, self.call.plan.library.block_by_block
        if len(parts) == 1 or self.dx is None or self.given:

            def of_groups(block: Block) -> Parameters:
                with self.part(block) as part:
                    parameters = part.parameters(self.wanted.within(block))
                    if self.dx is not None:
                        part.write_input_gradient(given=self.given)
                    return parameters

            return [of_groups(parts[0])] if len(parts) == 1 else share(of_groups, parts, threads, busy)
        parameters: list[Parameters] = []

        def sums_of_part(block: Block) -> tuple[GradientSums, Parameters]:
            with self.part(block) as part:
                made = part.parameters(self.wanted.within(block))
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
        library, own = self.call.plan.library, self.places
        with self.workspace.part(self.call, block, 1 + sum(own)) as (call, groups, free):
            if own.dy:
                place = free.pop()
                library.assign(place, dy)
                dy = place
            places = [*map(library.into, free if target is None or own.result else [*free, target])]
            result = PURE if target is None else places.pop()
            rstd, power = cut(block, self.rstd, self.power)
            outputs = Outputs(result, places[0], [result, *places[1:]][-1])
            yield self._standardized(
                _Part(call, target, outputs, groups, dy, self, Standardized(None, rstd, call.stats or NO_STATS), power)
            )

    def _standardized(self, part: "_Part") -> "_Part":
        """With what x becomes, and dy without padding; on the way back with y less beta, and the gradient of x."""
        (call, _, places, sums, dy, _, of, _), xhat = part, None
        plan, x, weights = call.plan, call.x, call.weights
        xp = plan.library.xp
        if x is not None:
            x = plan.library.cast(x, plan.dtype)
        if plan.inverse:
            dy = kernels.unscaled(xp, dy, call.gamma, of.rstd, places=Outputs(places.result), exact=self.exact)
            if x is not None and self.wanted.of_gamma:
                xhat = x if call.beta is None else places.xhat.subtract(x, call.beta)
        elif x is not None and (plan.divides or weights is not None):
            xhat = kernels.subtract_mean(x, of.stats, ops=places.xhat)
            xhat = xhat if of.rstd is None else places.xhat.multiply(xhat, of.rstd)
        if weights is not None:
            ready = part_weights(call, dy.shape)
            if xhat is not None and not bool(xp.all((weights.sums > 0) & xp.isfinite(sums.mean(xp, xhat)))):
                dy, xhat = weighting.gradient_without_padding(xp, dy, xhat, ready.each, weights.sums)
            sums = WeightedSums(sums.by(1.0), ready, places.product)
        return part._replace(sums=sums, dy=dy, of=of._replace(xhat=xhat if plan.divides else None))


class _Part(NamedTuple):
    """A block of a gradient."""

    call: Call
    target: Array | None
    """Where the gradient of x goes."""
    places: Outputs
    sums: Any
    """A `Reduction`."""
    dy: Array
    run: _Run
    of: Standardized
    power: Array | None

    def parameters(self, shapes: list[tuple[int, ...] | None]) -> Parameters:
        """The gradients of gamma and beta, of these shapes."""
        plan, places = self.call.plan, self.places
        how: dict[str, Any] = {"block": plan.library.eager_block, "ones": plan.groups.ones, "ops": places.product}
        return kernels.parameter_gradients(plan.library.xp, self.dy, self.of.xhat, shapes, **how)

    def gradient_sums(self) -> GradientSums:
        """What a part of some groups adds to their sums."""
        plan = self.call.plan
        how: dict[str, Any] = {"groups": self.sums, "centred": plan.centred, "places": self.places}
        sums = kernels.gradient_sums(plan.library.xp, self._cotangent(), self.of.xhat, part=True, **how)[1]
        return GradientSums(*single(plan, sums))  # parts may have runs of different lengths

    def write_input_gradient(self, sums: GradientSums | None = None, *, given: bool = False) -> None:
        """Write the gradient of x: by the sums of the groups, of whole groups, or by statistics that are `given`."""
        plan, xp, gamma = self.call.plan, self.call.plan.library.xp, self.call.gamma
        last, how = self.run.last, dict[str, Any](places=self.places, exact=self.run.exact)
        if plan.inverse:
            dx = self.dy
        elif sums is None:
            groups = None if given else self.sums
            how |= {"groups": groups, "centred": plan.centred, "last": last, "power": self.power}
            dx = kernels.input_gradient(xp, self.dy, gamma, self.of, **how)
        else:
            sums = GradientSums(*repeated(plan, sums, self.dy))
            gamma, each = gamma if last else None, self.sums.each
            g = self._cotangent()
            dx = kernels.input_gradient_of_part(xp, g, sums, self.of, each, gamma, self.power, **how)
        if self.target is not None and dx is not self.target:
            plan.library.assign(self.target, dx)

    def _cotangent(self) -> Array:
        """The gradient of xhat, but for a gamma that is one number for each group."""
        if self.run.last:
            return self.dy
        places, exact, gamma = self.places, self.run.exact, self.call.gamma
        return kernels.cotangent(self.call.plan.library.xp, self.dy, gamma, self.power, places=places, exact=exact)
