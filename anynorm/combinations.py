"""The gradient of x as a combination of dy and x, with three numbers for each group: fewer passes than the formula.

It is taken where it is as exact: where, in each group, the mean of the gradient is smaller than its spread.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from anynorm import kernels
from anynorm.arrays import assign, empty
from anynorm.blocks import Block, share
from anynorm.calls import Call, Plan
from anynorm.kernels import Array, Combination, Groups, Places, Spread, Sums
from anynorm.passes import SHORT, cut, folded

ROOMS = 4
"""The arrays of a block's size that a block takes."""
ENOUGH = 512
"""The squares of so many values tell that their mean is small."""
Parameters = list[Array | None]
"""The gradients of gamma and beta, as far as they are wanted, from some of the values."""


class Wanted(NamedTuple):
    """Which gradients there are to be."""

    dtype: Any
    """That of x and of its gradient, or None if that is not wanted."""
    parameters: tuple[tuple[int, ...] | None, ...]
    """The shapes, beside the view, of gamma and beta, or None."""

    def within(self, block: Block) -> list[tuple[int, ...] | None]:
        """The shapes beside a block."""
        return [
            None
            if shape is None
            else tuple(1 if n == 1 else each.stop - each.start for n, each in zip(shape, block, strict=True))
            for shape in self.parameters
        ]


class Pull(NamedTuple):
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
    pivot: Array | None
    """What is taken from x first: its mean, unless that is small."""
    left: Array | None
    """What else of the mean there is, if it can be seen."""
    ones: Array | None
    axes: tuple[int, ...] | None
    """Those of `runs`."""
    dx: Array | None
    rooms: list[list[Array]]
    """Arrays to work in that no block works in now."""
    largest: int

    @contextmanager
    def desk(self, block: Block) -> Iterator["Desk"]:
        """What a block is worked on with."""
        plan, dy = self.call.plan, self.dy[block]
        library, xp = plan.library, plan.library.xp
        try:
            rooms = self.rooms.pop()
        except IndexError:
            rooms = [empty((self.largest,), dy, plan.dtype) for _ in range(ROOMS - 1)]
        try:
            with library.busy():
                shape = tuple(dy.shape)
                result, xhat, product = (xp.reshape(each[: math.prod(shape)], shape) for each in rooms)
                target = None if self.dx is None else self.dx[block]
                if target is not None and target.dtype == plan.dtype:
                    result = target
                x = None if self.call.x is None else xp.astype(self.call.x[block], plan.dtype, copy=False)
                dy = xp.astype(dy, plan.dtype, copy=False)
                yield Desk(plan, block, x, dy, target, Places(*map(library.into, (result, xhat, product))))
        finally:
            self.rooms.append(rooms)


class Desk(NamedTuple):
    """A block, and places to work in."""

    plan: Plan
    block: Block
    x: Array | None
    dy: Array
    target: Array | None
    """Where the gradient of x goes."""
    places: Places

    def finish(self, dx: Array) -> None:
        """Write the gradient of x."""
        if self.target is not None and dx is not self.target:
            assign(self.plan.library, self.target, dx)


class Look(NamedTuple):
    """What a look at a block tells of its groups."""

    g: Array
    """dy, times gamma where that is not in the scale."""
    u: Array
    """x less the pivot."""
    sums: Sums | None
    """None where they are not asked for, as the statistics are constants."""
    parameters: Parameters


def pull(run: Pull, parts: list[Block], threads: int) -> list[Parameters] | None:
    """The gradient of x in the groups that these parts hold together; those of the parameters, of each part.

    None where it would not be as exact.
    """
    axes = run.axes
    if run.dx is None or axes is None:
        return None
    given, xp = run.call.spread is not None, run.call.plan.library.xp

    def whole(block: Block) -> Parameters | None:
        with run.desk(block) as desk:
            look = _look(run, desk, axes)
            of = kernels.CONSTANT if look.sums is None else _settled(run, block, look.sums)
            if of is not None:
                desk.finish(kernels.combine(look.g, look.u, _scale(run, block, axes), of, places=desk.places))
            return None if of is None else look.parameters

    if given or len(parts) == 1:
        found = share(whole, parts, threads)
        exact = [each for each in found if each is not None]
        return exact if len(exact) == len(found) else None
    parameters: list[Parameters] = []

    def survey(block: Block) -> Look:
        with run.desk(block) as desk:
            return _look(run, desk, axes)._replace(g=None, u=None)

    def surveys(some: list[Block]) -> list[Sums]:
        looks = share(survey, some, threads)
        parameters.extend(look.parameters for look in looks)
        return [look.sums for look in looks if look.sums is not None]

    def join(found: list[Sums]) -> Sums:
        return Sums(*(xp.sum(xp.stack(each, axis=0), axis=0) for each in zip(*found, strict=True)))

    of = _settled(run, parts[0], folded(join, surveys, parts))
    if of is None:
        return None

    def apply(block: Block) -> None:
        with run.desk(block) as desk:
            g, u = _entered(run, desk, axes)
            desk.finish(kernels.combine(g, u, _scale(run, block, axes), of, places=desk.places))

    share(apply, parts, threads)
    return parameters


