"""What the demonstration prints: a bar while it trains, a table, and findings."""

import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from anynorm.demo.claims import Finding
from anynorm.demo.network import METHODS
from anynorm.demo.training import History

if TYPE_CHECKING:
    from rich.progress import Progress

GOAL = 0.95
COLOURS = {"seen": "green", "seen in part": "yellow", "not seen": "red"}


class Bar:
    """A progress bar with a description."""

    def __init__(self, progress: "Progress", steps: int) -> None:
        self._progress = progress
        self._task = progress.add_task("", total=steps)

    def say(self, description: str) -> None:
        """Name what is now being done."""
        self._progress.update(self._task, description=description)

    def advance(self, steps: int) -> None:
        """So many more are done."""
        self._progress.advance(self._task, steps)


class Screen:
    """The terminal, or the file that stands in for it and gets neither bar nor control codes."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)

    def heading(self, text: str) -> None:
        """A line in bold."""
        self._console.print(text, style="bold", markup=False)

    def line(self, text: str) -> None:
        """A line; a path in it is not broken."""
        self._console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, steps: int) -> Iterator[Bar]:
        """A progress bar that is gone afterwards."""
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        width = max(len(method.title) for method in METHODS.values()) + len("Training ")
        columns = (
            TextColumn(f"{{task.description:{width}}}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        progress = Progress(*columns, console=self._console, transient=True, expand=True)
        # a bar that is disabled still leaves an empty line, in some versions of rich
        with progress if self._console.is_terminal else nullcontext():
            yield Bar(progress, steps)

    def table(self, histories: Mapping[str, History]) -> None:
        """How each network did."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.ROUNDED)
        table.add_column("network")
        for column in ("final loss", "test accuracy", f"epochs to {GOAL:.0%}", "seconds"):
            table.add_column(column, justify="right")
        for name, history in histories.items():
            epochs = history.epochs_to(GOAL)
            table.add_row(
                METHODS[name].title,
                f"{history.epoch_losses[-1]:.4f}",
                f"{history.accuracies[-1]:.1%}",
                "never" if epochs is None else str(epochs),
                f"{history.seconds:.1f}",
            )
        self._console.print(table)

    def finding(self, claim: str, finding: Finding) -> None:
        """A claim, whether it was seen, and what was."""
        from rich.text import Text

        verdict = (f" {finding.verdict}.", f"bold {COLOURS[finding.verdict]}")
        self._console.print(Text.assemble("\n", (claim, "italic"), ":", verdict))
        indent = "  "
        self.line(textwrap.fill(finding.evidence, self._console.width, initial_indent=indent, subsequent_indent=indent))
