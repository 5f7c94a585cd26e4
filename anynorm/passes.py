"""Block by block: how a large array is normalized in little memory, each block straight into its place in the result.

A block of whole groups is normalized while it is in the cache. Where a group is larger than a block, its parts are
surveyed, their statistics pooled, and then applied to each part.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

from anynorm import kernels
from anynorm.arrays import assign, empty
from anynorm.blocks import STRETCH, Block, blocks, both, share, within
from anynorm.calls import Call, Plan
from anynorm.kernels import PURE, Arithmetic, Array, Groups, Scale, Spread
from anynorm.settings import current, default_threads

T = TypeVar("T")
SHARED = 2**22
"""So many bytes are worth a thread."""
SHORT = 16
"""The sums of runs of fewer numbers are not small beside them."""
PENDING = 16
"""So many parts of a group are pooled at a time."""


class _Part(NamedTuple):
    """A block of a call, and where its result goes."""

    plan: Plan
    groups: Groups
    x: Array
    """In the dtype of the computation; it is used up if it is a copy."""
    gamma: Array | None
    beta: Array | None
    y: Array | None
    """None where the statistics are all that is asked for."""
    ops: Arithmetic
    squares: Arithmetic

    def enter(self, scale: Scale | None = None) -> Array:
        """x, times the unit of the scale."""
        return self.x if scale is None else self.ops.multiply(self.x, scale.unit)

    def deviations(self, scale: Scale | None) -> tuple[Array, Spread]:
        centred = self.plan.centred
        return kernels.deviations(
            self.plan.library.xp,
            self.enter(scale),
            groups=self.groups,
            centred=centred,
            alike=scale.alike if scale is not None and centred else None,
            ops=self.ops,
            squares=self.squares,
        )

    def finish(self, d: Array, rstd: Array, rest: Array | None = None) -> None:
        """Write the result: the deviations, less a rest of their mean, times rstd; times gamma, plus beta."""
        if self.y is None:
            return
        xp, gamma, beta, ops = self.plan.library.xp, self.gamma, self.beta, self.ops
        if rest is not None and not float(xp.max(xp.abs(rest * rstd))) <= 1:  # beta would be lost beside it
            d, rest = ops.subtract(d, rest), None
        if gamma is not None and self.plan.folds and sound(xp, rstd * gamma):
            rstd, gamma = rstd * gamma, None
        if rest is not None and gamma is None:
            beta = -(rest * rstd) if beta is None else beta - rest * rstd
        elif rest is not None:
            d = ops.subtract(d, rest)
        y = kernels.affine(ops.multiply(d, rstd), gamma, beta, ops=ops)
        if y is not self.y:
            assign(self.plan.library, self.y, y)


class _Run(NamedTuple):
    """A call that is run in blocks."""

    call: Call
    y: Array | None
    """In the view."""
    in_place: bool
    """Whether the result's own place may be worked in."""
    threads: int
    rooms: list[Array]
    """Places to work in that no part works in now."""
    largest: int
    """How many numbers a part has."""

    @contextmanager
    def part(self, block: Block, *, survey: bool = False) -> Iterator[_Part]:
        """A block of the call; only its statistics are asked for, if it is a survey."""
        call, plan = self.call, self.call.plan
        library = plan.library
        x, y = call.x[block], None if self.y is None else self.y[block]
        shape = tuple(x.shape)
        taken: list[Array] = []

        def room() -> Array:
            try:
                taken.append(self.rooms.pop())
            except IndexError:  # and no look beforehand: another thread may be faster
                taken.append(empty((self.largest,), x, plan.dtype))
            return library.xp.reshape(taken[-1][: math.prod(shape)], shape)

        place = room() if survey or y is None or not self.in_place else y
        if not self.in_place:
            assign(library, place, x)
            x = place
        number = math.prod([shape[axis] for axis in plan.view.axes])
        groups = plan.groups._replace(divisor=min(plan.groups.divisor, float(number)), block=library.plain_block)
        squares = PURE if groups.dots(x) else library.into(room())
        try:
            yield _Part(plan, groups, x, cut(call.gamma, block), cut(call.beta, block), y, library.into(place), squares)
        finally:
            self.rooms.extend(taken)

    def each(self, work: Callable[[_Part], T], parts: list[Block], *, survey: bool = False) -> list[T]:
        """The results of `work` on each part."""

        def busy(block: Block) -> T:
            with self.call.plan.library.busy(), self.part(block, survey=survey) as part:
                return work(part)

        return share(busy, parts, self.threads)


