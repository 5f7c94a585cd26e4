"""The gradients of a call: whole, in arithmetic that may be recorded; or block by block, in little memory."""

import math
from collections.abc import Sequence

from anynorm import combinations, compilers, kernels, weights
from anynorm.arrays import assign, empty, zeros
from anynorm.blocks import Block, blocks, both, share, within
from anynorm.calls import Call, Plan
from anynorm.combinations import ROOMS, Desk, Parameters, Pull, Wanted
from anynorm.kernels import Array, Groups, Places, Spread, Standardized
from anynorm.passes import Portion, cut, minor, numbers, ordinary, pooled, root, seen, shared, spread_within
from anynorm.schedules import in_blocks, part_of, standardize, weighted_blocks

Gradients = tuple[Array | None, ...]
"""With respect to x, gamma and beta, beside the view; None where it is not wanted."""


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
            compiled = compilers.gradients(call, dy, wanted.dtype, wanted.parameters, of, compiler)
            if compiled is not None:
                return compiled
        if call.weights is not None:
            if call.x is not None and in_blocks(call, arrays):
                return _weighted(call, dy, wanted)
        elif in_blocks(call, arrays) and ordinary(plan, of.var):
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


def _in_blocks(call: Call, dy: Array, wanted: Wanted, spread: Spread) -> Gradients:
    plan = call.plan
    library = plan.library
    with library.quiet():
        rstd = root(plan, spread)
        mean, rest = spread.mean, seen(plan, spread.rest, spread.var)
        axes = combinations.runs(call, wanted, rstd)
        pivot, left = (None, mean) if mean is not None and minor(plan, mean, spread.var) else (mean, rest)
    dx = None if wanted.dtype is None else empty(plan.view.shape, dy, wanted.dtype)
    totals = [None if shape is None else zeros(shape, dy, plan.dtype) for shape in wanted.parameters]
    averaged = () if call.spread is not None else plan.view.axes
    grid = blocks(plan.view.shape, averaged, *numbers(plan, ROOMS))
    largest = max(math.prod([each.stop - each.start for each in both(grid.groups[0], grid.parts[0])]), 1)
    run = Pull(call, dy, wanted, spread._replace(rest=rest), rstd, pivot, left, _ones(plan, dy), axes, dx, [], largest)
    threads = shared(plan)
    many = len(grid.groups) >= threads

    def work(group: Block) -> list[tuple[Block, Parameters]]:
        parts = [both(group, part) for part in grid.parts]
        with library.busy():
            found = combinations.pull(run, parts, 1 if many else threads)
            if found is None:
                found = _groups(run, parts, 1 if many else threads)
        return list(zip(parts, found, strict=True))

    for results in share(work, grid.groups, threads if many else 1):
        for block, parameters in results:
            for total, each in zip(totals, parameters, strict=True):
                if total is not None:
                    total[within(total, block)] += each
    return dx, *totals


def _weighted(call: Call, dy: Array, wanted: Wanted) -> Gradients:
    """The gradients of a call with weights, block by block."""
    plan = call.plan
    dx = None if wanted.dtype is None else empty(plan.view.shape, dy, wanted.dtype)
    totals = [None if shape is None else zeros(shape, dy, plan.dtype) for shape in wanted.parameters]

    def work(block: Block) -> tuple[Block, list[Array | None]]:
        shapes = tuple(wanted.within(block))
        with plan.library.busy():
            d, *parameters = _pull(part_of(call, block), dy[block], Wanted(wanted.dtype, shapes), None)
            if dx is not None:
                assign(plan.library, dx[block], d)
        return block, parameters

    for block, parameters in share(work, weighted_blocks(plan), shared(plan)):
        for total, each in zip(totals, parameters, strict=True):
            if total is not None:
                total[within(total, block)] += each
    return dx, *totals


def _groups(run: Pull, parts: list[Block], threads: int) -> list[Parameters]:
    """The gradient of x in the groups that these parts hold together; those of the parameters, of each part."""
    call, plan = run.call, run.call.plan
    xp, centred = plan.library.xp, plan.centred

    def entered(desk: Desk) -> tuple[Standardized, Groups]:
        """What x was standardized to, and the groups of this part."""
        rstd, places = cut(run.rstd, desk.block), desk.places
        xhat = desk.x
        if xhat is not None:
            xhat = places.xhat.multiply(
                kernels.less(xhat, spread_within(run.spread, desk.block), ops=places.xhat), rstd
            )
        number = math.prod([desk.dy.shape[axis] for axis in plan.view.axes])
        groups = plan.groups._replace(divisor=min(plan.groups.divisor, float(number)), block=plan.library.plain_block)
        return Standardized(xhat, rstd, run.spread), groups

    def parameters_of(desk: Desk, of: Standardized) -> Parameters:
        shapes = run.wanted.within(desk.block)
        return _parameter_gradients(plan, desk.dy, of.xhat, shapes, block=plan.library.plain_block, places=desk.places)

    if len(parts) == 1 or run.dx is None or call.spread is not None:

        def whole(block: Block) -> Parameters:
            with run.desk(block) as desk:
                of, groups = entered(desk)
                parameters = parameters_of(desk, of)
                if run.dx is not None:
                    desk.finish(
                        kernels.input_gradient(
                            *(xp, desk.dy, cut(call.gamma, block), of),
                            groups=None if call.spread is not None else groups,
                            centred=centred,
                            places=desk.places,
                        )
                    )
                return parameters

        return share(whole, parts, threads)

    parameters: list[Parameters] = []

    def survey(block: Block) -> tuple[Portion, Parameters]:
        with run.desk(block) as desk:
            of, groups = entered(desk)
            found = parameters_of(desk, of)
            g = kernels.affine(desk.dy, cut(call.gamma, block), None, ops=desk.places.result)
            level = groups.mean(xp, of.xhat) if centred else None
            _, leaning = kernels.lean(xp, g, of.xhat, groups=groups, centred=centred, places=desk.places)
            return Portion(leaning, groups.divisor, level), found

    def surveys(some: list[Block]) -> list[Portion]:
        portions, found = zip(*share(survey, some, threads), strict=True)
        parameters.extend(found)
        return list(portions)

    leaning = pooled(plan, surveys, parts)

    def apply(block: Block) -> None:
        with run.desk(block) as desk:
            of, _ = entered(desk)
            g = kernels.affine(desk.dy, cut(call.gamma, block), None, ops=desk.places.result)
            g = kernels.less(g, leaning, ops=desk.places.result)
            desk.finish(kernels.upright(g, leaning, of, places=desk.places))

    share(apply, parts, threads)
    return parameters


def _parameter_gradients(
    plan: Plan,
    dy: Array,
    xhat: Array,
    shapes: Sequence[tuple[int, ...] | None],
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
