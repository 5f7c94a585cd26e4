"""What the papers claim, as experiments of this size: which networks to train, and what of the claim is then seen."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from anynorm.demo.training import History, Run

BATCH_SIZE = 32
LEARNING_RATE = 0.05
REPEATS = 3
"""The seeds that each claim is tried with."""

LARGE_RATE = 1.0
APART = 0.25
"""How far apart two test accuracies are if only one of two networks trains: most are 0.8 apart then."""

SMALL_BATCH = 2
KEPT = 0.02
"""The test accuracy that may be lost before it counts, of itself or beside that of another network."""

RATES = (0.05, 0.1, 0.2, 0.4)
TARGET_LOSS = 0.2
FEWER = 0.95
"""The share of the steps that is clearly fewer."""


class Finding(NamedTuple):
    """Whether a claim was seen, and what was."""

    verdict: str
    """seen, seen in part, or not seen."""
    evidence: str


class Experiment(NamedTuple):
    """A claim, the networks to train, and what their histories, in the same order, say of it."""

    claim: str
    runs: tuple[Run, ...]
    judge: Callable[[Sequence[History]], Finding]


def experiments(seed: int, most_epochs: int) -> tuple[Experiment, ...]:
    """All experiments, none of more than `most_epochs` epochs."""
    return (
        _large_rate(seed, min(5, most_epochs)),
        _small_batch(seed, min(1, most_epochs)),
        _few_steps(seed, min(5, most_epochs)),
    )


def _large_rate(seed: int, epochs: int) -> Experiment:
    def judge(histories: Sequence[History]) -> Finding:
        plain, bn = (_accuracies(histories[start::2]) for start in range(2))
        seen = [other - one > APART for one, other in zip(plain, bn, strict=True)]
        return Finding(
            _verdict(seen),
            f"At a learning rate of {LARGE_RATE}, after {_count(epochs, 'epoch')}, by seed: the plain network "
            f"recognises {_shares(plain)}; with BN, {_shares(bn)}. BN is ahead by more than {100 * APART:g} points "
            f"{_how_often(seen)}.",
        )

    return Experiment(
        "BN trains at a learning rate where the plain network diverges or stalls",
        tuple(
            Run(method, seed + repeat, LARGE_RATE, BATCH_SIZE, epochs)
            for repeat in range(REPEATS)
            for method in ("plain", "BN")
        ),
        judge,
    )


def _small_batch(seed: int, epochs: int) -> Experiment:
    def judge(histories: Sequence[History]) -> Finding:
        gn, gn_small, bn, bn_small = (_accuracies(histories[start::4]) for start in range(4))
        gn_lost, bn_lost = (
            [before - after for before, after in zip(*each, strict=True)] for each in ((gn, gn_small), (bn, bn_small))
        )
        keeps = [lost <= KEPT for lost in gn_lost]
        loses = [of_bn - max(of_gn, 0) > KEPT for of_gn, of_bn in zip(gn_lost, bn_lost, strict=True)]
        seen = [one and other for one, other in zip(keeps, loses, strict=True)]
        return Finding(
            _verdict(seen, in_part=any(loses)),
            f"From batches of {BATCH_SIZE} to batches of {SMALL_BATCH}, {_count(epochs, 'epoch')} each and the "
            f"learning rate in proportion, by seed: GN goes from {_shares(gn)} to {_shares(gn_small)}; BN from "
            f"{_shares(bn)} to {_shares(bn_small)}. GN keeps its accuracy {_how_often(keeps)}, and BN loses more "
            f"{_how_often(loses)}. The dense layer leaves BN only {SMALL_BATCH} values to average.",
        )

    sizes = ((BATCH_SIZE, LEARNING_RATE), (SMALL_BATCH, LEARNING_RATE * SMALL_BATCH / BATCH_SIZE))
    return Experiment(
        f"At batch size {SMALL_BATCH} GN keeps its accuracy and BN loses some",
        tuple(
            Run(method, seed + repeat, rate, size, epochs)
            for repeat in range(REPEATS)
            for method in ("GN", "BN")
            for size, rate in sizes
        ),
        judge,
    )


def _few_steps(seed: int, epochs: int) -> Experiment:
    runs = tuple(
        Run(method, seed + repeat, rate, BATCH_SIZE, epochs, TARGET_LOSS)
        for method in ("plain", "WN")
        for rate in RATES
        for repeat in range(REPEATS)
    )

    def judge(histories: Sequence[History]) -> Finding:
        found = [history.steps_to(TARGET_LOSS) for history in histories]
        steps = [math.inf if each is None else each for each in found]
        rows = [steps[start : start + REPEATS] for start in range(0, len(steps), REPEATS)]
        means = [sum(row) / REPEATS for row in rows]
        plain, wn = means[: len(RATES)], means[len(RATES) :]
        fewer = [rate for rate, without, weights in zip(RATES, plain, wn, strict=True) if weights < FEWER * without]
        best, best_wn = (
            [min(of_seed) for of_seed in zip(*some, strict=True)] for some in (rows[: len(RATES)], rows[len(RATES) :])
        )
        seen = [weights < FEWER * without for without, weights in zip(best, best_wn, strict=True)]
        each = "; ".join(
            f"{rate:g}: plain {_steps(without)}, WN {_steps(weights)}"
            for rate, without, weights in zip(RATES, plain, wn, strict=True)
        )
        return Finding(
            _verdict(seen, in_part=bool(fewer)),
            f"Steps to a loss of {TARGET_LOSS:g}, mean of {REPEATS} seeds, by learning rate: {each}. Clearly fewer "
            f"with WN at {', '.join(map(str, fewer)) or 'none of them'}; where each has its best rate, "
            f"{_how_often(seen)}: plain {_listed(best)}, WN {_listed(best_wn)}.",
        )

    return Experiment("WN reaches a given loss in fewer steps than the plain weights", runs, judge)


def _verdict(seen: Sequence[bool], *, in_part: bool = False) -> str:
    """What is said of a claim that was tried with several seeds."""
    if 2 * sum(seen) > len(seen):
        return "seen"
    return "seen in part" if in_part or any(seen) else "not seen"


def _how_often(seen: Sequence[bool]) -> str:
    return f"on {sum(seen)} of {len(seen)} seeds"


def _accuracies(histories: Sequence[History]) -> list[float]:
    return [history.accuracies[-1] for history in histories]


def _shares(accuracies: Sequence[float]) -> str:
    return ", ".join(f"{each:.1%}" for each in accuracies)


def _listed(steps: Sequence[float]) -> str:
    return ", ".join("never" if each == math.inf else f"{each:g}" for each in steps)


def _steps(mean: float) -> str:
    return "not in every run" if mean == math.inf else f"{mean:.0f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
