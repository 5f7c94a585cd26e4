"""`anynorm demo`: a small network learns to read digits, once for each way to normalize it, on this library alone."""

import importlib
from collections.abc import Sequence
from pathlib import Path

import anynorm
from anynorm.demo import digits, plot, report
from anynorm.demo.backends import Backend
from anynorm.demo.claims import experiments
from anynorm.demo.network import METHODS
from anynorm.demo.training import History, Run, Trainer


def run(backend: Backend, *, seed: int, epochs: int, learning_rate: float, batch_size: int, plot_path: Path) -> None:
    """Train, and print the table; draw the curves; then check the claims of the papers, and print what was seen."""
    screen = report.Screen()
    screen.heading(
        f"anynorm {anynorm.__version__} on {digits.TRAINED + digits.TESTED:,} handwritten digits: "
        f"{backend.name} on {backend.device}, seed {seed}"
    )
    # threadpoolctl comes with scikit-learn; these products are too small for threads, which cost more than they bring
    limits = importlib.import_module("threadpoolctl").threadpool_limits(limits=1)
    with limits, anynorm.options(engine=backend.engine):
        trainer = Trainer(backend, digits.load())
        runs = [Run(method, seed, learning_rate, batch_size, epochs) for method in METHODS]
        histories = dict(zip(METHODS, _train(screen, trainer, "Training", runs), strict=True))
        screen.table(histories)
        if backend.name == "jax":
            screen.line("The seconds of JAX include the compilation of each network.")
        title = (
            f"Handwritten digits: {backend.name}, learning rate {learning_rate:g}, batch size {batch_size}, seed {seed}"
        )
        plot.save(histories, title, plot_path)
        screen.line(f"Curves: {plot_path}")

        checks = experiments(seed, epochs)
        runs = [each for check in checks for each in check.runs]
        found = iter(_train(screen, trainer, "Checking", runs))
        screen.heading("What the papers claim, at this small size:")
        for check in checks:
            finding = check.judge([next(found) for _ in check.runs])
            screen.finding(check.claim, finding)


def _train(screen: report.Screen, trainer: Trainer, verb: str, runs: Sequence[Run]) -> list[History]:
    histories = []
    with screen.bar(sum(each.steps for each in runs)) as bar:
        for each in runs:
            bar.say(f"{verb} {METHODS[each.method].title}")
            histories.append(trainer.train(each, bar.advance))
    return histories
