"""How programs run on a processor: which axes are loops, what threads share, and where arrays are."""

import math
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

from anynorm.arrays import empty, name_of
from anynorm.blocks import share
from anynorm.calls import Plan
from anynorm.executors.programs import compiled
from anynorm.executors.programs.cpu import Access, Kind, Program, Written, programs
from anynorm.executors.programs.trace import Operand, TracedNamespace, TracedSums, Tracer
from anynorm.kernels import Array
from anynorm.settings import current

SHARED = 2**20
"""A call of fewer bytes is run by one thread."""
PIECES = 16
"""Threads share so many pieces; of these and their sums the number of threads knows nothing."""
FEW = 8
"""Fewer groups than this are shared in parts, if they are large."""
LARGE = 2**16
"""So many numbers are worth a piece, where parts of groups are shared."""
TILE = 512
"""So many numbers of a row are read together in columns."""
SHORT = 32
"""Groups in runs of fewer numbers are interleaved."""
SUMS = 2**16
"""So many numbers in float64 may the sums for parameters take, in all their pieces and for each of the parameters."""

Body = Callable[[type[TracedNamespace], list[Any], TracedSums], Written]


class Piece(NamedTuple):
    """What one launch is told: groups or tiles from start to stop, which part it is, and what of the split axis."""

    start: int
    stop: int
    part: int
    low: int
    high: int


class Loops(NamedTuple):
    """The programs of a call and how they are run, found once for arrays of these shapes."""

    plan: Plan
    functions: list[Callable[..., None]]
    programs: list[Program]
    pieces: list[Piece]
    sizes: tuple[tuple[int, ...], tuple[int, ...]]
    """Where what there is for each group goes to its place, and where it all goes to one."""
    groups: int
    kept: tuple[int, ...]
    sums: tuple[tuple[int, ...], ...]
    """The shapes that the sums for parameters are added up in."""


