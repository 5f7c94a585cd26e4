"""The emitter for a GPU: a trace printed as CUDA."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from anynorm.executors.programs.trace import Operand, Statement, TracedNamespace, TracedScalar, TracedSums, Tracer

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
    """What a program is written for: an array, the axes of its groups, and what is read and written beside it."""

    whole: tuple[int, ...]
    axes: tuple[int, ...]
    operands: tuple[Operand | None, ...]
    aligned: bool = False
    """Whether all of them start where a pack may."""

    @property
    def kept(self) -> tuple[int, ...]:
        """The other axes."""
        return tuple(axis for axis in range(len(self.whole)) if axis not in self.axes)

    @property
    def pack(self) -> int:
        """How many numbers a thread has side by side, and does the same to."""
        last, these = len(self.whole) - 1, [each for each in self.operands if each is not None]
        pack = PACK // SIZES[these[0].dtype]
        if not self.aligned or last not in self.axes or self.whole[last] % pack:
            return 1
        for each in these:
            if each.steps[last] not in (0, 1) or (each.steps[last] and any(step % pack for step in each.steps[:-1])):
                return 1
        return pack

    @property
    def packed(self) -> "Shape":
        """The same, of packs for numbers."""
        pack, whole = self.pack, (*self.whole[:-1], self.whole[-1] // self.pack)
        operands = [each and each._replace(steps=(*each.steps[:-1], each.steps[-1] * pack)) for each in self.operands]
        return self._replace(whole=whole, operands=tuple(operands))

    @property
    def length(self) -> int:
        """The numbers of a group."""
        return math.prod([self.whole[axis] for axis in self.axes])

    @property
    def groups(self) -> int:
        """How many there are."""
        return math.prod([self.whole[axis] for axis in self.kept])

    @property
    def columns(self) -> bool:
        """Whether groups lie side by side in memory."""
        last = len(self.whole) - 1
        side_by_side = any(each is not None and each.steps[last] == 1 for each in self.operands[:1])
        return last not in self.axes and self.whole[last] > 1 and side_by_side

    @property
    def lanes(self) -> int:
        """How many threads a group has."""
        if self.columns:
            return BLOCK // COLUMNS
        packs = self.length // self.pack
        lanes = next(lanes for most, lanes in LANES if packs <= most)
        return lanes if lanes > WARP else min(lanes, near_power(min(packs, self.length // SEVERAL)))

    @property
    def together(self) -> int:
        """How many groups a block has."""
        return COLUMNS if self.columns else BLOCK // self.lanes if self.lanes <= WARP else 1

    @property
    def threads(self) -> int:
        """How many a block has."""
        return self.lanes * self.together

    @property
    def splits(self) -> int:
        """By how many blocks a group is shared: as many as a GPU has room for, if they have enough to do."""
        blocks = -(-self.groups // self.together)
        return 1 if blocks > BUSY // 8 else max(1, min(BUSY // blocks, self.length // (WORTH // self.together)))

    @property
    def large(self) -> bool:
        """Whether 32 bits are too few to count with."""
        return any(
            sum((n - 1) * abs(step) for n, step in zip(self.whole, each.steps, strict=True)) >= 2**30
            for each in self.operands
            if each is not None
        )

    @property
    def kind(self) -> Hashable:
        """All that the text depends upon, which the length of the first axis is not."""
        operands = tuple(
            each and (each.dtype, each.shape[0] == 1, each.shape[1:], each.steps) for each in self.operands
        )
        return self.whole[1:], self.axes, operands, self.large, self.lanes, self.columns, self.splits > 1, self.pack


def near_power(n: int) -> int:
    """The largest power of two that is no more than n, and 1 at least."""
    return 1 << max(0, n.bit_length() - 1)


class Program(NamedTuple):
    """The text of a program, and what it leaves to the next."""

    text: str
    totals: tuple[str, ...]
    """How each of them comes about; none where it is the last."""


def programs(
    shape: Shape,
    inputs: int,
    body: Callable[[Any, list[TracedScalar | None], TracedSums], tuple[Sequence[TracedScalar], Sequence[TracedScalar]]],
    *,
    apart: bool,
) -> list[Program]:
    """One program, or one for each loop where several blocks share a group.

    `body` makes of the numbers of the inputs, the first of the operands, what is written to the others, and what there
    is for each group. `apart` says that nothing that is written to is read.
    """
    tracer = Tracer(shape.axes, shape.operands[:inputs])
    each, of_groups = body(TracedNamespace, tracer.numbers, TracedSums(tracer))
    last = tracer.last
    loops = [range(last + 1)] if shape.splits == 1 else [range(loop, loop + 1) for loop in range(last + 1)]
    return [
        Program(
            _text(shape, tracer, inputs, each, of_groups, some, apart=apart),
            () if last in some else tuple(total.how for total in tracer.totals if total.level == some.start),
        )
        for some in loops
    ]


def _text(
    shape: Shape,
    tracer: Tracer,
    inputs: int,
    each: Sequence[TracedScalar],
    of_groups: Sequence[TracedScalar],
    loops: range,
    *,
    apart: bool,
) -> str:
    """The program that runs these loops; what those before added up is read."""
    last, pack = tracer.last, shape.pack
    shape_of_packs, kept, axes = shape.packed, shape.kept, shape.axes
    operands = [(i, operand) for i, operand in enumerate(shape_of_packs.operands) if operand is not None]
    alone = "__restrict__ " if apart else ""
    arguments = [f"{'const ' * (i < inputs)}{STORED[operand.dtype]} *{alone}a{i}" for i, operand in operands]
    before = range(loops.start)
    arguments += [f"const double *c{loop}" for loop in before]
    if last in loops:
        arguments += [f"{TYPES[number.dtype]} *g{i}" for i, number in enumerate(of_groups)]
    else:
        arguments.append("double *partial")
    lines = [
        f'extern "C" __global__ void normalized({", ".join(arguments)}, Index groups, Index count, double divisor) {{'
    ]
    lines += [*SLOTS, *_divided("group", "k", kept, shape_of_packs.whole)]
    lines += [f"const auto p{i} = a{i} + ({_offset('k', kept, operand)});" for i, operand in operands]
    for loop in before:
        totals = [(k, total) for k, total in enumerate(tracer.totals) if total.level == loop]
        lines += [
            f"const {TYPES[total.dtype]} t{k} = c{loop}[{i} * groups + group];" for i, (k, total) in enumerate(totals)
        ]
    statements = [(each.level, each.varies, _printed(shape, tracer, each)) for each in tracer.statements.values()]
    lines += [text for level, varies, text in statements if not varies and level <= loops.start]
    totals = []
    for loop in loops:
        totals = [(k, total) for k, total in enumerate(tracer.totals) if total.level == loop]
        results = each if loop == last else ()
        if totals or results:
            lines += [f"{TYPES[total.dtype]} s{k} = {IDENTITY[total.how]};" for k, total in totals]
            lines += [f"#pragma unroll {2 if pack > 1 else 8}", *LOOP, *_divided("j", "i", axes, shape_of_packs.whole)]
            packs = [(i, operand) for i, operand in operands if operand.varies(axes)]
            lines += [f"const Index o{i} = {_offset('i', axes, operand)};" for i, operand in packs]
            packs = [(i, operand) for i, operand in packs if pack > 1 and operand.steps[-1]]
            places = {i: f"Pack<{STORED[operand.dtype]}>" for i, operand in packs}
            lines += [
                f"const {kind} q{i} = *(const {kind} *)(p{i} + o{i});" for i, kind in places.items() if i < inputs
            ]
            if results:
                lines += [f"{kind} q{i};" for i, kind in places.items() if i >= inputs]
            lines += ["#pragma unroll", f"for (int u = 0; u < {pack}; u++) {{"]
            lines += [text for level, varies, text in statements if varies and level <= loop]
            lines += [f"s{k} = join<{HOW[total.how]}>(s{k}, ({TYPES[total.dtype]}){total.of});" for k, total in totals]
            for i, number in enumerate(results, inputs):
                place = _place(i, shape.operands[i], axes, pack)
                lines.append(f"{'' if i in places else 'if (live) '}write({place}, {number.name});")
            lines.append("}")
            if results:
                lines += [f"if (live) *({kind} *)(p{i} + o{i}) = q{i};" for i, kind in places.items() if i >= inputs]
            lines.append("}")
        lines += [f"const {TYPES[total.dtype]} t{k} = across<{HOW[total.how]}>(s{k});" for k, total in totals]
        if loop + 1 in loops:
            lines += [text for level, varies, text in statements if not varies and level == loop + 1]
    if last in loops:
        written = [f"g{i}[group] = {number.name};" for i, number in enumerate(of_groups)]
        lines.append(f"if (live && lane == 0 && blockIdx.y == 0) {{ {' '.join(written)} }}")
    else:
        places_of = f"(blockIdx.y * {len(totals)} + {{}}) * groups + group"
        written = [f"partial[{places_of.format(i)}] = t{k};" for i, (k, _) in enumerate(totals)]
        lines.append(f"if (live && lane == 0) {{ {' '.join(written)} }}")
    head = [f"#define LANES {shape.lanes}", f"#define COLUMNS {COLUMNS * shape.columns}"]
    head += [f"#define TOGETHER {shape.together}", f"#define PACK {pack}"]
    head += [f"typedef {'long long' if shape.large else 'int'} Index;", ASSEMBLY, PREAMBLE]
    return "\n".join([*head, *lines, "}", ""])


def _printed(shape: Shape, tracer: Tracer, statement: Statement) -> str:
    """A statement as it stands in a program."""
    kind, arguments = TYPES[statement.dtype], statement.arguments
    if statement.operation == "read":
        value = f"read({_place(arguments[0], tracer.operands[arguments[0]], shape.axes, shape.pack)})"
    elif statement.operation == "first":
        value = f"read(p{arguments[0]}[0])"
    elif statement.operation == "astype":
        value = f"{'widened' if statement.dtype == 'float64' else 'narrowed'}({arguments[0].name})"
    else:
        dtypes = {each.dtype for each in arguments if isinstance(each, TracedScalar)}
        names = [_argument(each, dtypes) for each in arguments]
        value = PRINTED[statement.operation].format(*names)
    return f"const {kind} {statement.name} = ({kind})({value});"


def _argument(value: Any, dtypes: set[str]) -> str:
    """An argument beside others of these dtypes, of which it takes the widest."""
    if not isinstance(value, TracedScalar):
        return f"({float(value)!r})" if "float64" in dtypes else f"({float(value)!r}f)"
    return f"widened({value.name})" if value.dtype == "float32" and "float64" in dtypes else value.name


def _divided(index: str, name: str, axes: tuple[int, ...], whole: tuple[int, ...]) -> list[str]:
    """An index into some axes as one for each of them; the first of these may have any length."""
    lines, rest = [], index
    for axis in reversed(axes[1:]):
        lines.append(f"const Index {name}{axis} = {rest} % {whole[axis]}, {name}r{axis} = {rest} / {whole[axis]};")
        rest = f"{name}r{axis}"
    return lines + [f"const Index {name}{axes[0]} = {rest};" for _ in axes[:1]]


def _offset(name: str, axes: tuple[int, ...], operand: Operand) -> str:
    """How far an index into some axes is from the start of an array."""
    return " + ".join([f"{name}{axis} * {operand.steps[axis]}" for axis in axes if operand.steps[axis]]) or "0"


def _place(i: int, operand: Operand | None, axes: tuple[int, ...], pack: int) -> str:
    """Where a number of a group is."""
    if operand is not None and pack > 1 and operand.steps[-1]:
        return f"q{i}.a[u]"
    return f"p{i}[o{i}]" if operand is not None and operand.varies(axes) else f"p{i}[0]"


TYPES = {"float32": "float", "float64": "double", "bool": "bool"}
SIZES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
STORED = {"float32": "float", "float64": "double", "float16": "Half", "bfloat16": "Bfloat"}
HOW = {"sum": 0, "min": 1, "max": 2}
IDENTITY = {"sum": "0", "min": "(1e300 * 1e300)", "max": "-(1e300 * 1e300)"}
PRINTED = {
    "add": "plus({}, {})",
    "subtract": "minus({}, {})",
    "multiply": "times({}, {})",
    "divide": "{} / {}",
    "negative": "-{}",
    "less": "{} < {}",
    "greater": "{} > {}",
    "greater_equal": "{} >= {}",
    "equal": "{} == {}",
    "not_equal": "{} != {}",
    "logical_and": "{} && {}",
    "logical_or": "{} || {}",
    "logical_not": "!{}",
    "where": "{} ? {} : {}",
    "sqrt": "sqrt({})",
    "one": "1",
    "zero": "0",
}
SLOTS = [
    "#if COLUMNS",
    "const Index slot = blockIdx.x * TOGETHER + threadIdx.x % COLUMNS, lane = threadIdx.x / COLUMNS;",
    "#else",
    "const Index slot = blockIdx.x * TOGETHER + threadIdx.x / LANES, lane = threadIdx.x % LANES;",
    "#endif",
    "const bool live = slot < groups;",
    "const Index group = live ? slot : groups - 1;",
    "const Index share = (count + gridDim.y - 1) / gridDim.y, start = share * blockIdx.y;",
    "const Index stop = start + share < count ? start + share : count;",
]
LOOP = ["for (Index j = start + lane; j < stop; j += LANES) {"]
ASSEMBLY = """
struct Half { unsigned short bits; };
struct Bfloat { unsigned short bits; };

