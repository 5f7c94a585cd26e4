"""The report: JSON with all that was measured, and Markdown with a table for each question."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import NamedTuple

from candidates import PEER, candidates
from devices import DEVICES
from measure import LEAST_MEMORY, Outcome, Row
from targets import NUMPY, TORCH, ratios

TITLES = {"cpu": "On a CPU", "cuda": "On a GPU"}


@dataclass
class Report:
    """The rows that were measured on a machine."""

    device: str
    machine: dict[str, str]
    """The processor, and the version of each library."""
    short: bool
    """Whether the shapes were cut down."""
    rows: list[Row]
    stopped: bool = False
    """Whether there was to be more."""

    def to_json(self) -> str:
        """All of it."""
        value = {"device": self.device, "machine": self.machine, "short": self.short}
        return json.dumps(value | {"rows": [row.to_json() for row in self.rows]}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Report":
        """The report that was written."""
        value = json.loads(path.read_text())
        return cls(**(value | {"rows": [Row.from_json(row) for row in value["rows"]]}))

    def keep(self, old: Sequence[Row]) -> None:
        """Take in those old rows that were not measured again."""
        again = {(row.work, row.dtype) for row in self.rows}
        self.rows = [row for row in old if (row.work, row.dtype) not in again] + self.rows

    @property
    def dtypes(self) -> list[str]:
        """Those that were measured."""
        return list(dict.fromkeys(row.dtype for row in self.rows))

    def named(self, row: Row) -> str:
        """A row's work, and its dtype where that is not the first of several."""
        return row.work if row.dtype == self.dtypes[0] else f"{row.work}, {row.dtype}"

    def columns(self) -> list[str]:
        """The candidates that took part, in their order; last those that are no longer measured."""
        known = [each.name for each in candidates(self.device, DEVICES[self.device].libraries)]
        present = [name for row in self.rows for name in row.outcomes]
        return [name for name in dict.fromkeys(known + present) if name in present]


def write(report: Report, folder: Path, *, figure: bool) -> None:
    """Write the Markdown and the JSON."""
    (folder / f"{report.device}.json").write_text(report.to_json())
    (folder / f"{report.device}.md").write_text(markdown(report, figure=figure))


class Question(NamedTuple):
    """What a table answers, and in what cells."""

    title: str
    text: str
    cell: Callable[[Outcome], str | None]
    of: Callable[[str], bool]
    """Whether it is asked of a candidate."""


def markdown(report: Report, *, figure: bool) -> str:
    """The page; with the figure, if there is one."""
    versions = [f"{name} {version}" for name, version in report.machine.items() if name != "processor"]
    lines = [f"# {TITLES[report.device]}", ""]
    lines += [f"Measured on {report.machine['processor']}, with {', '.join(versions)}, in {', '.join(report.dtypes)}."]
    lines += ["What the columns are, and how it is done: [benchmarks](index.md). All numbers: "]
    lines[-1] += f"[{report.device}.json]({report.device}.json)."
    if report.short:
        lines += ["", "**A short run, of small shapes: it shows that everything works, and not how fast.**"]
    if figure:
        lines += ["", f"![The time of each candidate, as a multiple of that of {PEER}]({report.device}.svg)"]
    for question in QUESTIONS:
        if found := table(report, question):
            lines += ["", f"## {question.title}", "", question.text, "", *found]
    return "\n".join([*lines, *reached(report), "", *failures(report), ""])