def run(call: Call, y: Array | None, in_place: bool, keep: bool) -> Spread:
    """Write the result to y, where there is one; its statistics, if they are to be kept."""
    plan = call.plan
    axes = () if call.spread is not None else plan.view.axes
    spread = call.spread or Spread(None, None, None)
    if keep and call.spread is None:
        spread = Spread(*(empty(plan.spread.shape, call.x, plan.dtype) for _ in Spread._fields))
    last = len(plan.view.shape) - 1
    split = bool(axes) and (axes[-1] < last or not plan.library.products)  # then squares take a place of their own
    narrow = y is not None and call.x.dtype != plan.dtype  # so does what goes to a result of another dtype
    short = plan.view.shape[-1] < SHORT  # and so do sums over the last axis alone
    arrays = 2 if split or not in_place else 1
    made = (split or narrow or short) + (not in_place)
    grid = blocks(plan.view.shape, axes, *numbers(plan, arrays, made=made))
    if len(grid.parts) > 1 and axes and in_place:  # a part of a group is surveyed in a place of its own
        grid = blocks(plan.view.shape, axes, *numbers(plan, arrays, made=made + 1))
    threads = shared(plan)
    many = len(grid.groups) >= threads
    largest = math.prod([each.stop - each.start for each in both(grid.groups[0], grid.parts[0])])
    these = _Run(call, y, in_place, 1 if many else threads, [], largest)

    def work(block: Block) -> None:
        parts = [both(block, part) for part in grid.parts]
        with plan.library.busy():
            if call.spread is not None:
                _apply(these, parts, spread_within(spread, block), None)
                return
            for every, part in zip(spread, _groups(these, parts, None), strict=True):
                if part is not None and every is not None:
                    every[within(every, block)] = part

    share(work, grid.groups, threads if many else 1)
    return spread if plan.centred or call.spread is not None else Spread(None, None, spread.var)


def numbers(plan: Plan, arrays: int, *, made: int = 0) -> tuple[int, int]:
    """How many numbers of a block there may be, and how many if they are whole groups.

    Each block is so many arrays of its size; those of them that are made for it take, in as many threads as there are
    by default, little more than `block_bytes`. Of the threads in force the blocks, and so the last
    bits of a result, know nothing.
    """
    bits: int = plan.library.xp.finfo(plan.dtype).bits
    room = current().block_bytes * 8 // bits
    most, largest = room // arrays, STRETCH * room // arrays
    if made:
        spare = room * 5 // 4 // (made * (default_threads() if plan.library.products else 1))
        most, largest = min(most, spare), min(largest, spare)
    return max(1, most), max(1, largest)