// in words of the machine, as CuPy has its compiler take subnormal numbers of float32 for 0
#define SAY(word, a, b) float y; asm(word " %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b)); return y
__device__ float plus(float a, float b) { SAY("add.rn.f32", a, b); }
__device__ float minus(float a, float b) { SAY("sub.rn.f32", a, b); }
__device__ float times(float a, float b) { SAY("mul.rn.f32", a, b); }
__device__ double widened(float x) { double y; asm("cvt.f64.f32 %0, %1;" : "=d"(y) : "f"(x)); return y; }
__device__ float narrowed(double x) { float y; asm("cvt.rn.f32.f64 %0, %1;" : "=f"(y) : "d"(x)); return y; }
__device__ float read(const Half &x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
__device__ void write(Half &y, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ float read(const Bfloat &x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ void write(Bfloat &y, float x) {
  const unsigned bits = __float_as_uint(x);
  y.bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
"""
PREAMBLE = """
template <class T> struct alignas(sizeof(T) * PACK < 16 ? sizeof(T) * PACK : 16) Pack { T a[PACK]; };

__device__ double plus(double a, double b) { return a + b; }
__device__ double minus(double a, double b) { return a - b; }
__device__ double times(double a, double b) { return a * b; }
__device__ float read(const float &x) { return x; }
__device__ double read(const double &x) { return x; }
__device__ void write(float &y, float x) { y = x; }
__device__ void write(double &y, double x) { y = x; }

template <int HOW, class T> __device__ T join(T a, T b) {
  return HOW == 0 ? a + b : HOW == 1 ? (b < a ? b : a) : (b > a ? b : a);
}

// what the threads of a group have, together
template <int HOW, class T> __device__ T across(T a) {
#if LANES > 1
#if COLUMNS
  __shared__ T kept[LANES * COLUMNS];
  __syncthreads();
  kept[threadIdx.x] = a;
  __syncthreads();
  a = kept[threadIdx.x % COLUMNS];
  for (int i = 1; i < LANES; i++) a = join<HOW>(a, kept[threadIdx.x % COLUMNS + i * COLUMNS]);
#else
  for (int step = (LANES < 32 ? LANES : 32) / 2; step; step /= 2) a = join<HOW>(a, __shfl_xor_sync(~0u, a, step));
#if LANES > 32
  __shared__ T kept[LANES / 32];
  __syncthreads();
  if (threadIdx.x % 32 == 0) kept[threadIdx.x / 32] = a;
  __syncthreads();
  a = kept[0];
  for (int i = 1; i < LANES / 32; i++) a = join<HOW>(a, kept[i]);
#endif
#endif
#endif
  return a;
}
"""
