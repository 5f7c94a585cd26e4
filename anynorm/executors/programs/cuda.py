"""The emitter for a GPU: a trace printed as CUDA, in words of `cuda.cu`."""

import math
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from anynorm.executors.programs.trace import OPERATORS, Loop, Operand, Statement, TracedScalar, Tracer, Written

LANES = ((128, 32), (512, 128), (4096, 256), (math.inf, 512))
"""Up to so many packs a group has so many threads; a short group fewer than a warp."""
WARP = 32
BLOCK = 256
"""So many threads are together, where groups have fewer than a warp."""
PACK = 16
"""A thread reads so many bytes at once, where they lie side by side."""
SEVERAL = 4
"""It has as many numbers of a group at least, if there are as many."""
COLUMNS = 32
"""So many groups that lie side by side are read at once."""
BUSY = 1056
"""So many blocks keep a GPU busy."""
WORTH = 1024
"""A group is shared by blocks that have so many numbers each."""


class Shape(NamedTuple):
    """What a program is written for: how arrays lie beside the axes of a call, in packs of numbers side by side."""

    sizes: tuple[int, ...]
    axes: tuple[int, ...]
    """Those of the numbers of a group."""
    operands: tuple[Operand | None, ...]
    pack: int
    lanes: int
    """How many threads a group has."""
    together: int
    """How many groups a block has."""
    columns: bool
    """Whether groups lie side by side in memory."""
    splits: int
    """How many blocks share a group."""

    @property
    def kept(self) -> tuple[int, ...]:
        """The other axes."""
        return tuple(axis for axis in range(len(self.sizes)) if axis not in self.axes)

    @property
    def length(self) -> int:
        """The packs of a group."""
        return math.prod([self.sizes[axis] for axis in self.axes])

    @property
    def groups(self) -> int:
        """How many there are."""
        return math.prod([self.sizes[axis] for axis in self.kept])

    @property
    def large(self) -> bool:
        """Whether 32 bits are too few to count with."""
        return any(
            sum((n - 1) * abs(step) for n, step in zip(self.sizes, each.steps, strict=True)) >= 2**30
            for each in self.operands
            if each is not None
        )

    @property
    def kind(self) -> Hashable:
        """All that the text depends upon, which the length of the first axis is not."""
        operands = tuple(
            each and (each.dtype, each.shape[0] == 1, each.shape[1:], each.steps) for each in self.operands
        )
        return self.sizes[1:], self.axes, operands, self.large, self.lanes, self.columns, self.splits > 1, self.pack


