"""Block by block: a large array in little memory, each block straight into its place in the result."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple

from anynorm import kernels
from anynorm.calls import Call
from anynorm.calls.blocks import Block, blocks, both, within
from anynorm.calls.call import Normalized
from anynorm.calls.conditions import exact_product, in_range, resolved, root, within_spread
from anynorm.calls.weights import weighed
from anynorm.executors.blocks.parts import (
    SHORT,
    T,
    Workspace,
    cut,
    groups_of,
    numbers,
    only,
    repeated,
    shared,
    single,
    stats_within,
    trailing,
    tree_reduce,
    weights_within,
)
from anynorm.executors.threads import share
from anynorm.kernels import NO_STATS, PURE, Array, Ops, Outputs, PartStats, Scale, Stats, Sums, merge_parts, weighting
from anynorm.kernels.weighting import WeightedSums


def forward(call: Call, *, keep: bool) -> Normalized:
    """Block by block, each into its place in the result."""
    call, plan, out = weighed(call), call.plan, call.out
    library = plan.library
    target, y = out, None
    if out is not None:
        call, y = _apart(call, out), plan.to_view(out)
    if y is None or (library.overlap(call.x, y) and not library.same_memory(call.x, y)):
        y = plan.library.empty(plan.view.shape, call.x, plan.result)
        target = plan.from_view(y)
    in_place = library.adds(call.x, plan.dtype) and library.adds(y, plan.dtype)
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


def _write(call: Call, y: Array | None, in_place: bool, keep: bool) -> Stats:
    """Write the result to y, where there is one; its statistics, if they are to be kept."""
    plan = call.plan
    axes = () if call.stats is not None else plan.view.axes
    stats = call.stats or NO_STATS
    if keep and call.stats is None:
        stats = Stats(*(plan.library.empty(plan.stats.shape, call.x, plan.dtype) for _ in Stats._fields))
    apart = bool(axes) and not _added(call)  # then squares take a place of their own
    short = plan.view.shape[-1] < SHORT  # and so do sums over the last axis alone
    arrays, made = 2 if apart or not in_place else 1, (apart or short) + (not in_place)
    if call.weights is not None:  # and x without padding, its products with the weights, and these
        arrays, made = 3, 5
    grid = blocks(plan.view.shape, axes, *numbers(plan, arrays, made=made))
    if len(grid.parts) > 1 and axes and in_place and call.weights is None:
        made += 1  # the statistics of a part of a group are found in a place of their own
        grid = blocks(plan.view.shape, axes, *numbers(plan, arrays, made=made))
    largest = math.prod([each.stop - each.start for each in both(grid.groups[0], grid.parts[0])])
    threads = shared(plan, made * largest)
    many = len(grid.groups) >= threads
    exact = False
    if call.stats is not None and call.gamma is not None:
        with plan.library.quiet():
            exact = exact_product(plan, root(plan, call.stats), plan.library.extent(call.gamma))
    run = _Run(call, y, in_place, exact, 1 if many else threads, Workspace(largest, call.x, plan.dtype))

    def work(block: Block) -> None:
        if call.stats is not None:
            own = stats_within(call.stats, block)
            run.each(lambda part: part.apply(own, root(plan, own), None), [block], writes=True)
            return
        for all_groups, some in zip(stats, run.groups([both(block, part) for part in grid.parts]), strict=True):
            if some is not None and all_groups is not None:
                all_groups[within(all_groups, block)] = some

    with plan.library.block_by_block():
        share(work, grid.groups, threads if many else 1, plan.library.block_by_block)
    return stats if plan.centred or call.stats is not None else Stats(None, None, stats.var)


def _added(call: Call) -> bool:
    """Whether squares take no place, as they are added as they are made."""
    return call.weights is None and trailing(call.plan) and call.plan.library.blas_sums


class _Run(NamedTuple):
    """A call that is run in blocks."""

    call: Call
    y: Array | None
    """In the view; None where the statistics are all that is asked for."""
    in_place: bool
    """Whether the result's own place may be worked in."""
    exact: bool
    """For `kernels.scaled`."""
    threads: int
    workspace: Workspace

    def groups(self, parts: list[Block], scale: Scale | None = None) -> Stats:
        """Normalize the groups that these parts hold together, times the unit of a scale; their statistics."""
        call, plan = self.call, self.call.plan
        xp = plan.library.xp
        if len(parts) == 1 and call.weights is None:
            with self.part(parts[0], writes=True) as part:
                d, stats = part.deviations(scale)
                done = scale is not None or in_range(plan, stats.var)
                if done:
                    part.finish(d, root(plan, stats, scale))
            stats = Stats(*single(plan, stats))
        else:
            stats = tree_reduce(
                lambda parts: merge_parts(xp, parts, plan.groups.divisor),
                lambda parts: self.each(lambda part: part.stats(scale), parts),
                parts,
            ).stats
            done = scale is not None or (in_range(plan, stats.var) and (call.weights is None or resolved(plan, stats)))
            if done and self.y is not None:
                rstd = root(plan, stats, scale)
                self.each(lambda part: part.apply(stats, rstd, scale), parts, writes=True)
        if done:
            return stats if scale is None else scale.undo_stats(stats)
        bottom, top = zip(*self.each(lambda part: part.extremes(), parts), strict=True)
        ends = reduce(xp.minimum, bottom), reduce(xp.maximum, top)
        if call.weights is not None:
            ends = weighting.found(xp, *ends, call.weights.sums[within(call.weights.sums, parts[0])] > 0)
        return self.groups(parts, kernels.scale_of(xp, *ends, eps=plan.eps, centred=plan.centred))

    def each(self, work: Callable[["_Part"], T], parts: list[Block], *, writes: bool = False) -> list[T]:
        """The results of `work` on each part, which it `writes`."""

        def of(block: Block) -> T:
            with self.part(block, writes=writes) as part:
                return work(part)

        return share(of, parts, self.threads, self.call.plan.library.block_by_block)

    @contextmanager
    def part(self, block: Block, *, writes: bool) -> Iterator["_Part"]:
        """A block of the call, whose result is written to its place; or for its statistics alone."""
        call, plan, library = self.call, self.call.plan, self.call.plan.library
        x, y = call.x[block], self.y[block] if self.y is not None and writes else None
        shape, in_place = tuple(x.shape), y is not None and self.in_place
        apart = call.stats is None and not (_added(call) or (writes and call.weights is not None))
        with self.workspace.take((not in_place) + apart, plan, shape) as places:
            squares = library.into(places.pop()) if apart else PURE
            place = y if in_place else places.pop()
            if not self.in_place:
                library.assign(place, x)
                x = place
            plain = groups_of(plan, shape, repeated=call.weights is None)
            groups: Sums | WeightedSums = plain
            if call.weights is not None and call.stats is None:
                if writes:
                    x = only(plan, x, call.weights.sums[within(call.weights.sums, block)] > 0)
                else:
                    weights = weights_within(plan, call.weights, block, shape)
                    groups = WeightedSums(plain.by(1.0), weights, squares)
            beside = (cut(call.gamma, block), cut(call.beta, block))
            yield _Part(call, groups, x, *beside, y, library.into(place), squares, self.exact)


