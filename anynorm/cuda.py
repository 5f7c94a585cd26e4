"""The kernels written out in CUDA: what they do to arrays is followed once, and becomes the text of one program.

A program is loops over the numbers of each group. Every sum over groups ends a loop, and what comes of it is used in
the next; in the last one the results are written. Nothing of the mathematics is here: it is read off the kernels.
"""

import math
import sys
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from anynorm.kernels import PURE, Arithmetic, Namespace

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


class Operand(NamedTuple):
    """How an array lies beside a shape: 0 steps along the axes that it is broadcast along."""

    dtype: str
    shape: tuple[int, ...]
    steps: tuple[int, ...]

    def varies(self, axes: Sequence[int]) -> bool:
        """Whether it has more than one number along these."""
        return any(self.steps[axis] for axis in axes)


class Number:
    """A number of a program, in the arithmetic that kernels know: that of arrays."""

    __slots__ = ("dtype", "each", "level", "name", "operand", "shape", "writer")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, writer: "Writer", name: str, dtype: str, level: int, *, each: bool) -> None:
        self.writer, self.name, self.dtype = writer, name, dtype
        self.level, self.each = level, each
        """How many loops must have ended, and whether it differs within a group."""
        self.operand: int | None = None
        """The array that it is a number of, unless it is computed."""
        self.shape: tuple[int, ...] = ()

    def __getitem__(self, index: Any) -> "Number":
        """The first number of each group."""
        return self.writer.first(self)

    def __add__(self, other: Any) -> "Number":
        return self.writer.write(None, "plus({}, {})", self, other)

    def __radd__(self, other: Any) -> "Number":
        return self.writer.write(None, "plus({}, {})", other, self)

    def __sub__(self, other: Any) -> "Number":
        return self.writer.write(None, "minus({}, {})", self, other)

    def __rsub__(self, other: Any) -> "Number":
        return self.writer.write(None, "minus({}, {})", other, self)

    def __mul__(self, other: Any) -> "Number":
        return self.writer.write(None, "times({}, {})", self, other)

    def __rmul__(self, other: Any) -> "Number":
        return self.writer.write(None, "times({}, {})", other, self)

    def __truediv__(self, other: Any) -> "Number":
        return self.writer.write(None, "{} / {}", self, other)

    def __rtruediv__(self, other: Any) -> "Number":
        return self.writer.write(None, "{} / {}", other, self)

    def __neg__(self) -> "Number":
        return self.writer.write(None, "-{}", self)

    def __lt__(self, other: Any) -> "Number":
        return self.writer.write("bool", "{} < {}", self, other)

    def __gt__(self, other: Any) -> "Number":
        return self.writer.write("bool", "{} > {}", self, other)

    def __ge__(self, other: Any) -> "Number":
        return self.writer.write("bool", "{} >= {}", self, other)

    def __eq__(self, other: object) -> "Number":  # type: ignore[override]
        return self.writer.write("bool", "{} == {}", self, other)

    def __ne__(self, other: object) -> "Number":  # type: ignore[override]
        return self.writer.write("bool", "{} != {}", self, other)

    def __and__(self, other: Any) -> "Number":
        return self.writer.write("bool", "{} && {}", self, other)

    def __invert__(self) -> "Number":
        return self.writer.write("bool", "!{}", self)


class Info(NamedTuple):
    """The limits of a dtype."""

    max: float
    smallest_normal: float
    eps: float


INFO = {
    "float32": Info((2 - 2.0**-23) * 2.0**127, 2.0**-126, 2.0**-23),
    "float64": Info(sys.float_info.max, sys.float_info.min, sys.float_info.epsilon),
}