def shape_of(
    sizes: tuple[int, ...], axes: tuple[int, ...], operands: tuple[Operand | None, ...], *, aligned: bool
) -> Shape:
    """How threads share the groups along these axes; `aligned` says that all arrays start where a pack may."""
    given, last = [each for each in operands if each is not None], len(sizes) - 1
    pack = PACK // SIZES[given[0].dtype]
    if not aligned or last not in axes or sizes[last] % pack or not all(_packs(each, pack) for each in given):
        pack = 1
    packed = tuple(each and each._replace(steps=(*each.steps[:-1], each.steps[-1] * pack)) for each in operands)
    columns = last not in axes and sizes[last] > 1 and operands[0] is not None and operands[0].steps[last] == 1
    length = math.prod([sizes[axis] for axis in axes])
    lanes, together = BLOCK // COLUMNS, COLUMNS
    if not columns:
        packs = length // pack
        lanes = next(lanes for most, lanes in LANES if packs <= most)
        if lanes == WARP:
            lanes = min(WARP, _near_power(min(packs, length // SEVERAL)))
        together = BLOCK // lanes if lanes <= WARP else 1
    shared = splits(math.prod(sizes) // length, length, together)
    return Shape((*sizes[:-1], sizes[-1] // pack), axes, packed, pack, lanes, together, columns, shared)


def splits(groups: int, length: int, together: int) -> int:
    """By how many blocks a group is shared: as many as a GPU runs at once, if they have enough to do."""
    blocks = -(-groups // together)
    return 1 if blocks > BUSY // 8 else max(1, min(BUSY // blocks, length // (WORTH // together)))


def _packs(operand: Operand, pack: int) -> bool:
    """Whether an array can be read in packs."""
    *others, last = operand.steps
    return last == 0 or (last == 1 and all(step % pack == 0 for step in others))


def _near_power(n: int) -> int:
    """The largest power of two that is no more than n, and 1 at least."""
    return 1 << max(0, n.bit_length() - 1)


class Program(NamedTuple):
    """The text of a program, and what it writes for each group."""

    text: str
    totals: list[str]
    """How each total comes about that it leaves to the next; none where it is the last."""
    dtypes: list[str]
    """Those of what there is for each group in the end."""


def programs(shape: Shape, tracer: Tracer, written: Written, *, apart: bool) -> list[Program]:
    """One program, or one for each loop where several blocks share a group.

    `apart` says that nothing that is written to is read.
    """
    loops = tracer.loops(written)
    parts = [loops] if shape.splits == 1 else [[loop] for loop in loops]
    dtypes = [number.dtype for number in written.of_groups]
    made = []
    for part in parts:
        text = _text(shape, tracer, part, written if part[-1] is loops[-1] else None, apart=apart)
        made.append(Program(text, [total.how for total in part[-1].totals.values()], dtypes))
    return made


def _text(shape: Shape, tracer: Tracer, loops: list[Loop], written: Written | None, *, apart: bool) -> str:
    """The program that runs these loops; `written` is None where another follows. What those before left is read."""
    inputs, axes, pack, before = len(tracer.operands), shape.axes, shape.pack, range(loops[0].number)
    operands = {i: operand for i, operand in enumerate(shape.operands) if operand is not None}
    values = written.of_groups if written else ()
    restrict = "__restrict__ " if apart else ""
    arguments = [f"{'const ' * (i < inputs)}{STORED[each.dtype]} *{restrict}a{i}" for i, each in operands.items()]
    arguments += [f"const double *c{loop}" for loop in before]
    arguments += [f"{TYPES[each.dtype]} *g{m}" for m, each in enumerate(values)] if written else ["double *partial"]
    lines = [
        f"#define LANES {shape.lanes}",
        f"#define COLUMNS {COLUMNS * shape.columns}",
        f"#define TOGETHER {shape.together}",
        f"#define PACK {pack}",
        f"typedef {'long long' if shape.large else 'int'} Index;",
        preamble(),
        f'extern "C" __global__ void normalized({", ".join(arguments)}, Index groups, Index count, double divisor) {{',
        "const auto [group, lane, start, stop, live] = place(groups, count);",
        *_divided("group", "k", shape.kept, shape.sizes),
        *(f"const auto p{i} = a{i} + ({_offset('k', shape.kept, each)});" for i, each in operands.items()),
    ]
    for number in before:
        for m, k in enumerate(tracer.totals_of(number)):
            lines.append(f"const {TYPES[tracer.totals[k].dtype]} t{k} = c{number}[{m} * groups + group];")
    needed = tracer.needed([*(each.name for each in values), *(name for loop in loops for name in loop.values)])
    for loop in loops:
        of_groups = [each for each in needed if not each.varies and max(each.level, before.stop) == loop.number]
        lines += [_printed(each, {i: f"p{i}[0]" for i in operands}) for each in of_groups]
        if not loop.totals and not loop.operands:
            continue
        lines += [f"{TYPES[total.dtype]} s{k} = {IDENTITY[total.how]};" for k, total in loop.totals.items()]
        lines.append(f"#pragma unroll {2 if pack > 1 else 8}")
        lines.append("for (Index j = start + lane; j < stop; j += LANES) {")
        lines += _divided("j", "i", axes, shape.sizes)
        places, packs = dict[int, str](), dict[int, str]()
        for i in loop.operands:
            places[i] = f"p{i}[{_offset('i', axes, operands[i])}]"
            if pack > 1 and operands[i].steps[-1]:
                packs[i], kind = places[i], f"Pack<{STORED[operands[i].dtype]}>"
                lines.append(f"{kind} q{i};" if i >= inputs else f"const {kind} q{i} = *(const {kind} *)&{places[i]};")
                places[i] = f"q{i}.a[u]"
        lines += ["#pragma unroll", f"for (int u = 0; u < {pack}; u++) {{"]
        lines += [_printed(each, places) for each in loop.statements]
        for k, total in loop.totals.items():
            lines.append(f"s{k} = join<{HOW[total.how]}>(s{k}, ({TYPES[total.dtype]}){total.of});")
        for i, name in loop.results.items():
            lines.append(f"{'' if i in packs else 'if (live) '}write({places[i]}, {name});")
        lines.append("}")
        for i in [i for i in loop.results if i in packs]:
            lines.append(f"if (live) *(Pack<{STORED[operands[i].dtype]}> *)&{packs[i]} = q{i};")
        lines.append("}")
        for k, total in loop.totals.items():
            lines.append(f"const {TYPES[total.dtype]} t{k} = across<{HOW[total.how]}>(s{k});")
    if written:
        stored = [f"g{m}[group] = {each.name};" for m, each in enumerate(values)]
        lines.append(f"if (live && lane == 0 && blockIdx.y == 0) {{ {' '.join(stored)} }}")
    else:
        first = f"blockIdx.y * {len(loops[0].totals)}"
        stored = [f"partial[({first} + {m}) * groups + group] = t{k};" for m, k in enumerate(loops[0].totals)]
        lines.append(f"if (live && lane == 0) {{ {' '.join(stored)} }}")
    return "\n".join([*lines, "}", ""])


@cache
def preamble() -> str:
    """What programs are written in."""
    return Path(__file__).with_suffix(".cu").read_text()


def _printed(statement: Statement, places: dict[int, str]) -> str:
    """A statement; what it reads is at these places."""
    kind, arguments = TYPES[statement.dtype], statement.arguments
    if statement.operation in ("read", "first"):
        value = f"read({places[arguments[0]]})"
    elif statement.operation == "astype":
        value = f"{'widened' if statement.dtype == 'float64' else 'narrowed'}({arguments[0].name})"
    else:
        dtypes = {each.dtype for each in arguments if isinstance(each, TracedScalar)}
        names = [_argument(each, wide="float64" in dtypes) for each in arguments]
        value = PRINTED[statement.operation].format(*names)
    return f"const {kind} {statement.name} = ({kind})({value});"


def _argument(value: TracedScalar | float, *, wide: bool) -> str:
    """An argument beside others, of which it takes the widest dtype."""
    if not isinstance(value, TracedScalar):
        return f"({float(value)!r})" if wide else f"({float(value)!r}f)"
    return f"widened({value.name})" if value.dtype == "float32" and wide else value.name


def _divided(index: str, name: str, axes: tuple[int, ...], sizes: tuple[int, ...]) -> list[str]:
    """An index into some axes as one for each of them; the first of these may have any length."""
    lines, rest = [], index
    for axis in reversed(axes[1:]):
        lines.append(f"const Index {name}{axis} = {rest} % {sizes[axis]}, {name}r{axis} = {rest} / {sizes[axis]};")
        rest = f"{name}r{axis}"
    return lines + [f"const Index {name}{axis} = {rest};" for axis in axes[:1]]


def _offset(name: str, axes: tuple[int, ...], operand: Operand) -> str:
    """How far an index into some axes is from the start of an array."""
    return " + ".join([f"{name}{axis} * {operand.steps[axis]}" for axis in axes if operand.steps[axis]]) or "0"


TYPES = {"float32": "float", "float64": "double", "bool": "bool"}
SIZES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
STORED = {"float32": "float", "float64": "double", "float16": "Half", "bfloat16": "Bfloat"}
HOW = {"sum": 0, "min": 1, "max": 2}
IDENTITY = {"sum": "0", "min": "(1e300 * 1e300)", "max": "-(1e300 * 1e300)"}
PRINTED = OPERATORS | {
    "add": "plus({}, {})",
    "subtract": "minus({}, {})",
    "multiply": "times({}, {})",
    "logical_not": "!{}",
    "where": "{} ? {} : {}",
    "one": "1",
    "zero": "0",
}