def runs(call: Call, wanted: Wanted, *, folds: bool) -> tuple[int, ...] | None:
    """The axes, of a group, along which all but dy and x stay the same; () for rows that gamma varies along.

    Along axes a gamma must fold into rstd. None where it is not so simple.
    """
    plan, gamma = call.plan, call.gamma
    if call.weights is not None:
        return None
    view, beside = plan.view, [shape for shape in wanted.parameters if shape is not None]
    if gamma is not None:
        beside.append(gamma.shape)
    axes = tuple(axis for axis in view.axes if all(shape[axis] == 1 for shape in beside))
    if math.prod([view.shape[axis] for axis in axes]) >= SHORT:
        return axes if gamma is None or folds else None
    rows = view.axes == (1,) and len(view.shape) == 2 and call.spread is None
    return () if rows and all(shape[0] == 1 for shape in beside) else None


def _entered(run: Pull, desk: Desk, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """The g and the u of a block."""
    g, u, pivot = desk.dy, desk.x, cut(run.pivot, desk.block)
    if run.call.gamma is not None and not axes:
        g = desk.places.result.multiply(g, cut(run.call.gamma, desk.block))
    return g, u if pivot is None or u is None else desk.places.xhat.subtract(u, pivot)


def _scale(run: Pull, block: Block, axes: tuple[int, ...]) -> Array:
    """What g is multiplied by."""
    rstd, gamma = cut(run.rstd, block), cut(run.call.gamma, block)
    return rstd if gamma is None or not axes else rstd * gamma


def _look(run: Pull, desk: Desk, axes: tuple[int, ...]) -> Look:
    """The sums over a block, and the gradients of its parameters."""
    return _look_at_runs(run, desk, axes) if axes else _look_at_rows(run, desk)


def _look_at_runs(run: Pull, desk: Desk, axes: tuple[int, ...]) -> Look:
    """Where the parameters stay the same along some axes, all that is asked for comes of three sums over these."""
    plan, xp, product, given = desk.plan, desk.plan.library.xp, desk.places.product, run.call.spread is not None
    rstd, left, gamma = (cut(each, desk.block) for each in (run.rstd, run.left, run.call.gamma))
    (dy, u), shapes = _entered(run, desk, axes), run.wanted.within(desk.block)
    if given and not any(shapes):
        return Look(dy, u, None, [None for _ in shapes])
    groups = Groups(axes, 1.0, plan.library.plain_block, run.ones)
    of_dy = groups.mean(xp, dy)
    of_product = of_dy if u is None else groups.mean_product(xp, dy, u, ops=product)
    of_xhat = (of_product if left is None else of_product - left * of_dy) * rstd
    parameters = [
        None if shape is None else _summed(plan, each, shape)
        for each, shape in zip((of_xhat, of_dy), shapes, strict=False)
    ]
    if given:
        return Look(dy, u, None, parameters)
    of_square = _squares(plan, groups, dy)
    sums = (of_dy, of_product, of_square)
    if gamma is not None:
        sums = (of_dy * gamma, of_product * gamma, of_square * (gamma * gamma))
    kept = tuple(1 if axis in plan.view.axes else n for axis, n in enumerate(dy.shape))
    return Look(dy, u, Sums(*(_summed(plan, each, kept) for each in sums)), parameters)


def _look_at_rows(run: Pull, desk: Desk) -> Look:
    """Where gamma and beta vary along the rows, their gradients are sums across these."""
    plan, xp, product = desk.plan, desk.plan.library.xp, desk.places.product
    rstd, left = cut(run.rstd, desk.block), cut(run.left, desk.block)
    (g, u), shapes = _entered(run, desk, ()), run.wanted.within(desk.block)
    groups = Groups((1,), 1.0, plan.library.plain_block, run.ones)
    of_g, of_product = groups.mean(xp, g), groups.mean_product(xp, g, u, ops=product)
    of_square = _squares(plan, groups, g)
    parameters: Parameters = []
    for i, shape in enumerate(shapes):
        if shape is None:
            parameters.append(None)
        elif i:
            parameters.append(groups._replace(axes=(0,)).mean(xp, desk.dy))
        else:
            across = kernels.across(xp, rstd, product.multiply(desk.dy, u))
            parameters.append(across if left is None else across - kernels.across(xp, rstd * left, desk.dy))
    return Look(g, u, Sums(of_g, of_product, of_square), parameters)


def _squares(plan: Plan, groups: Groups, g: Array) -> Array:
    """The sum of squares of some of the values: it is no more than that of all."""
    axis = groups.axes[-1]
    n = g.shape[axis]
    few = g[(*(slice(None),) * axis, slice(0, min(n, max(ENOUGH, n // 8))), ...)]
    return groups.mean_product(plan.library.xp, few, few)


def _summed(plan: Plan, values: Array, shape: tuple[int, ...]) -> Array:
    """Values summed to a shape that broadcasts to theirs."""
    axes = tuple(axis for axis, (n, whole) in enumerate(zip(shape, values.shape, strict=True)) if n < whole)
    return kernels.total(plan.library.xp, values, axes=axes, block=plan.library.plain_block)


def _settled(run: Pull, block: Block, sums: Sums) -> Combination | None:
    """What the sums of whole groups come to; None where that would not be as exact."""
    plan = run.call.plan
    rstd, left = cut(run.rstd, block), cut(run.left, block)
    xp = plan.library.xp
    of, fair = kernels.combination(xp, sums, rstd, left, divisor=plan.groups.divisor, centred=plan.centred)
    return of if bool(xp.all(fair)) else None
