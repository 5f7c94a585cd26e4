"""The kernels, run once on traced scalars: what they do to arrays becomes statements with a loop level.

A program is loops over the numbers of each group. Every total over a group ends a loop, and what comes of it is used in
the next; in the last one the results are written. Nothing of the mathematics is here: it is read off the kernels, and
`cpu` and `cuda` print what was read.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from anynorm.kernels import PURE, Namespace, Ops
from anynorm.kernels.weighting import positive


class Access(NamedTuple):
    """How an array is gone through."""

    dtype: str
    steps: tuple[int, ...]
    """For each axis 0 where it stays, 1 from one number to the next, and 2 by a step that is an argument."""


class Operand(NamedTuple):
    """How an array lies beside a shape: 0 steps along the axes that it is broadcast along."""

    dtype: str
    shape: tuple[int, ...]
    steps: tuple[int, ...]

    def varies(self, axes: Iterable[int]) -> bool:
        """Whether it has more than one number along these."""
        return any(self.steps[axis] for axis in axes)


def _operator(operation: str, dtype: str | None = None) -> Callable[..., "TracedScalar"]:
    return lambda x, *others: x.tracer.operation(operation, x, *others, dtype=dtype)


def _reflected(operation: str) -> Callable[["TracedScalar", Any], "TracedScalar"]:
    return lambda x, other: x.tracer.operation(operation, other, x)


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

    __add__, __radd__ = _operator("add"), _reflected("add")
    __sub__, __rsub__ = _operator("subtract"), _reflected("subtract")
    __mul__, __rmul__ = _operator("multiply"), _reflected("multiply")
    __truediv__, __rtruediv__ = _operator("divide"), _reflected("divide")
    __neg__ = _operator("negative")
    __lt__, __gt__, __ge__ = (_operator(name, "bool") for name in ("less", "greater", "greater_equal"))
    __eq__, __ne__ = _operator("equal", "bool"), _operator("not_equal", "bool")  # type: ignore[assignment]
    __and__, __or__ = _operator("logical_and", "bool"), _operator("logical_or", "bool")
    __invert__ = _operator("logical_not", "bool")


class Info(NamedTuple):
    """The limits of a dtype."""

    max: float
    smallest_normal: float
    eps: float


INFO = {
    "float32": Info((2 - 2.0**-23) * 2.0**127, 2.0**-126, 2.0**-23),
    "float64": Info(sys.float_info.max, sys.float_info.min, sys.float_info.epsilon),
}


def _astype(x: TracedScalar, dtype: str, *, copy: bool = True) -> TracedScalar:  # noqa: ARG001
    if x.dtype == dtype:
        return x
    cast = x.tracer.operation("astype", x, dtype=dtype)
    cast.shape = x.shape
    return cast


def _total(how: str) -> Callable[..., TracedScalar]:
    return lambda x, *, axis, keepdims: x.tracer.total(how, x)


class TracedNamespace:
    """The part of the array API that kernels are written in, of traced scalars; `sum`, `min` and `max` of a group."""

    float32, float64 = "float32", "float64"
    finfo = staticmethod(INFO.__getitem__)
    astype = staticmethod(_astype)
    where, sqrt = staticmethod(_operator("where")), staticmethod(_operator("sqrt"))
    ones_like, zeros_like = staticmethod(_operator("one")), staticmethod(_operator("zero"))
    reciprocal = staticmethod(lambda x: 1.0 / x)
    abs = staticmethod(lambda x: TracedNamespace.where(x < 0.0, -x, x))
    isfinite = staticmethod(lambda x: x - x == 0.0)
    # NaN stays; a y that is one is not among what kernels compare with
    minimum = staticmethod(lambda x, y: TracedNamespace.where(x > y, y, x))
    maximum = staticmethod(lambda x, y: TracedNamespace.where(x < y, y, x))
    sum, min, max = staticmethod(_total("sum")), staticmethod(_total("min")), staticmethod(_total("max"))


class TracedSums:
    """`Sums` of a program: a `Reduction`."""

    each: Any = None

    def __init__(self, tracer: "Tracer", *, twice: bool = False) -> None:
        self.tracer, self.axes, self.twice = tracer, tracer.axes, twice
        """Whether numbers are as wide as their sums, and the anchor takes a pass of its own."""

    @property
    def weight(self) -> TracedScalar:
        """How many numbers there are."""
        return self.tracer.divisor

    def pivot(self, xp: Namespace, x: TracedScalar) -> TracedScalar:  # noqa: ARG002
        """The first number of each group."""
        return self.tracer.first(x)

    def mean(self, xp: Namespace, x: TracedScalar) -> TracedScalar:
        """The mean of each group."""
        return self.total(xp, x) / self.tracer.divisor

    def mean_product(self, xp: Namespace, x: TracedScalar, other: TracedScalar, *, ops: Ops = PURE) -> TracedScalar:
        """Of x * other."""
        return self.mean(xp, ops.multiply(x, other))

    def total(self, xp: Namespace, x: TracedScalar) -> TracedScalar:
        """The sum of each group."""
        total: TracedScalar = xp.sum(x, axis=self.axes, keepdims=True)
        return total

    def total_product(self, xp: Namespace, x: TracedScalar, other: TracedScalar, *, ops: Ops = PURE) -> TracedScalar:
        """Of x * other."""
        return self.total(xp, ops.multiply(x, other))

    def anchor(self, xp: Namespace, g: TracedScalar) -> TracedScalar | None:
        """The first number, or the mean."""
        first = self.pivot(xp, g)
        return first + self.mean(xp, g - first) if self.twice else first


class TracedWeightedSums(TracedSums):
    """Groups of a program whose numbers have weights, which add up to `weight` if that is known."""

    def __init__(
        self, tracer: "Tracer", each: TracedScalar, weight: TracedScalar | None = None, *, twice: bool = False
    ) -> None:
        super().__init__(tracer, twice=twice)
        self.each, self._weight = each, weight

    @property
    def weight(self) -> TracedScalar:
        """The sum of the weights of each group."""
        if self._weight is None:
            self._weight = self.tracer.total("sum", self.each)
        return self._weight

    def pivot(self, xp: Namespace, x: TracedScalar) -> TracedScalar:  # noqa: ARG002
        """The first number of each group that weighs something; 0 where none does."""
        return self.tracer.first(x, self.each)

    def mean(self, xp: Namespace, x: TracedScalar) -> TracedScalar:
        """The mean of each group; 0 where nothing weighs anything."""
        weight = self.weight
        mean: TracedScalar = self.total(xp, x * self.each) / positive(xp, weight)
        return mean

    def anchor(self, xp: Namespace, g: TracedScalar) -> TracedScalar | None:
        """None, or the sum of g over that of the weights."""
        return self.total(xp, g) / positive(xp, self.weight) if self.twice else None


OPERATORS = {
    "divide": "{} / {}",
    "negative": "-{}",
    "less": "{} < {}",
    "greater": "{} > {}",
    "greater_equal": "{} >= {}",
    "equal": "{} == {}",
    "not_equal": "{} != {}",
    "logical_and": "{} & {}",
    "logical_or": "{} | {}",
    "sqrt": "sqrt({})",
}
"""Operations that Python and C write alike."""


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

    @property
    def uses(self) -> list[str]:
        """The names of its arguments."""
        return [argument.name for argument in self.arguments if isinstance(argument, TracedScalar)]


class Total(NamedTuple):
    """What a loop makes of all numbers of a group."""

    how: str
    """"sum", "min" or "max"."""
    dtype: str
    level: int
    """The number of the loop."""
    of: str


class Written(NamedTuple):
    """What a program writes."""

    numbers: Sequence[TracedScalar] = ()
    """For each number of x, to the results."""
    of_groups: Sequence[TracedScalar] = ()
    """For each group."""
    of_parameters: Sequence[TracedScalar] = ()
    """Added up to the sums for parameters."""


class Loop(NamedTuple):
    """A loop over the numbers of each group: what it computes, and what for."""

    number: int
    totals: dict[int, Total]
    """What it makes of the group: total k is named t{k}."""
    sums: dict[int, str]
    """What is added to operands, by their numbers."""
    results: dict[int, str]
    """What is written to them."""
    statements: list[Statement]
    """All that this rests upon and that varies in a group, in the order in which it is computed."""
    values: list[str]
    """What is used of the group: totals, and statements that do not vary in it."""

    @property
    def operands(self) -> list[int]:
        """The numbers of those that it reads or writes."""
        reads = {each.arguments[0] for each in self.statements if each.operation == "read"}
        return sorted(reads | {*self.sums, *self.results})


class Tracer:
    """The statements of a program, as they come."""

    def __init__(self, axes: tuple[int, ...], operands: Sequence[Operand | None], *, wide: bool = False) -> None:
        self.axes, self.operands, self.wide = axes, operands, wide
        """`wide` says that everything is computed in float64."""
        self.totals: list[Total] = []
        self.statements: dict[str, Statement] = {}
        self.divisor = TracedScalar(self, "divisor", "float64", 0, varies=False)
        self.eps = TracedScalar(self, "eps", "float64", 0, varies=False)
        self.numbers = [None if operand is None else self._read(i, operand) for i, operand in enumerate(operands)]

    def loops(self, written: Written) -> list[Loop]:
        """All loops. Behind the operands that are read come the results, and then the sums for parameters."""
        results = dict(enumerate([number.name for number in written.numbers], len(self.operands)))
        sums = dict(enumerate(written.of_parameters, len(self.operands) + len(results)))
        levels = [*(total.level + 1 for total in self.totals), *(each.level for each in sums.values())]
        last, loops = max([0, *levels, *(each.level for each in written.numbers)]), []
        for loop in range(last + 1):
            totals = {k: self.totals[k] for k in self.totals_of(loop)}
            added = {i: number.name for i, number in sums.items() if number.level == loop}
            stored = results if loop == last else {}
            outcome = [*(total.of for total in totals.values()), *added.values(), *stored.values()]
            statements = [each for each in self.needed(outcome) if each.varies]
            used = dict.fromkeys([*outcome, *(name for each in statements for name in each.uses)])
            values = [name for name in used if self._is_of_group(name)]
            loops.append(Loop(loop, totals, added, stored, statements, values))
        return loops

    def totals_of(self, loop: int) -> list[int]:
        """The numbers of the totals that a loop ends with, in the order in which a program leaves them to the next."""
        return [k for k, total in enumerate(self.totals) if total.level == loop]

    def needed(self, names: Iterable[str]) -> list[Statement]:
        """The statements that these numbers rest upon, in the order in which they are computed."""
        found = set(names)
        for statement in reversed(self.statements.values()):
            if statement.name in found:
                found.update(statement.uses)
        return [statement for statement in self.statements.values() if statement.name in found]

    def _is_of_group(self, name: str) -> bool:
        """Whether it differs from group to group, and not within one."""
        if name in self.statements:
            return not self.statements[name].varies
        return name not in (self.eps.name, self.divisor.name)

    def operation(self, operation: str, *arguments: Any, dtype: str | None = None) -> TracedScalar:
        """A new number; of the widest of the dtypes of the arguments, if no other is named."""
        numbers = [argument for argument in arguments if isinstance(argument, TracedScalar)]
        if dtype is None:
            dtype = max(number.dtype for number in numbers if number.dtype != "bool")
        level, varies = max(number.level for number in numbers), any(number.varies for number in numbers)
        return self._state(operation, arguments, dtype, level, varies=varies)

    def first(self, x: TracedScalar, weights: TracedScalar | None = None) -> TracedScalar:
        """x at the first number of each group, or at the first that weighs something."""
        if not x.varies:
            return x
        of = self.statements[x.name]
        if of.operation == "read":
            if weights is None:
                return self._state("first", of.arguments, of.dtype, 0, varies=False)
            arguments = (*of.arguments, *self.statements[weights.name].arguments)
            return self._state("first_where", arguments, of.dtype, 0, varies=False)
        first = [self.first(each, weights) if isinstance(each, TracedScalar) else each for each in of.arguments]
        return self.operation(of.operation, *first, dtype=of.dtype)

    def total(self, how: str, x: TracedScalar) -> TracedScalar:
        """What all numbers of a group come to, which ends a loop."""
        self.totals.append(Total(how, x.dtype, x.level, x.name))
        return TracedScalar(self, f"t{len(self.totals) - 1}", x.dtype, x.level + 1, varies=False)

    def _read(self, i: int, operand: Operand) -> TracedScalar:
        dtype = "float64" if self.wide or operand.dtype == "float64" else "float32"
        number = self._state("read", (i,), dtype, 0, varies=operand.varies(self.axes))
        number.shape = operand.shape
        return number

    def _state(
        self, operation: str, arguments: tuple[Any, ...], dtype: str, level: int, *, varies: bool
    ) -> TracedScalar:
        number = TracedScalar(self, f"v{len(self.statements)}", dtype, level, varies=varies)
        self.statements[number.name] = Statement(level, varies, number.name, dtype, operation, arguments)
        return number
