"""Block by block: a large array in little memory, each block straight into its place in the result."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

from anynorm import kernels
from anynorm.arrays import assign, empty
from anynorm.arrays.blocks import Block, blocks, both, within
from anynorm.arrays.library import WRITTEN_OUT
from anynorm.arrays.memory import adds
from anynorm.calls import Call, Plan
from anynorm.calls.conditions import extent_of, folds, in_range, resolved, root, significant, within_spread
from anynorm.calls.results import Normalized
from anynorm.calls.weights import weighed
from anynorm.executors.blocks.parts import (
    SHORT,
    T,
    added,
    merged,
    numbers,
    only,
    plain_groups,
    present,
    shared,
    stats_within,
    weights_within,
)
from anynorm.executors.blocks.tail import Tail, cut, interleaved, make_tail
from anynorm.executors.threads import share
from anynorm.kernels import NO_STATS, PURE, Array, Ops, Scale, Stats, Sums, weighting
from anynorm.kernels.merging import PartStats
from anynorm.kernels.weighting import WeightedSums

FEW = 2**16
"""So many numbers take no memory to speak of."""
NEAR = 16
"""The square of how many standard deviations a mean may be away from 0 and yet be taken from beta, not from x."""


def forward(call: Call, *, keep: bool) -> Normalized:
    """Block by block, each into its place in the result."""
    call, plan, out = weighed(call), call.plan, call.out
    library = plan.library
    target, y = out, None
    if out is not None:
        call, y = _apart(call, out), plan.to_view(out)
    if y is None or (library.overlap(call.x, y) and not library.same(call.x, y)):
        y = empty(plan.view.shape, call.x, call.x.dtype)
        target = plan.from_view(y)
    in_place = adds(library, call.x, plan.dtype) and adds(library, y, plan.dtype)
    in_place = in_place and (target is not out or not library.overlap(call.x, y))
    stats = _write(call, y, in_place, keep)
    if out is not None and target is not out:
        out[...] = target
    return Normalized(target if out is None else out, stats)


def _apart(call: Call, out: Array) -> Call:
    """The call with copies of what `out` shares memory with, but for x."""

    def copied(array: Array | None) -> Array | None:
        return array * 1.0 if array is not None and call.plan.library.overlap(array, out) else array

    stats = None if call.stats is None else Stats(*map(copied, call.stats))
    given = call.weights
    if given is not None and call.plan.library.overlap(given.each, out):
        given = given._replace(each=call.plan.library.xp.asarray(given.each, copy=True))
    return call._replace(gamma=copied(call.gamma), beta=copied(call.beta), stats=stats, weights=given)


def statistics(call: Call) -> Stats:
    """The statistics of a call."""
    return _write(weighed(call), None, False, True)


class _Part(NamedTuple):
    """A block of a call, and where its result goes."""

    plan: Plan
    groups: Sums
    x: Array
    """In the dtype of the computation; it is used up if it is a copy."""
    gamma: Array | None
    beta: Array | None
    y: Array | None
    """None where the statistics are all that is asked for."""
    ops: Ops
    squares: Ops
    weighted: WeightedSums | None = None
    """The groups of a statistics_only, where there are weights."""
    kept: Array | None = None
    """Where x is taken for what it is, and not for 0; None for everywhere."""

    def scaled(self, scale: Scale | None = None) -> Array:
        """x, times the unit of the scale."""
        x = self.x if scale is None else self.ops.multiply(self.x, scale.unit)
        return only(self.plan, x, self.kept)

    def extremes(self) -> tuple[Array, Array]:
        if self.weighted is None:
            return kernels.extremes(self.plan.library.xp, self.x, groups=self.groups)
        return weighting.extremes(self.plan.library.xp, self.x, self.weighted.weights, groups=self.groups)

    def part_stats(self, scale: Scale | None) -> "PartStats":
        number = self.groups.divisor if self.weighted is None else self.weighted.weights.sums
        return PartStats(self.measure(scale)[1], number)

    def measure(self, scale: Scale | None) -> tuple[Array, Stats, Array | None]:
        """The array less a pivot; the statistics; and what else of the mean is to be taken from that array."""
        plan, xp = self.plan, self.plan.library.xp
        centred, groups, ops, squares = plan.centred, self.groups, self.ops, self.squares
        if scale is not None or self.weighted is not None:
            d, stats = kernels.deviations(
                xp,
                self.scaled(scale),
                groups=self.weighted or groups,
                centred=centred,
                constant=None if scale is None else scale.constant,
                ops=ops,
                squares=squares,
            )
            return d, stats, None
        d, mean, var = kernels.shifted(xp, self.x, None, groups=groups, centred=centred, squares=squares)
        if mean is None:
            return d, Stats(None, None, var), None
        left, rest = mean, xp.zeros_like(mean)
        if not within_spread(plan, mean, var / 2):  # for a condition of 3 / 2: not all sums are as exact as BLAS's
            d, rest, var = kernels.shifted(xp, self.x, mean, groups=groups, ops=ops, squares=squares)
            left = rest
            if not within_spread(plan, rest, var):  # some units of a large mean, beside a spread of one or less
                d, left, var = kernels.shifted(xp, d, rest, groups=groups, ops=ops, squares=squares)
            left = significant(plan, left, var)
        return d, Stats(mean, rest, var), left

    def finish(self, x: Array, tail: "Tail") -> None:
        """Write the result."""
        if self.y is None:
            return
        tail = tail.repeated(self.plan, x)
        for mean in tail.means:
            x = self.ops.subtract(x, mean)
        *factors, last = tail.factors
        for factor in factors:
            x = self.ops.multiply(x, factor)
        y = kernels.affine(x, last, tail.beta, ops=self.ops)
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
    buffers: list[Array]
    """Places to work in that no part works in now."""
    largest: int
    """How many numbers a part has."""
    extent: tuple[float, float] | None
    """Of gamma."""

    @contextmanager
    def part(self, block: Block, *, statistics_only: bool = False, keep_out_padding: bool = False) -> Iterator[_Part]:
        """A block of the call; only its statistics are asked for, if they are all that is wanted.

        A `keep_out_padding` keeps from these what weighs nothing, which no arithmetic does where it is not finite.
        """
        call, plan = self.call, self.call.plan
        library = plan.library
        x, y = call.x[block], None if self.y is None else self.y[block]
        shape = tuple(x.shape)
        taken: list[Array] = []

        def buffer() -> Array:
            try:
                taken.append(self.buffers.pop())
            except IndexError:  # and no look beforehand: another thread may be faster
                taken.append(empty((self.largest,), x, plan.dtype))
            return library.xp.reshape(taken[-1][: math.prod(shape)], shape)

        place = buffer() if statistics_only or y is None or not self.in_place else y
        if not self.in_place:
            assign(library, place, x)
            x = place
        number = math.prod([shape[axis] for axis in plan.view.axes])
        groups = plain_groups(plan, divisor=min(plan.groups.divisor, float(number)))._replace(
            interleaved=interleaved(plan)
        )
        dots = added(plan) and (call.weights is None or not statistics_only)
        squares = PURE if dots or call.stats is not None else library.into(buffer())
        weighted = kept = None
        if call.weights is not None and statistics_only:
            found = weights_within(plan, call.weights, block, shape)
            weighted = WeightedSums(groups.by(1.0), found, product=squares)
            kept = weighted.weights.each > 0 if keep_out_padding else None
        elif call.weights is not None:
            kept = present(plan, call.weights, block)
        parameters = cut(call.gamma, block), cut(call.beta, block)
        try:
            yield _Part(plan, groups, x, *parameters, y, library.into(place), squares, weighted, kept)
        finally:
            self.buffers.extend(taken)

    def each(
        self,
        work: Callable[[_Part], T],
        parts: list[Block],
        *,
        statistics_only: bool = False,
        keep_out_padding: bool = False,
    ) -> list[T]:
        """The results of `work` on each part."""

        def of(block: Block) -> T:
            with self.part(block, statistics_only=statistics_only, keep_out_padding=keep_out_padding) as part:
                return work(part)

        return share(of, parts, self.threads, self.call.plan.library.busy)


def _write(call: Call, y: Array | None, in_place: bool, keep: bool) -> Stats:
    """Write the result to y, where there is one; its statistics, if they are to be kept."""
    plan = call.plan
    axes = () if call.stats is not None else plan.view.axes
    stats = call.stats or NO_STATS
    if keep and call.stats is None:
        stats = Stats(*(empty(plan.stats.shape, call.x, plan.dtype) for _ in Stats._fields))
    split = bool(axes) and not added(plan)  # then squares take a place of their own
    standardizer = y is not None and call.x.dtype != plan.dtype  # so does what goes to a result of another dtype
    short = plan.view.shape[-1] < SHORT  # and so do sums over the last axis alone
    arrays = 2 if split or not in_place else 1
    made = (split or standardizer or short) + (not in_place)
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
        if call.stats is not None:
            with these.part(block) as part:
                own = ready and ready.within(block)
                part.finish(part.x, own or _tail_of(these, stats_within(stats, block), part.gamma, part.beta))
            return
        for every, found in zip(stats, _groups(these, [both(block, part) for part in grid.parts], None), strict=True):
            if found is not None and every is not None:
                every[within(every, block)] = found

    with plan.library.busy():
        if call.stats is not None and plan.affine <= FEW:
            ready = _tail_of(these, stats, call.gamma, call.beta)
            small = math.prod(plan.view.shape[1:]) <= WRITTEN_OUT
            if ready.one_pass and small and in_place and plan.library.threaded:
                # no second pass is to find it in the cache
                groups = [tuple(slice(0, n) for n in plan.view.shape)]
        share(work, groups, threads if many else 1, plan.library.busy)
    return stats if plan.centred or call.stats is not None else Stats(None, None, stats.var)


def _groups(run: _Run, parts: list[Block], scale: Scale | None, *, keep_out_padding: bool = False) -> Stats:
    """Normalize the groups that these parts hold together; their statistics."""
    plan, given = run.call.plan, run.call.weights
    xp = plan.library.xp
    if len(parts) == 1 and given is None:
        with run.part(parts[0]) as part:
            d, stats, left = part.measure(scale)
            done = scale is not None or in_range(plan, stats.var)
            if done:
                rstd, slight = root(plan, stats, scale), [] if left is None else [left]
                part.finish(
                    d, make_tail(run.call, [], rstd, slight, part.gamma, part.beta, folds=folds(plan, rstd, run.extent))
                )
    else:
        statistics_only = partial(
            run.each, lambda part: part.part_stats(scale), statistics_only=True, keep_out_padding=keep_out_padding
        )
        stats = merged(plan, statistics_only, parts)
        done = scale is not None or (in_range(plan, stats.var) and (given is None or resolved(plan, stats)))
        if done and run.y is not None:
            _apply(run, parts, stats, scale)
    if done:
        return stats if scale is None else scale.undo_stats(stats)
    if given is not None and not keep_out_padding:
        return _groups(run, parts, None, keep_out_padding=True)
    bounds = run.each(lambda part: part.extremes(), parts, statistics_only=True)
    bottom, top = bounds[0]
    for low, high in bounds[1:]:
        bottom, top = xp.minimum(bottom, low), xp.maximum(top, high)
    if given is not None:
        bottom, top = weighting.found(xp, bottom, top, given.sums[within(given.sums, parts[0])] > 0)
    return _groups(
        run,
        parts,
        kernels.scale_of(xp, bottom, top, eps=plan.eps, centred=plan.centred),
        keep_out_padding=keep_out_padding,
    )


def _apply(run: _Run, parts: list[Block], stats: Stats, scale: Scale | None) -> None:
    """Normalize parts by statistics that are known."""
    plan = run.call.plan
    rstd, (means, slight) = root(plan, stats, scale), _means(plan, stats, scale)
    fold = folds(plan, rstd, run.extent)

    def apply(part: _Part) -> None:
        part.finish(part.scaled(scale), make_tail(run.call, means, rstd, slight, part.gamma, part.beta, folds=fold))

    run.each(apply, parts)


def _tail_of(run: _Run, stats: Stats, gamma: Array | None, beta: Array | None) -> Tail:
    """The tail of statistics that were given."""
    plan = run.call.plan
    rstd, (means, slight) = root(plan, stats), _means(plan, stats)
    return make_tail(run.call, means, rstd, slight, gamma, beta, folds=folds(plan, rstd, run.extent))


def _means(plan: Plan, stats: Stats, scale: Scale | None = None) -> tuple[list[Array], list[Array]]:
    """The means that are to be taken from x, and those that are slight beside its spread."""
    mean, rest = stats.mean, significant(plan, stats.rest, stats.var)
    if mean is None:
        return [], []
    if rest is not None and not within_spread(plan, rest, stats.var):
        return [mean, rest], []
    slight = [] if rest is None else [rest]
    # x itself is rounded to the units of its mean: two bits more than those of its spread are lost at most
    if scale is None and within_spread(plan, mean, stats.var * NEAR):
        return [], [mean, *slight]
    return [mean], slight
