"""The emitter for a processor: a trace printed as loops for numba.

Loops follow memory. In *rows* the innermost axis is one of the group: each group is read in one loop after another. In
*columns* it is not: a tile of groups that lie side by side is read row by row, with a vector of sums, and where a
group has several numbers in each row, its sums are added up in the end.

Names in the text: n{axis} is a size, p{i} the address of array i, s{i}_{axis} its step and b{i} where a group begins in
it; c{loop} are the totals of a loop before, g{m} what is written for each group; t{k} is a total, w{k} what it had some
rows before, v{k} another number.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from anynorm.executors.programs.trace import OPERATORS, Access, Loop, Statement, TracedScalar, Tracer, Written


class Kind(NamedTuple):
    """All that the text of a program depends upon besides the kernels: no size is among it.

    Axes are in the order of the loops: `kept` of the groups, `reduced` of their numbers, and those of a `tile`.
    """

    kept: int
    reduced: int
    tile: int
    """In rows 0. In columns 1, the axis of groups side by side; or 2, that and behind it an axis of the numbers of a
    group."""
    accesses: tuple[Access | None, ...]
    """Of the inputs, of the results, and of the sums for parameters."""
    inputs: int
    sums: int
    split: int | None = None
    """The axis of a group that several parts share; each loop is then a program of its own."""
    in_place: bool = False
    """Whether the first result lies where the first input does."""
    dtype: str = "float64"
    """Of what is written for each group."""

    @property
    def axes(self) -> tuple[int, ...]:
        """Those of the numbers of a group."""
        loops = range(self.kept, self.kept + self.reduced)
        return (*loops, self.kept + self.reduced + 1) if self.tile == 2 else tuple(loops)


class Program(NamedTuple):
    """The text of a program."""

    text: str
    totals: int
    """How many it leaves to the next; 0 where it is the last."""


def programs(kind: Kind, tracer: Tracer, written: Written, name: str) -> list[Program]:
    """One program; or one for each loop where parts share a group."""
    loops = tracer.loops(written)
    parts = [loops] if kind.split is None else [[loop] for loop in loops]
    printer = Columns if kind.tile else Rows
    return [printer(kind, tracer, part, written if part[-1] is loops[-1] else None).program(name) for part in parts]


PRINTED = OPERATORS | {"add": "{} + {}", "subtract": "{} - {}", "multiply": "{} * {}", "logical_not": "not {}"}
PRINTED |= {"where": "where({}, {}, {})", "one": "1.0", "zero": "0.0", "astype": "float({})"}
NARROW = {"where": "where_float32({}, {}, {})", "one": "single(1.0)", "zero": "single(0.0)", "astype": "single({})"}
"""What is printed in another way in float32."""
TOGETHER = 256
"""In columns so many rows are added one after another."""
SCRATCH, BEFORE, AFTER = 20, 40, 41
"""Where places of a program's own memory begin, and of what it takes from the loop before and leaves to the next."""


class Sum(NamedTuple):
    """A sum that a loop adds to."""

    term: str
    moves: bool
    """Whether there is one for each number along a row."""
    load: str
    store: str


