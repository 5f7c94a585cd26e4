"""Block by block: a large array in little memory, each block straight into its place in the result."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple

from anynorm import kernels
from anynorm.calls import Call
from anynorm.calls.blocks import Block, within
from anynorm.calls.call import Normalized
from anynorm.calls.conditions import exact_product, in_range, resolved, root, within_spread
from anynorm.calls.weights import weighed
from anynorm.executors.blocks.parts import T, Workspace, divide, part_weights, repeated, single, tree_reduce
from anynorm.executors.threads import share
from anynorm.kernels import NO_STATS, PURE, Array, Ops, Outputs, PartStats, Scale, Stats, Sums, merge_parts, weighting
from anynorm.kernels.weighting import WeightedSums

SHORT = 16
"""The sums of runs of fewer numbers are not small beside them."""


def forward(call: Call, *, keep: bool) -> Normalized:
    """Block by block, each into its place in the result."""
    call, plan, out = weighed(call), call.plan, call.out
    library, target, y = plan.library, out, None
    if out is not None:
        call, y = _apart(call, out), plan.to_view(out)
    if y is None or (library.overlap(call.x, y) and not library.same_memory(call.x, y)):
        y = library.empty(plan.view.shape, call.x, plan.result)
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
    plan, given, exact = call.plan, call.stats is not None, False
    axes, stats = () if given else plan.view.axes, call.stats or NO_STATS
    apart = bool(axes) and not plan.adds_products  # then squares take a place of their own
    short = plan.view.shape[-1] < SHORT  # and so do sums over the last axis alone
    arrays, made = 2 if apart or not in_place else 1, (apart or short) + (not in_place)
    if call.weights is not None:  # and x without padding, its products with the weights, and these
        arrays, made = 3, 5
    division = divide(plan, axes, arrays, made=made)
    if len(division.blocks[0]) > 1 and in_place and call.weights is None:
        # the statistics of a part of a group are found in a place of their own
        division = divide(plan, axes, arrays, made=made + 1)
    if given and call.gamma is not None:
        with plan.library.quiet():
            exact = exact_product(plan, root(plan, stats), plan.library.extent(call.gamma))
    if plan.interleaved:
        gamma, beta = repeated(plan, (call.gamma, call.beta), call.x)
        call = call._replace(gamma=gamma, beta=beta)
    run = _Run(call, y, in_place, exact, division.inner, Workspace(division.numbers, plan, call.x))
    if keep and not given:
        stats = Stats(*(plan.library.empty(plan.stats.shape, call.x, plan.dtype) for _ in Stats._fields))

    def work(parts: list[Block]) -> None:
        if given:
            run.each(lambda part: part.apply(part.call.stats or NO_STATS), parts, writes=True)
            return
        for all_groups, some in zip(stats, run.groups(parts), strict=True):
            if some is not None and all_groups is not None:
                all_groups[within(all_groups, parts[0])] = some

    with plan.library.block_by_block():
        share(work, division.blocks, division.outer, plan.library.block_by_block)
    return stats if plan.centred or given else Stats(None, None, stats.var)


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
                self.each(lambda part: part.apply(stats, scale), parts, writes=True)
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
        plan, library = self.call.plan, self.call.plan.library
        y = self.y[block] if self.y is not None and writes else None
        in_place = y is not None and self.in_place
        added = plan.adds_products if self.call.weights is None else writes  # by statistics nothing is added
        apart = self.call.stats is None and not added
        with self.workspace.part(self.call, block, (not in_place) + apart) as (call, groups, places):
            x = call.x
            squares = library.into(places.pop()) if apart else PURE
            place = y if in_place else places.pop()
            if not self.in_place:
                library.assign(place, x)
                x = place
            sums: Sums | WeightedSums = groups
            if call.weights is not None and call.stats is None:
                if writes:
                    x = _only(call, x, call.weights.sums > 0)
                else:
                    sums = WeightedSums(groups.by(1.0), part_weights(call, x.shape), squares)
            yield _Part(call._replace(x=x), sums, y, library.into(place), squares, self.exact)


class _Part(NamedTuple):
    """A block of a call, and where its result goes."""

    call: Call
    """Its x has the dtype of the computation, and is used up if it is a copy."""
    sums: Sums | WeightedSums
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
            return weighting.extremes(xp, self.call.x, self.sums.weights, groups=self.sums.plain)
        return kernels.extremes(xp, self.call.x, groups=self.sums)

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

    def apply(self, stats: Stats, scale: Scale | None = None) -> None:
        """Normalize by statistics that are known, or go back, and write the result."""
        call, plan, x = self.call, self.call.plan, self._scaled(scale)
        *own, rstd = repeated(plan, (*stats, root(plan, stats, scale)), x)
        if plan.inverse:
            how: dict[str, Any] = {"ops": self.ops, "exact": self.exact}
            self._put(kernels.denormalize(plan.library.xp, x, call.gamma, call.beta, Stats(*own), rstd, **how))
        else:
            self.finish(kernels.subtract_mean(x, Stats(*own), ops=self.ops), rstd)

    def finish(self, d: Array, rstd: Array | None) -> None:
        """Write d * rstd * gamma + beta."""
        call, plan, ops = self.call, self.call.plan, self.ops
        if self.y is None:
            return
        gamma, beta = call.gamma, call.beta
        if gamma is not None and (call.stats is not None or plan.eps > 1):  # what lies between may be out of range
            d, gamma = kernels.scaled(plan.library.xp, d, gamma, rstd, places=Outputs(ops), exact=self.exact), None
        elif rstd is not None:
            d = ops.multiply(d, rstd)
        self._put(kernels.affine(d, gamma, beta, ops=ops))

    def _put(self, y: Array) -> None:
        """Write the result to its place, unless it is there."""
        if y is not self.y:
            self.call.plan.library.assign(self.y, y)

    def _scaled(self, scale: Scale | None) -> Array:
        if scale is None:  # padding that is no number shows in the statistics, which are then found in a scale
            return self.call.x
        x, sums = self.call.x, self.sums
        return self.ops.multiply(
            _only(self.call, x, sums.each > 0) if isinstance(sums, WeightedSums) else x, scale.unit
        )


def _only(call: Call, x: Array, kept: Array) -> Array:
    """x, with 0 where it is not to be kept."""
    return call.plan.library.xp.where(kept, x, call.plan.library.zeros((1,) * x.ndim, x, call.plan.dtype))
