"""Measure every norm against a copy, the formula typed by hand and the libraries' own kernels, and write the report.

    nox -s bench
    nox --no-venv -s bench -- --device cuda

or `python docs/benchmarks`, where what is to be measured is installed.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # anynorm as it is in this checkout

import figure
from candidates import PEER, Candidate, candidates
from devices import DEVICES, TITLES, Device, MissingError, machine
from measure import Row, measure
from report import Report, digits, percent, write
from works import GIGABYTE, OF_EVERY_DTYPE, WORKS, Work

HERE = Path(__file__).resolve().parent
SHORT = 2**16
"""How many numbers an array has in a short run."""
SECONDS = {"cpu": 240.0, "cuda": 90.0}
"""Of taking turns; to compile and to check comes on top."""
BUSY = 0.7
"""The load of a machine, in the last minute, above which it is said to do other work."""


class BadArgumentError(Exception):
    """A sentence on what was asked wrongly."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; the exit code is 0, 1 if something is missing, 2 if asked wrongly, 130 after Ctrl-C.

    What was measured before Ctrl-C is written.
    """
    chosen = _parser().parse_args(arguments)
    try:
        _run(chosen)
    except BadArgumentError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except (MissingError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    return 0


def bench(
    chosen: argparse.Namespace, device: Device, *, begin: Callable[[Work, str], None], end: Callable[[Row], None]
) -> Report:
    """Measure what was chosen; `begin` and `end` are told of each row. After Ctrl-C there are those measured so far."""
    found = _candidates(chosen)
    tasks = _tasks(chosen)
    seconds = (chosen.seconds or SECONDS[chosen.device]) / len(tasks)
    report = Report(chosen.device, machine(device), chosen.quick, [])
    try:
        for work, dtype in tasks:
            begin(work, dtype)
            row = measure(work, dtype, found, device, 0.0 if chosen.quick and not chosen.seconds else seconds)
            report.rows.append(row)
            end(row)
    except KeyboardInterrupt:
        if not report.rows:
            raise
        report.stopped = True
    return report


def _run(chosen: argparse.Namespace) -> None:
    tasks = len(_tasks(chosen)) if _candidates(chosen) else 0
    device = DEVICES[chosen.device]()
    old = _old(chosen, device)
    if hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY:
        print(f"bench: other work is running here (load {os.getloadavg()[0]:.1f}): the times say less", file=sys.stderr)
    folder: Path = chosen.to
    folder.mkdir(parents=True, exist_ok=True)
    with _screen(tasks) as (begin, end):
        report = bench(chosen, device, begin=begin, end=end)
    report.keep(old)
    drawn = _installed("matplotlib") and figure.draw(report, folder / f"{chosen.device}.svg")
    write(report, folder, figure=drawn)
    figured = ", .json and .svg" if drawn else f" and .json, and no figure: that takes matplotlib and times of {PEER}"
    print(f"Wrote {folder / chosen.device}.md{figured}.")
    if report.stopped:
        raise KeyboardInterrupt


def _old(chosen: argparse.Namespace, device: Device) -> Sequence[Row]:
    """The rows of the report that is there, if they are to be kept."""
    path: Path = chosen.to / f"{chosen.device}.json"
    if not chosen.keep or not path.exists():
        return ()
    old = Report.read(path)
    if (old.machine, old.short) != (machine(device), chosen.quick):
        raise BadArgumentError("--keep must find a report of the same processor, versions and shapes, got another")
    return old.rows


def _installed(package: str) -> bool:
    return find_spec(package) is not None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    libraries = tuple(TITLES)
    parser = _Parser(prog="bench", description=f"{__doc__}".partition("\n")[0])
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="the kind of device (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="the works whose title has one of these texts")
    parser.add_argument("--library", nargs="+", choices=libraries, default=libraries, help="the libraries (all)")
    parser.add_argument("--dtypes", nargs="+", choices=DEVICES["cuda"].dtypes, help="the dtypes (all of the device)")
    parser.add_argument("--seconds", type=_seconds, help=f"of taking turns, in all ({SECONDS['cpu']:g} on the CPU)")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: does everything work?")
    parser.add_argument("--to", type=Path, default=HERE, metavar="FOLDER", help="where the report is written")
    parser.add_argument(
        "--keep", action="store_true", help="keep those rows of the report there that are not measured again"
    )
    return parser


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 86400:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0 and below a day, got {text}")
    return number


def _tasks(chosen: argparse.Namespace) -> list[tuple[Work, str]]:
    tasks: list[tuple[Work, str]] = []
    for dtype in _dtypes(chosen):
        works = (*GIGABYTE, *WORKS) if chosen.device == "cuda" else WORKS if dtype == "float32" else OF_EVERY_DTYPE
        tasks += [(work.shortened(SHORT) if chosen.quick else work, dtype) for work in works]
    if chosen.only is not None:
        only = [text.lower() for text in chosen.only]
        tasks = [(work, dtype) for work, dtype in tasks if any(text in work.title.lower() for text in only)]
    if not tasks:
        raise BadArgumentError(
            f"--only must be part of a title, as 'layer norm' or 'gradient', got {' '.join(chosen.only)}"
        )
    return list(dict.fromkeys(tasks))


def _dtypes(chosen: argparse.Namespace) -> list[str]:
    known = DEVICES[chosen.device].dtypes
    for dtype in chosen.dtypes or ():
        if dtype not in known:
            raise BadArgumentError(f"--dtypes on {chosen.device} must be among {', '.join(known)}, got {dtype}")
    return list(dict.fromkeys(chosen.dtypes or known))


def _candidates(chosen: argparse.Namespace) -> list[Candidate]:
    known = DEVICES[chosen.device].libraries
    libraries = tuple(library for library in known if library in chosen.library)
    if not libraries:
        raise BadArgumentError(f"--library on {chosen.device} must have one of {', '.join(known)}, got none of them")
    return candidates(chosen.device, libraries)


@contextmanager
def _screen(tasks: int) -> Iterator[tuple[Callable[[Work, str], None], Callable[[Row], None]]]:
    """A bar, and a table for each row when it is measured; nothing without rich."""
    if not _installed("rich"):
        yield lambda work, dtype: None, lambda row: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=tasks)

        def begin(work: Work, dtype: str) -> None:
            progress.update(bar, description=f"{work.title}, {dtype}")

        def end(row: Row) -> None:
            progress.advance(bar)
            console.print(f"\n{row.work}, {row.dtype}, {row.rounds} rounds", style="bold", markup=False)
            console.print(_table(row))
            for name, outcome in row.outcomes.items():
                if outcome.failed is not None:
                    console.print(f" {name} failed: {outcome.failed}", style="red", markup=False)

        yield begin, end


def _table(row: Row) -> Any:
    """How long, against PyTorch and the formula, at what share of the copy's bandwidth, and with how much memory."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("")
    for column in ("ms", "/ torch", "/ formula", "copy", "memory", "first s"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, outcome in row.outcomes.items():
        if outcome.failed is None:
            times = map(digits, (outcome.ms, outcome.to_peer, outcome.to_formula))
            rest = map(digits, (outcome.extra_memory, outcome.first_call_s))
            table.add_row(name, *times, percent(outcome.bandwidth), *rest)
    return table


if __name__ == "__main__":
    sys.exit(main())
