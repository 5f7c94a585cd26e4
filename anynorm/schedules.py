"""How a call is run: whole or in blocks; plainly where its numbers turn out ordinary, else proof to any size."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from anynorm import kernels
from anynorm.arrays import empty
from anynorm.blocks import Block, blocks, both, share, within
from anynorm.calls import Call, Plan
from anynorm.kernels import Arithmetic, Array, Groups, Scale, Spread, Standardized
from anynorm.settings import current

SMALL = 2**16
"""An array of fewer bytes is not worth the trouble of writing in place."""
SHARED = 2**22
"""So many bytes are worth a thread."""
PENDING = 32
"""So many parts of a group are pooled at a time."""


class Normalized(NamedTuple):
    """A call's result, as the caller's x was, and its statistics beside the view."""

    y: Array
    spread: Spread


def normalize(call: Call) -> Normalized:
    """The result of a call: in blocks where the array is large and may be written part by part, else whole."""
    plan, out = call.plan, call.out
    if in_blocks(plan, arrays(call)):
        return _in_blocks(call)
    with plan.library.quiet():
        standardized = standardize(call)
        y = affine(call, standardized)
    if out is not None:
        out[...] = y
    return Normalized(y if out is None else out, standardized.spread)


def survey(call: Call) -> Spread:
    """The statistics of a call alone."""
    if in_blocks(call.plan, arrays(call)):
        return _statistics(call)
    with call.plan.library.quiet():
        return standardize(call).spread


def in_blocks(plan: Plan, arrays: list[Array]) -> bool:
    """Whether what is computed of these arrays is large, and may be written part by part."""
    return plan.nbytes >= min(SMALL, current().block_bytes) and plan.library.plain(*arrays)


def standardize(call: Call) -> Standardized:
    """The kernel's result. An eager array is scaled only if it turns out that it must be; any other always is."""
    plan = call.plan
    library, xp = plan.library, plan.library.xp
    x = call.x if call.x.dtype == plan.dtype else xp.astype(call.x, plan.dtype)
    if call.spread is not None:
        return kernels.standardize_with(xp, x, call.spread, eps=plan.eps)
    vacant = not plan.nbytes > 0  # NaN is a size that Dask does not know: there it takes no minimum
    flat = 1.0 if plan.tiny else None
    if vacant or library.readable(x):
        plain = kernels.standardize(xp, x, groups=plan.groups, eps=plan.eps, centred=plan.centred, flat=flat)
        if vacant or ordinary(plan, plain.spread.var):
            return plain
    subnormal = None
    if plan.tiny and library.subnormal:
        subnormal = library.subnormal(x, plan.limits.step * plan.limits.further)
    return kernels.standardize_scaled(
        xp, x, groups=plan.groups, eps=plan.eps, centred=plan.centred, subnormal=subnormal
    )


def affine(call: Call, standardized: Standardized) -> Array:
    """The normalized array in the dtype and the shape of the caller's x."""
    return restore(call.plan, kernels.affine(standardized.xhat, call.gamma, call.beta), call.x.dtype)


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

    def enter(self, scale: Scale | None = None) -> Array:
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
        )

    def finish(self, d: Array, rstd: Array, rest: Array | None = None) -> None:
        """Write the result: the deviations, less a rest of their mean, times rstd; times gamma, plus beta."""
        if self.y is None:
            return
        xp, gamma, beta, ops = self.plan.library.xp, self.gamma, self.beta, self.ops
        if gamma is not None and self.plan.folds and sound(xp, rstd * gamma):
            rstd, gamma = rstd * gamma, None
        if rest is not None and gamma is None:
            beta = -(rest * rstd) if beta is None else beta - rest * rstd
        elif rest is not None:
            d = ops.subtract(d, rest)
        y = kernels.affine(ops.multiply(d, rstd), gamma, beta, ops=ops)
        if y is not self.y:
            self.y[...] = xp.astype(y, self.y.dtype, copy=False)


