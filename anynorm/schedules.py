"""How a call is run: whole or in blocks; plainly where its numbers turn out ordinary, else proof to any size."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

from anynorm import compilers, kernels, replicas, weights
from anynorm.arrays import assign, empty
from anynorm.blocks import STRETCH, Block, blocks, both, share, whole, within
from anynorm.calls import Call, Plan
from anynorm.kernels import PURE, Arithmetic, Array, Groups, Scale, Spread, Standardized
from anynorm.settings import current, default_threads
from anynorm.weights import Weights

T = TypeVar("T")
SMALL = 2**16
"""An array of fewer bytes is not worth the trouble of writing in place."""
SHARED = 2**22
"""So many bytes are worth a thread."""
WEIGHTED = 8
"""So many arrays of a block's size are made of a block where there are weights."""
SHORT = 16
"""The sums of runs of fewer numbers are not small beside them."""
PENDING = 16
"""So many parts of a group are pooled at a time."""


class Normalized(NamedTuple):
    """A call's result, as the caller's x was, and its statistics beside the view."""

    y: Array
    spread: Spread
    """Empty where they are not to be kept: of short groups they are nearly as large as the array."""


def normalize(call: Call, *, keep: bool = True) -> Normalized:
    """The result of a call: compiled if it is to be; in blocks if it is large and may be written so; else whole."""
    plan, out, given = call.plan, call.out, arrays(call)
    compiler = compilers.chosen(call, given)
    if compiler != "none":
        with plan.library.quiet():
            compiled = Normalized(*compilers.normalize(call, compiler))
            if compilers.safe(call, compiler, call.x) or ordinary(plan, compiled.spread.var):
                return compiled
    if in_blocks(call, given):
        return _in_blocks(call, keep)
    with plan.library.quiet():
        standardized = standardize(call)
        y = affine(call, standardized)
    if out is not None:
        out[...] = y
    return Normalized(y if out is None else out, standardized.spread)


def survey(call: Call) -> Spread:
    """The statistics of a call alone."""
    if in_blocks(call, arrays(call)):
        return _statistics(call)
    with call.plan.library.quiet():
        return standardize(call).spread


def in_blocks(call: Call, arrays: list[Array]) -> bool:
    """Whether what is computed of these arrays is large, and may be written part by part."""
    plan = call.plan
    if call.all_reduce is not None:  # replicas wait for each other
        return False
    if plan.library.traced():  # by a compiler that cannot follow into the settings
        return False
    return plan.nbytes >= min(SMALL, current().block_bytes) and plan.library.plain(*arrays)


def standardize(call: Call) -> Standardized:
    """The kernel's result. An eager array is scaled only if it turns out that it must be; any other always is."""
    plan = call.plan
    library, xp = plan.library, plan.library.xp
    x = call.x if call.x.dtype == plan.dtype else xp.astype(call.x, plan.dtype)
    if call.spread is not None:
        return kernels.standardize_with(xp, x, call.spread, eps=plan.eps)
    subnormal = None
    if plan.tiny and library.subnormal:
        subnormal = library.subnormal(x, plan.limits.step * plan.limits.further)
    weighted = call.weighted
    if weighted is not None and weighted.join is not None:
        return replicas.standardize(xp, x, groups=weighted, constant=library.constant, subnormal=subnormal)
    room: Any = kernels if weighted is None else weights
    groups = weighted or plan.groups
    vacant = not plan.nbytes > 0  # NaN is a size that Dask does not know: there it takes no minimum
    flat = 1.0 if plan.tiny else None
    done: Standardized
    if vacant or library.readable(x):
        done = room.standardize(xp, x, groups=groups, eps=plan.eps, centred=plan.centred, flat=flat)
        if vacant or ordinary(plan, done.spread.var):
            return done
    done = room.standardize_scaled(xp, x, groups=groups, eps=plan.eps, centred=plan.centred, subnormal=subnormal)
    return done


def affine(call: Call, standardized: Standardized) -> Array:
    """The normalized array in the dtype and the shape of the caller's x."""
    return restore(call.plan, _affine(call, standardized), call.x.dtype)


def _affine(call: Call, standardized: Standardized) -> Array:
    y = compilers.affine(call, standardized.xhat)
    if standardized.stray is None:
        return y
    constant = call.plan.library.constant
    stray, *parameters = (
        None if each is None else constant(each) for each in (standardized.stray, call.gamma, call.beta)
    )
    return call.plan.library.xp.where(stray != 0, kernels.affine(stray, *parameters), y)


def length(call: Call) -> Array:
    """The norm of each group of `calls.direction`, beside the view: v along its own direction."""
    with call.plan.library.quiet():
        return call.plan.groups.mean(call.plan.library.xp, standardize(call).xhat * call.x)


def enter(plan: Plan, value: Array, *, dtype: Any) -> Array:
    """An array of the caller's shape in the view and this dtype."""
    xp = plan.library.xp
    value = xp.astype(value, dtype, copy=False)
    return xp.reshape(value, plan.view.shape) if plan.view.shape != plan.layout.shape else value