class _Part(NamedTuple):
    """A block of a call, and where its result goes."""

    call: Call
    sums: Sums | WeightedSums
    x: Array
    """In the dtype of the computation; it is used up if it is a copy."""
    gamma: Array | None
    beta: Array | None
    y: Array | None
    ops: Ops
    squares: Ops
    exact: bool

    def stats(self, scale: Scale | None) -> PartStats:
        """The statistics of a part of some groups."""
        return PartStats(Stats(*single(self.call.plan, self.deviations(scale)[1])), self.sums.weight)

    def extremes(self) -> tuple[Array, Array]:
        """The smallest and the largest number of each group."""
        xp = self.call.plan.library.xp
        if isinstance(self.sums, WeightedSums):
            return weighting.extremes(xp, self.x, self.sums.weights, groups=self.sums.plain)
        return kernels.extremes(xp, self.x, groups=self.sums)

    def deviations(self, scale: Scale | None) -> tuple[Array, Stats]:
        """The array, times the unit of the scale, less its mean; and the statistics."""
        plan, constant = self.call.plan, None if scale is None else scale.constant
        how: dict[str, Any] = {"groups": self.sums, "centred": plan.centred, "ops": self.ops, "squares": self.squares}
        d, stats = kernels.deviations(plan.library.xp, self._scaled(scale), constant=constant, **how)
        if plan.centred and scale is None and not within_spread(plan, stats.mean_lo, stats.var):
            # some units of a large mean, beside a spread of one or less
            d, left = kernels.deviations(plan.library.xp, d, **how)
            stats = Stats(stats.mean, stats.mean_lo + left.mean, left.var)
        return d, stats

    def apply(self, stats: Stats, rstd: Array | None, scale: Scale | None) -> None:
        """Normalize by statistics that are known, or go back, and write the result."""
        plan, x = self.call.plan, self._scaled(scale)
        own = Stats(*(repeated(plan, each, x) for each in stats))
        if plan.inverse:
            rstd, gamma, beta = (repeated(plan, each, x) for each in (rstd, self.gamma, self.beta))
            self._put(kernels.denormalize(plan.library.xp, x, gamma, beta, own, rstd, ops=self.ops, exact=self.exact))
            return
        self.finish(kernels.subtract_mean(x, own, ops=self.ops), rstd)

    def finish(self, d: Array, rstd: Array | None) -> None:
        """Write d * rstd * gamma + beta."""
        plan, ops = self.call.plan, self.ops
        if self.y is None:
            return
        rstd, gamma, beta = (repeated(plan, each, d) for each in (rstd, self.gamma, self.beta))
        if gamma is not None and (self.call.stats is not None or plan.eps > 1):  # what lies between may be out of range
            places = Outputs(result=ops)
            d, gamma = kernels.scaled(plan.library.xp, d, gamma, rstd, places=places, exact=self.exact), None
        elif rstd is not None:
            d = ops.multiply(d, rstd)
        self._put(kernels.affine(d, gamma, beta, ops=ops))

    def _put(self, y: Array) -> None:
        """Write the result to its place, unless it is there."""
        if y is not self.y:
            self.call.plan.library.assign(self.y, y)

    def _scaled(self, scale: Scale | None) -> Array:
        if scale is None:  # padding that is no number shows in the statistics, which are then found in a scale
            return self.x
        x = only(self.call.plan, self.x, self.sums.each > 0) if isinstance(self.sums, WeightedSums) else self.x
        return self.ops.multiply(x, scale.unit)
