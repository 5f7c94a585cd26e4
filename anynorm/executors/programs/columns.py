"""Columns: a tile of groups that lie side by side is read row by row, with a vector of sums."""

from anynorm.executors.programs.printer import OWN, PLACES_AFTER, PLACES_BEFORE, SCRATCH, Printer
from anynorm.executors.programs.trace import Statement, TracedScalar


class Columns(Printer):
    """A tile of groups side by side after another, row by row."""

    def _body(self) -> None:
        kind = self.kind
        self.run = f"n{kind.rank - 1}" if kind.interleaved else "1"
        """How many numbers of a group are side by side."""
        self.outer = [axis for axis in kind.axes if axis < self.across]
        self.others = [axis for axis in self.kept if axis != self.across]
        slots: dict[str, None] = {f"t{k}": None for loop in self.loops for k in self._totals(loop)}
        for loop in self.loops:
            slots |= dict.fromkeys(self._of_groups(loop))
            slots |= dict.fromkeys(each.name for each in self._ahead(loop))
        self.slots = {name: k for k, name in enumerate(slots)}
        self._line(f"tiles = (n{self.across} + width - 1) // width")
        self._line(f"room = width * {self.run}")
        self._line(f"scratch = empty({max(len(self.slots), 1)} * room)")
        self._line("h = scratch.ctypes.data")
        for name, k in self.slots.items():
            self._line(f"a_{name} = h + {8 * k} * room")
        self._line("for item in range(start, stop):")
        self.depth += 1
        self._line("tile = item % tiles")
        self._line("other = item // tiles")
        self._indices("other", self.others)
        self._line("first = tile * width")
        self._line(f"columns = min(width, n{self.across} - first)")
        self._line(f"count = columns * {self.run}")
        self._bases(self.others, more=str(self.across))
        for loop in self.loops:
            self._values(loop)
            self._preload(loop)
            self._loop(loop)
        if not self.is_last:
            self._partial()

    def _slot(self, name: str, index: str) -> str:
        return f"load_float64(a_{name}, {index}, {SCRATCH + self.slots[name]})"

    def _into(self, name: str, index: str, value: str) -> None:
        self._line(f"store_float64(a_{name}, {index}, {value}, {SCRATCH + self.slots[name]})")

    def _ahead(self, loop: int) -> list[Statement]:
        """The reads of a loop that are the same in every row."""
        return [
            each
            for each in self._needed(self._outcome(loop), varies=True)
            if each.operation == "read" and not self._moves(each.arguments[0])
        ]

    def _moves(self, i: int) -> bool:
        """Whether an operand differs from row to row."""
        access = self.kind.accesses[i]
        assert access is not None
        return any(access.steps[axis] for axis in self.outer)

    def _group_statements(self, names: list[str]) -> None:
        """What there is for the group in column a."""
        statements = [each for each in self._needed(names) if not each.varies]
        arguments = {each.name for each in statements for each in each.arguments if isinstance(each, TracedScalar)}
        for k, total in enumerate(self.tracer.totals):
            if f"t{k}" in arguments or f"t{k}" in names:
                if total.level < self.loops.start:
                    index = self._totals(total.level).index(k)
                    at = f"{index} * groups + other * n{self.across} + first + a"
                    self._line(f"t{k} = load_float64(c{total.level}, {at}, {PLACES_BEFORE})")
                else:
                    self._line(f"t{k} = {self._slot(f't{k}', f'a * {self.run}')}")
        self._of_group(statements, column="a")

    def _values(self, loop: int) -> None:
        """What a loop uses of each group, written out along the tile; and at last what there is for each group."""
        names, of_groups = self._of_groups(loop), [each.name for each in self.written.of_groups if loop == self.last]
        if not names and not of_groups:
            return
        self._line("for a in range(columns):")
        self.depth += 1
        self._group_statements([*names, *of_groups])
        if of_groups:
            self._line(f"group = other * n{self.across} + first + a")
        for m, each in enumerate(self.written.of_groups if of_groups else ()):
            self._line(f"store_{self.kind.of_groups}(g{m}, {OWN}, {self._name(each)}, {PLACES_AFTER + m})")
        # the totals of this program are in their place
        names = [
            name for name in names if not (name[0] == "t" and self.tracer.totals[int(name[1:])].level in self.loops)
        ]
        if self.kind.interleaved and names:
            self._line(f"for r in range({self.run}):")
            self.depth += 1
        for name in names:
            self._into(name, f"a * {self.run} + r" if self.kind.interleaved else "a", name)
        self.depth -= 1 + (self.kind.interleaved and bool(names))

    def _preload(self, loop: int) -> None:
        """What is the same in every row, written out along the tile."""
        for each in self._ahead(loop):
            if loop > self.loops.start and any(each in self._ahead(before) for before in range(self.loops.start, loop)):
                continue
            i = each.arguments[0]
            across = self._step(i, self.across, "a")
            self._line("for a in range(columns):")
            self.depth += 1
            terms = [f"b{i}", across]
            if self.kind.interleaved:
                self._line(f"for r in range({self.run}):")
                self.depth += 1
                terms.append(self._step(i, self.kind.rank - 1, "r"))
            at = " + ".join(term for term in terms if term)
            self._into(each.name, f"a * {self.run} + r" if self.kind.interleaved else "a", self._load(i, at))
            self.depth -= 1 + self.kind.interleaved

    def _loop(self, loop: int) -> None:
        if not self._outcome(loop):
            return
        totals, operands = (
            self._totals(loop),
            [i for i in self._operands(loop) if self._moves(i) or i >= self.kind.inputs],
        )
        before = self.depth
        if totals:
            self._line("for j in range(count):")
            self.depth += 1
            for k in totals:
                self._into(f"t{k}", "j", "0.0")
            self.depth -= 1
        where = self._loops(self.outer, operands)
        sums = [(i, each) for i, each in self.sums if self._loop_of(each) == loop]

        def side_by_side(i: int) -> bool:
            access = self.kind.accesses[i]
            assert access is not None
            return bool(access.steps[-1])

        for i, _ in sums:
            if not side_by_side(i):
                self._line(f"u{i} = 0.0")
        ahead = {each.name for each in self._ahead(loop)}
        columns = self._of_groups(loop)

        def at(i: int) -> str:
            return f"{where[i]} + j" if side_by_side(i) else where[i]

        def printed(statements: list[Statement]) -> None:
            for each in statements:
                if each.name in ahead:
                    self._line(f"{each.name} = {self._slot(each.name, 'j')}")
                else:
                    self._print(each, self._load(each.arguments[0], at(each.arguments[0])) if self._reads(each) else "")

        statements = self._needed(self._outcome(loop), varies=True)
        same, other = self._apart(statements, {i for i in operands if side_by_side(i)}, [*ahead, *columns])
        printed(same)
        self._line("for j in range(count):")
        self.depth += 1
        for name in columns:
            statement = self.tracer.statements.get(name)
            kept = " != 0.0" if statement is not None and statement.dtype == "bool" else ""
            self._line(f"{name} = {self._slot(name, 'j')}{kept}")
        printed(other)
        for k in totals:
            self._into(f"t{k}", "j", f"{self._slot(f't{k}', 'j')} + {self.tracer.totals[k].of}")
        for i, each in sums:
            if side_by_side(i):
                self._store(i, at(i), f"{self._load(i, at(i))} + {each.name}")
            else:
                self._line(f"u{i} = plus(u{i}, {each.name})")
        if loop == self.last:
            for r, each in enumerate(self.written.numbers, self.kind.inputs):
                self._store(r, at(r), each.name)
        self.depth -= 1
        for i, _ in sums:
            if not side_by_side(i):
                self._store(i, where[i], f"{self._load(i, where[i])} + u{i}")
        self.depth = before
        if self.kind.interleaved and totals:
            self._line("for a in range(columns):")
            self.depth += 1
            for k in totals:
                self._line(f"w{k} = 0.0")
            self._line(f"for r in range({self.run}):")
            for k in totals:
                self._line(f"    w{k} += {self._slot(f't{k}', f'a * {self.run} + r')}")
            self._line(f"for r in range({self.run}):")
            self.depth += 1
            for k in totals:
                self._into(f"t{k}", f"a * {self.run} + r", f"w{k}")
            self.depth -= 2

    def _partial(self) -> None:
        """The totals, for the next loop."""
        totals = self._totals(self.loops.start)
        self._line("for a in range(columns):")
        self.depth += 1
        self._line(f"group = other * n{self.across} + first + a")
        for index, k in enumerate(totals):
            at = f"(part * {len(totals)} + {index}) * groups + group"
            self._line(f"store_float64(partial, {at}, {self._slot(f't{k}', f'a * {self.run}')}, {PLACES_AFTER})")
        self.depth -= 1