class _Run(NamedTuple):
    """A call that is run in blocks."""

    call: Call
    y: Array | None
    """In the view."""
    in_place: bool
    """Whether the result's own place may be worked in."""
    threads: int

    def part(self, block: Block) -> _Part:
        call, plan = self.call, self.call.plan
        x, y = call.x[block], None if self.y is None else self.y[block]
        if not self.in_place:
            x = plan.library.xp.astype(x, plan.dtype, copy=True)
        place = y if self.in_place else x
        number = math.prod([x.shape[axis] for axis in plan.view.axes])
        groups = plan.groups._replace(divisor=min(plan.groups.divisor, float(number)))
        return _Part(plan, groups, x, cut(call.gamma, block), cut(call.beta, block), y, plan.library.into(place))

    def each(self, work: Any, parts: list[Block]) -> list[Any]:
        """The results of `work` on each part."""

        def busy(block: Block) -> Any:
            with self.call.plan.library.busy():
                return work(self.part(block))

        return share(busy, parts, self.threads)


def _in_blocks(call: Call) -> Normalized:
    """Block by block, each into its place in the result."""
    plan, out = call.plan, call.out
    library = plan.library
    if out is not None:
        call = _apart(call, out)
    target = out
    if target is None or (library.overlap(call.x, target) and not library.same(call.x, target)):
        target = empty(plan.layout.shape, call.x, call.x.dtype)
    in_place = call.x.dtype == plan.dtype and (target is not out or not library.overlap(call.x, target))
    spread = _run(call, library.xp.reshape(target, plan.view.shape), in_place)
    if out is not None and target is not out:
        out[...] = target
    return Normalized(target if out is None else out, spread)


def _statistics(call: Call) -> Spread:
    return _run(call, None, False)


def _run(call: Call, y: Array | None, in_place: bool) -> Spread:
    """Write the result to y, where there is one; its statistics."""
    plan = call.plan
    axes = () if call.spread is not None else plan.view.axes
    spread = call.spread or Spread(*(empty(plan.spread.shape, call.x, plan.dtype) for _ in Spread._fields))
    leading = bool(axes) and axes[-1] < len(plan.view.shape) - 1  # squares take a place of their own
    grid = blocks(plan.view.shape, axes, numbers(plan, 2 if leading or not in_place else 1))
    threads = shared(plan)
    many = len(grid.groups) >= threads
    run = _Run(call, y, in_place, 1 if many else threads)

    def work(block: Block) -> None:
        parts = [both(block, part) for part in grid.parts]
        with plan.library.busy():
            if call.spread is not None:
                _apply(run, parts, spread_within(spread, block), None)
                return
            for whole, part in zip(spread, _groups(run, parts, None), strict=True):
                if part is not None:
                    whole[within(whole, block)] = part

    share(work, grid.groups, threads if many else 1)
    return spread if plan.centred or call.spread is not None else Spread(None, None, spread.var)


def numbers(plan: Plan, arrays: int) -> int:
    """How many numbers of a block there may be, where each block is so many arrays of its size."""
    bits: int = plan.library.xp.finfo(plan.dtype).bits
    return max(1, current().block_bytes * 8 // bits // arrays)


def shared(plan: Plan) -> int:
    """How many threads share a call."""
    return max(1, min(current().threads, int(plan.nbytes // SHARED))) if plan.library.products else 1


def _groups(run: _Run, parts: list[Block], scale: Scale | None) -> Spread:
    """Normalize the groups that these parts hold together; their statistics."""
    plan = run.call.plan
    if len(parts) == 1:
        part = run.part(parts[0])
        d, spread = part.deviations(scale)
    else:
        spread = _pooled(run, parts, scale)
    if scale is None and not ordinary(plan, spread.var):
        bounds = run.each(lambda part: kernels.extremes(plan.library.xp, part.enter(), groups=part.groups), parts)
        bottom, top = bounds[0]
        for low, high in bounds[1:]:
            bottom, top = plan.library.xp.minimum(bottom, low), plan.library.xp.maximum(top, high)
        return _groups(run, parts, kernels.scale_of(plan.library.xp, bottom, top, eps=plan.eps))
    if len(parts) == 1:
        part.finish(d, root(plan, spread, scale))
    elif run.y is not None:
        _apply(run, parts, spread, scale)
    return spread if scale is None else scale.restore(spread)


def _pooled(run: _Run, parts: list[Block], scale: Scale | None) -> Spread:
    """The statistics of groups that are spread over parts."""
    return pooled(
        run.call.plan,
        lambda some: run.each(lambda part: Portion(part.deviations(scale)[1], part.groups.divisor), some),
        parts,
    )


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