def shared(plan: Plan) -> int:
    """How many threads share a call."""
    return max(1, min(current().threads, int(plan.nbytes // SHARED))) if plan.library.products else 1


def _groups(run: _Run, parts: list[Block], scale: Scale | None) -> Spread:
    """Normalize the groups that these parts hold together; their statistics."""
    plan = run.call.plan
    xp = plan.library.xp
    if len(parts) == 1:
        with run.part(parts[0]) as part:
            d, spread = part.deviations(scale)
            done = scale is not None or ordinary(plan, spread.var)
            if done:
                part.finish(d, root(plan, spread, scale))
    else:
        spread = pooled(plan, partial(run.each, partial(_portion, scale), survey=True), parts)
        done = scale is not None or ordinary(plan, spread.var)
        if done and run.y is not None:
            _apply(run, parts, spread, scale)
    if done:
        return spread if scale is None else scale.restore(spread)
    bounds = run.each(lambda part: kernels.extremes(xp, part.enter(), groups=part.groups), parts, survey=True)
    bottom, top = bounds[0]
    for low, high in bounds[1:]:
        bottom, top = xp.minimum(bottom, low), xp.maximum(top, high)
    return _groups(run, parts, kernels.scale_of(xp, bottom, top, eps=plan.eps))


def _portion(scale: Scale | None, part: _Part) -> "Portion":
    return Portion(part.deviations(scale)[1], part.groups.divisor)


class Portion(NamedTuple):
    """The statistics of a part of some groups."""

    spread: Spread
    number: float
    """The number of values behind them."""
    level: Array | None = None
    """For `kernels.pool`."""


def pooled(plan: Plan, each: Callable[[list[Block]], list[Portion]], parts: list[Block]) -> Spread:
    """The statistics of all parts together, of which only some are pending at a time."""
    found: list[Portion] = []
    for i in range(0, len(parts), PENDING):
        found += each(parts[i : i + PENDING])
        found = [pool(plan.library.xp, found, plan.groups.divisor)]
    return found[0].spread


def pool(xp: Any, found: list[Portion], divisor: float) -> Portion:
    """The statistics of portions together; a divisor of 1 says that they are sums."""
    number = divisor if divisor == 1 else sum(portion.number for portion in found)
    like = found[0].spread.var
    share = xp.stack([xp.ones_like(like) * (portion.number / number) for portion in found], axis=0)

    def stack(parts: Iterable[Array | None]) -> Array | None:
        some = [part for part in parts if part is not None]
        return xp.stack(some, axis=0) if some else None

    stacked = Spread(*map(stack, zip(*(portion.spread for portion in found), strict=True)))
    level = stack([portion.level for portion in found])
    spread = Spread(
        *(None if each is None else each[0, ...] for each in kernels.pool(xp, stacked, share, axis=0, level=level))
    )
    return Portion(spread, number, None if level is None else xp.sum(level * share, axis=0))


def _apply(run: _Run, parts: list[Block], spread: Spread, scale: Scale | None) -> None:
    """Normalize parts by statistics that are known."""
    rstd = root(run.call.plan, spread, scale)
    bare = spread._replace(rest=None)

    def apply(part: _Part) -> None:
        part.finish(kernels.less(part.enter(scale), bare, ops=part.ops), rstd, spread.rest)

    run.each(apply, parts)


def root(plan: Plan, spread: Spread, scale: Scale | None = None) -> Array:
    """1 / sqrt(var + eps)."""
    xp = plan.library.xp
    if scale is not None:
        return kernels.inverse_root(xp, spread.var + scale.eps, flat=scale.flat)
    return kernels.inverse_root(xp, spread.var + plan.eps, flat=1.0 if plan.tiny else None)


def trimmed(plan: Plan, spread: Spread) -> Spread:
    """Without the rest of the mean where it is an eighth of a unit in the last place of the spread, or less."""
    if spread.rest is None:
        return spread
    slight = (float(plan.library.xp.finfo(plan.dtype).eps) / 8) ** 2
    excess = plan.library.most(spread.rest * spread.rest - slight * spread.var)
    return spread._replace(rest=None) if excess <= 0 else spread  # a NaN keeps it


def cut(array: Array | None, block: Block) -> Array | None:
    """The part of an array that broadcasts to the whole which goes with a block."""
    return None if array is None else array[within(array, block)]


def spread_within(spread: Spread, block: Block) -> Spread:
    """The statistics that go with a block."""
    return Spread(*(cut(each, block) for each in spread))


def ordinary(plan: Plan, var: Array) -> bool:
    """Whether no square overflowed, and none that matters underflowed."""
    var = plan.library.constant(var)
    try:
        return plan.library.most(var) < math.inf and (not plan.tiny or plan.library.least(var) >= plan.limits.eps)
    except RuntimeError:  # torch.func.vmap and fake tensors: a number that cannot be read
        return False


def sound(xp: Any, scale: Array) -> bool:
    """Whether rstd * gamma has lost nothing: there is no overflow, no subnormal number."""
    size = xp.abs(scale)
    return float(xp.max(size)) < math.inf and float(xp.min(size)) >= float(xp.finfo(scale.dtype).smallest_normal)