def table(report: Report, question: Question) -> list[str]:
    """The lines of a table, a row for each work and a column for each candidate; none if it has no numbers."""
    asked = [name for name in report.columns() if question.of(name)]
    cells = [[_cell(row.outcomes.get(name), question) for name in asked] for row in report.rows]
    answered = [any(text not in ("", "failed") for text in column) for column in zip(*cells, strict=True)]
    if question is QUESTIONS[0]:  # here a candidate that always failed is seen too
        answered = [True] * len(asked)
    if not any(answered):
        return []
    columns = [_code(name) for name in compress(asked, answered)]
    lines = [f"| work | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for row, texts in zip(report.rows, cells, strict=True):
        shown = list(compress(texts, answered))
        if any(shown):
            lines.append(f"| {' | '.join([report.named(row), *shown])} |")
    return lines


def reached(report: Report) -> list[str]:
    """Each ratio for which there is a speed to reach; none where there are no such candidates."""
    names = [name for name in report.columns() if name.startswith((NUMPY, TORCH))]
    found = [(row, name, *each) for row in report.rows for name in names for each in ratios(report.rows, row, name)]
    if not found:
        return []
    heads = list(dict.fromkeys(f"{name} / {to}" for name in names for _, by, to, _, _ in found if by == name))
    lines = ["", "## Speed to reach", ""]
    missed = sum(ratio > most for *_, ratio, most in found)
    lines += [
        f"The ratio of two times, and the most that it should be. In bold what is missed: {missed} of {len(found)}."
    ]
    lines += ["", f"| work | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for row in report.rows:
        cells = dict.fromkeys(heads, "")
        for of, name, to, ratio, most in found:
            if of is row:
                bold = "**" if ratio > most else ""
                cells[f"{name} / {to}"] = f"{bold}{digits(ratio)}{bold} ({most})"
        if any(cells.values()):
            lines.append(f"| {' | '.join([row.work, *cells.values()])} |")
    return lines


def failures(report: Report) -> list[str]:
    """Each candidate that failed, why, and at what."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in report.rows:
        for name, outcome in row.outcomes.items():
            if outcome.failed is not None:
                found[name, outcome.failed].append(report.named(row))
    if not found:
        return ["## What failed", "", "Nothing."]
    lines = ["## What failed", ""]
    for (name, reason), works in found.items():
        where = "everywhere" if len(works) == len(report.rows) else "; ".join(works)
        lines.append(f"- **{name}**: `{reason.replace('`', chr(39))}` ({where})")
    return lines


def digits(number: float | None) -> str | None:
    """A number in three digits."""
    if number is None:
        return None
    decimals = next((decimals for least, decimals in ((100, 0), (10, 1), (1, 2), (0.1, 3)) if number >= least), 4)
    return f"{number:.{decimals}f}"


def percent(share: float | None) -> str | None:
    """A share as a percentage."""
    return None if share is None else f"{share:.0%}"


def _cell(outcome: Outcome | None, question: Question) -> str:
    if outcome is None:
        return ""
    return "failed" if outcome.failed is not None else question.cell(outcome) or ""


def _code(name: str) -> str:
    return f"`{name}`" if name == PEER else name


QUESTIONS: Sequence[Question] = (
    Question("Time", "The median, in milliseconds.", lambda outcome: digits(outcome.ms), lambda name: True),
    Question(
        f"Against `{PEER}`",
        "The time divided by that of PyTorch's own kernel: below 1 is faster than it.",
        lambda outcome: digits(outcome.to_peer),
        lambda name: name != PEER,
    ),
    Question(
        "Against the formula typed by hand",
        "The time divided by that of the formula in the same library: below 1 is faster than it.",
        lambda outcome: digits(outcome.to_formula),
        lambda name: not name.startswith("formula"),
    ),
    Question(
        "Bandwidth",
        "The bytes that must be read and written once, by the time, as a share of what the copy does: 100% is as fast "
        "as memory goes.",
        lambda outcome: percent(outcome.bandwidth),
        lambda name: True,
    ),
    Question(
        "Peak extra memory",
        f"The most that is taken at a time beside what is given, results included, in sizes of x; only where x has "
        f"{LEAST_MEMORY // 2**20} MiB.",
        lambda outcome: digits(outcome.extra_memory),
        lambda name: True,
    ),
    Question(
        "First call",
        "In seconds, of what is compiled then. The works were done in this order, and what is compiled for one may "
        "serve the next.",
        lambda outcome: digits(outcome.first_call_s),
        lambda name: any(word in name for word in ("jit", "numba", "compiler")),
    ),
)
