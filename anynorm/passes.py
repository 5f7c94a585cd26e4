"""Block by block: how a large array is normalized in little memory, each block straight into its place in the result.

A block of whole groups is normalized while it is in the cache. Where a group is larger than a block, its parts are
surveyed, their statistics pooled, and then applied to each part; and so are all groups with weights, as a number that
weighs nothing is normalized all the same.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

from anynorm import kernels, weights
from anynorm.arrays import assign, empty, extent, zeros
from anynorm.blocks import STRETCH, Block, blocks, both, share, within
from anynorm.calls import Call, Plan, ready
from anynorm.kernels import PURE, Arithmetic, Array, Groups, Scale, Spread
from anynorm.library import WRITTEN_OUT
from anynorm.settings import current, default_threads
from anynorm.weights import Weighted, Weights

T = TypeVar("T")
SHARED = 2**22
"""So many bytes are worth a thread."""
RUN = 32
"""Shorter runs are strewn."""
ROWS = 16
"""Beside so many rows, what there is for each group is small."""
SHORT = 16
"""The sums of runs of fewer numbers are not small beside them."""
FEW = 2**16
"""So many numbers take no room to speak of."""
NEAR = 16
"""The square of how many standard deviations a mean may be away from 0 and yet be taken from beta, not from x."""
EVEN = 4
"""Threads share so many blocks evenly, if they are no more."""
PENDING = 16
"""So many parts of a group are pooled at a time, and then so many of these: few roundings follow each other."""


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
    weighted: Weighted | None = None
    """The groups of a survey, where there are weights."""
    kept: Array | None = None
    """Where x is taken for what it is, and not for 0; None for everywhere."""

    def enter(self, scale: Scale | None = None) -> Array:
        """x, times the unit of the scale."""
        x = self.x if scale is None else self.ops.multiply(self.x, scale.unit)
        return only(self.plan, x, self.kept)

    def extremes(self) -> tuple[Array, Array]:
        if self.weighted is None:
            return kernels.extremes(self.plan.library.xp, self.x, groups=self.groups)
        return weights.extremes(self.plan.library.xp, self.x, self.weighted.weights, groups=self.groups)

    def portion(self, scale: Scale | None) -> "Portion":
        number = self.groups.divisor if self.weighted is None else self.weighted.weights.sums
        return Portion(self.measure(scale)[1], number)

    def measure(self, scale: Scale | None) -> tuple[Array, Spread, Array | None]:
        """The array less a pivot; the statistics; and what else of the mean is to be taken from that array."""
        plan, xp = self.plan, self.plan.library.xp
        centred, groups, ops, squares = plan.centred, self.groups, self.ops, self.squares
        if scale is not None or self.weighted is not None:
            d, spread = kernels.deviations(
                xp,
                self.enter(scale),
                groups=self.weighted or groups,
                centred=centred,
                alike=None if scale is None else scale.alike,
                ops=ops,
                squares=squares,
            )
            return d, spread, None
        d, mean, var = kernels.shifted(xp, self.x, None, groups=groups, centred=centred, squares=squares)
        if mean is None:
            return d, Spread(None, None, var), None
        left, rest = mean, xp.zeros_like(mean)
        if not minor(plan, mean, var / 2):  # for a condition of 3 / 2: not all sums are as exact as BLAS's
            d, rest, var = kernels.shifted(xp, self.x, mean, groups=groups, ops=ops, squares=squares)
            left = rest
            if not minor(plan, rest, var):  # some units of a large mean, beside a spread of one or less
                d, left, var = kernels.shifted(xp, d, rest, groups=groups, ops=ops, squares=squares)
            left = seen(plan, left, var)
        return d, Spread(mean, rest, var), left

    def finish(self, x: Array, tail: "_Tail") -> None:
        """Write the result."""
        if self.y is None:
            return
        tail = tail.spelt(self.plan, x)
        for mean in tail.means:
            x = self.ops.subtract(x, mean)
        *factors, last = tail.factors
        for factor in factors:
            x = self.ops.multiply(x, factor)
        y = kernels.affine(x, last, tail.beta, ops=self.ops)
        if y is not self.y:
            assign(self.plan.library, self.y, y)


class _Tail(NamedTuple):
    """What makes the result of x, once the statistics are known: less means, times rstd and gamma, plus beta."""

    means: list[Array]
    factors: list[Array]
    beta: Array | None

    @property
    def one_pass(self) -> bool:
        """Whether it takes no more, where a library multiplies and adds in one."""
        return not self.means and len(self.factors) == 1

    def spelt(self, plan: Plan, x: Array) -> "_Tail":
        """With its values `spelt` beside x."""
        means, factors = ([spelt(plan, each, x) for each in some] for some in (self.means, self.factors))
        return _Tail(means, factors, spelt(plan, self.beta, x))

    def within(self, block: Block) -> "_Tail":
        """That of a block."""
        means, factors = ([each[within(each, block)] for each in some] for some in (self.means, self.factors))
        return _Tail(means, factors, cut(self.beta, block))


def _tail(
    run: "_Run",
    means: list[Array],
    rstd: Array,
    slight: list[Array],
    gamma: Array | None,
    beta: Array | None,
    *,
    folds: bool,
) -> _Tail:
    """Of these means, and of slight ones: beside the spread they are so small that beta loses nothing by them."""
    plan = run.call.plan
    if not folds and gamma is not None and (run.call.spread is not None or plan.eps > 1):
        # what lies between may be out of range
        return _Tail(means + slight, [*kernels.factors(plan.library.xp, gamma, rstd)], beta)
    if not folds:
        return _Tail(means + slight, [rstd] if gamma is None else [rstd, gamma], beta)
    scale = rstd if gamma is None else rstd * gamma
    for mean in slight:
        beta = -(mean * scale) if beta is None else beta - mean * scale
    return _Tail(means, [scale], beta)


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
    extent: tuple[float, float] | None
    """Of gamma."""

    @contextmanager
    def part(self, block: Block, *, survey: bool = False, shield: bool = False) -> Iterator[_Part]:
        """A block of the call; only its statistics are asked for, if it is a survey.

        A `shield` keeps from these what weighs nothing, which no arithmetic does where it is not finite.
        """
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
        groups = plain_groups(plan, divisor=min(plan.groups.divisor, float(number)))._replace(strewn=strewn(plan))
        dots = added(plan) and (call.weights is None or not survey)
        squares = PURE if dots or call.spread is not None else library.into(room())
        weighted = kept = None
        if call.weights is not None and survey:
            found = weights_within(plan, call.weights, block, shape)
            weighted = Weighted(groups.by(1.0), found, product=squares)
            kept = weighted.weights.each > 0 if shield else None
        elif call.weights is not None:
            kept = present(plan, call.weights, block)
        parameters = cut(call.gamma, block), cut(call.beta, block)
        try:
            yield _Part(plan, groups, x, *parameters, y, library.into(place), squares, weighted, kept)
        finally:
            self.rooms.extend(taken)

    def each(
        self, work: Callable[[_Part], T], parts: list[Block], *, survey: bool = False, shield: bool = False
    ) -> list[T]:
        """The results of `work` on each part."""

        def of(block: Block) -> T:
            with self.part(block, survey=survey, shield=shield) as part:
                return work(part)

        return share(of, parts, self.threads, self.call.plan.library.busy)


def run(call: Call, y: Array | None, in_place: bool, keep: bool) -> Spread:
    """Write the result to y, where there is one; its statistics, if they are to be kept."""
    plan = call.plan
    axes = () if call.spread is not None else plan.view.axes
    spread = call.spread or Spread(None, None, None)
    if keep and call.spread is None:
        spread = Spread(*(empty(plan.spread.shape, call.x, plan.dtype) for _ in Spread._fields))
    split = bool(axes) and not added(plan)  # then squares take a place of their own
    narrow = y is not None and call.x.dtype != plan.dtype  # so does what goes to a result of another dtype
    short = plan.view.shape[-1] < SHORT  # and so do sums over the last axis alone
    arrays = 2 if split or not in_place else 1
    made = (split or narrow or short) + (not in_place)
    if call.weights is not None:  # and what is surveyed, its products with the weights, and these
        arrays, made = 3, 4
    grid = blocks(plan.view.shape, axes, *numbers(plan, arrays, made=made))
    if len(grid.parts) > 1 and axes and in_place and call.weights is None:
        # a part of a group is surveyed in a place of its own
        made += 1
        grid = blocks(plan.view.shape, axes, *numbers(plan, arrays, made=made))
    largest = math.prod([each.stop - each.start for each in both(grid.groups[0], grid.parts[0])])
    threads = shared(plan, made * largest)
    many = len(grid.groups) >= threads
    reach = None if y is None else extent_of(plan, call.gamma)
    these = _Run(call, y, in_place, 1 if many else threads, [], largest, reach)
    groups, ready = grid.groups, None

    def work(block: Block) -> None:
        if call.spread is not None:
            with these.part(block) as part:
                own = ready and ready.within(block)
                part.finish(part.x, own or _tail_of(these, spread_within(spread, block), part.gamma, part.beta))
            return
        for every, found in zip(spread, _groups(these, [both(block, part) for part in grid.parts], None), strict=True):
            if found is not None and every is not None:
                every[within(every, block)] = found

    with plan.library.busy():
        if call.spread is not None and plan.affine <= FEW:
            ready = _tail_of(these, spread, call.gamma, call.beta)
            small = math.prod(plan.view.shape[1:]) <= WRITTEN_OUT
            if ready.one_pass and small and in_place and plan.library.threaded:
                # no second pass is to find it in the cache
                groups = [tuple(slice(0, n) for n in plan.view.shape)]
        share(work, groups, threads if many else 1, plan.library.busy)
    return spread if plan.centred or call.spread is not None else Spread(None, None, spread.var)


def numbers(plan: Plan, arrays: int, *, made: int = 0, beside: int = 0) -> tuple[int, int, int]:
    """How many numbers of a block there may be; how many if they are whole groups; what their number is a multiple of.

    Each block is so many arrays of its size, and a library that has threads of its own shares one among them; those of
    these arrays that are made for it take, in as many threads as there are by default, little more than `block_bytes`,
    with the numbers that each thread makes `beside` them.
    Of the threads in force the blocks, and so the last bits of a result, know nothing.
    """
    room = plan.room
    together = min(default_threads(), STRETCH) if plan.library.threaded else 1
    most, largest = together * room // arrays, STRETCH * room // arrays
    if made:
        spare = room * 5 // 4 // (default_threads() if plan.library.products else 1)
        spare = max(spare - beside, spare // 2) // made
        most, largest = min(most, spare), min(largest, spare)
    return max(1, most), max(1, largest), EVEN if plan.library.products else 1


def plain_groups(plan: Plan, *, divisor: float) -> Groups:
    """Those of a plan, for arrays that are worked on in blocks."""
    return plan.groups.by(divisor)._replace(block=plan.library.plain_block, norm=plan.library.norm)


def added(plan: Plan) -> bool:
    """Whether squares take no place, as they are added as they are made."""
    trailing = plan.view.axes[-1:] == (len(plan.view.shape) - 1,) and not strewn(plan)
    return trailing and (plan.library.products or plan.library.norm is not None)


def strewn(plan: Plan) -> bool:
    """Whether groups lie in memory in short runs among those of others.

    So they do in group norm with channels last, and in batch norm of few places.
    """
    axes, shape = plan.view.axes, plan.view.shape
    last = len(shape) - 1
    if len(axes) < 2 or axes[-1] != last or axes[-2] == last - 1 or shape[last] >= RUN:
        return False
    return math.prod([shape[axis] for axis in axes[:-1]]) >= ROWS


def spelt(plan: Plan, value: Array | None, x: Array) -> Array | None:
    """A value for each group, as long as a run of x where these are strewn: it goes with many of them at once."""
    if value is None or value.shape[-1] != 1 or not strewn(plan):
        return value
    return value * plan.library.xp.ones(x.shape[-1], dtype=plan.dtype, device=plan.library.device(x))


def shared(plan: Plan, made: int) -> int:
    """How many threads share a call; each makes so many numbers, all together less than twice `block_bytes`."""
    if not plan.library.products:
        return 1
    return max(1, min(current().threads, int(plan.nbytes // SHARED), plan.room * 7 // 4 // max(made, 1)))


def _groups(run: _Run, parts: list[Block], scale: Scale | None, *, shield: bool = False) -> Spread:
    """Normalize the groups that these parts hold together; their statistics."""
    plan, given = run.call.plan, run.call.weights
    xp = plan.library.xp
    if len(parts) == 1 and given is None:
        with run.part(parts[0]) as part:
            d, spread, left = part.measure(scale)
            done = scale is not None or ordinary(plan, spread.var)
            if done:
                rstd, slight = root(plan, spread, scale), [] if left is None else [left]
                part.finish(d, _tail(run, [], rstd, slight, part.gamma, part.beta, folds=folds(plan, rstd, run.extent)))
    else:
        survey = partial(run.each, lambda part: part.portion(scale), survey=True, shield=shield)
        spread = pooled(plan, survey, parts)
        done = scale is not None or (ordinary(plan, spread.var) and (given is None or told(plan, spread)))
        if done and run.y is not None:
            _apply(run, parts, spread, scale)
    if done:
        return spread if scale is None else scale.restore(spread)
    if given is not None and not shield:
        return _groups(run, parts, None, shield=True)
    bounds = run.each(lambda part: part.extremes(), parts, survey=True)
    bottom, top = bounds[0]
    for low, high in bounds[1:]:
        bottom, top = xp.minimum(bottom, low), xp.maximum(top, high)
    if given is not None:
        bottom, top = weights.found(xp, bottom, top, given.sums[within(given.sums, parts[0])] > 0)
    return _groups(run, parts, kernels.scale_of(xp, bottom, top, eps=plan.eps, centred=plan.centred), shield=shield)


class Portion(NamedTuple):
    """The statistics of a part of some groups."""

    spread: Spread
    number: Any
    """The number of values behind them, or in each group the sum of their weights."""
    level: Array | None = None
    """For `kernels.pool`."""


def folded(join: Callable[[list[T]], T], each: Callable[[list[Block]], list[T]], parts: list[Block]) -> T:
    """What is found of all parts, joined; only some of it is pending at a time."""
    if len(parts) <= PENDING:
        found = each(parts)
    else:
        step = PENDING
        while step * PENDING < len(parts):
            step *= PENDING
        found = [folded(join, each, parts[i : i + step]) for i in range(0, len(parts), step)]
    return found[0] if len(found) == 1 else join(found)


def pooled(plan: Plan, each: Callable[[list[Block]], list[Portion]], parts: list[Block]) -> Spread:
    """The statistics of all parts together."""
    return folded(lambda found: pool(plan.library.xp, found, plan.groups.divisor), each, parts).spread


def pool(xp: Any, found: list[Portion], divisor: float) -> Portion:
    """The statistics of portions together; a divisor of 1 says that they are sums."""
    number = whole = divisor if divisor == 1 else sum(portion.number for portion in found)
    if not isinstance(number, (int, float)):
        whole = weights.positive(xp, number)
    like = found[0].spread.var
    share = xp.stack([xp.ones_like(like) * (portion.number / whole) for portion in found], axis=0)

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
    plan = run.call.plan
    rstd, (means, slight) = root(plan, spread, scale), _means(plan, spread, scale)
    fold = folds(plan, rstd, run.extent)

    def apply(part: _Part) -> None:
        part.finish(part.enter(scale), _tail(run, means, rstd, slight, part.gamma, part.beta, folds=fold))

    run.each(apply, parts)


def _tail_of(run: _Run, spread: Spread, gamma: Array | None, beta: Array | None) -> _Tail:
    """The tail of statistics that were given."""
    plan = run.call.plan
    rstd, (means, slight) = root(plan, spread), _means(plan, spread)
    return _tail(run, means, rstd, slight, gamma, beta, folds=folds(plan, rstd, run.extent))


def _means(plan: Plan, spread: Spread, scale: Scale | None = None) -> tuple[list[Array], list[Array]]:
    """The means that are to be taken from x, and those that are slight beside its spread."""
    mean, rest = spread.mean, seen(plan, spread.rest, spread.var)
    if mean is None:
        return [], []
    if rest is not None and not minor(plan, rest, spread.var):
        return [mean, rest], []
    slight = [] if rest is None else [rest]
    # x itself is rounded to the units of its mean: two bits more than those of its spread are lost at most
    if scale is None and minor(plan, mean, spread.var * NEAR):
        return [], [mean, *slight]
    return [mean], slight


def root(plan: Plan, spread: Spread, scale: Scale | None = None) -> Array:
    """1 / sqrt(var + eps)."""
    xp = plan.library.xp
    if scale is not None:
        return kernels.inverse_root(xp, spread.var + scale.eps, flat=scale.flat)
    return kernels.inverse_root(xp, spread.var + plan.addend, flat=1.0 if plan.tiny else None)


def seen(plan: Plan, mean: Array | None, var: Array) -> Array | None:
    """A mean that is to be taken away; None where it is half a unit in the last place of the spread, or less."""
    if mean is None:
        return None
    units = mean * (2 / float(plan.library.xp.finfo(plan.dtype).eps))
    return None if minor(plan, units, var) else mean


def minor(plan: Plan, mean: Array, var: Array) -> bool:
    """Whether a mean is nowhere larger than the spread; one whose square may underflow is taken for none."""
    library, least = plan.library, plan.limits.eps
    if not library.most(mean * mean - var) <= 0:  # a NaN is not minor
        return False
    return library.least(var) >= least or bool(library.xp.all((mean == 0) | (var >= least)))


def cut(array: Array | None, block: Block) -> Array | None:
    """The part of an array that broadcasts to the whole which goes with a block."""
    return None if array is None else array[within(array, block)]


def weights_within(plan: Plan, given: Weights, block: Block, shape: tuple[int, ...]) -> Weights:
    """The weights that go with a block of this shape, ready, and their own sums."""
    xp, groups = plan.library.xp, plan.groups
    found = ready(plan.library, Weights(*(cut(each, block) for each in given[:3])), plan.dtype)
    if math.prod([shape[axis] for axis in groups.axes]) == groups.divisor:
        return found
    return found._replace(sums=weights.summed(xp, found.each, shape, groups=groups))


def only(plan: Plan, x: Array, kept: Array | None) -> Array:
    """x, with 0 where it is not to be kept."""
    return x if kept is None else plan.library.xp.where(kept, x, zeros((1,) * x.ndim, x, plan.dtype))


def present(plan: Plan, given: Weights, block: Block) -> Array | None:
    """Which groups of a block have a weight; None for all."""
    some = given.sums[within(given.sums, block)] > 0
    return None if bool(plan.library.xp.all(some)) else some


def spread_within(spread: Spread, block: Block) -> Spread:
    """The statistics that go with a block."""
    return Spread(*(cut(each, block) for each in spread))


def ordinary(plan: Plan, var: Array) -> bool:
    """Whether no square overflowed, and none that matters underflowed."""
    try:
        return plan.library.most(var) < math.inf and (not plan.tiny or plan.library.least(var) >= plan.limits.eps)
    except RuntimeError:  # torch.func.vmap and fake tensors: a number that cannot be read
        return False


def told(plan: Plan, spread: Spread) -> bool:
    """Whether no spread may be rounding of the mean alone, which shares leave that do not quite add up to 1."""
    if spread.mean is None:
        return True
    xp = plan.library.xp
    slight = spread.mean * (2 * float(xp.finfo(plan.dtype).eps))
    return not bool(xp.any((spread.var > 0) & (spread.var < slight * slight)))


def extent_of(plan: Plan, gamma: Array | None) -> tuple[float, float] | None:
    """The magnitudes, but for 0, that a gamma lies between, where that matters to `folds`."""
    if gamma is None or not plan.folds:
        return None
    return extent(plan.library, gamma)


def folds(plan: Plan, rstd: Array, extent: tuple[float, float] | None) -> bool:
    """Whether rstd * gamma is small, and loses nothing: there is no overflow, no subnormal number."""
    return plan.folds if extent is None else plan.folds and exact_product(plan, rstd, extent)


def exact_product(plan: Plan, rstd: Array, extent: tuple[float, float]) -> bool:
    """Whether numbers of this extent, times rstd, have all their digits; and 0 is 0."""
    library, xp, (low, high) = plan.library, plan.library.xp, extent
    if high == 0:
        return True
    most, least = float(library.most(rstd)) * high, float(library.least(rstd)) * low
    return most <= float(xp.finfo(plan.dtype).max) and least >= kernels.smallest_normal(xp, plan.dtype)