class Words:
    """The part of the array API that kernels are written in, of numbers of a program."""

    float32, float64 = "float32", "float64"

    @staticmethod
    def finfo(dtype: str) -> "Info":
        """Its limits."""
        return INFO[dtype]

    @staticmethod
    def astype(x: Number, dtype: str, *, copy: bool = True) -> Number:  # noqa: ARG004
        """A number of another dtype."""
        if x.dtype == dtype:
            return x
        cast = x.writer.write(dtype, "widened({})" if dtype == "float64" else "narrowed({})", x)
        cast.operand, cast.shape = x.operand, x.shape
        return cast

    @staticmethod
    def where(condition: Number, x: Any, y: Any) -> Number:
        """One of two."""
        return condition.writer.write(None, "{} ? {} : {}", condition, x, y)

    @staticmethod
    def sqrt(x: Number) -> Number:
        """The root."""
        return x.writer.write(None, "sqrt({})", x)

    @staticmethod
    def reciprocal(x: Number) -> Number:
        """1 / x."""
        return 1.0 / x

    @staticmethod
    def isfinite(x: Number) -> Number:
        """Whether it is neither infinite nor NaN."""
        return x - x == 0.0

    @staticmethod
    def minimum(x: Number, y: Any) -> Number:
        """The smaller one."""
        return Words.where(x < y, x, y)

    @staticmethod
    def maximum(x: Number, y: Any) -> Number:
        """The larger one."""
        return Words.where(x > y, x, y)

    @staticmethod
    def ones_like(x: Number) -> Number:
        """1."""
        return x.writer.write(x.dtype, "1", x)

    @staticmethod
    def zeros_like(x: Number) -> Number:
        """0."""
        return x.writer.write(x.dtype, "0", x)

    @staticmethod
    def sum(x: Number, *, axis: Any, keepdims: bool) -> Number:  # noqa: ARG004
        """Over the group."""
        return x.writer.over(0, x)

    @staticmethod
    def min(x: Number, *, axis: Any, keepdims: bool) -> Number:  # noqa: ARG004
        """Of the group."""
        return x.writer.over(1, x)

    @staticmethod
    def max(x: Number, *, axis: Any, keepdims: bool) -> Number:  # noqa: ARG004
        """Of the group."""
        return x.writer.over(2, x)


class Sums:
    """`Groups` of a program."""

    def __init__(self, writer: "Writer") -> None:
        self.writer, self.axes = writer, writer.axes

    def mean(self, xp: Namespace, x: Number) -> Number:
        """The mean of each group."""
        total: Number = xp.sum(x, axis=self.axes, keepdims=True)
        return total / self.writer.divisor

    def mean_product(self, xp: Namespace, x: Number, other: Number, *, ops: Arithmetic = PURE) -> Number:
        """Of x * other."""
        return self.mean(xp, ops.multiply(x, other))


class Total(NamedTuple):
    """What a loop makes of all numbers of a group."""

    how: int
    """0 for the sum, 1 for the smallest, 2 for the largest."""
    type: str
    level: int
    """The number of the loop."""
    of: str


class Writer:
    """The statements of a program, as they come."""

    def __init__(self, axes: tuple[int, ...], operands: Sequence[Operand | None], pack: int) -> None:
        self.axes, self.pack = axes, pack
        self.totals: list[Total] = []
        self.statements: list[tuple[int, bool, str]] = []
        """With the loops that must have ended before, and whether it differs within a group."""
        self.divisor = Number(self, "divisor", "float64", 0, each=False)
        self.numbers = [None if each is None else self._read(i, each) for i, each in enumerate(operands)]

    def write(self, dtype: str | None, text: str, *parts: Any) -> Number:
        """A new number, of the parts; of the widest of their dtypes, if no other is named."""
        numbers = [each for each in parts if isinstance(each, Number)]
        if dtype is None:
            dtype = max(each.dtype for each in numbers if each.dtype != "bool")
        wide = any(each.dtype == "float64" for each in numbers)
        mixed = wide and any(each.dtype == "float32" for each in numbers)
        words = [
            _literal(part, wide=wide)
            if not isinstance(part, Number)
            else f"widened({part.name})"
            if mixed and part.dtype == "float32"
            else part.name
            for part in parts
        ]
        level, each = max(part.level for part in numbers), any(part.each for part in numbers)
        return self._stated(dtype, text.format(*words), level, each=each)

    def first(self, x: Number) -> Number:
        """The first number of the group that one comes from, in its dtype."""
        assert x.operand is not None
        own = self.numbers[x.operand]
        value = f"read(p{x.operand}[0])"
        return self._stated(x.dtype, f"widened({value})" if own and own.dtype != x.dtype else value, 0, each=False)

    def over(self, how: int, x: Number) -> Number:
        """What all numbers of a group come to, which ends a loop."""
        self.totals.append(Total(how, TYPES[x.dtype], x.level, x.name))
        return Number(self, f"t{len(self.totals) - 1}", x.dtype, x.level + 1, each=False)

    def _read(self, i: int, operand: Operand) -> Number:
        each = operand.varies(self.axes)
        dtype = "float64" if operand.dtype == "float64" else "float32"
        number = self._stated(dtype, f"read({_place(i, operand, self.axes, self.pack)})", 0, each=each)
        number.operand, number.shape = i, operand.shape
        return number

    def _stated(self, dtype: str, value: str, level: int, *, each: bool) -> Number:
        number = Number(self, f"v{len(self.statements)}", dtype, level, each=each)
        kind = TYPES[number.dtype]
        self.statements.append((level, each, f"const {kind} {number.name} = ({kind})({value});"))
        return number