def operand(plan: Plan, x: Array) -> Operand:
    """How an array lies."""
    item, strides = x.dtype.itemsize, plan.library.strides(x)
    unit = 1 if plan.library.name == "torch" else item
    steps = tuple(0 if n == 1 else step // unit for n, step in zip(x.shape, strides, strict=True))
    return Operand(name_of(x.dtype), tuple(x.shape), steps)


def run(
    plan: Plan,
    what: Hashable,
    inputs: list[Array | None],
    results: list[Array],
    parameters: list[tuple[int, ...]],
    body: Body,
    *,
    axes: tuple[int, ...] | None = None,
    of_groups: int = 0,
    dtype: Any = None,
    keep: bool = True,
    in_place: int | None = None,
) -> tuple[list[Array], list[Array]]:
    """Run a body over the groups of a call, or over those along other axes.

    Returns what there is for each group, so many arrays beside the view of this dtype or of float64, if they are to be
    kept; and the sums for parameters of these shapes beside the view, in float64.
    """
    axes = plan.view.axes if axes is None else axes
    library, xp, arrays = plan.library, plan.library.xp, [*inputs, *results]
    key = (
        id(plan),
        what,
        axes,
        in_place,
        tuple([None if each is None else (each.dtype, each.shape, plan.library.strides(each)) for each in arrays]),
    )
    loops = _known.get(key)
    if loops is None:
        loops = _loops(plan, what, inputs, results, parameters, body, axes, in_place, name_of(dtype or xp.float64))
        if len(_known) >= MOST:
            _known.clear()
        _known[key] = loops
    like = results[0] if results else next(x for x in inputs if x is not None)
    pieces, count = loops.pieces, len(loops.pieces)
    sums = [library.xp.zeros((count, *shape), dtype=xp.float64) for shape in loops.sums]
    made = [empty(loops.kept if keep else (8 * count,), like, dtype or xp.float64) for _ in range(of_groups)]
    address = library.address
    given = [address(each) for i, each in enumerate(arrays) if each is not None and not (in_place is not None and i == len(inputs))]
    given += [address(each) for each in sums]
    threads = current().threads if plan.nbytes >= SHARED else 1
    before: list[int] = []
    totals: list[Array] = []
    for function, program in zip(loops.functions, loops.programs, strict=True):
        if program.totals:
            partial = empty((count, program.totals, loops.groups), like, xp.float64)
            after = [address(partial)]
        else:
            after = [address(each) for each in made]
        rest = (*loops.sizes[not keep], plan.eps, plan.groups.divisor, *given, *before, *after)
        if count == 1:
            function(*pieces[0], *rest)
        else:
            share(lambda piece: function(*piece, *rest), pieces, threads)  # noqa: B023
        if program.totals:
            totals.append(xp.sum(partial, axis=0))
            before.append(address(totals[-1]))
    found = [each[0, ...] if count == 1 else xp.sum(each, axis=0) for each in sums]
    return made if keep else [], [_summed(xp, each, shape) for each, shape in zip(found, parameters, strict=True)]


def _summed(xp: Any, values: Array, shape: tuple[int, ...]) -> Array:
    """Values summed to a shape that broadcasts to theirs."""
    axes = tuple([axis for axis, (n, whole) in enumerate(zip(shape, values.shape, strict=True)) if n < whole])
    return xp.sum(values, axis=axes, keepdims=True) if axes else values


def _loops(
    plan: Plan,
    what: Hashable,
    inputs: list[Array | None],
    results: list[Array],
    parameters: list[tuple[int, ...]],
    body: Body,
    axes: tuple[int, ...],
    in_place: int | None,
    of_groups: str,
) -> Loops:
    whole = plan.view.shape
    rank, last = len(whole), len(whole) - 1
    operands = [None if each is None else operand(plan, each) for each in (*inputs, *results)]
    interleaved = last in axes and last - 1 not in axes and rank > 2 and whole[last] < SHORT
    columns = (interleaved or last not in axes) and _in_columns(whole, axes, operands, interleaved=interleaved)
    interleaved = interleaved and columns
    across = last - interleaved
    outer = [axis for axis in axes if not columns or axis < across]
    # the sums for parameters, in their own memory
    shapes = [
        tuple(whole[axis] if interleaved and axis >= across and max(shape[across:]) > 1 else n for axis, n in enumerate(shape))
        for shape in parameters
    ]
    operands += [Operand("float64", shape, _contiguous(shape)) for shape in shapes]
    groups = math.prod([n for axis, n in enumerate(whole) if axis not in axes])
    run = whole[last] if interleaved else 1
    width = max(1, min(whole[across], TILE // run)) if columns else 0
    items = groups // whole[across] * -(-whole[across] // width) if columns else groups
    # parts of groups, where these are few and large
    axis = max(outer, key=lambda axis: whole[axis])
    most = max(1, min([PIECES, *(SUMS // math.prod(shape) for shape in shapes)]))
    pieces = min(most, math.prod(whole) // LARGE, whole[axis])
    split = axis if items < FEW and pieces > 1 else None
    if split is None:
        pieces = min(most, items) if plan.nbytes >= SHARED else 1
    kind = Kind(
        rank,
        axes,
        tuple(None if each is None else _access(each, last if columns else axes[-1]) for each in operands),
        len(inputs),
        len(results),
        columns,
        interleaved,
        split,
        in_place,
        of_groups,
    )
    name, key = _name(what), (what, plan.centred, name_of(plan.dtype) == "float64", kind)
    with compiled.lock:
        found = _programs.get(key)
        if found is None:
            tracer = Tracer(axes, operands[: len(inputs)], wide=True)
            written = body(TracedNamespace, tracer.numbers, TracedSums(tracer))
            made = programs(kind, tracer, written, name)
            found = _programs[key] = made, [compiled.function_of(name, each.text, each.sizes, each.arrays) for each in made]
    made, functions = found
    if split is None:
        ranges = [Piece(items * i // pieces, items * (i + 1) // pieces, i, 0, 0) for i in range(pieces)]
    else:
        n = whole[split]
        ranges = [Piece(0, items, i, n * i // pieces, n * (i + 1) // pieces) for i in range(pieces)]
    sizes = list(whole)
    for each, access in zip(operands, kind.accesses, strict=True):
        if each is not None and access is not None:
            sizes += [each.steps[axis] for axis, step in enumerate(access.steps) if step == 2]
    sizes += [math.prod(shape) for shape in shapes]
    sizes += [groups, width]
    kept = tuple(1 if axis in axes else n for axis, n in enumerate(whole))
    told = (*sizes, 1, 0), (*sizes, 0, 8)
    return Loops(plan, functions, made, ranges, told, groups, kept, tuple(shapes))


def _name(what: Hashable) -> str:
    return "_".join(str(each) for each in (what if isinstance(what, tuple) else (what,)) if isinstance(each, str))


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    steps, step = [], 1
    for n in reversed(shape):
        steps.append(0 if n == 1 else step)
        step *= n
    return tuple(reversed(steps))


def _in_columns(
    whole: tuple[int, ...], axes: tuple[int, ...], operands: list[Operand | None], *, interleaved: bool
) -> bool:
    """Whether rows of groups side by side can be gone through from one number to the next."""
    across = len(whole) - 1 - interleaved
    outer = [axis for axis in axes if axis < across]
    if not outer or math.prod([whole[axis] for axis in outer]) < 2:
        return False
    for each in operands:
        if each is None or not each.varies(outer):
            continue
        tile = each.steps[across:]
        side_by_side = tile == (whole[-1], 1) if interleaved else tile == (1,)
        if not side_by_side and any(tile):
            return False
    return True


def _access(each: Operand, inner: int) -> Access:
    """0 for the axes along which an array stays, 1 for the innermost one if it is side by side there, else 2."""
    steps = [0 if step == 0 else 2 for step in each.steps]
    if each.steps[inner] == 1:
        steps[inner] = 1
    return Access(each.dtype, tuple(steps))


MOST = 1024
"""So many calls are remembered."""
_known: dict[Hashable, Loops] = {}
_programs: dict[Hashable, tuple[list[Program], list[Callable[..., None]]]] = {}
