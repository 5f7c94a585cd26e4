"""The gradient of x as a combination of dy and x, with three numbers for each group: fewer passes than the formula.

It is taken where it is as exact: where, in each group, the mean of the gradient is smaller than its spread.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

from anynorm import kernels
from anynorm.arrays import adds, assign, cast, empty, in_rows
from anynorm.blocks import Block, share
from anynorm.calls import Call, Plan
from anynorm.kernels import PURE, Array, Combination, Groups, Places, Spread, Sums
from anynorm.passes import SHORT, cut, folded, plain_groups, spelt, strewn

ENOUGH = 256
"""The squares of so many values tell that their mean is small."""
Product = Literal["xhat", "result", "apart"]
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

    @property
    def moved(self) -> bool:
        """Whether a block of dy is copied first: it has another dtype, or its rows are not rows in memory."""
        plan = self.call.plan
        return not (adds(plan.library, self.dy, plan.dtype) and in_rows(plan.library, self.dy))

    @property
    def dots(self) -> bool:
        """Whether the products of `_look_at_runs` take no room, as they are added as they are made."""
        return bool(self.axes) and self._along(self.axes) and not self.strewn

    @property
    def strewn(self) -> bool:
        """Whether groups are `strewn`, and `_look_at_runs` adds all of a group."""
        plan = self.call.plan
        return self.axes == plan.view.axes and strewn(plan)

    @property
    def product(self) -> Product:
        """Where the products of `pull` go."""
        return "apart" if self.pivot is not None and not self.dots else "xhat"

    @property
    def product_of_xhat(self) -> Product:
        """Where the products go that are made of xhat, before there is a result."""
        alone = self.dx is not None and self.call.weights is None
        return "result" if alone and self._along(self.call.plan.view.axes) else "apart"

    def _along(self, axes: tuple[int, ...] | None) -> bool:
        last = len(self.call.plan.view.shape) - 1
        return self.call.plan.library.products and axes is not None and axes[-1:] == (last,)

    @contextmanager
    def desk(self, block: Block, *, product: Product) -> Iterator["Desk"]:
        """What a block is worked on with, products in the place of xhat, of the result or in one of their own."""
        plan, dy = self.call.plan, self.dy[block]
        library, xp, shape = plan.library, plan.library.xp, tuple(dy.shape)
        try:
            rooms = self.rooms.pop()
        except IndexError:  # and no look beforehand: another thread may be faster
            rooms = []
        target = None if self.dx is None else self.dx[block]
        narrow = target is not None and target.dtype != plan.dtype
        number, size, moved = 1 + (product == "apart") + narrow, math.prod(shape), self.moved
        rooms += [empty((self.largest,), dy, plan.dtype) for _ in range(number + moved - len(rooms))]
        free = [xp.reshape(each[:size], shape) for each in rooms[: number + moved]]
        places = [library.into(each) for each in free[:number]]
        result = PURE if target is None else places[-1] if narrow else library.into(target)
        x = None if self.call.x is None else cast(library, self.call.x[block], plan.dtype)
        try:
            if moved:
                assign(library, free[-1], dy)
                dy = free[-1]
            own = {"xhat": places[0], "result": result, "apart": places[number - narrow - 1]}[product]
            yield Desk(plan, block, x, dy, target, Places(result, places[0], own))
        finally:
            self.rooms.append(rooms)

    def known(self, block: Block) -> "Known":
        """What goes with a block."""
        return Known(*(cut(each, block) for each in (self.rstd, self.left, self.pivot, self.call.gamma)))


class Desk(NamedTuple):
    """A block, and places to work in."""

    plan: Plan
    block: Block
    x: Array | None
    dy: Array
    target: Array | None
    """Where the gradient of x goes."""
    places: Places

    def combine(self, g: Array, u: Array, scale: Array, of: Combination) -> None:
        """Write the gradient of x as a combination of g and u."""
        scale, slope, shift = (spelt(self.plan, each, g) for each in (scale, *of))
        self.finish(kernels.combine(g, u, scale, Combination(slope, shift), places=self.places))

    def finish(self, dx: Array) -> None:
        """Write the gradient of x."""
        if self.target is not None and dx is not self.target:
            assign(self.plan.library, self.target, dx)


class Known(NamedTuple):
    """What there is for each group of a block, and gamma."""

    rstd: Array
    left: Array | None
    pivot: Array | None
    gamma: Array | None


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
    given, library = run.call.spread is not None, run.call.plan.library
    desk_of = partial(run.desk, product=run.product)

    def whole(block: Block) -> Parameters | None:
        with desk_of(block) as desk:
            known = run.known(block)
            look = _look(run, desk, known, axes)
            of = kernels.CONSTANT if look.sums is None else _settled(run, known, look.sums)
            if of is not None:
                desk.combine(look.g, look.u, _scale(known, axes), of)
            return None if of is None else look.parameters

    if given or len(parts) == 1:
        found = share(whole, parts, threads, library.busy)
        exact = [each for each in found if each is not None]
        return exact if len(exact) == len(found) else None
    parameters: list[Parameters] = []

    def survey(block: Block) -> Look:
        with desk_of(block) as desk:
            return _look(run, desk, run.known(block), axes)._replace(g=None, u=None)

    def surveys(some: list[Block]) -> list[Sums]:
        looks = share(survey, some, threads, library.busy)
        parameters.extend(look.parameters for look in looks)
        return [look.sums for look in looks if look.sums is not None]

    def join(found: list[Sums]) -> Sums:
        xp = library.xp
        return Sums(*(xp.sum(xp.stack(each, axis=0), axis=0) for each in zip(*found, strict=True)))

    of = _settled(run, run.known(parts[0]), folded(join, surveys, parts))
    if of is None:
        return None

    def apply(block: Block) -> None:
        with desk_of(block) as desk:
            known = run.known(block)
            g, u = _entered(desk, known, axes)
            desk.combine(g, u, _scale(known, axes), of)

    share(apply, parts, threads, library.busy)
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
    return () if rows and all(shape == (1, view.shape[1]) for shape in beside) else None


def _entered(desk: Desk, known: Known, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """The g and the u of a block."""
    g, u = desk.dy, desk.x
    if known.gamma is not None and not axes:
        g = desk.places.result.multiply(g, known.gamma)
    if known.pivot is None or u is None:
        return g, u
    return g, desk.places.xhat.subtract(u, spelt(desk.plan, known.pivot, u))


def _scale(known: Known, axes: tuple[int, ...]) -> Array:
    """What g is multiplied by."""
    return known.rstd if known.gamma is None or not axes else known.rstd * known.gamma


def _look(run: Pull, desk: Desk, known: Known, axes: tuple[int, ...]) -> Look:
    """The sums over a block, and the gradients of its parameters."""
    return (_look_at_runs if axes else _look_at_rows)(run, desk, known, axes)


def _look_at_runs(run: Pull, desk: Desk, known: Known, axes: tuple[int, ...]) -> Look:
    """Where the parameters stay the same along some axes, all that is asked for comes of three sums over these."""
    plan, xp, given = desk.plan, desk.plan.library.xp, run.call.spread is not None
    (dy, u), shapes = _entered(desk, known, axes), run.wanted.within(desk.block)
    if given and not any(shapes):
        return Look(dy, u, None, [None for _ in shapes])
    groups = plain_groups(plan, divisor=1.0)._replace(axes=axes, ones=run.ones, strewn=run.strewn)
    of_dy = groups.mean(xp, dy)
    of_product = of_dy if u is None else groups.mean_product(xp, dy, u, ops=desk.places.product)
    of_xhat = (of_product if known.left is None else of_product - known.left * of_dy) * known.rstd
    parameters = [
        None if shape is None else _summed(plan, each, shape)
        for each, shape in zip((of_xhat, of_dy), shapes, strict=False)
    ]
    if given:
        return Look(dy, u, None, parameters)
    of_square, gamma = _squares(plan, groups, dy), known.gamma
    sums = (of_dy, of_product, of_square)
    if gamma is not None:
        sums = (of_dy * gamma, of_product * gamma, of_square * (gamma * gamma))
    kept = tuple([1 if axis in plan.view.axes else n for axis, n in enumerate(dy.shape)])
    return Look(dy, u, Sums(*(_summed(plan, each, kept) for each in sums)), parameters)


def _look_at_rows(run: Pull, desk: Desk, known: Known, axes: tuple[int, ...]) -> Look:
    """Where gamma and beta vary along the rows, their gradients are sums across these."""
    plan, xp, (rstd, left, _, gamma) = desk.plan, desk.plan.library.xp, known
    (g, u), shapes = _entered(desk, known, axes), run.wanted.within(desk.block)
    groups = plain_groups(plan, divisor=1.0)._replace(ones=run.ones)
    of_g, of_square = groups.mean(xp, g), _squares(plan, groups, g)
    product = desk.places.product.multiply(desk.dy, u)
    of_product = groups.mean(xp, product) if gamma is None else kernels.along(xp, product, gamma, groups=groups)
    parameters: Parameters = []
    for i, shape in enumerate(shapes):
        if shape is None:
            parameters.append(None)
        elif i:
            parameters.append(kernels.across(xp, xp.ones_like(rstd), desk.dy))
        else:
            across = kernels.across(xp, rstd, product)
            parameters.append(across if left is None else across - kernels.across(xp, rstd * left, desk.dy))
    return Look(g, u, Sums(of_g, of_product, of_square), parameters)


def _squares(plan: Plan, groups: Groups, g: Array) -> Array:
    """The sum of squares of some of the values: it is no more than that of all."""
    axis, enough = groups.axes[-1], ENOUGH
    if groups.strewn:
        axis, enough = groups.axes[-2], -(-ENOUGH // g.shape[-1])
    n = g.shape[axis]
    few = g[(*(slice(None),) * axis, slice(0, min(n, max(enough, n // 8))), ...)]
    return groups.mean_product(plan.library.xp, few, few)


def _summed(plan: Plan, values: Array, shape: tuple[int, ...]) -> Array:
    """Values summed to a shape that broadcasts to theirs."""
    if shape == values.shape:
        return values
    axes = tuple([axis for axis, (n, whole) in enumerate(zip(shape, values.shape, strict=True)) if n < whole])
    return kernels.total(plan.library.xp, values, axes=axes, block=plan.library.plain_block)


def _settled(run: Pull, known: Known, sums: Sums) -> Combination | None:
    """What the sums of whole groups come to; None where that would not be as exact."""
    plan = run.call.plan
    of, fair = kernels.combination(
        plan.library.xp, sums, known.rstd, known.left, divisor=plan.groups.divisor, centred=plan.centred
    )
    return of if bool(plan.library.xp.all(fair)) else None
