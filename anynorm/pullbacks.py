"""The gradients of a call: whole, in arithmetic that may be recorded; or block by block, in little memory."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from anynorm import compilers, kernels, weights
from anynorm.arrays import assign, empty, zeros
from anynorm.blocks import Block, blocks, both, share, within
from anynorm.calls import Call, Plan
from anynorm.kernels import Arithmetic, Array, Groups, Places, Spread, Standardized
from anynorm.passes import (
    Portion,
    cut,
    numbers,
    only,
    ordinary,
    pooled,
    present,
    root,
    shared,
    sound,
    spread_within,
    trimmed,
    weights_within,
)
from anynorm.schedules import in_blocks, standardize
from anynorm.weights import Weights


class Wanted(NamedTuple):
    """Which gradients there are to be."""

    dtype: Any
    """That of x and of its gradient, or None if that is not wanted."""
    parameters: tuple[tuple[int, ...] | None, ...]
    """The shapes, beside the view, of gamma and beta, or None."""


Gradients = tuple[Array | None, ...]
"""With respect to x, gamma and beta, beside the view; None where it is not wanted."""
ROOMS = 4
"""The arrays of a block's size that a block takes."""
WEIGHTED = 3
"""And so many more where there are weights."""


def pull(call: Call, dy: Array, wanted: Wanted, of: Standardized | Spread | None) -> Gradients:
    """The gradients of sum(y * dy), where dy stands beside the view; over all replicas, where there are any.

    `of` is what x was standardized to, or the statistics that the call gave; without it all that is done is recorded,
    if anything records.
    """
    dx, *parameters = _pull(call, dy, wanted, of)
    if call.join is not None:
        shared = [i for i, each in enumerate(parameters) if each is not None and call.plan.short[i]]
        sums = call.join(*(parameters[i] for i in shared)) if shared else []
        for i, each in zip(shared, sums, strict=True):
            parameters[i] = each
    return dx, *parameters


def _pull(call: Call, dy: Array, wanted: Wanted, of: Standardized | Spread | None) -> Gradients:
    plan = call.plan
    if isinstance(of, Spread):
        arrays = [each for each in (call.x, call.gamma, dy) if each is not None]
        compiler = compilers.chosen(call, arrays)
        if compiler != "none" and (compilers.safe(call, compiler, dy) or ordinary(plan, of.var)):
            return compilers.gradients(call, dy, wanted.dtype, wanted.parameters, of, compiler)
        if in_blocks(call, arrays) and ordinary(plan, of.var):
            return _in_blocks(call, dy, wanted, of)
        of = None
    if of is None and call.x is None:  # nothing that is wanted depends on it
        spread = call.spread or Spread(None, None, None)
        of = Standardized(None, None if call.spread is None else root(plan, spread), spread)
    elif of is None:
        of = standardize(call)
    xp = plan.library.xp
    dy = xp.astype(dy, plan.dtype, copy=False)
    if of.stray is not None:
        dy = xp.where(of.stray != 0, xp.zeros_like(dy), dy)
    parameters = _parameter_gradients(plan, dy, of.xhat, wanted.parameters, block=plan.groups.block)
    if wanted.dtype is None:
        return None, *parameters
    if (weighted := call.weighted) is not None:
        dx = weights.input_gradient(xp, dy, call.gamma, of, groups=weighted, centred=plan.centred)
    else:
        groups = None if call.spread is not None else plan.groups
        dx = kernels.input_gradient(xp, dy, call.gamma, of, groups=groups, centred=plan.centred)
    return xp.astype(dx, wanted.dtype, copy=False), *parameters


