"""The emitter for a processor: a trace printed as loops for numba, in float64, rounded once where they are written.

Loops follow memory. In *rows* the innermost axis is one of the group: each group is read in one loop after another. In
*columns* it is not: a tile of groups that lie side by side is read row by row, with a vector of sums, and where a
group has some numbers in each row (`interleaved`), its sums are added up in the end.
"""

from anynorm.executors.programs.columns import Columns
from anynorm.executors.programs.printer import Kind, Program, Written
from anynorm.executors.programs.rows import Rows
from anynorm.executors.programs.trace import Tracer


def programs(kind: Kind, tracer: Tracer, written: Written, name: str) -> list[Program]:
    """One program; or one for each loop where parts share a group."""
    last = max([tracer.last, *(each.level for each in (*written.numbers, *written.of_parameters))])
    loops = [range(last + 1)] if kind.split is None else [range(loop, loop + 1) for loop in range(last + 1)]
    printer = Columns if kind.columns else Rows
    return [printer(kind, tracer, written, some, last).program(name) for some in loops]