class Rows:
    """Prints a program that goes through one group after another."""

    def __init__(self, kind: Kind, tracer: Tracer, loops: list[Loop], written: Written | None) -> None:
        """`written` is None where another program follows."""
        self.kind, self.tracer, self.loops, self.is_last = kind, tracer, loops, written is not None
        self.values = [number.name for number in written.of_groups] if written else []
        self.accesses = {i: access for i, access in enumerate(kind.accesses) if access is not None}
        self.sums = range(len(kind.accesses) - kind.sums, len(kind.accesses))
        self.inner = kind.kept + kind.reduced + kind.tile - 1
        self.across = self.inner - (kind.tile == 2)
        """The axis along a row, and that of the groups along it."""
        self.lines: list[str] = []
        self.depth = 1

    def program(self, name: str) -> Program:
        """The whole text."""
        kind, places = self.kind, list(self.accesses)
        if kind.in_place:
            places.remove(kind.inputs)
        arrays = [*(f"p{i}" for i in places), *(f"c{loop}" for loop in range(self.loops[0].number))]
        arrays += [f"g{m}" for m in range(len(self.values))] if self.is_last else ["partial"]
        sizes = [f"n{axis}" for axis in range(self.inner + 1)]
        for i, access in self.accesses.items():
            sizes += [f"s{i}_{axis}" for axis, step in enumerate(access.steps) if step == 2]
        sizes += [*(f"z{i}" for i in self.sums), "groups", "width", "group_step", "part_step"]
        for array in arrays:
            self._line(f"{array} = located({array}, offset)")
        with self._block(f"if {' | '.join(f'(p{i} & {_size(self.accesses[i].dtype) - 1})' for i in places)}:"):
            self._line("return 1")
        if kind.in_place:
            self._line(f"p{kind.inputs} = p0")
        self._body()
        self._line("return 0")
        arguments = ["start", "stop", "part", "low", "high", "offset", *sizes, "eps", "divisor", *arrays]
        text = "\n".join([f"def {name}({', '.join(arguments)}):", *self.lines, ""])
        return Program(text, 0 if self.is_last else len(self.loops[0].totals))

    def _body(self) -> None:
        needed = self.tracer.needed([*self.values, *(name for loop in self.loops for name in loop.values)])
        with self._block("for group in range(start, stop):"):
            self._bases("group")
            for k, total in enumerate(self.tracer.totals):
                if total.level < self.loops[0].number:
                    self._line(f"t{k} = {self._total_before(k)}")
            for loop in self.loops:
                for each in needed:
                    if not each.varies and max(each.level, self.loops[0].number) == loop.number:
                        self._statement(each, self._starts())
                for k in loop.totals:
                    self._line(f"t{k} = 0.0")
                self._loop(loop, range(self.kind.kept, self.inner), self._range(self.inner))
            self._end()

    def _loop(self, loop: Loop, outer: range, row: str) -> None:
        """A loop over the numbers of a group, or of a tile of groups: over the outer axes, and along a row."""
        if not loop.totals and not loop.operands:
            return
        depth = self.depth
        rows = self._nest(outer, {i: f"b{i}" for i in loop.operands})
        places = {i: _plus(place, self._step(i, self.inner, "j")) for i, place in rows.items()}
        sums = [self._total(k) for k in loop.totals]
        for i, name in loop.sums.items():
            moves = self.accesses[i].steps[-1] != 0
            sums.append(Sum(name, moves, self._load(i, places[i]), self._store(i, places[i])))
        still = {f"u{m}": total for m, total in enumerate(sums) if not total.moves}
        """Added up along a row first."""
        for register in still:
            self._line(f"{register} = 0.0")
        with self._block(f"for j in {row}:"):
            self._load_values(loop)
            for each in loop.statements:
                self._statement(each, places)
            for register, total in still.items():
                self._line(f"{register} = plus({register}, {total.term})")
            for total in sums:
                if total.moves:
                    self._line(total.store.format(f"{total.load} + {total.term}"))
            for i, name in loop.results.items():
                self._line(self._store(i, places[i]).format(name))
        self._end_row(loop)
        for register, total in still.items():
            self._line(total.store.format(f"{total.load} + {register}"))
        self.depth = depth

    def _total(self, k: int) -> Sum:
        """A total, as its loop adds it up."""
        return Sum(self.tracer.totals[k].of, moves=False, load=f"t{k}", store=f"t{k} = {{}}")

    def _load_values(self, loop: Loop) -> None:
        """What a loop uses of each group along a row; of one group it is known."""

    def _end_row(self, loop: Loop) -> None:
        """What is done behind each row."""

    def _starts(self) -> dict[int, str]:
        """Where the first number of a group lies."""
        return {i: f"b{i}" for i in self.accesses}

    def _total_before(self, k: int) -> str:
        """A total of a program before."""
        level = self.tracer.totals[k].level
        index = self.tracer.totals_of(level).index(k)
        return f"load_float64(c{level}, {index} * groups + group, {BEFORE})"

    def _end(self) -> None:
        """Write what there is for a group, or for the next program."""
        # where nobody wants it, it all goes to one place of the part
        for m, name in enumerate(self.values):
            place = "part * part_step + group * group_step"
            self._line(f"store_{self.kind.dtype}(g{m}, {place}, {name}, {AFTER + m})")
        totals = () if self.is_last else self.loops[0].totals
        for m, k in enumerate(totals):
            place = f"(part * {len(totals)} + {m}) * groups + group"
            self._line(f"store_float64(partial, {place}, t{k}, {AFTER})")

    def _line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    @contextmanager
    def _block(self, head: str) -> Iterator[None]:
        self._line(head)
        self.depth += 1
        yield
        self.depth -= 1

    def _range(self, axis: int) -> str:
        return "range(low, high)" if axis == self.kind.split else f"range(n{axis})"

    def _nest(self, axes: Iterable[int], places: Mapping[int, str], until: str = "") -> dict[int, str]:
        """Begin loops over these axes; where in the arrays they then are, from these places on.

        Loops that end early, `until` something is so, go through all parts of a group.
        """
        places = dict(places)
        for axis in axes:
            self._line(f"for i{axis} in {f'range(n{axis})' if until else self._range(axis)}:")
            self.depth += 1
            if until:
                self._line(f"if {until}:")
                self._line("    break")
            for i, place in places.items():
                if step := self._step(i, axis, f"i{axis}"):
                    self._line(f"o{i}_{axis} = {place} + {step}")
                    places[i] = f"o{i}_{axis}"
        return places

    def _bases(self, group: str, first: str = "") -> None:
        """Where a group begins in each array, by its index; or the first of a tile of groups."""
        rest, kept = group, range(self.kind.kept)
        for axis in reversed(kept):
            self._line(f"k{axis} = {rest} % n{axis}" if axis else f"k{axis} = {rest}")
            self._line(f"r{axis} = {rest} // n{axis}")
            rest = f"r{axis}"
        for i in self.accesses:
            terms = [self._step(i, axis, f"k{axis}") for axis in kept]
            terms += [self._step(i, self.across, first)] if first else []
            terms += [f"part * z{i}"] if i in self.sums else []
            self._line(f"b{i} = {_plus(*terms)}")

    def _step(self, i: int, axis: int, index: str) -> str:
        """How far an index into an axis is from its start, or "" where that is no way."""
        i = self._memory(i)  # the compiler sees that a number is written where it was read
        return ("", index, f"{index} * s{i}_{axis}")[self.accesses[i].steps[axis]]

    def _load(self, i: int, place: str) -> str:
        return f"load_{self.accesses[i].dtype}(p{i}, {place}, {self._memory(i)})"

    def _store(self, i: int, place: str) -> str:
        """To be formatted with the value."""
        return f"store_{self.accesses[i].dtype}(p{i}, {place}, {{}}, {self._memory(i)})"

    def _memory(self, i: int) -> int:
        """The number of the memory that an array lies in, alone but for a result in the place of an input."""
        return 0 if self.kind.in_place and i == self.kind.inputs else i

    def _statement(self, statement: Statement, places: Mapping[int, str]) -> None:
        """A statement; what it reads is at these places."""
        name, operation, arguments = statement.name, statement.operation, statement.arguments
        if operation == "first_where":
            self._first_where(name, *({i: places[i]} for i in arguments))
        elif operation in ("read", "first"):
            self._line(f"{name} = {self._load(arguments[0], places[arguments[0]])}")
        else:
            form, narrow = PRINTED[operation], statement.dtype == "float32"
            kept = "single({!r})" if narrow else "{!r}"
            names = [each.name if isinstance(each, TracedScalar) else kept.format(float(each)) for each in arguments]
            self._line(f"{name} = {(NARROW.get(operation, form) if narrow else form).format(*names)}")

    def _first_where(self, name: str, x: dict[int, str], weights: dict[int, str]) -> None:
        """The first number of a group that weighs something; 0 where there is none."""
        self._line(f"{name} = 0.0")
        self._line("found = False")
        depth, places = self.depth, self._nest(self.kind.axes, x | weights, until="found")
        (i,), (j,) = x, weights
        with self._block(f"if {self._load(j, places[j])} > 0.0:"):
            self._line(f"{name} = {self._load(i, places[i])}")
            self._line("found = True")
        self.depth = depth