class _Piece(NamedTuple):
    """A block of a gradient."""

    groups: Groups
    dy: Array
    gamma: Array | None
    of: Standardized
    parameters: list[Array | None]
    target: Array | None
    places: Places
    weights: Weights | None
    kept: Array | None
    """The groups that have a weight; None for all."""

    def gradient(self, plan: Plan) -> Array:
        """That of xhat, where gamma is not in the scale; 0 in a group without weight."""
        return only(plan, kernels.affine(self.dy, self.gamma, None, ops=self.places.result), self.kept)

    def finish(self, plan: Plan, d: Array) -> None:
        if self.target is not None and d is not self.target:
            assign(plan.library, self.target, d)


class _Pull(NamedTuple):
    """The gradients of a call that are computed in blocks."""

    call: Call
    dy: Array
    wanted: Wanted
    spread: Spread
    rstd: Array
    scale: Array
    """What the gradient of xhat is multiplied by: rstd, or rstd * gamma where gamma is one number for each group."""
    gamma: Array | None
    """None where it is in the scale, too."""
    dx: Array | None
    rooms: list[list[Array]]
    """Arrays to work in that no block works in now."""
    largest: int

    @contextmanager
    def piece(self, block: Block, *, of_parameters: bool = True) -> Iterator[_Piece]:
        """A block with its xhat, and the gradients of its parameters."""
        plan = self.call.plan
        library, xp = plan.library, plan.library.xp
        dy = self.dy[block]
        try:
            room = self.rooms.pop()
        except IndexError:
            room = [empty((self.largest,), dy, plan.dtype) for _ in range(ROOMS - 1)]
        try:
            with library.busy():
                shape = tuple(dy.shape)
                result, xhat, product = (xp.reshape(each[: math.prod(shape)], shape) for each in room)
                target = None if self.dx is None else self.dx[block]
                if target is not None and target.dtype == plan.dtype:
                    result = target
                places = Places(*map(library.into, (result, xhat, product)))
                number = math.prod([shape[axis] for axis in plan.view.axes])
                groups = plan.groups._replace(
                    divisor=min(plan.groups.divisor, float(number)), block=library.plain_block
                )
                dy = xp.astype(dy, plan.dtype, copy=False)
                of, given, kept = self._standardized(block, places), self.call.weights, None
                if given is not None:
                    kept, given = present(plan, given, block), weights_within(plan, given, block)
                    if of.xhat is not None:
                        dy, xhat = _without_strays(plan, dy, of.xhat, given, kept, groups=groups, ops=places.xhat)
                        of = of._replace(xhat=xhat)
                shapes = self.wanted.parameters if of_parameters else ()
                shapes = tuple(None if each is None else _narrowed(each, block) for each in shapes)
                yield _Piece(
                    groups,
                    dy,
                    cut(self.gamma, block),
                    of._replace(rstd=cut(self.scale, block)),
                    _parameter_gradients(plan, dy, of.xhat, shapes, block=library.plain_block, places=places),
                    target,
                    places,
                    given,
                    kept,
                )
        finally:
            self.rooms.append(room)

    def _standardized(self, block: Block, places: Places) -> Standardized:
        plan, spread, rstd = self.call.plan, spread_within(self.spread, block), cut(self.rstd, block)
        if self.call.x is None:
            return Standardized(None, rstd, spread)
        x = plan.library.xp.astype(self.call.x[block], plan.dtype, copy=False)
        return Standardized(places.xhat.multiply(kernels.less(x, spread, ops=places.xhat), rstd), rstd, spread)


