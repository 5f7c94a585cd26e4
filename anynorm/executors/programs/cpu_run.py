"""How programs run on a processor: which axes are loops, what threads share, and where arrays are."""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

from anynorm.arrays.checks import name_of
from anynorm.arrays.library import Library
from anynorm.calls import Plan
from anynorm.executors.programs import compiled
from anynorm.executors.programs.cpu import Kind, Program, programs
from anynorm.executors.programs.trace import Access, Operand, TracedNamespace, TracedSums, Tracer, Written
from anynorm.executors.threads import share
from anynorm.kernels import Array

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


class Nest(NamedTuple):
    """The axes of a call in the order of the loops, and how arrays lie along them."""

    sizes: tuple[int, ...]
    operands: list[Operand | None]
    kept: int
    reduced: int
    """How many there are of the groups, and of the numbers of a group; the rest are those of a tile."""


class Ready(NamedTuple):
    """The programs of a call and all their arguments but the arrays, found once for arrays that lie alike."""

    functions: list[Callable[..., int]]
    partial: list[tuple[int, ...] | None]
    """The shape of the totals that each leaves to the next, in pieces."""
    pieces: tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]
    """The first arguments, for each piece: with one place for what there is for all groups, and with one for each."""
    kept: tuple[int, ...]
    """The shape of what there is for each group."""
    sums: list[tuple[int, ...]]
    """The shapes that the sums for parameters are added up in."""
    shared: int
    """The array that lies where the first input does; -1 for none."""
    unwanted: Array
    """Where what there is for each group goes that is not kept."""


def reads(library: Library, x: Array) -> bool:
    """Whether programs can read an array where it lies."""
    return _readable(library, x) and library.aligned(x)


def _readable(library: Library, x: Array) -> bool:
    return name_of(x.dtype) in compiled.readable() and library.in_place(x)


