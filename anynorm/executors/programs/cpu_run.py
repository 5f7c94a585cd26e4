"""How programs run on a processor: which axes are loops, what threads share, and where arrays are."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from anynorm.arrays import name_of
from anynorm.arrays.library import Library
from anynorm.calls import Plan
from anynorm.executors.programs import compiled
from anynorm.executors.programs.cpu import programs
from anynorm.executors.programs.printer import Access, Kind, Program, Written
from anynorm.executors.programs.trace import Operand, TracedNamespace, TracedSums, Tracer
from anynorm.executors.threads import share
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


class Loops(NamedTuple):
    """The programs of a call and how they are run, found once for arrays that lie alike."""

    plan: Plan
    functions: list[Callable[..., int]]
    programs: list[Program]
    alone: bool
    """Whether there is one, which runs in one piece."""
    heads: tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]
    """What each piece is told before the arrays: groups or tiles from start to stop, which part it is, what of the
    split axis, the offset, the sizes, eps and the divisor; with one place for what there is for all groups, and with
    one for each."""
    groups: int
    kept: tuple[int, ...]
    sums: tuple[tuple[int, ...], ...]
    """The shapes that the sums for parameters are added up in."""
    shared: int
    """The array that lies where the first input does; -1 for none."""
    nowhere: Any
    """Where what there is for each group goes that nobody wants."""


def operand(library: Library, x: Array) -> Operand:
    """How an array lies."""
    unit = 1 if library.name == "torch" else x.dtype.itemsize
    steps = tuple(0 if n == 1 else step // unit for n, step in zip(x.shape, library.strides(x), strict=True))
    return Operand(name_of(x.dtype), tuple(x.shape), steps)


def reads(library: Library, x: Array) -> bool:
    """Whether programs can read an array where it lies."""
    return _readable(library, x) and library.aligned(x)


def _readable(library: Library, x: Array) -> bool:
    return name_of(x.dtype) in compiled.readable() and library.in_place(x)


def run(
    plan: Plan,
    what: Hashable,
    inputs: Sequence[Array | None],
    results: Sequence[Array],
    parameters: Sequence[tuple[int, ...]],
    body: Body,
    *,
    axes: tuple[int, ...] | None = None,
    of_groups: int = 0,
    dtype: Any = None,
    keep: bool = True,
    in_place: bool = False,
) -> tuple[list[Array], list[Array]] | None:
    """Run a body over the groups of a call, or over those along other axes.

    Returns what there is for each group, so many arrays beside the view of this dtype or of float64, if they are to be
    kept; and the sums for parameters of these shapes beside the view, in float64. None where an array cannot be read
    where it lies, or one part of a group would write what another still reads. `in_place` says that the first result
    lies where the first input does. What else `body` depends upon, also the dtypes of arrays that the plan does not
    tell, is in `what`.
    """
    library, strides, address = plan.library, plan.library.strides, plan.library.address
    assert address is not None
    assert library.new is not None
    assert library.nothing is not None
    places = (*inputs, *results)
    key = (id(plan), what, axes, in_place, *[None if each is None else strides(each) for each in places])
    loops = _known.get(key, key)
    if loops is key:
        if len(_known) >= MOST:
            _known.clear()
        loops = _known[key] = _loops(plan, what, inputs, results, parameters, body, axes, in_place, dtype, of_groups)
    if loops is None:
        return None
    given = [address(each) for each in places if each is not None]
    if in_place:
        del given[loops.shared]
    float64, heads = library.xp.float64, loops.heads[keep]
    sums = [library.nothing((len(heads), *shape), float64) for shape in loops.sums]
    if sums:
        given += [address(each) for each in sums]
    made = [library.new(loops.kept, dtype or float64) for _ in range(of_groups)] if keep else []
    last = [address(each) for each in made] if keep else [address(loops.nowhere)] * of_groups
    if loops.alone:
        if loops.functions[0](*heads[0], *given, *last):
            return None
    elif not _run_all(loops, heads, given, last):
        return None
    if not sums:
        return made, sums
    found = [each[0, ...] if len(heads) == 1 else library.xp.sum(each, axis=0) for each in sums]
    return made, [_summed(library.xp, each, shape) for each, shape in zip(found, parameters, strict=True)]


def _run_all(loops: Loops, heads: list[tuple[Any, ...]], given: list[int], last: list[int]) -> bool:
    """Run one program after another, each in its pieces; False where an array lies at an odd place."""
    plan, library = loops.plan, loops.plan.library
    assert library.new is not None
    assert library.address is not None
    threads = current().threads if plan.nbytes >= SHARED else 1
    before: list[int] = []
    totals = []
    for function, program in zip(loops.functions, loops.programs, strict=True):
        after = last
        if program.totals:
            partial = library.new((len(heads), program.totals, loops.groups), library.xp.float64)
            after = [library.address(partial)]
        rest = (*given, *before, *after)
        if max(share(lambda head: function(*head, *rest), heads, threads)):  # noqa: B023
            return False
        if program.totals:
            totals.append(library.xp.sum(partial, axis=0))
            before.append(library.address(totals[-1]))
    return True


def _summed(xp: Any, values: Array, shape: tuple[int, ...]) -> Array:
    """Values summed to a shape that broadcasts to theirs."""
    axes = tuple([axis for axis, (n, whole) in enumerate(zip(shape, values.shape, strict=True)) if n < whole])
    return xp.sum(values, axis=axes, keepdims=True) if axes else values


def _loops(
    plan: Plan,
    what: Hashable,
    inputs: Sequence[Array | None],
    results: Sequence[Array],
    parameters: Sequence[tuple[int, ...]],
    body: Body,
    axes: tuple[int, ...] | None,
    in_place: bool,
    dtype: Any,
    of_groups: int,
) -> Loops | None:
    whole, axes, library = plan.view.shape, axes or plan.view.axes, plan.library
    arrays = [*inputs, *results]
    if not all(_readable(library, each) for each in arrays if each is not None):
        return None
    rank, last = len(whole), len(whole) - 1
    operands = [None if each is None else operand(library, each) for each in arrays]
    interleaved = last in axes and last - 1 not in axes and rank > 2 and whole[last] < SHORT
    columns = (interleaved or last not in axes) and _in_columns(whole, axes, operands, interleaved=interleaved)
    interleaved = interleaved and columns
    across = last - interleaved
    # the sums for parameters, in their own memory
    shapes = [
        tuple(
            whole[axis] if interleaved and axis >= across and max(shape[across:]) > 1 else n
            for axis, n in enumerate(shape)
        )
        for shape in parameters
    ]
    operands += [Operand("float64", shape, _contiguous(shape)) for shape in shapes]
    kept = tuple(1 if axis in axes else n for axis, n in enumerate(whole))
    whole, axes, operands = _arranged(whole, axes, operands, columns=columns, interleaved=interleaved)
    last = len(whole) - 1
    across = last - interleaved
    outer = [axis for axis in axes if not columns or axis < across]
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
    if split is not None and in_place and of_groups:  # the last loop reads the first number of a group again
        return None
    kind = Kind(
        len(whole),
        axes,
        tuple(None if each is None else _access(each, axes, last) for each in operands),
        len(inputs),
        len(results),
        columns,
        interleaved,
        split,
        0 if in_place else None,
        name_of(dtype or library.xp.float64),
    )
    name, key = _name(what), (what, plan.centred, name_of(plan.dtype) == "float64", kind)
    with compiled.lock:
        found = _programs.get(key)
        if found is None:
            tracer = Tracer(axes, operands[: len(inputs)], wide=True)
            written = body(TracedNamespace, tracer.numbers, TracedSums(tracer))
            made = programs(kind, tracer, written, name)
            found = _programs[key] = (
                made,
                [compiled.function_of(name, each.text, each.sizes, each.arrays) for each in made],
            )
    made, functions = found
    if split is None:
        ranges = [(items * i // pieces, items * (i + 1) // pieces, i, 0, 0) for i in range(pieces)]
    else:
        n = whole[split]
        ranges = [(0, items, i, n * i // pieces, n * (i + 1) // pieces) for i in range(pieces)]
    sizes = list(whole)
    for each, access in zip(operands, kind.accesses, strict=True):
        if each is not None and access is not None:
            sizes += [each.steps[axis] for axis, step in enumerate(access.steps) if step == 2]
    sizes += [math.prod(shape) for shape in shapes]
    sizes += [groups, width]
    numbers = plan.eps, plan.groups.divisor
    ahead = (library.offset, *sizes, 0, 8, *numbers), (library.offset, *sizes, 1, 0, *numbers)
    heads = [(*each, *ahead[0]) for each in ranges], [(*each, *ahead[1]) for each in ranges]
    shared = sum(each is not None for each in inputs) if in_place else -1
    assert library.new is not None
    nowhere = library.new((8 * len(ranges),), library.xp.float64)
    alone = len(made) == len(ranges) == 1
    return Loops(plan, functions, made, alone, heads, groups, kept, tuple(shapes), shared, nowhere)


def _name(what: Hashable) -> str:
    return str(what[0] if isinstance(what, tuple) else what).replace(" ", "_")


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


def _arranged(
    whole: tuple[int, ...],
    axes: tuple[int, ...],
    operands: list[Operand | None],
    *,
    columns: bool,
    interleaved: bool,
) -> tuple[tuple[int, ...], tuple[int, ...], list[Operand | None]]:
    """The same with axes in the order of the loops, those of the groups inside, and as many as there mostly are.

    So a program is the same for all norms that are gone through alike, whatever the axes of their arrays.
    """
    inside = list(range(len(whole) - 1 - interleaved, len(whole))) if columns else []
    kept, reduced = ([axis for axis in range(len(whole)) if (axis in axes) is within] for within in (False, True))
    kept, reduced = ([axis for axis in some if axis not in inside] for some in (kept, reduced))
    order: list[int | None] = [*[None] * (2 - columns - len(kept)), *kept]
    first = len(order)
    order += [*[None] * (2 - columns - len(reduced)), *reduced]
    found = [*range(first, len(order)), *([len(order) + 1] if interleaved else [])]
    order += inside

    def arranged(values: tuple[int, ...], missing: int) -> tuple[int, ...]:
        return tuple(missing if axis is None else values[axis] for axis in order)

    there = [
        None if each is None else Operand(each.dtype, arranged(each.shape, 1), arranged(each.steps, 0))
        for each in operands
    ]
    return arranged(whole, 1), tuple(found), there


def _access(each: Operand, axes: tuple[int, ...], last: int) -> Access:
    """0 for the axes of a group along which an array stays, 1 for the last axis if it is side by side there, else 2."""
    inside = last in axes and each.steps[last] != 0
    steps = [2 if step or inside or (axis not in axes and axis != last) else 0 for axis, step in enumerate(each.steps)]
    if each.steps[last] == 1:
        steps[last] = 1
    return Access(each.dtype, tuple(steps))


MOST = 1024
"""So many calls are remembered."""
_known: dict[Hashable, Any] = {}
_programs: dict[Hashable, tuple[list[Program], list[Callable[..., int]]]] = {}
