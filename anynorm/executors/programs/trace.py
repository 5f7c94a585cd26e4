"""The kernels, run once on traced scalars: what they do to arrays becomes statements with a loop level.

A program is loops over the numbers of each group. Every total over a group ends a loop, and what comes of it is used in
the next; in the last one the results are written. Nothing of the mathematics is here: it is read off the kernels, and
`cpu` and `cuda` print what was read.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from anynorm.kernels import PURE, Namespace, Ops
from anynorm.kernels.weighting import positive


class Operand(NamedTuple):
    """How an array lies beside a shape: 0 steps along the axes that it is broadcast along."""

    dtype: str
    shape: tuple[int, ...]
    steps: tuple[int, ...]

    def varies(self, axes: Iterable[int]) -> bool:
        """Whether it has more than one number along these."""
        return any(self.steps[axis] for axis in axes)


class TracedScalar:
    """A number of a program, in the arithmetic that kernels know: that of arrays."""

    __slots__ = ("dtype", "level", "name", "shape", "tracer", "varies")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, tracer: "Tracer", name: str, dtype: str, level: int, *, varies: bool) -> None:
        self.tracer, self.name, self.dtype = tracer, name, dtype
        self.level, self.varies = level, varies
        """How many loops must have ended, and whether it differs within a group."""
        self.shape: tuple[int, ...] = ()
        """That of the array that it is a number of, unless it is computed."""

    def __getitem__(self, index: Any) -> "TracedScalar":
        """The first number of each group."""
        return self.tracer.first(self)

    def __add__(self, other: Any) -> "TracedScalar":
        return self.tracer.operation("add", self, other)

    def __radd__(self, other: Any) -> "TracedScalar":
        return self.tracer.operation("add", other, self)

    def __sub__(self, other: Any) -> "TracedScalar":
        return self.tracer.operation("subtract", self, other)

    def __rsub__(self, other: Any) -> "TracedScalar":
        return self.tracer.operation("subtract", other, self)

    def __mul__(self, other: Any) -> "TracedScalar":
        return self.tracer.operation("multiply", self, other)

    def __rmul__(self, other: Any) -> "TracedScalar":
        return self.tracer.operation("multiply", other, self)

    def __truediv__(self, other: Any) -> "TracedScalar":
        return self.tracer.operation("divide", self, other)

    def __rtruediv__(self, other: Any) -> "TracedScalar":
        return self.tracer.operation("divide", other, self)

    def __neg__(self) -> "TracedScalar":
        return self.tracer.operation("negative", self)

    def __lt__(self, other: Any) -> "TracedScalar":
        return self.tracer.operation("less", self, other, dtype="bool")

    def __gt__(self, other: Any) -> "TracedScalar":
        return self.tracer.operation("greater", self, other, dtype="bool")

    def __ge__(self, other: Any) -> "TracedScalar":
        return self.tracer.operation("greater_equal", self, other, dtype="bool")

    def __eq__(self, other: object) -> "TracedScalar":  # type: ignore[override]
        return self.tracer.operation("equal", self, other, dtype="bool")

    def __ne__(self, other: object) -> "TracedScalar":  # type: ignore[override]
        return self.tracer.operation("not_equal", self, other, dtype="bool")

    def __and__(self, other: Any) -> "TracedScalar":
        return self.tracer.operation("logical_and", self, other, dtype="bool")

    def __or__(self, other: Any) -> "TracedScalar":
        return self.tracer.operation("logical_or", self, other, dtype="bool")

    def __invert__(self) -> "TracedScalar":
        return self.tracer.operation("logical_not", self, dtype="bool")


class Info(NamedTuple):
    """The limits of a dtype."""

    max: float
    smallest_normal: float
    eps: float


INFO = {
    "float32": Info((2 - 2.0**-23) * 2.0**127, 2.0**-126, 2.0**-23),
    "float64": Info(sys.float_info.max, sys.float_info.min, sys.float_info.epsilon),
}


class TracedNamespace:
    """The part of the array API that kernels are written in, of traced scalars."""

    float32, float64 = "float32", "float64"

    @staticmethod
    def finfo(dtype: str) -> "Info":
        """Its limits."""
        return INFO[dtype]

    @staticmethod
    def astype(x: TracedScalar, dtype: str, *, copy: bool = True) -> TracedScalar:  # noqa: ARG004
        """A number of another dtype."""
        if x.dtype == dtype:
            return x
        cast = x.tracer.operation("astype", x, dtype=dtype)
        cast.shape = x.shape
        return cast

    @staticmethod
    def where(condition: TracedScalar, x: Any, y: Any) -> TracedScalar:
        """One of two."""
        return condition.tracer.operation("where", condition, x, y)

    @staticmethod
    def sqrt(x: TracedScalar) -> TracedScalar:
        """The root."""
        return x.tracer.operation("sqrt", x)

    @staticmethod
    def reciprocal(x: TracedScalar) -> TracedScalar:
        """1 / x."""
        return 1.0 / x

    @staticmethod
    def abs(x: TracedScalar) -> TracedScalar:
        """Its magnitude."""
        return TracedNamespace.where(x < 0.0, -x, x)

    @staticmethod
    def isfinite(x: TracedScalar) -> TracedScalar:
        """Whether it is neither infinite nor NaN."""
        return x - x == 0.0

    @staticmethod
    def minimum(x: TracedScalar, y: Any) -> TracedScalar:
        """The smaller one."""
        return TracedNamespace.where(x < y, x, y)

    @staticmethod
    def maximum(x: TracedScalar, y: Any) -> TracedScalar:
        """The larger one."""
        return TracedNamespace.where(x > y, x, y)

    @staticmethod
    def ones_like(x: TracedScalar) -> TracedScalar:
        """1."""
        return x.tracer.operation("one", x, dtype=x.dtype)

    @staticmethod
    def zeros_like(x: TracedScalar) -> TracedScalar:
        """0."""
        return x.tracer.operation("zero", x, dtype=x.dtype)

    @staticmethod
    def sum(x: TracedScalar, *, axis: Any, keepdims: bool) -> TracedScalar:  # noqa: ARG004
        """Over the group."""
        return x.tracer.total("sum", x)

    @staticmethod
    def min(x: TracedScalar, *, axis: Any, keepdims: bool) -> TracedScalar:  # noqa: ARG004
        """Of the group."""
        return x.tracer.total("min", x)

    @staticmethod
    def max(x: TracedScalar, *, axis: Any, keepdims: bool) -> TracedScalar:  # noqa: ARG004
        """Of the group."""
        return x.tracer.total("max", x)


class TracedSums:
    """`Sums` of a program."""

    def __init__(self, tracer: "Tracer") -> None:
        self.tracer, self.axes = tracer, tracer.axes

    def first(self, x: TracedScalar) -> TracedScalar:
        """The first number of each group."""
        return self.tracer.first(x)

    def mean(self, xp: Namespace, x: TracedScalar) -> TracedScalar:
        """The mean of each group."""
        total: TracedScalar = xp.sum(x, axis=self.axes, keepdims=True)
        return total / self.tracer.divisor

    def mean_product(self, xp: Namespace, x: TracedScalar, other: TracedScalar, *, ops: Ops = PURE) -> TracedScalar:
        """Of x * other."""
        return self.mean(xp, ops.multiply(x, other))


class TracedWeightedSums(TracedSums):
    """Groups of a program whose numbers have weights."""

    def __init__(self, tracer: "Tracer", weights: TracedScalar) -> None:
        super().__init__(tracer)
        self.weights, self._sum = weights, dict[str, TracedScalar]()

    @property
    def sum_of_weights(self) -> TracedScalar:
        """That of each group."""
        if not self._sum:
            self._sum["weights"] = self.tracer.total("sum", self.weights)
        return self._sum["weights"]

    def first(self, x: TracedScalar) -> TracedScalar:
        """The first number of each group that weighs something; 0 where none does."""
        return self.tracer.first(x, self.weights)

    def mean(self, xp: Namespace, x: TracedScalar) -> TracedScalar:
        """The mean of each group; 0 where nothing weighs anything."""
        whole = self.sum_of_weights
        total: TracedScalar = xp.sum(x * self.weights, axis=self.axes, keepdims=True)
        mean: TracedScalar = total / positive(xp, whole)
        return mean


class Statement(NamedTuple):
    """How a number comes about."""

    level: int
    """How many loops must have ended before."""
    varies: bool
    """Whether it differs within a group."""
    name: str
    dtype: str
    operation: str
    arguments: tuple[Any, ...]
    """Traced scalars and Python numbers; for "read" and "first" the number of the operand, for "first_where" of two."""


class Total(NamedTuple):
    """What a loop makes of all numbers of a group."""

    how: str
    """"sum", "min" or "max"."""
    dtype: str
    level: int
    """The number of the loop."""
    of: str


class Tracer:
    """The statements of a program, as they come."""

    def __init__(self, axes: tuple[int, ...], operands: Sequence[Operand | None], *, wide: bool = False) -> None:
        self.axes, self.operands, self.wide = axes, operands, wide
        """`wide` says that everything is computed in float64."""
        self.totals: list[Total] = []
        self.statements: dict[str, Statement] = {}
        self.divisor = TracedScalar(self, "divisor", "float64", 0, varies=False)
        self.eps = TracedScalar(self, "eps", "float64", 0, varies=False)
        self.numbers = [None if each is None else self._read(i, each) for i, each in enumerate(operands)]

    @property
    def last(self) -> int:
        """The number of the last loop."""
        return max([0, *(1 + total.level for total in self.totals)])

    def operation(self, operation: str, *arguments: Any, dtype: str | None = None) -> TracedScalar:
        """A new number; of the widest of the dtypes of the arguments, if no other is named."""
        numbers = [each for each in arguments if isinstance(each, TracedScalar)]
        if dtype is None:
            dtype = max(each.dtype for each in numbers if each.dtype != "bool")
        level, varies = max(each.level for each in numbers), any(each.varies for each in numbers)
        return self._stated(operation, arguments, dtype, level, varies=varies)

    def first(self, x: TracedScalar, weights: TracedScalar | None = None) -> TracedScalar:
        """x at the first number of each group, or at the first that weighs something."""
        if not x.varies:
            return x
        of = self.statements[x.name]
        if of.operation == "read":
            if weights is None:
                return self._stated("first", of.arguments, of.dtype, 0, varies=False)
            arguments = (*of.arguments, *self.statements[weights.name].arguments)
            return self._stated("first_where", arguments, of.dtype, 0, varies=False)
        first = [self.first(each, weights) if isinstance(each, TracedScalar) else each for each in of.arguments]
        return self.operation(of.operation, *first, dtype=of.dtype)

    def total(self, how: str, x: TracedScalar) -> TracedScalar:
        """What all numbers of a group come to, which ends a loop."""
        self.totals.append(Total(how, x.dtype, x.level, x.name))
        return TracedScalar(self, f"t{len(self.totals) - 1}", x.dtype, x.level + 1, varies=False)

    def _read(self, i: int, operand: Operand) -> TracedScalar:
        dtype = "float64" if self.wide or operand.dtype == "float64" else "float32"
        number = self._stated("read", (i,), dtype, 0, varies=operand.varies(self.axes))
        number.shape = operand.shape
        return number

    def _stated(
        self, operation: str, arguments: tuple[Any, ...], dtype: str, level: int, *, varies: bool
    ) -> TracedScalar:
        number = TracedScalar(self, f"v{len(self.statements)}", dtype, level, varies=varies)
        self.statements[number.name] = Statement(level, varies, number.name, dtype, operation, arguments)
        return number