def run(
    plan: Plan,
    body_key: Hashable,
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
    tell, is in `body_key`.
    """
    library, lies, address = plan.library, plan.library.memory_key, plan.library.address
    assert address is not None
    arrays = (*inputs, *results)
    key = (id(plan), body_key, axes, in_place, *[None if x is None else lies(x) for x in arrays])
    known = _known.get(key)
    if known is None:
        if len(_known) >= MOST:
            _known.clear()
        how = (axes or plan.view.axes, in_place, of_groups, dtype)
        known = _known[key] = plan, _ready(plan, body_key, arrays, len(inputs), parameters, body, *how)
    ready = known[1]
    if ready is None:
        return None
    given = [address(x) for x in arrays if x is not None]
    if in_place:
        del given[ready.shared]
    float64, pieces = library.xp.float64, ready.pieces[keep]
    sums = [library.host_zeros((len(pieces), *shape), float64) for shape in ready.sums]
    if sums:
        given += [address(x) for x in sums]
    made = [library.host_empty(ready.kept, dtype or float64) for _ in range(of_groups)] if keep else []
    last = [address(x) for x in made] if keep else [address(ready.unwanted)] * of_groups
    if len(ready.functions) == len(pieces) == 1:
        if ready.functions[0](*pieces[0], *given, *last):
            return None
    elif not _run_all(plan, ready, pieces, given, last):
        return None
    if sums:
        sums = [_summed(library.xp, x, shape) for x, shape in zip(sums, parameters, strict=True)]
    return made, sums


def _run_all(plan: Plan, ready: Ready, pieces: list[tuple[Any, ...]], given: list[int], last: list[int]) -> bool:
    """Run one program after another, each in its pieces; False where an array lies at an odd place."""
    library, totals, before = plan.library, list[Array](), list[int]()
    threads = plan.settings.threads if plan.nbytes >= SHARED else 1
    run: Callable[..., Any] = map if threads == 1 else partial(share, threads=threads)
    for function, shape in zip(ready.functions, ready.partial, strict=True):
        own = None if shape is None else library.host_empty(shape, library.xp.float64)
        arrays = (*given, *before, *(last if own is None else [library.address(own)]))
        if any(run(lambda piece: function(*piece, *arrays), pieces)):  # noqa: B023
            return False
        if own is not None:
            totals.append(library.xp.sum(own, axis=0))
            before.append(library.address(totals[-1]))
    return True


def _summed(xp: Any, pieces: Array, shape: tuple[int, ...]) -> Array:
    """Sums in pieces, added up to a shape that broadcasts to theirs."""
    values = pieces[0, ...] if pieces.shape[0] == 1 else xp.sum(pieces, axis=0)
    axes = tuple([axis for axis, (n, m) in enumerate(zip(shape, values.shape, strict=True)) if n < m])
    return xp.sum(values, axis=axes, keepdims=True) if axes else values


def _ready(
    plan: Plan,
    body_key: Hashable,
    arrays: Sequence[Array | None],
    inputs: int,
    parameters: Sequence[tuple[int, ...]],
    body: Body,
    axes: tuple[int, ...],
    in_place: bool,
    of_groups: int,
    dtype: Any,
) -> Ready | None:
    library, shape = plan.library, plan.view.shape
    if not all(_readable(library, x) for x in arrays if x is not None):
        return None
    operands = [None if x is None else _operand(library, x) for x in arrays]
    tile = _tile(shape, axes, operands)
    # the sums for parameters lie in memory of their own; along a row there is one for all numbers or one for each
    across = len(shape) - tile
    sums = [(*each[:across], *shape[across:]) if math.prod(each[across:]) > 1 else each for each in parameters]
    operands += [Operand("float64", each, _contiguous(each)) for each in sums]
    nest = _nest(shape, axes, operands, tile)
    sizes, kept = nest.sizes, tuple(1 if axis in axes else n for axis, n in enumerate(shape))
    groups, run = math.prod(kept), sizes[-1] if tile == 2 else 1
    width = max(1, min(sizes[-tile], TILE // run)) if tile else 0
    items = groups // sizes[-tile] * -(-sizes[-tile] // width) if tile else groups
    # parts of groups, where these are few and large
    loops = range(nest.kept, nest.kept + nest.reduced)
    longest = max(loops, key=lambda axis: sizes[axis])
    most = max(1, min([PIECES, *(SUMS // math.prod(each) for each in sums)]))
    parts = min(most, math.prod(sizes) // LARGE, sizes[longest])
    split = longest if items < FEW and parts > 1 else None
    if split is not None:
        n = sizes[split]
        ranges = [(0, items, i, n * i // parts, n * (i + 1) // parts) for i in range(parts)]
    else:
        parts = min(most, items) if plan.nbytes >= SHARED else 1
        ranges = [(items * i // parts, items * (i + 1) // parts, i, 0, 0) for i in range(parts)]
    if split is not None and in_place and of_groups:  # the last loop reads the first number of a group again
        return None
    of_group = (*loops, len(sizes) - 1) if tile == 2 else tuple(loops)
    accesses = tuple(None if each is None else _access(each, of_group) for each in nest.operands)
    dtype = name_of(dtype or library.xp.float64)
    kind = Kind(nest.kept, nest.reduced, tile, accesses, inputs, len(sums), split, in_place, dtype)
    made, functions = _compiled(plan, body_key, kind, nest.operands[:inputs], body)
    steps = [
        step
        for each, access in zip(nest.operands, accesses, strict=True)
        if each is not None and access is not None
        for step, kind_of_step in zip(each.steps, access.steps, strict=True)
        if kind_of_step == 2
    ]
    numbers = (library.offset, *sizes, *steps, *map(math.prod, sums), groups, width)
    one, each_group = (
        [(*piece, *numbers, *steps_of_groups, plan.eps, plan.groups.divisor) for piece in ranges]
        for steps_of_groups in ((0, 8), (1, 0))
    )
    return Ready(
        functions,
        [(parts, each.totals, groups) if each.totals else None for each in made],
        (one, each_group),
        kept,
        sums,
        sum(x is not None for x in arrays[:inputs]) if in_place else -1,
        library.host_empty((8 * parts,), library.xp.float64),
    )


def _compiled(
    plan: Plan, body_key: Hashable, kind: Kind, inputs: Sequence[Operand | None], body: Body
) -> tuple[list[Program], list[Callable[..., int]]]:
    """The programs of a kind, made once."""
    key = body_key, plan.centred, plan.divides, plan.inverse, name_of(plan.dtype) == "float64", kind
    with compiled.lock:
        if key not in _programs:
            tracer = Tracer(kind.axes, inputs, wide=True)
            written = body(TracedNamespace, tracer.numbers, TracedSums(tracer))
            name = str(body_key[0] if isinstance(body_key, tuple) else body_key).replace(" ", "_")
            made = programs(kind, tracer, written, name)
            functions = [compiled.function_of(name, each.text) for each in made]
            _programs[key] = made, functions
        return _programs[key]


def _operand(library: Library, x: Array) -> Operand:
    """How an array lies."""
    unit = x.dtype.itemsize if library.strides_in_bytes else 1
    steps = tuple(0 if n == 1 else step // unit for n, step in zip(x.shape, library.strides(x), strict=True))
    return Operand(name_of(x.dtype), tuple(x.shape), steps)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(0 if n == 1 else math.prod(shape[axis + 1 :]) for axis, n in enumerate(shape))


def _tile(shape: tuple[int, ...], axes: tuple[int, ...], operands: list[Operand | None]) -> int:
    """How many of the last axes are gone through along rows of groups side by side, from one number to the next."""
    last = len(shape) - 1
    interleaved = last in axes and last - 1 not in axes and last > 1 and shape[last] < SHORT
    if last in axes and not interleaved:
        return 0
    tile = 1 + interleaved
    if math.prod([shape[axis] for axis in axes if axis <= last - tile]) < 2:
        return 0
    for each in operands:
        steps = each.steps[-tile:] if each is not None and each.varies(axes) else ()
        if any(steps) and steps != (shape[last], 1)[-tile:]:
            return 0
    return tile


def _nest(shape: tuple[int, ...], axes: tuple[int, ...], operands: list[Operand | None], tile: int) -> Nest:
    """As many axes as there mostly are: so a program is the same for all norms that are gone through alike."""
    inside, least = range(len(shape) - tile, len(shape)), 2 - (tile > 0)
    halves = [[axis for axis in range(len(shape) - tile) if (axis in axes) is within] for within in (False, True)]
    kept, reduced = ([*[None] * (least - len(some)), *some] for some in halves)
    order = [*kept, *reduced, *inside]

    def ordered(values: tuple[int, ...], missing: int) -> tuple[int, ...]:
        return tuple(missing if axis is None else values[axis] for axis in order)

    arranged = [each and Operand(each.dtype, ordered(each.shape, 1), ordered(each.steps, 0)) for each in operands]
    return Nest(ordered(shape, 1), arranged, len(kept), len(reduced))


def _access(each: Operand, axes: Sequence[int]) -> Access:
    """0 for the axes of a group along which an array stays, 1 for the last axis if it is side by side there, else 2."""
    last = len(each.steps) - 1
    inside = last in axes and each.steps[last] != 0
    steps = [2 if step or inside or (axis not in axes and axis != last) else 0 for axis, step in enumerate(each.steps)]
    if each.steps[last] == 1:
        steps[last] = 1
    return Access(each.dtype, tuple(steps))


MOST = 1024
"""So many calls are remembered."""
_known: dict[Hashable, tuple[Plan, Ready | None]] = {}
_programs: dict[Hashable, tuple[list[Program], list[Callable[..., int]]]] = {}
