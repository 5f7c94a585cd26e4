"""What the text of programs for numba is made of, whatever the order of their loops."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from anynorm.executors.programs.trace import Statement, TracedScalar, Tracer

Lines = list[str]


class Access(NamedTuple):
    """How an array is gone through."""

    dtype: str
    steps: tuple[int, ...]
    """For each axis 0 where it stays, 1 from one number to the next, and 2 by a step that is told at run time."""


class Kind(NamedTuple):
    """All that the text of a program depends upon besides the kernels: no size is among it."""

    rank: int
    axes: tuple[int, ...]
    """The axes of a group."""
    accesses: tuple[Access | None, ...]
    """Of the inputs, of the results, and of the sums for parameters."""
    inputs: int
    results: int
    columns: bool = False
    interleaved: bool = False
    split: int | None = None
    """The axis of the groups that several parts share; each loop is then a program of its own."""
    in_place: int | None = None
    """The input whose memory is that of the first result."""
    of_groups: str = "float64"
    """The dtype of what is written for each group."""


class Written(NamedTuple):
    """What a program writes."""

    numbers: Sequence[TracedScalar] = ()
    """For each number of x, to the results."""
    of_groups: Sequence[TracedScalar] = ()
    """For each group."""
    of_parameters: Sequence[TracedScalar] = ()
    """Added up to the sums for parameters."""


class Program(NamedTuple):
    """The text of a program."""

    text: str
    totals: int
    """How many it leaves to the next; 0 where it is the last."""
    sizes: int
    """How many sizes and steps it takes."""
    arrays: int
    """How many addresses it takes."""


PRINTED = {
    "add": "{} + {}",
    "subtract": "{} - {}",
    "multiply": "{} * {}",
    "divide": "{} / {}",
    "negative": "-{}",
    "less": "{} < {}",
    "greater": "{} > {}",
    "greater_equal": "{} >= {}",
    "equal": "{} == {}",
    "not_equal": "{} != {}",
    "logical_and": "{} & {}",
    "logical_or": "{} | {}",
    "logical_not": "not {}",
    "where": "where({}, {}, {})",
    "sqrt": "sqrt({})",
}
CONSTANTS = {"one": "1.0", "zero": "0.0"}


class Printer:
    """What the two orders of loops have in common."""

    def __init__(self, kind: Kind, tracer: Tracer, written: Written, loops: range, last: int) -> None:
        self.kind, self.tracer, self.written, self.loops, self.last = kind, tracer, written, loops, last
        self.is_last = last in loops
        self.lines: Lines = []
        self.depth = 1
        self.kept = [axis for axis in range(kind.rank) if axis not in kind.axes]
        sums = range(kind.inputs + kind.results, len(kind.accesses))
        self.sums = list(zip(sums, written.of_parameters, strict=True))
        self.across = kind.rank - 1 - kind.interleaved
        """In columns, the axis of the groups side by side."""
        self.used = self._used()

    def program(self, name: str) -> Program:
        """The whole text."""
        places = [i for i, access in enumerate(self.kind.accesses) if access is not None]
        shared = self.kind.inputs if self.kind.in_place is not None else None
        arrays = [f"p{i}" for i in places if i != shared]
        before = [f"c{loop}" for loop in range(self.loops.start)]
        after = [f"g{m}" for m in range(len(self.written.of_groups))] if self.is_last else ["partial"]
        names = [*arrays, *before, *after]
        sizes = self._sizes(places)
        head = (
            f"def {name}(start, stop, part, low, high, offset, {', '.join(sizes)}, eps, divisor, {', '.join(names)}):"
        )
        for each in names:
            self._line(f"{each} = located({each}, offset)")
        odd = [f"p{i} & {size - 1}" for i in places if i != shared and (size := self._size(i)) > 1]
        self._line(f"if {' | '.join(f'({each})' for each in odd)}:")
        self._line("    return 1")
        if shared is not None:
            self._line(f"p{shared} = p{self.kind.in_place}")
        self._body()
        self.depth = 1
        self._line("return 0")
        totals = 0 if self.is_last else len(self._totals(self.loops.start))
        return Program("\n".join([head, *self.lines, ""]), totals, len(sizes), len(names))

    def _body(self) -> None:
        raise NotImplementedError

    def _size(self, i: int) -> int:
        """The bytes of a number."""
        access = self.kind.accesses[i]
        assert access is not None
        digits = access.dtype.strip("abcdefghijklmnopqrstuvwxyz")
        return int(digits) // 8 if digits else 1

    # what is read of the trace

    def _totals(self, loop: int) -> list[int]:
        return [k for k, total in enumerate(self.tracer.totals) if total.level == loop]

    def _outcome(self, loop: int) -> list[str]:
        """The names of what a loop is there for."""
        names = [self.tracer.totals[k].of for k in self._totals(loop)]
        names += [each.name for _, each in self.sums if self._loop_of(each) == loop]
        return names + [each.name for each in self.written.numbers if loop == self.last]

    def _loop_of(self, each: TracedScalar) -> int:
        return each.level

    def _needed(self, names: Iterable[str], *, varies: bool | None = None) -> list[Statement]:
        """The statements that these rest upon, in their order; those alone that vary within a group, or do not."""
        found: set[str] = set()
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            statement = self.tracer.statements.get(name)
            if statement is None or name in found or (varies is True and not statement.varies):
                continue
            found.add(name)
            waiting += [each.name for each in statement.arguments if isinstance(each, TracedScalar)]
        return [each for name, each in self.tracer.statements.items() if name in found]

    def _of_groups(self, loop: int) -> list[str]:
        """The values for each group, totals included, that a loop uses."""
        names = self._outcome(loop)
        for statement in self._needed(self._outcome(loop), varies=True):
            names += [each.name for each in statement.arguments if isinstance(each, TracedScalar)]
        return [name for name in dict.fromkeys(names) if self._is_of_group(name)]

    def _is_of_group(self, name: str) -> bool:
        """Whether it differs from group to group, and not within one."""
        statement = self.tracer.statements.get(name)
        if statement is None:
            return name not in ("eps", "divisor")
        return not statement.varies and statement.operation not in CONSTANTS

    def _varies(self, name: str) -> bool:
        statement = self.tracer.statements.get(name)
        return statement is not None and statement.varies

    def _used(self) -> set[int]:
        """The operands that are read or written."""
        names = [name for loop in self.loops for name in self._outcome(loop)]
        names += [each.name for each in self.written.of_groups]
        statements = self._needed([*names, *(total.of for total in self.tracer.totals)])
        found = {i for each in statements if each.operation in ("read", "first", "first_where") for i in each.arguments}
        return found | set(range(self.kind.inputs, len(self.kind.accesses)))

    # how it is printed

    def _line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def _sizes(self, places: list[int]) -> list[str]:
        """The sizes and the steps: of the axes, of each array, of the sums, and of what there is for each group."""
        names = [f"n{axis}" for axis in range(self.kind.rank)]
        for i in places:
            access = self.kind.accesses[i]
            assert access is not None
            names += [f"s{i}_{axis}" for axis, step in enumerate(access.steps) if step == 2]
        names += [f"z{i}" for i, _ in self.sums]
        return [*names, "groups", "width", "group_step", "part_step"]

    def _step(self, i: int, axis: int, index: str) -> str:
        """How far an index into an axis is from its start, or "" where that is no way."""
        access = self.kind.accesses[i]
        assert access is not None
        step = access.steps[axis]
        return "" if step == 0 else index if step == 1 else f"{index} * s{i}_{axis}"

    def _load(self, i: int, index: str) -> str:
        access = self.kind.accesses[i]
        assert access is not None
        return f"load_{access.dtype}(p{i}, {index}, {self._place(i)})"

    def _store(self, i: int, index: str, value: str) -> None:
        access = self.kind.accesses[i]
        assert access is not None
        self._line(f"store_{access.dtype}(p{i}, {index}, {value}, {self._place(i)})")

    def _place(self, i: int) -> int:
        shared = self.kind.in_place
        return shared if shared is not None and i == self.kind.inputs else i

    @staticmethod
    def _reads(statement: Statement) -> bool:
        return statement.operation in ("read", "first")

    def _print(self, statement: Statement, read: str) -> None:
        """A statement; `read` is what a "read" or a "first" of it is."""
        if self._reads(statement):
            value = read
        elif statement.operation in CONSTANTS:
            return
        else:
            value = PRINTED[statement.operation].format(*map(self._name, statement.arguments))
        self._line(f"{statement.name} = {value}")

    def _name(self, each: Any) -> str:
        """An argument of a statement."""
        if not isinstance(each, TracedScalar):
            return repr(float(each))
        statement = self.tracer.statements.get(each.name)
        return CONSTANTS.get(statement.operation, each.name) if statement else each.name

    def _indices(self, group: str, kept: list[int]) -> None:
        """The index into each of these axes, of the number of a group."""
        rest = group
        for axis in reversed(kept[1:]):
            self._line(f"k{axis} = {rest} % n{axis}")
            self._line(f"r{axis} = {rest} // n{axis}")
            rest = f"r{axis}"
        for axis in kept[:1]:
            self._line(f"k{axis} = {rest}")

    def _bases(self, axes: list[int], more: str = "") -> None:
        """Where the numbers of a group begin, in each array."""
        for i, access in enumerate(self.kind.accesses):
            if access is None or i not in self.used:
                continue
            terms = [self._step(i, axis, f"k{axis}") for axis in axes]
            terms += [self._step(i, int(more), "first")] if more else []
            terms += [f"part * z{i}"] if any(i == j for j, _ in self.sums) else []
            self._line(f"b{i} = {' + '.join(term for term in terms if term) or '0'}")

    def _range(self, axis: int) -> str:
        return "range(low, high)" if axis == self.kind.split else f"range(n{axis})"

    def _loops(self, axes: Sequence[int], operands: Sequence[int]) -> dict[int, str]:
        """Begin the loops over these axes; where each of these operands then is."""
        where = {i: f"b{i}" for i in operands}
        for axis in axes:
            self._line(f"for i{axis} in {self._range(axis)}:")
            self.depth += 1
            for i in operands:
                if step := self._step(i, axis, f"i{axis}"):
                    self._line(f"o{i}_{axis} = {where[i]} + {step}")
                    where[i] = f"o{i}_{axis}"
        return where

    def _apart(
        self, statements: list[Statement], moving: set[int], names: Iterable[str] = ()
    ) -> tuple[list[Statement], list[Statement]]:
        """The statements that stay the same along a row, and those that rest upon what moves there."""
        moved = set(names)
        for each in statements:
            arguments = {one.name for one in each.arguments if isinstance(one, TracedScalar)}
            if each.name in moved or arguments & moved or (self._reads(each) and each.arguments[0] in moving):
                moved.add(each.name)
        return [each for each in statements if each.name not in moved], [
            each for each in statements if each.name in moved
        ]

    def _of_group(self, statements: list[Statement], column: str = "") -> None:
        """What there is for a group: the one that begins at the base, or some columns further."""

        def begin(i: int) -> str:
            step = self._step(i, self.across, column) if column else ""
            return f"b{i} + {step}" if step else f"b{i}"

        for each in statements:
            if each.operation == "first_where":
                self._first_where(each, {i: begin(i) for i in each.arguments})
            else:
                self._print(each, self._load(each.arguments[0], begin(each.arguments[0])) if self._reads(each) else "")

    def _first_where(self, statement: Statement, where: dict[int, str]) -> None:
        """The first number of a group that weighs something; 0 where there is none."""
        x, weights = statement.arguments
        self._line(f"{statement.name} = 0.0")
        self._line("missing = True")
        before = self.depth
        for axis in self.kind.axes:
            self._line(f"for f{axis} in range(n{axis}):")
            self.depth += 1
            self._line("if not missing:")
            self._line("    break")
            for i in where:
                if step := self._step(i, axis, f"f{axis}"):
                    self._line(f"q{i}_{axis} = {where[i]} + {step}")
                    where[i] = f"q{i}_{axis}"
        self._line(f"if {self._load(weights, where[weights])} > 0.0:")
        self._line(f"    {statement.name} = {self._load(x, where[x])}")
        self._line("    missing = False")
        self.depth = before

    def _operands(self, loop: int) -> list[int]:
        """Those that a loop reads and writes."""
        found = {
            each.arguments[0] for each in self._needed(self._outcome(loop), varies=True) if each.operation == "read"
        }
        found |= {i for i, each in self.sums if self._loop_of(each) == loop}
        if loop == self.last:
            found |= {self.kind.inputs + r for r in range(self.kind.results)}
        return sorted(found)


OWN = "part * part_step + group * group_step"
"""Where what there is for a group goes: to its place, or all to one place of the part, where nobody wants it."""
SCRATCH, PLACES_BEFORE, PLACES_AFTER = 20, 40, 41
"""Where places of a program's own memory begin, and of what it takes from the loop before and leaves to the next."""
