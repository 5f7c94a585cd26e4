"""The gradients of a call: whole, in arithmetic that may be recorded; or block by block, in little memory."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from anynorm import kernels, weights
from anynorm.arrays import adds, assign, cast, empty, extent, in_rows, zeros
from anynorm.blocks import Block, blocks, both, share, within
from anynorm.calls import Call, Plan, Wanted, at_once, weighed
from anynorm.executors import programs
from anynorm.kernels import PURE, Arithmetic, Array, Groups, Places, Spread, Standardized
from anynorm.passes import (
    Portion,
    cut,
    exact_product,
    folded,
    numbers,
    only,
    ordinary,
    plain_groups,
    pool,
    present,
    root,
    seen,
    shared,
    spelt,
    spread_within,
    strewn,
    weights_within,
)
from anynorm.schedules import in_blocks, standardize, standardize_by
from anynorm.weights import Leaning, Weighted, Weights

Gradients = tuple[Array | None, ...]
"""With respect to x, gamma and beta, beside the view; None where it is not wanted."""
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


def pull(call: Call, dy: Array, wanted: Wanted, of: Standardized | Spread | None) -> Gradients:
    """The gradients of sum(y * dy), where dy stands beside the view; over all replicas, where there are any.

    `of` is what x was standardized to, or the statistics that the call gave; without it all that is done is recorded,
    if anything records.
    """
    found = None
    if isinstance(of, Spread) and programs.supports(call, dy):
        found = programs.backward(call, dy, wanted, of)
    if found is None:
        found = _by_arrays(call, dy, wanted, of)
    if call.all_reduce is None:
        return found
    assert call.join is not None
    dx, *parameters = found
    shared = [i for i, each in enumerate(parameters) if each is not None and call.plan.short[i]]
    sums = call.join(*(parameters[i] for i in shared)) if shared else []
    for i, each in zip(shared, sums, strict=True):
        parameters[i] = each
    return dx, *parameters


def _by_arrays(call: Call, dy: Array, wanted: Wanted, of: Standardized | Spread | None) -> Gradients:
    """Again by a smaller dy, where a sum had no room."""
    dx, *parameters = _pull(call, dy, wanted, of)
    if dx is not None and call.all_reduce is None and _overflowed(call, dy, dx):
        xp, step = call.plan.library.xp, call.plan.limits.further
        smaller = Wanted(call.plan.dtype, tuple(None for _ in parameters))
        again: Any = _pull(call, cast(call.plan.library, dy, call.plan.dtype) * (1 / step), smaller, of)[0]
        dx = xp.where(xp.isfinite(dx), dx, xp.astype(again * step, dx.dtype, copy=False))
    return dx, *parameters


def _overflowed(call: Call, dy: Array, dx: Array) -> bool:
    """Whether a sum over a group may have had no room, which the first number of each group tells."""
    plan, arrays = call.plan, [each for each in (call.x, call.gamma) if each is not None]
    if call.spread is not None or math.prod(plan.view.shape) == 0 or not plan.library.plain(dy, dx, *arrays):
        return False
    return not bool(plan.library.xp.all(plan.library.xp.isfinite(plan.groups.first(dx))))


def _pull(call: Call, dy: Array, wanted: Wanted, of: Standardized | Spread | None) -> Gradients:
    plan = call.plan
    if isinstance(of, Spread):
        call = weighed(call)
        if in_blocks(call, dy) and ordinary(plan, of.var):
            return _in_blocks(call, dy, wanted, of.astype(plan.library.xp, plan.dtype))
        # to find them again replicas would sum again, and those that run programs do not
        known = call.all_reduce is not None and call.spread is None and ordinary(plan, of.var)
        of = standardize_by(call, of.astype(plan.library.xp, plan.dtype)) if known else None
    call = weighed(call)
    gradients: Gradients = at_once(call, ("gradients", wanted), partial(_whole, wanted), dy, of)
    return gradients


def _whole(wanted: Wanted, call: Call, dy: Array, of: Standardized | None) -> Gradients:
    plan = call.plan
    if of is None and call.x is None:  # nothing that is wanted depends on it
        spread = call.spread or Spread(None, None, None)
        of = Standardized(None, None if call.spread is None else root(plan, spread), spread)
    elif of is None:
        of = standardize(call)
    xp = plan.library.xp
    dy = cast(plan.library, dy, plan.dtype)
    if of.stray is not None:
        dy = xp.where(of.stray != 0, xp.zeros_like(dy), dy)
    block, ones = plan.groups.block, _ones(plan, dy)
    parameters = _parameter_gradients(plan, dy, of.xhat, wanted.parameters, block=block, ones=ones)
    if wanted.dtype is None:
        return None, *parameters
    power = _power(plan, call.gamma, plan.library.constant(of.rstd)) if plan.library.readable(dy) else None
    if (weighted := call.weighted) is not None:
        dy = xp.where(weighted.weights.sums > 0, dy, xp.zeros_like(dy))
        dx = weights.input_gradient(xp, dy, call.gamma, of, groups=weighted, centred=plan.centred, power=power)
    else:
        groups = None if call.spread is not None else plan.groups
        dx = kernels.input_gradient(xp, dy, call.gamma, of, groups=groups, centred=plan.centred, power=power)
    return xp.astype(dx, wanted.dtype, copy=False), *parameters


def _in_blocks(call: Call, dy: Array, wanted: Wanted, spread: Spread) -> Gradients:
    plan = call.plan
    library = plan.library
    with library.quiet():
        rstd, gamma = root(plan, spread), call.gamma
        power = None if call.spread is not None else _power(plan, gamma, rstd)
        exact = gamma is not None and exact_product(plan, rstd if power is None else power, extent(library, gamma))
        spread = spread._replace(rest=seen(plan, spread.rest, spread.var))
    dx = None if wanted.dtype is None else empty(plan.view.shape, dy, wanted.dtype)
    totals = [None if shape is None else _Total(shape, dy, plan.dtype) for shape in wanted.parameters]
    averaged = () if call.spread is not None else plan.view.axes
    run = _Run(call, dy, wanted, spread, rstd, power, exact, _ones(plan, dy), dx, [], 1)
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
    spread: Spread
    rstd: Array
    power: Array | None
    """For `kernels.input_gradient`."""
    exact: bool
    """For `kernels.scaled`."""
    ones: Array | None
    dx: Array | None
    rooms: list[list[Array]]
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
        trailing = plan.view.axes[-1:] == (len(plan.view.shape) - 1,) and not strewn(plan)
        return self.dx is None or self.call.weights is not None or not (plan.library.products and trailing)

    @contextmanager
    def piece(self, block: Block) -> Iterator["_Piece"]:
        """A block, standardized."""
        plan, dy = self.call.plan, self.dy[block]
        library, xp, shape = plan.library, plan.library.xp, tuple(dy.shape)
        try:
            rooms = self.rooms.pop()
        except IndexError:  # and no look beforehand: another thread may be faster
            rooms = []
        target = None if self.dx is None else self.dx[block]
        narrow = target is not None and target.dtype != plan.dtype
        number = 1 + self.products_apart + narrow + self.copies_dy
        rooms += [empty((self.largest,), dy, plan.dtype) for _ in range(number - len(rooms))]
        free = [xp.reshape(each[: math.prod(shape)], shape) for each in rooms[:number]]
        try:
            if self.copies_dy:
                place = free.pop()
                assign(library, place, dy)
                dy = place
            places = [library.into(each) for each in free]
            result = PURE if target is None else places.pop() if narrow else library.into(target)
            yield self._standardized(block, dy, target, Places(result, places[0], [result, *places[1:]][-1]))
        finally:
            self.rooms.append(rooms)

    def _standardized(self, block: Block, dy: Array, target: Array | None, places: Places) -> "_Piece":
        call, plan = self.call, self.call.plan
        xhat = None if call.x is None else cast(plan.library, call.x[block], plan.dtype)
        given, kept = call.weights, None
        rstd, power = (spelt(plan, cut(each, block), dy) for each in (self.rstd, self.power))
        number = math.prod([dy.shape[axis] for axis in plan.view.axes])
        groups = plain_groups(plan, divisor=min(plan.groups.divisor, float(number)))
        groups = groups._replace(strewn=strewn(plan), spelt=given is None)
        if xhat is not None:
            own = Spread(*(spelt(plan, each, dy) for each in spread_within(self.spread, block)))
            centred = kernels.less(xhat, own, ops=places.xhat)
            xhat = places.xhat.multiply(centred, rstd)
        if given is not None:
            kept, given = present(plan, given, block), weights_within(plan, given, block, tuple(dy.shape))
            if xhat is not None:
                dy, xhat = _without_strays(plan, dy, xhat, given, kept, groups=groups, ops=places.xhat)
        of, alone = Standardized(xhat, rstd, self.spread), kernels.alone(call.gamma, plan.view.axes)
        gamma, how = cut(call.gamma, block), {"places": places, "exact": self.exact}
        return _Piece(plan, block, target, places, groups, dy, gamma, alone, of, power, how, given, kept)


class _Piece(NamedTuple):
    """A block of a gradient that is computed of xhat."""

    plan: Plan
    block: Block
    target: Array | None
    """Where the gradient of x goes."""
    places: Places
    groups: Groups
    dy: Array
    gamma: Array | None
    alone: bool
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
        if not self.alone:
            g = kernels.cotangent(self.plan.library.xp, g, self.gamma, self.power, **self.how)
        return only(self.plan, g, self.kept)

    @property
    def weighted(self) -> Weighted | None:
        """The groups of a piece, where there are weights."""
        if self.weights is None:
            return None
        return Weighted(self.groups.by(1.0), self.weights, product=self.places.product)

    def parameters(self, run: _Run) -> Parameters:
        plan, shapes = self.plan, run.wanted.within(self.block)
        block, places = plan.library.plain_block, self.places
        return _parameter_gradients(plan, self.dy, self.of.xhat, shapes, block=block, ones=run.ones, places=places)

    def input_gradient(self, *, given: bool) -> Array:
        """That of x: of whole groups, or by statistics that are `given`."""
        plan, dy, weighted = self.plan, only(self.plan, self.dy, self.kept), self.weighted
        how = {"centred": plan.centred, "power": self.power, **self.how}
        if weighted is not None:
            return weights.input_gradient(plan.library.xp, dy, self.gamma, self.of, groups=weighted, **how)
        groups = None if given else self.groups
        return kernels.input_gradient(plan.library.xp, dy, self.gamma, self.of, groups=groups, **how)

    def lean(self) -> Portion | Leaning:
        """What a part has to say of the gradients of its groups."""
        xp, centred, places, xhat = self.plan.library.xp, self.plan.centred, self.places, self.of.xhat
        g, weighted = self.gradient(), self.weighted
        if weighted is not None:
            return weights.lean_in_part(xp, g, xhat, groups=weighted, centred=centred, places=places)
        level = self.groups.mean(xp, xhat) if centred else None
        leaning = kernels.lean(xp, g, xhat, groups=self.groups, centred=centred, places=places)[1]
        if self.groups.strewn:  # parts may have runs of different lengths
            *own, level = (None if each is None else each[..., :1] for each in (*leaning, level))
            leaning = Spread(*own)
        return Portion(leaning, self.groups.divisor, level)

    def upright(self, leaning: Portion | Leaning) -> Array:
        """The gradient of x in a part, of what all parts had to say."""
        xp, g, factors = self.plan.library.xp, self.gradient(), (self.gamma if self.alone else None, self.power)
        if isinstance(leaning, Leaning):
            assert self.weights is not None
            return weights.upright_in_part(xp, g, leaning, self.of, self.weights.each, *factors, **self.how)
        own = Spread(*(spelt(self.plan, each, g) for each in leaning.spread))
        g = kernels.less(g, own, ops=self.places.result)
        return kernels.upright(xp, g, own, self.of, *factors, **self.how)


def _power(plan: Plan, gamma: Array | None, rstd: Array) -> Array | None:
    """For `kernels.input_gradient`."""
    if gamma is None or kernels.alone(gamma, plan.view.axes):
        return None
    return kernels.power_of_two(plan.library.xp, rstd)


def _groups(run: _Run, parts: list[Block], threads: int) -> list[Parameters]:
    """The gradient of x in the groups that these parts hold together; those of the parameters, of each part."""
    call, plan = run.call, run.call.plan
    xp = plan.library.xp
    if len(parts) == 1 or run.dx is None or call.spread is not None:

        def whole(block: Block) -> Parameters:
            with run.piece(block) as piece:
                parameters = piece.parameters(run)
                if run.dx is not None:
                    piece.finish(piece.input_gradient(given=call.spread is not None))
                return parameters

        return share(whole, parts, threads, plan.library.busy)

    parameters: list[Parameters] = []

    def survey(block: Block) -> tuple[Portion | Leaning, Parameters]:
        with run.piece(block) as piece:
            found = piece.parameters(run)
            return piece.lean(), found

    def surveys(some: list[Block]) -> list[Portion | Leaning]:
        portions, found = zip(*share(survey, some, threads, plan.library.busy), strict=True)
        parameters.extend(found)
        return list(portions)

    def join(found: list[Any]) -> Portion | Leaning:
        return pool(xp, found, plan.groups.divisor) if call.weights is None else weights.pool(xp, found)

    leaning = folded(join, surveys, parts)

    def apply(block: Block) -> None:
        with run.piece(block) as piece:
            piece.finish(piece.upright(leaning))

    share(apply, parts, threads, plan.library.busy)
    return parameters


def _without_strays(
    plan: Plan, dy: Array, xhat: Array, given: Weights, kept: Array | None, *, groups: Groups, ops: Arithmetic
) -> tuple[Array, Array]:
    """dy and xhat as nothing where xhat weighs nothing and is not finite; and xhat in a group that is not kept."""
    xp = plan.library.xp
    if not bool(xp.all(xp.isfinite(groups.mean(xp, xhat)))):
        fine = (given.each > 0) | xp.isfinite(xhat)
        dy, xhat = only(plan, dy, fine if kept is None else fine | ~kept), only(plan, xhat, fine)
    return dy, xhat if kept is None else ops.multiply(xhat, xp.astype(kept, plan.dtype))


def _parameter_gradients(
    plan: Plan,
    dy: Array,
    xhat: Array,
    shapes: Sequence[tuple[int, ...] | None],
    *,
    block: int | None,
    ones: Array | None,
    places: Places = kernels.NEW,
) -> list[Array | None]:
    """Of a gamma, or of a gamma and a beta, of these shapes; None for None."""
    return [
        None
        if shape is None
        else kernels.parameter_gradient(plan.library.xp, dy, factor, shape, block=block, ones=ones, ops=places.product)
        for shape, factor in zip(shapes, (xhat, None), strict=False)
    ]


def _ones(plan: Plan, dy: Array) -> Array | None:
    """A run of ones as long as the sums over dy need."""
    n = max(kernels.LEADING, min(dy.shape[-1], kernels.RUN))
    return plan.library.xp.ones(n, dtype=plan.dtype, device=plan.library.device(dy)) if plan.library.products else None
