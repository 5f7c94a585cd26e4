"""Rows: each group is read in one loop after another."""

from anynorm.executors.programs.printer import OWN, PLACES_AFTER, PLACES_BEFORE, Printer
from anynorm.executors.programs.trace import Statement


class Rows(Printer):
    """Group after group."""

    def _body(self) -> None:
        self._line("for group in range(start, stop):")
        self.depth += 1
        self._indices("group", self.kept)
        self._bases(self.kept)
        for loop in range(self.loops.start):
            for index, k in enumerate(self._totals(loop)):
                self._line(f"t{k} = load_float64(c{loop}, {index} * groups + group, {PLACES_BEFORE})")
        wanted = [each.name for each in self.written.of_groups] if self.is_last else []
        wanted += [name for loop in self.loops for name in self._of_groups(loop)]
        of_groups = [each for each in self._needed(wanted) if not each.varies]
        self._of_group([each for each in of_groups if each.level <= self.loops.start])
        for loop in self.loops:
            self._loop(loop)
            self._of_group([each for each in of_groups if each.level == loop + 1 and loop + 1 <= self.last])
        if self.is_last:
            for m, each in enumerate(self.written.of_groups):
                self._line(f"store_{self.kind.of_groups}(g{m}, {OWN}, {self._name(each)}, {PLACES_AFTER + m})")
        else:
            totals = self._totals(self.loops.start)
            for index, k in enumerate(totals):
                at = f"(part * {len(totals)} + {index}) * groups + group"
                self._line(f"store_float64(partial, {at}, t{k}, {PLACES_AFTER})")

    def _loop(self, loop: int) -> None:
        if not self._outcome(loop):
            return
        totals, operands = self._totals(loop), self._operands(loop)
        statements = self._needed(self._outcome(loop), varies=True)
        *outer, inner = self.kind.axes
        before = self.depth
        for k in totals:
            self._line(f"t{k} = 0.0")
        where = self._loops(outer, operands)
        sums = [(i, each) for i, each in self.sums if self._loop_of(each) == loop]
        along = {i: self._step(i, inner, "j") for i in operands}
        for k in totals:
            self._line(f"w{k} = 0.0")
        for i, _ in sums:
            if not along[i]:
                self._line(f"u{i} = 0.0")

        def at(i: int) -> str:
            return f"{where[i]} + {along[i]}" if along[i] else where[i]

        def printed(statements: list[Statement]) -> None:
            for each in statements:
                self._print(each, self._load(each.arguments[0], at(each.arguments[0])) if self._reads(each) else "")

        same, other = self._apart(statements, {i for i in operands if along[i]})
        printed(same)
        self._line(f"for j in {self._range(inner)}:")
        self.depth += 1
        printed(other)
        for k in totals:
            self._line(f"w{k} = plus(w{k}, {self.tracer.totals[k].of})")
        for i, each in sums:
            if along[i]:
                self._store(i, at(i), f"{self._load(i, at(i))} + {each.name}")
            else:
                self._line(f"u{i} = plus(u{i}, {each.name})")
        if loop == self.last:
            for r, each in enumerate(self.written.numbers, self.kind.inputs):
                self._store(r, at(r), each.name)
        self.depth -= 1
        for i, _ in sums:
            if not along[i]:
                self._store(i, where[i], f"{self._load(i, where[i])} + u{i}")
        for k in totals:
            self._line(f"t{k} += w{k}")
        self.depth = before