def _literal(value: float, *, wide: bool) -> str:
    return f"({float(value)!r})" if wide else f"({float(value)!r}f)"


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
        return lanes if lanes > WARP else min(lanes, _power(min(packs, self.length // SEVERAL)))

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


def _power(n: int) -> int:
    """The largest power of two that is no more than n, and 1 at least."""
    return 1 << max(0, n.bit_length() - 1)


class Program(NamedTuple):
    """The text of a program, and what it leaves to the next."""

    text: str
    totals: tuple[int, ...]
    """How each of them comes about; none where it is the last."""


def programs(
    shape: Shape,
    inputs: int,
    body: Callable[[Any, list[Number | None], Sums], tuple[Sequence[Number], Sequence[Number]]],
    *,
    apart: bool,
) -> list[Program]:
    """One program, or one for each loop where several blocks share a group.

    `body` makes of the numbers of the inputs, the first of the operands, what is written to the others, and what there
    is for each group. `apart` says that nothing that is written to is read.
    """
    writer = Writer(shape.axes, shape.operands[:inputs], shape.pack)
    each, of_groups = body(Words, writer.numbers, Sums(writer))
    last = max([0, *(1 + total.level for total in writer.totals)])
    loops = [range(last + 1)] if shape.splits == 1 else [range(loop, loop + 1) for loop in range(last + 1)]
    return [
        Program(
            _text(shape, writer, inputs, each, of_groups, some, apart=apart),
            () if last in some else tuple(total.how for total in writer.totals if total.level == some.start),
        )
        for some in loops
    ]


def _text(
    shape: Shape,
    writer: Writer,
    inputs: int,
    each: Sequence[Number],
    of_groups: Sequence[Number],
    loops: range,
    *,
    apart: bool,
) -> str:
    """The program that runs these loops; what those before added up is read."""
    last, pack = max([0, *(1 + total.level for total in writer.totals)]), shape.pack
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
        totals = [(k, total) for k, total in enumerate(writer.totals) if total.level == loop]
        lines += [f"const {total.type} t{k} = c{loop}[{i} * groups + group];" for i, (k, total) in enumerate(totals)]
    lines += [text for level, differs, text in writer.statements if not differs and level <= loops.start]
    totals = []
    for loop in loops:
        totals = [(k, total) for k, total in enumerate(writer.totals) if total.level == loop]
        results = each if loop == last else ()
        if totals or results:
            lines += [f"{total.type} s{k} = {IDENTITY[total.how]};" for k, total in totals]
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
            lines += [text for level, differs, text in writer.statements if differs and level <= loop]
            lines += [f"s{k} = join<{total.how}>(s{k}, ({total.type}){total.of});" for k, total in totals]
            for i, number in enumerate(results, inputs):
                place = _place(i, shape.operands[i], axes, pack)
                lines.append(f"{'' if i in places else 'if (live) '}write({place}, {number.name});")
            lines.append("}")
            if results:
                lines += [f"if (live) *({kind} *)(p{i} + o{i}) = q{i};" for i, kind in places.items() if i >= inputs]
            lines.append("}")
        lines += [f"const {total.type} t{k} = across<{total.how}>(s{k});" for k, total in totals]
        if loop + 1 in loops:
            lines += [text for level, differs, text in writer.statements if not differs and level == loop + 1]
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
IDENTITY = ("0", "(1e300 * 1e300)", "-(1e300 * 1e300)")
"""Of a sum, of the smallest and of the largest."""
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