def restore(plan: Plan, value: Array, dtype: Any) -> Array:
    """An array of the view in the caller's shape and this dtype."""
    xp = plan.library.xp
    if plan.view.shape != plan.layout.shape:
        value = xp.reshape(value, plan.layout.shape)
    return value if value.dtype == dtype else xp.astype(value, dtype)


def statistic(call: Call, value: Any) -> Array:
    """A mean, a variance or a norm, of the shape that the caller sees, as a constant."""
    plan = call.plan
    xp = plan.library.xp
    value = plan.library.constant(xp.squeeze(value, axis=plan.view.axes))
    return xp.reshape(value, plan.layout.kept_shape) if plan.view.joined else value


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
            taken.append(self.rooms.pop() if self.rooms else empty((self.largest,), x, plan.dtype))
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


def _in_blocks(call: Call, keep: bool) -> Normalized:
    """Block by block, each into its place in the result."""
    plan, out = call.plan, call.out
    library, xp = plan.library, plan.library.xp
    target, y = out, None
    if out is not None:
        call, y = _apart(call, out), xp.reshape(out, plan.view.shape)
    if y is None or (library.overlap(call.x, y) and not library.same(call.x, y)):
        target = empty(plan.layout.shape, call.x, call.x.dtype)
        y = xp.reshape(target, plan.view.shape)
    in_place = call.x.dtype == plan.dtype and (target is not out or not library.overlap(call.x, y))
    spread = _run(call, y, in_place, keep)
    if out is not None and target is not out:
        out[...] = target
    return Normalized(target if out is None else out, spread)


def _statistics(call: Call) -> Spread:
    return _run(call, None, False, True)


def _run(call: Call, y: Array | None, in_place: bool, keep: bool) -> Spread:
    """Write the result to y, where there is one; its statistics, if they are to be kept."""
    plan = call.plan
    if call.weights is not None:
        return _run_weighted(call, y, keep)
    axes = () if call.spread is not None else plan.view.axes
    spread = call.spread or Spread(None, None, None)
    if keep and call.spread is None:
        spread = Spread(*(empty(plan.spread.shape, call.x, plan.dtype) for _ in Spread._fields))
    last = len(plan.view.shape) - 1
    split = bool(axes) and axes[-1] < last  # then squares take a place of their own
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
    run = _Run(call, y, in_place, 1 if many else threads, [], largest)

    def work(block: Block) -> None:
        parts = [both(block, part) for part in grid.parts]
        with plan.library.busy():
            if call.spread is not None:
                _apply(run, parts, spread_within(spread, block), None)
                return
            for every, part in zip(spread, _groups(run, parts, None), strict=True):
                if part is not None and every is not None:
                    every[within(every, block)] = part

    share(work, grid.groups, threads if many else 1)
    return spread if plan.centred or call.spread is not None else Spread(None, None, spread.var)


def _run_weighted(call: Call, y: Array | None, keep: bool) -> Spread:
    """`_run` with weights: each block whole, as if it were all."""
    plan = call.plan
    spread = Spread(None, None, None)
    if keep:
        spread = Spread(*(empty(plan.spread.shape, call.x, plan.dtype) for _ in Spread._fields))

    def work(block: Block) -> None:
        part = part_of(call, block)
        with plan.library.busy():
            done = standardize(part)
            for every, each in zip(spread, done.spread, strict=True):
                if each is not None and every is not None:
                    every[within(every, block)] = each
            if y is not None:
                assign(plan.library, y[block], _affine(part, done))

    share(work, weighted_blocks(plan), shared(plan))
    return spread if plan.centred else Spread(None, None, spread.var)


def weighted_blocks(plan: Plan) -> list[Block]:
    """Blocks of an array with weights."""
    most, _ = numbers(plan, 1, made=WEIGHTED)
    return whole(plan.view.shape, plan.view.axes, most)


def part_of(call: Call, block: Block) -> Call:
    """The call of some of the groups."""
    given = None if call.weights is None else Weights(*(cut(each, block) for each in call.weights))
    return call._replace(
        x=call.x[block], gamma=cut(call.gamma, block), beta=cut(call.beta, block), out=None, weights=given
    )


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


def _apart(call: Call, out: Array) -> Call:
    """The call with copies of what `out` shares memory with, but for x."""

    def copied(array: Array | None) -> Array | None:
        return array * 1.0 if array is not None and call.plan.library.overlap(array, out) else array

    spread = None if call.spread is None else Spread(*map(copied, call.spread))
    return call._replace(gamma=copied(call.gamma), beta=copied(call.beta), spread=spread)


def arrays(call: Call) -> list[Array]:
    """All arrays of a call."""
    arrays = (call.x, call.gamma, call.beta, call.out, *(call.spread or ()))
    return [array for array in arrays if array is not None]


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