def _in_blocks(call: Call, dy: Array, wanted: Wanted, spread: Spread) -> Gradients:
    plan = call.plan
    library = plan.library
    with library.quiet():
        rstd = scale = root(plan, spread)
        spread = trimmed(plan, spread)
        gamma = call.gamma
        if gamma is not None and all(gamma.shape[axis] == 1 for axis in plan.view.axes) and plan.folds:
            scale, gamma = (rstd * gamma, None) if sound(library.xp, rstd * gamma) else (rstd, gamma)
    dx = None if wanted.dtype is None else empty(plan.view.shape, dy, wanted.dtype)
    totals = [None if shape is None else zeros(shape, dy, plan.dtype) for shape in wanted.parameters]
    axes = () if call.spread is not None else plan.view.axes
    grid = blocks(plan.view.shape, axes, *numbers(plan, ROOMS if call.weights is None else ROOMS + WEIGHTED))
    largest = max(math.prod([each.stop - each.start for each in both(grid.groups[0], grid.parts[0])]), 1)
    run = _Pull(call, dy, wanted, spread, rstd, scale, gamma, dx, [], largest)
    threads = shared(plan)
    many = len(grid.groups) >= threads

    def work(group: Block) -> list[tuple[Block, list[Array | None]]]:
        parts = [both(group, part) for part in grid.parts]
        with library.busy():
            found = _groups(run, parts, 1 if many else threads)
        return list(zip(parts, found, strict=True))

    for results in share(work, grid.groups, threads if many else 1):
        for block, parameters in results:
            for total, each in zip(totals, parameters, strict=True):
                if total is not None:
                    total[within(total, block)] += each
    return dx, *totals


def _groups(run: _Pull, parts: list[Block], threads: int) -> list[list[Array | None]]:
    """The gradient of x in the groups that these parts hold together; those of the parameters, of each part."""
    call, plan = run.call, run.call.plan
    xp, centred = plan.library.xp, plan.centred
    if (len(parts) == 1 and call.weights is None) or run.dx is None or call.spread is not None:

        def whole(block: Block) -> list[Array | None]:
            with run.piece(block) as piece:
                if piece.target is not None:
                    groups = None if call.spread is not None else piece.groups
                    d = kernels.input_gradient(
                        xp, piece.dy, piece.gamma, piece.of, groups=groups, centred=centred, places=piece.places
                    )
                    piece.finish(plan, d)
                return piece.parameters

        return share(whole, parts, threads)

    parameters: list[list[Array | None]] = []

    def survey(block: Block) -> tuple[Portion, list[Array | None]]:
        with run.piece(block) as piece:
            return _portion(plan, piece), piece.parameters

    def surveys(some: list[Block]) -> list[Portion]:
        portions, found = zip(*share(survey, some, threads), strict=True)
        parameters.extend(found)
        return list(portions)

    leaning = pooled(plan, surveys, parts)

    def apply(block: Block) -> None:
        with run.piece(block, of_parameters=False) as piece:
            g = piece.gradient(plan)
            if piece.weights is not None:
                each, sums, *_ = piece.weights
                share = each * (plan.groups.divisor / weights.positive(xp, sums))
                piece.finish(plan, weights.upright(g, leaning, piece.of, share, places=piece.places))
                return
            g = kernels.less(g, leaning, ops=piece.places.result)
            piece.finish(plan, kernels.upright(g, leaning, piece.of, places=piece.places))

    share(apply, parts, threads)
    return parameters


def _portion(plan: Plan, piece: _Piece) -> Portion:
    """What a part has to say of the gradients of its groups."""
    xp, centred = plan.library.xp, plan.centred
    g, xhat, groups, places = piece.gradient(plan), piece.of.xhat, piece.groups, piece.places
    if piece.weights is None:
        level = groups.mean(xp, xhat) if centred else None
        leaning = kernels.lean(xp, g, xhat, groups=groups, centred=centred, places=places)[1]
        return Portion(leaning, groups.divisor, level)
    leaning = weights.lean(xp, g, xhat, groups=groups, centred=centred, places=places)
    return Portion(leaning, groups.divisor, xp.zeros_like(leaning.var))


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
    shapes: tuple[tuple[int, ...] | None, ...],
    *,
    block: int | None,
    places: Places = kernels.NEW,
) -> list[Array | None]:
    """Of a gamma, or of a gamma and a beta, of these shapes; None for None."""
    ones = _ones(plan, dy)
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


def _narrowed(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    return tuple(1 if n == 1 else each.stop - each.start for n, each in zip(shape, block, strict=True))