class Columns(Rows):
    """Prints a program that goes through a tile of groups side by side after another, row by row.

    What there is for the groups of a tile is kept in slots, as many numbers as a row has: `run` for each group.
    """

    def _body(self) -> None:
        kind = self.kind
        self.run = f"n{self.inner}" if kind.tile == 2 else "1"
        totals = [f"{letter}{k}" for loop in self.loops for k in loop.totals for letter in "tw"]
        names = [*totals, *(name for loop in self.loops for name in loop.values)]
        self.slots = {name: m for m, name in enumerate(dict.fromkeys(names))}
        self._line(f"tiles = (n{self.across} + width - 1) // width")
        self._line(f"slot = width * {self.run}")
        self._line(f"scratch = empty({max(len(self.slots), 1)} * slot)")
        for name, m in self.slots.items():
            self._line(f"a_{name} = scratch.ctypes.data + {8 * m} * slot")
        with self._block("for item in range(start, stop):"):
            self._line("first = item % tiles * width")
            self._line("other = item // tiles")
            self._line(f"columns = min(width, n{self.across} - first)")
            self._line(f"count = columns * {self.run}")
            self._bases("other", "first")
            for loop in self.loops:
                last = self.is_last and loop is self.loops[-1]
                if loop.values or (last and self.values):
                    self._of_groups(loop.values, self.values if last else [])
                if loop.totals:
                    self._line("rows = 0")
                    with self._block("for j in range(count):"):
                        for k in loop.totals:
                            self._line(self._into_slot(f"t{k}", "j").format("0.0"))
                            self._line(self._into_slot(f"w{k}", "j").format("0.0"))
                self._loop(loop, range(kind.kept, self.across), "range(count)")
                if loop.totals:
                    self._add(loop, "t", "w")
                    if kind.tile == 2:
                        self._add_up(loop)
            if not self.is_last:
                self._of_groups([], [f"t{k}" for k in self.loops[0].totals])

    def _of_groups(self, values: list[str], ends: list[str]) -> None:
        """Compute what there is for each group of a tile: what is kept in slots, and what is written in the end."""
        statements = [each for each in self.tracer.needed([*values, *ends]) if not each.varies]
        used = {*values, *ends, *(name for each in statements for name in each.uses)}
        with self._block("for a in range(columns):"):
            self._line(f"group = other * n{self.across} + first + a")
            for k, total in enumerate(self.tracer.totals):
                if f"t{k}" in used:
                    before = total.level < self.loops[0].number
                    self._line(f"t{k} = {self._total_before(k) if before else self._slot(f't{k}', f'a * {self.run}')}")
            for each in statements:
                self._statement(each, self._starts())
            if ends:
                self._end()
            if values:
                with self._block(f"for r in range({self.run}):"):
                    for name in values:
                        self._line(self._into_slot(name, f"a * {self.run} + r").format(name))

    def _end_row(self, loop: Loop) -> None:
        """So that no more than `TOGETHER` numbers are added one after another, and then so many of these."""
        if loop.totals:
            self._line("rows += 1")
            with self._block(f"if rows % {TOGETHER} == 0:"):
                self._add(loop, "w", "t")

    def _add(self, loop: Loop, to: str, of: str) -> None:
        """Move totals along a row to those of another kind: t is of the last rows, w of those before."""
        with self._block("for j in range(count):"):
            for k in loop.totals:
                added = f"{self._slot(f'{to}{k}', 'j')} + {self._slot(f'{of}{k}', 'j')}"
                self._line(self._into_slot(f"{to}{k}", "j").format(added))
                self._line(self._into_slot(f"{of}{k}", "j").format("0.0"))

    def _add_up(self, loop: Loop) -> None:
        """The totals of the numbers that a group has in a row."""
        with self._block("for a in range(columns):"):
            for k in loop.totals:
                self._line(f"t{k} = 0.0")
            with self._block(f"for r in range({self.run}):"):
                for k in loop.totals:
                    self._line(f"t{k} += {self._slot(f't{k}', f'a * {self.run} + r')}")
            for k in loop.totals:
                self._line(self._into_slot(f"t{k}", f"a * {self.run}").format(f"t{k}"))

    def _total(self, k: int) -> Sum:
        name = f"t{k}"
        return Sum(self.tracer.totals[k].of, moves=True, load=self._slot(name, "j"), store=self._into_slot(name, "j"))

    def _load_values(self, loop: Loop) -> None:
        for name in loop.values:
            statement = self.tracer.statements.get(name)
            form = {"bool": "{} != 0.0", "float32": "single({})"}.get(statement.dtype if statement else "", "{}")
            self._line(f"{name} = {form.format(self._slot(name, 'j'))}")

    def _starts(self) -> dict[int, str]:
        return {i: _plus(f"b{i}", self._step(i, self.across, "a")) for i in self.accesses}

    def _slot(self, name: str, index: str) -> str:
        return f"load_float64(a_{name}, {index}, {SCRATCH + self.slots[name]})"

    def _into_slot(self, name: str, index: str) -> str:
        """To be formatted with the value."""
        return f"store_float64(a_{name}, {index}, {{}}, {SCRATCH + self.slots[name]})"


def _plus(*terms: str) -> str:
    return " + ".join(term for term in terms if term) or "0"


def _size(dtype: str) -> int:
    """The bytes of a number."""
    return int(dtype.lstrip("abcdefghijklmnopqrstuvwxyz") or 8) // 8
