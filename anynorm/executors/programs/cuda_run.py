"""The kernels as programs of a GPU, where the library runs the text of one: as few passes as there are.

Numbers of up to four bytes are added up in float64, in which each has a square; those of eight are scaled first.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from anynorm import kernels
from anynorm.arrays.checks import name_of
from anynorm.calls import Call, Normalized, Plan, Wanted
from anynorm.executors.programs import cuda
from anynorm.executors.programs.trace import Operand, TracedNamespace, TracedScalar, TracedSums, Tracer, Written
from anynorm.kernels import NO_STATS, Array, Standardized, Stats

Body = Callable[[Any, list[Any], TracedSums], Written]


def supports(call: Call, arrays: list[Array]) -> bool:
    """Whether what is computed of these arrays is a program."""
    plan = call.plan
    return (
        plan.library.programs == "cuda"
        and call.weights is None
        and call.all_reduce is None
        and plan.nbytes > 0
        and all(name_of(each.dtype) in cuda.STORED for each in arrays)
        and (call.x is None or _as_wide(name_of(call.x.dtype), name_of(plan.dtype)))
        and all(step % each.itemsize == 0 for each in arrays for step in each.strides)
    )


def _as_wide(dtype: str, computed: str) -> bool:
    """Whether numbers of a dtype are computed in their own, or float32 for 2-byte floats, and no wider one."""
    return (dtype == "float64") == (computed == "float64")


def forward(call: Call, *, keep: bool) -> Normalized:
    """The result of a call, in `out` where there is one; and its statistics, if they are to be kept."""
    plan, out = call.plan, call.out
    direct = out is not None and apart(call, out) and _alone(call, out)
    place = plan.to_view(out) if direct else plan.library.empty(plan.view.shape, call.x, plan.result)
    inputs = [call.x, call.gamma, call.beta, *(call.stats or ())]

    def body(xp: Any, numbers: list[Any], sums: TracedSums) -> Written:
        x, gamma, beta, *given = numbers
        if plan.inverse:
            rstd = kernels.inverse_root(xp, given[-1] + plan.eps, rstd_at_zero=1.0)
            return Written([kernels.denormalize(xp, x, gamma, beta, Stats(*given), rstd)])
        if given:
            of = kernels.standardize_with(xp, x, Stats(*given), eps=plan.eps, divides=plan.divides)
        else:
            of = _standardized(plan, xp, x, sums)
        kept = [] if given or not keep else [each for each in of.stats if each is not None]
        return Written([kernels.affine(of.xhat, gamma, beta)], kept)

    axes = plan.view.axes if call.stats is None else _rows(plan)
    found = _run(plan, ("normalize", keep), axes, inputs, [place], body, apart=not direct)
    stats = call.stats or _stats(plan, found)
    if out is None:
        return Normalized(plan.from_view(place), stats)
    if not direct:
        out[...] = plan.from_view(place)
    return Normalized(out, stats)


def statistics(call: Call) -> Stats:
    """The statistics of a call."""

    def body(xp: Any, numbers: list[Any], sums: TracedSums) -> Written:
        of = _standardized(call.plan, xp, numbers[0], sums)
        return Written(of_groups=[each for each in of.stats if each is not None])

    return _stats(call.plan, _run(call.plan, "statistics", call.plan.view.axes, [call.x], [], body))


def backward(call: Call, dy: Array, wanted: Wanted, stats: Stats) -> tuple[Array | None, ...] | None:
    """`eager.backward` by statistics in float64, or such as were given; None where numbers must be scaled."""
    plan, given, xp = call.plan, call.stats is not None, call.plan.library.xp
    if not given and name_of(plan.dtype) != "float32":
        return None
    parts = [stats.mean, stats.mean_lo, _root(plan, stats)] if plan.divides else [None] * 3

    def standardized(xp: Any, x: TracedScalar | None, parts: list[Any]) -> Standardized:
        mean, rest, rstd = parts
        own, xhat = Stats(mean, rest, None), None
        if x is not None:
            xhat = (
                kernels.subtract_mean(x, own) * rstd
                if given
                else kernels.by(xp, x, kernels.standardizer(xp, own, rstd, x.dtype))
            )
        return Standardized(xhat, rstd, own)

    def of_x(xp: Any, numbers: list[Any], sums: TracedSums) -> Written:
        dy, x, gamma, *parts = numbers
        if not plan.divides:
            dx = kernels.input_gradient(
                xp, xp.astype(dy, xp.float64), None, Standardized(None, None, NO_STATS),
                groups=None if given else sums, centred=True, last=False,
            )  # fmt: skip
            return Written([xp.astype(dx, name_of(plan.dtype))])
        dy = xp.astype(dy, name_of(plan.dtype))
        if plan.inverse:
            return Written([kernels.unscaled(xp, dy, gamma, parts[-1])])
        of, centred = standardized(xp, x, parts), plan.centred
        if given:
            return Written([kernels.affine(dy, gamma, None) * of.rstd])
        own = kernels.standardizer(xp, of.stats, of.rstd, x.dtype)
        return Written([kernels.input_gradient_wide(xp, dy, x, gamma, of, own, groups=sums, centred=centred)])

    dx = None
    if wanted.dtype is not None or plan.inverse:
        dx = plan.library.empty(plan.view.shape, dy, plan.dtype if plan.inverse else wanted.dtype)
        axes, x = _rows(plan) if given else plan.view.axes, call.x if call.reads_x else None
        _run(plan, ("of x", given), axes, [dy, x, call.gamma, *parts], [dx], of_x)
    if plan.inverse:  # what is added up is the gradient itself, and its products with y less beta
        dy, parts = dx, [call.beta, None, None]
    found: list[Array | None] = [None for _ in wanted.parameters]
    for shape in dict.fromkeys(wanted.parameters):
        if shape is None:
            continue
        these = [i for i, each in enumerate(wanted.parameters) if each == shape]
        axes = tuple(axis for axis, n in enumerate(shape) if n == 1 < plan.view.shape[axis])

        def of_parameters(
            xp: Any, numbers: list[Any], _: TracedSums, these: list[int] = these, axes: tuple[int, ...] = axes
        ) -> Written:
            dy, x, *parts = numbers
            dy = xp.astype(dy, name_of(plan.dtype))
            if plan.inverse:
                xhat = x if parts[0] is None else x - parts[0]
            else:
                xhat = None if x is None else standardized(xp, x, parts).xhat
            products = [kernels.affine(dy, None if i else xhat, None) for i in these]
            if not axes:
                return Written(products)
            wide = [xp.astype(each, xp.float64) for each in products]
            totals = [xp.sum(each, axis=axes, keepdims=True) for each in wide]
            return Written(of_groups=[xp.astype(each, dy.dtype) for each in totals])

        inputs = [dy, *([call.x, *parts] if 0 in these else [None] * 4)]
        each = [] if axes else [plan.library.empty(plan.view.shape, dy, plan.dtype) for _ in these]
        totals = _run(plan, ("of parameters", given, *these), axes or _rows(plan), inputs, each, of_parameters)
        for i, total in zip(these, totals or each, strict=True):
            found[i] = xp.reshape(total, shape)
    return None if wanted.dtype is None else xp.astype(dx, wanted.dtype, copy=False), *found


def _root(plan: Plan, stats: Stats) -> Array:
    """1 / sqrt(var + eps): a root for each group, and not for each number."""

    def body(xp: Any, numbers: list[Any], sums: TracedSums) -> Written:  # noqa: ARG001
        return Written([kernels.inverse_root(xp, numbers[0] + plan.eps, rstd_at_zero=1.0)])

    rstd = plan.library.empty(tuple(stats.var.shape), stats.var, stats.var.dtype)
    _run(plan, "root", _rows(plan), [stats.var], [rstd], body)
    return rstd


def _standardized(plan: Plan, xp: Any, x: TracedScalar | None, sums: TracedSums) -> Standardized:
    if name_of(plan.dtype) == "float32":
        how: dict[str, Any] = {"eps": plan.eps, "centred": plan.centred, "dtype": xp.float64, "divides": plan.divides}
        return kernels.standardize_wide(xp, x, groups=sums, **how)
    groups: Any = sums
    how = {"eps": plan.eps, "centred": plan.centred, "divides": plan.divides}
    return kernels.standardize_scaled(xp, x, groups=groups, **how)


def _stats(plan: Plan, found: list[Array]) -> Stats:
    if not found:
        return NO_STATS
    return Stats(*found) if plan.centred else Stats(None, None, *found)


def _rows(plan: Plan) -> tuple[int, ...]:
    """The axis along which threads go, where there are no groups."""
    return (len(plan.view.shape) - 1,)


def apart(call: Call, out: Array) -> bool:
    """Whether `out` can be written to as it lies: it shares memory with nothing that is read, or it is x itself."""
    plan, library = call.plan, call.plan.library
    if out.shape != plan.view.shape and not library.contiguous(out) and not plan.view.order:
        return False
    weights = None if call.weights is None else call.weights.each
    others = [call.gamma, call.beta, weights, *(call.stats or ())]
    if any(each is not None and library.overlap(each, out) for each in others):
        return False
    return not library.overlap(call.x, out) or library.same_memory(call.x, plan.to_view(out))


def _alone(call: Call, out: Array) -> bool:
    """Whether a block reads all of a group before it writes any of it, where it must: it shares the group with none."""
    if not call.plan.library.overlap(call.x, out):
        return True
    view, operands = call.plan.view, (_operand(call.x),)
    return all(cuda.shape_of(view.shape, view.axes, operands, aligned=each).splits == 1 for each in (False, True))


class Step(NamedTuple):
    """A program, and what it is started with."""

    program: cuda.Program
    grid: tuple[int, int]
    partial: tuple[int, int, int] | None
    """The shape of what it leaves to the next, if it is not the last."""


class Ready(NamedTuple):
    """What a call needs, found once."""

    steps: list[Step]
    threads: int
    sizes: tuple[int, int, float]
    """How many groups there are, how many packs of numbers they have, and what a sum is divided by."""
    large: bool
    kept: tuple[int, ...]
    """The shape of what there is for each group."""
    dtypes: list[Any]
    """The dtypes of that."""


def _run(
    plan: Plan,
    body_key: Hashable,
    axes: tuple[int, ...],
    inputs: Sequence[Array | None],
    results: list[Array],
    body: Body,
    *,
    apart: bool = True,
) -> list[Array]:
    """Run a body over the groups along these axes; what there is for each of them."""
    arrays = [*inputs, *results]
    library, xp = plan.library, plan.library.xp
    given = [x for x in arrays if x is not None]
    aligned = all([library.aligned(x) for x in given])  # noqa: C419 - a generator takes longer
    key = (
        id(plan),
        body_key,
        aligned,
        apart,
        tuple([x if x is None else (x.dtype, x.shape, x.strides) for x in arrays]),
    )
    known = _known.get(key)
    if known is None:
        if len(_known) >= MOST:
            _known.clear()
        known = _known[key] = (
            plan,
            _ready(plan, body_key, axes, arrays, len(inputs), body, aligned=aligned, apart=apart),
        )
    ready = known[1]
    like, before = given[0], list[Array]()
    of_groups = [plan.library.empty(ready.kept, like, dtype) for dtype in ready.dtypes]
    for program, grid, partial in ready.steps:
        places = of_groups if partial is None else [plan.library.empty(partial, like, xp.float64)]
        library.launch(program.text, grid, ready.threads, [*given, *before, *places], ready.sizes, ready.large)
        if partial is not None:
            before.append(_together(xp, places[0], program.totals))
    return of_groups


def _together(xp: Any, partial: Array, totals: list[str]) -> Array:
    """What several blocks added up, or found to be the smallest or the largest."""
    if {*totals} == {"sum"}:
        return xp.sum(partial, axis=0)
    taken = {"sum": xp.sum, "min": xp.min, "max": xp.max}
    return xp.stack([taken[how](partial[:, i, :], axis=0) for i, how in enumerate(totals)], axis=0)


def _ready(
    plan: Plan,
    body_key: Hashable,
    axes: tuple[int, ...],
    arrays: list[Array | None],
    inputs: int,
    body: Body,
    *,
    aligned: bool,
    apart: bool,
) -> Ready:
    operands = tuple(None if x is None else _operand(x) for x in arrays)
    sizes = tuple(max(each.shape[axis] for each in operands if each) for axis in range(len(plan.view.shape)))
    shape = cuda.shape_of(sizes, axes, operands, aligned=aligned)
    formula = (plan.eps, plan.centred, plan.divides, plan.inverse)
    key = (body_key, apart, formula, name_of(plan.dtype), plan.view.axes, shape.kind)
    with _lock:
        if key not in _programs:
            tracer = Tracer(axes, operands[:inputs])
            written = body(TracedNamespace, tracer.numbers, TracedSums(tracer))
            _programs[key] = cuda.programs(shape, tracer, written, apart=apart)
        programs = _programs[key]
    steps, blocks = list[Step](), -(-shape.groups // shape.together)
    for program in programs:
        last = program is programs[-1]
        splits = 1 if last and inputs == len(arrays) else shape.splits
        steps.append(Step(program, (blocks, splits), None if last else (splits, len(program.totals), shape.groups)))
    kept = tuple(1 if axis in axes else n for axis, n in enumerate(sizes))
    numbers = (shape.groups, shape.length, plan.groups.divisor)
    dtypes = [getattr(plan.library.xp, dtype) for dtype in programs[0].dtypes]
    return Ready(steps, shape.lanes * shape.together, numbers, shape.large, kept, dtypes)


def _operand(x: Array) -> Operand:
    steps = tuple(0 if n == 1 else step // x.itemsize for n, step in zip(x.shape, x.strides, strict=True))
    return Operand(name_of(x.dtype), tuple(x.shape), steps)


MOST = 1024
"""So many calls are remembered."""
_known: dict[Hashable, tuple[Plan, Ready]] = {}
_programs: dict[Hashable, list[cuda.Program]] = {}
_lock = threading.Lock()
