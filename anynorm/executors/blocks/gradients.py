"""The gradients of a call block by block, in little memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from anynorm import kernels
from anynorm.arrays import adds, assign, cast, empty, extent, in_rows, zeros
from anynorm.arrays.blocks import Block, blocks, both, within
from anynorm.calls import Call, Plan, Wanted
from anynorm.calls.conditions import exact_product, in_range, root, significant
from anynorm.calls.results import Gradients
from anynorm.calls.weights import weighed
from anynorm.executors.blocks.parts import (
    numbers,
    only,
    plain_groups,
    present,
    shared,
    stats_within,
    tree_reduce,
    weights_within,
)
from anynorm.executors.blocks.tail import cut, interleaved, repeated
from anynorm.executors.parameters import near_power, parameter_gradients, run_of_ones
from anynorm.executors.threads import share
from anynorm.kernels import PURE, Array, Ops, Outputs, Standardized, Stats, Sums, weighting
from anynorm.kernels.merging import PartStats, merge_parts
from anynorm.kernels.weighting import GradientSums, WeightedSums, Weights

Parameters = list[Array | None]
"""The gradients of gamma and beta, as far as they are wanted, from some of the values."""
PENDING = 2**17
"""So many numbers of the gradients of parameters wait to be added at a time, in an order that threads do not change."""
TERMS = 64
"""So many of them are added one after another."""
BRIEF = 2**18
"""A parameter of more numbers is large."""
WEIGHTED = 7
"""So many arrays a block takes where there are weights."""


def backward(call: Call, dy: Array, wanted: Wanted, stats: Stats) -> Gradients | None:
    """The gradients; None where the statistics are out of range."""
    call, plan = weighed(call), call.plan
    if not in_range(plan, stats.var):
        return None
    stats = stats.astype(plan.library.xp, plan.dtype)
    library = plan.library
    with library.quiet():
        rstd, gamma = root(plan, stats), call.gamma
        power = None if call.stats is not None else near_power(plan, gamma, rstd)
        exact = gamma is not None and exact_product(plan, rstd if power is None else power, extent(library, gamma))
        stats = stats._replace(rest=significant(plan, stats.rest, stats.var))
    dx = None if wanted.dtype is None else empty(plan.view.shape, dy, wanted.dtype)
    totals = [None if shape is None else _Total(shape, dy, plan.dtype) for shape in wanted.parameters]
    averaged = () if call.stats is not None else plan.view.axes
    run = _Run(call, dy, wanted, stats, rstd, power, exact, run_of_ones(plan, dy), dx, [], 1)
    copied = run.copies_dy + (call.x is not None and not adds(library, call.x, plan.dtype))
    made = 1 + run.products_apart + copied + (dx is not None and dx.dtype != plan.dtype)
    arrays, made = (1, made) if call.weights is None else (WEIGHTED, WEIGHTED)
    beside = 2 * sum(math.prod(shape) for shape in wanted.parameters if shape is not None)
    grid = blocks(plan.view.shape, averaged, *numbers(plan, arrays, made=made, beside=beside))
    largest = math.prod([each.stop - each.start for each in both(grid.groups[0], grid.parts[0])])
    run, threads = run._replace(largest=max(largest, 1)), shared(plan, made * largest + beside)
    many = len(grid.groups) >= threads

    def work(group: Block) -> list[tuple[Block, Parameters]]:
        parts = [both(group, part) for part in grid.parts]
        return list(zip(parts, _groups(run, parts, 1 if many else threads), strict=True))

    waiting = sum(math.prod(shape) for shape in wanted.within(grid.groups[0]) if shape is not None)
    some = max(threads, PENDING // max(waiting, 1))

    def add(groups: list[Block]) -> None:
        """The gradients of parameters; what is added is let go of before the next."""
        found = share(work, groups, threads if many else 1, library.busy)
        for block, parameters in chain.from_iterable(found):
            for total, each in zip(totals, parameters, strict=True):
                if total is not None:
                    total.add(block, each)

    with library.busy():
        for i in range(0, len(grid.groups), some):
            add(grid.groups[i : i + some])
    return dx, *(None if total is None else total.sum() for total in totals)


class _Total:
    """The sum of the gradients of a parameter from all blocks: of `TERMS`, and then of these sums.

    One after another the terms of a long sum are rounded as often as there are terms. Of a large parameter there are
    few, as each takes much of a block; and a second array of its size would be too much.
    """

    def __init__(self, shape: tuple[int, ...], like: Array, dtype: Any) -> None:
        self._zeros = partial(zeros, shape, like, dtype)
        self._part, self._whole, self._terms = self._zeros(), None, 0
        self._many = math.prod(shape) <= BRIEF

    def add(self, block: Block, term: Array) -> None:
        """Add what a block has to say."""
        self._terms += 1
        if self._many and self._terms % TERMS == 0:
            self._part, self._whole = self._zeros(), self.sum()
        self._part[within(self._part, block)] += term

    def sum(self) -> Array:
        return self._part if self._whole is None else self._whole + self._part


class _Run(NamedTuple):
    """The gradients of a call that are computed in blocks."""

    call: Call
    dy: Array
    wanted: Wanted
    stats: Stats
    rstd: Array
    power: Array | None
    """For `kernels.input_gradient`."""
    exact: bool
    """For `kernels.scaled`."""
    ones: Array | None
    dx: Array | None
    buffers: list[list[Array]]
    """Arrays to work in that no block works in now."""
    largest: int

    @property
    def copies_dy(self) -> bool:
        """Whether a block of dy is copied first: it has another dtype, or its rows are not rows in memory."""
        plan = self.call.plan
        return not (adds(plan.library, self.dy, plan.dtype) and in_rows(plan.library, self.dy))

    @property
    def products_apart(self) -> bool:
        """Whether products with xhat need a place of their own; else they take none, or that of the result."""
        plan = self.call.plan
        trailing = plan.view.axes[-1:] == (len(plan.view.shape) - 1,) and not interleaved(plan)
        return self.dx is None or self.call.weights is not None or not (plan.library.products and trailing)

    @contextmanager
    def piece(self, block: Block) -> Iterator["_Piece"]:
        """A block, standardized."""
        plan, dy = self.call.plan, self.dy[block]
        library, xp, shape = plan.library, plan.library.xp, tuple(dy.shape)
        try:
            buffers = self.buffers.pop()
        except IndexError:  # and no look beforehand: another thread may be faster
            buffers = []
        target = None if self.dx is None else self.dx[block]
        standardizer = target is not None and target.dtype != plan.dtype
        number = 1 + self.products_apart + standardizer + self.copies_dy
        buffers += [empty((self.largest,), dy, plan.dtype) for _ in range(number - len(buffers))]
        free = [xp.reshape(each[: math.prod(shape)], shape) for each in buffers[:number]]
        try:
            if self.copies_dy:
                place = free.pop()
                assign(library, place, dy)
                dy = place
            places = [library.into(each) for each in free]
            result = PURE if target is None else places.pop() if standardizer else library.into(target)
            yield self._standardized(block, dy, target, Outputs(result, places[0], [result, *places[1:]][-1]))
        finally:
            self.buffers.append(buffers)

    def _standardized(self, block: Block, dy: Array, target: Array | None, places: Outputs) -> "_Piece":
        call, plan = self.call, self.call.plan
        xhat = None if call.x is None else cast(plan.library, call.x[block], plan.dtype)
        given, kept = call.weights, None
        rstd, power = (repeated(plan, cut(each, block), dy) for each in (self.rstd, self.power))
        number = math.prod([dy.shape[axis] for axis in plan.view.axes])
        groups = plain_groups(plan, divisor=min(plan.groups.divisor, float(number)))
        groups = groups._replace(interleaved=interleaved(plan), repeated=given is None)
        if xhat is not None:
            own = Stats(*(repeated(plan, each, dy) for each in stats_within(self.stats, block)))
            centred = kernels.subtract_mean(xhat, own, ops=places.xhat)
            xhat = places.xhat.multiply(centred, rstd)
        if given is not None:
            kept, given = present(plan, given, block), weights_within(plan, given, block, tuple(dy.shape))
            if xhat is not None:
                dy, xhat = _without_padding(plan, dy, xhat, given, kept, groups=groups, ops=places.xhat)
        of, one_per_group = Standardized(xhat, rstd, self.stats), kernels.one_per_group(call.gamma, plan.view.axes)
        gamma, how = cut(call.gamma, block), {"places": places, "exact": self.exact}
        return _Piece(plan, block, target, places, groups, dy, gamma, one_per_group, of, power, how, given, kept)


class _Piece(NamedTuple):
    """A block of a gradient that is computed of xhat."""

    plan: Plan
    block: Block
    target: Array | None
    """Where the gradient of x goes."""
    places: Outputs
    groups: Sums
    dy: Array
    gamma: Array | None
    one_per_group: bool
    """Whether gamma is one number for each group, and not only for what the block has of it."""
    of: Standardized
    power: Array | None
    how: dict[str, Any]
    """The places, and whether products with gamma are exact."""
    weights: Weights | None
    kept: Array | None
    """The groups that have a weight; None for all."""

    def finish(self, dx: Array) -> None:
        """Write the gradient of x."""
        if self.target is not None and dx is not self.target:
            assign(self.plan.library, self.target, dx)

    def gradient(self) -> Array:
        """That of xhat, but for a gamma that is one number for each group; 0 in a group without weight."""
        g = self.dy
        if not self.one_per_group:
            g = kernels.cotangent(self.plan.library.xp, g, self.gamma, self.power, **self.how)
        return only(self.plan, g, self.kept)

    @property
    def weighted(self) -> WeightedSums | None:
        """The groups of a piece, where there are weights."""
        if self.weights is None:
            return None
        return WeightedSums(self.groups.by(1.0), self.weights, product=self.places.product)

    def parameters(self, run: _Run) -> Parameters:
        plan, shapes = self.plan, run.wanted.within(self.block)
        block, places = plan.library.plain_block, self.places
        return parameter_gradients(plan, self.dy, self.of.xhat, shapes, block=block, ones=run.ones, places=places)

    def input_gradient(self, *, given: bool) -> Array:
        """That of x: of whole groups, or by statistics that are `given`."""
        plan, dy, weighted = self.plan, only(self.plan, self.dy, self.kept), self.weighted
        how = {"centred": plan.centred, "power": self.power, **self.how}
        if weighted is not None:
            return weighting.input_gradient(plan.library.xp, dy, self.gamma, self.of, groups=weighted, **how)
        groups = None if given else self.groups
        return kernels.input_gradient(plan.library.xp, dy, self.gamma, self.of, groups=groups, **how)

    def gradient_sums(self) -> PartStats | GradientSums:
        """What a part has to say of the gradients of its groups."""
        xp, centred, places, xhat = self.plan.library.xp, self.plan.centred, self.places, self.of.xhat
        g, weighted = self.gradient(), self.weighted
        if weighted is not None:
            return weighting.gradient_sums_of_part(xp, g, xhat, groups=weighted, centred=centred, places=places)
        level = self.groups.mean(xp, xhat) if centred else None
        sums_of_g = kernels.gradient_sums(xp, g, xhat, groups=self.groups, centred=centred, places=places)[1]
        if self.groups.interleaved:  # parts may have runs of different lengths
            *own, level = (None if each is None else each[..., :1] for each in (*sums_of_g, level))
            sums_of_g = Stats(*own)
        return PartStats(sums_of_g, self.groups.divisor, level)

    def input_gradient_by_sums(self, sums_of_g: PartStats | GradientSums) -> Array:
        """The gradient of x in a part, of what all parts had to say."""
        xp, g, factors = self.plan.library.xp, self.gradient(), (self.gamma if self.one_per_group else None, self.power)
        if isinstance(sums_of_g, GradientSums):
            assert self.weights is not None
            return weighting.input_gradient_of_part(xp, g, sums_of_g, self.of, self.weights.each, *factors, **self.how)
        own = Stats(*(repeated(self.plan, each, g) for each in sums_of_g.stats))
        g = kernels.subtract_mean(g, own, ops=self.places.result)
        return kernels.input_gradient_by_sums(xp, g, own, self.of, *factors, **self.how)


def _groups(run: _Run, parts: list[Block], threads: int) -> list[Parameters]:
    """The gradient of x in the groups that these parts hold together; those of the parameters, of each part."""
    call, plan = run.call, run.call.plan
    xp = plan.library.xp
    if len(parts) == 1 or run.dx is None or call.stats is not None:

        def whole(block: Block) -> Parameters:
            with run.piece(block) as piece:
                parameters = piece.parameters(run)
                if run.dx is not None:
                    piece.finish(piece.input_gradient(given=call.stats is not None))
                return parameters

        return share(whole, parts, threads, plan.library.busy)

    parameters: list[Parameters] = []

    def sums_of_part(block: Block) -> tuple[PartStats | GradientSums, Parameters]:
        with run.piece(block) as piece:
            found = piece.parameters(run)
            return piece.gradient_sums(), found

    def sums_of_parts(some: list[Block]) -> list[PartStats | GradientSums]:
        part_stats, found = zip(*share(sums_of_part, some, threads, plan.library.busy), strict=True)
        parameters.extend(found)
        return list(part_stats)

    def join(found: list[Any]) -> PartStats | GradientSums:
        return (
            merge_parts(xp, found, plan.groups.divisor)
            if call.weights is None
            else weighting.merge_gradient_sums(xp, found)
        )

    sums_of_g = tree_reduce(join, sums_of_parts, parts)

    def apply(block: Block) -> None:
        with run.piece(block) as piece:
            piece.finish(piece.input_gradient_by_sums(sums_of_g))

    share(apply, parts, threads, plan.library.busy)
    return parameters


def _without_padding(
    plan: Plan, dy: Array, xhat: Array, given: Weights, kept: Array | None, *, groups: Sums, ops: Ops
) -> tuple[Array, Array]:
    """dy and xhat as nothing where xhat weighs nothing and is not finite; and xhat in a group that is not kept."""
    xp = plan.library.xp
    if not bool(xp.all(xp.isfinite(groups.mean(xp, xhat)))):
        fine = (given.each > 0) | xp.isfinite(xhat)
        dy, xhat = only(plan, dy, fine if kept is None else fine | ~kept), only(plan, xhat, fine)
    return dy, xhat if kept is None else ops.multiply(xhat, xp.astype(kept, plan.dtype))
