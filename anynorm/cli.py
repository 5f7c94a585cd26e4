"""The command line: `anynorm demo` and `anynorm info`."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import anynorm
from anynorm import demo, info
from anynorm.demo.backends import BACKENDS, open_backend
from anynorm.demo.digits import TRAINED

_PLOT = Path("anynorm-demo.png")


class CommandError(Exception):
    """One sentence on why a command cannot run, and the exit code."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 1 if it cannot be done here, 2 if asked wrongly, 130 after Ctrl-C."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        if chosen.command == "demo":
            _demo(chosen)
        elif chosen.command == "info":
            _info()
        else:
            parser.print_help()
    except CommandError as error:
        print(f"anynorm {chosen.command}: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(f"anynorm {chosen.command}: interrupted", file=sys.stderr)
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="anynorm", description=f"{anynorm.__doc__}")
    parser.add_argument("--version", action="version", version=f"anynorm {anynorm.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="command")

    about = "train a small network on handwritten digits with each norm, and check what the papers claim"
    command = commands.add_parser("demo", help=about, description=about)
    command.add_argument("--backend", choices=BACKENDS, default="numpy", help="the array library (%(default)s)")
    command.add_argument("--device", help="the library's device: cpu, cuda:0, gpu:0, ... (its first)")
    command.add_argument("--plot", type=Path, help=f"the PNG to write ({_PLOT})")
    command.add_argument(
        "--epochs",
        type=_whole(1),
        default=10,
        help="how often each network sees the digits, but for those that fill no batch (%(default)s)",
    )
    command.add_argument("--learning-rate", type=_rate, default=0.05, help="the rate of the first step (%(default)s)")
    command.add_argument("--batch-size", type=_whole(1, TRAINED), default=32, help="digits in a step (%(default)s)")
    command.add_argument(
        "--seed", type=_whole(0), default=0, help="for the first weights and the order of the digits (%(default)s)"
    )

    about = "list the array libraries found, with their versions, devices and float dtypes that work"
    commands.add_parser("info", help=about, description=about)
    return parser


def _demo(chosen: argparse.Namespace) -> None:
    _require("rich", "matplotlib", "sklearn")
    plot = _PLOT if chosen.plot is None else chosen.plot
    _check_plot(plot, *(("--plot", 2) if plot is chosen.plot else (f"without --plot, {plot}", 1)))
    try:
        backend = open_backend(chosen.backend, chosen.device)
    except ImportError as error:
        raise CommandError(str(error), 1) from error
    except ValueError as error:
        raise CommandError(str(error), 2) from error
    try:
        demo.run(
            backend,
            seed=chosen.seed,
            epochs=chosen.epochs,
            learning_rate=chosen.learning_rate,
            batch_size=chosen.batch_size,
            plot_path=plot,
        )
    except OSError as error:
        raise CommandError(f"cannot write {error.filename or 'the output'}: {error.strerror}", 1) from error


def _info() -> None:
    _require("rich")
    info.run()


def _require(*packages: str) -> None:
    missing = [{"sklearn": "scikit-learn"}.get(each, each) for each in packages if not info.is_installed(each)]
    if missing:
        *others, last = missing
        named = f"{', '.join(others)} and {last}" if others else last
        raise CommandError(f"install {named} first: pip install {' '.join(missing)}", 1)


def _check_plot(path: Path, named: str, code: int) -> None:
    if path.suffix.lower() != ".png":
        raise CommandError(f"{named} must end in .png, got {path}", code)
    if path.is_dir():
        raise CommandError(f"{named} must name a file, got the folder {path}", code)
    if not path.parent.is_dir():
        raise CommandError(f"{named} must be in a folder that exists, got {path}", code)
    if not os.access(path.parent, os.W_OK):
        found = path.parent.absolute() if path == _PLOT else path
        raise CommandError(f"{named} must be in a folder that can be written to, got {found}", code)


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    rule = f"must be a whole number {f'of at least {least}' if most is None else f'from {least} to {most}'}"

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"{rule}, got {text}")
        return number

    return parse


def _rate(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, got {text}")
    return number
