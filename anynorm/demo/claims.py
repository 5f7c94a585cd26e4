"""What the papers claim, as experiments of this size: which networks to train, and what of the claim is then seen."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from anynorm.demo.training import History, Run

BATCH_SIZE = 32
LEARNING_RATE = 0.05

LARGE_RATE = 1.0
STALLS, TRAINS = 0.5, 0.9
"""Test accuracies below and above which a network did not train, and did; at an ordinary rate all pass 0.95."""

SMALL_BATCH = 2
KEPT = 0.02
"""The test accuracy that may be lost before it counts."""

RATES = (0.05, 0.1, 0.2, 0.4)
REPEATS = 3
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
        _small_batch(seed, min(3, most_epochs)),
        _few_steps(seed, min(5, most_epochs)),
    )


def _large_rate(seed: int, epochs: int) -> Experiment:
    def judge(histories: Sequence[History]) -> Finding:
        plain, bn = histories
        trains = bn.accuracies[-1] > TRAINS
        stalls = plain.accuracies[-1] < STALLS
        verdict = "seen" if trains and stalls else "not seen"
        return Finding(
            verdict,
            f"At a learning rate of {LARGE_RATE}, after {_count(epochs, 'epoch')}, the plain network has a loss of "
            f"{plain.epoch_losses[-1]:.2f} and recognises {plain.accuracies[-1]:.1%}; with BN, "
            f"{bn.epoch_losses[-1]:.2f} and {bn.accuracies[-1]:.1%}.",
        )

    return Experiment(
        "BN trains at a learning rate where the plain network diverges or stalls",
        tuple(Run(method, seed, LARGE_RATE, BATCH_SIZE, epochs) for method in ("plain", "BN")),
        judge,
    )


def _small_batch(seed: int, epochs: int) -> Experiment:
    def judge(histories: Sequence[History]) -> Finding:
        accuracies = [history.accuracies[-1] for history in histories]
        gn, gn_small, bn, bn_small = accuracies
        keeps, loses = gn - gn_small <= KEPT, bn - bn_small > KEPT
        verdict = "seen" if keeps and loses else "seen in part" if loses and gn_small > bn_small else "not seen"
        return Finding(
            verdict,
            f"From batches of {BATCH_SIZE} to batches of {SMALL_BATCH}, {_count(epochs, 'epoch')} each and the "
            f"learning rate in proportion, GN goes from {gn:.1%} to {gn_small:.1%}, BN from {bn:.1%} to "
            f"{bn_small:.1%}. The dense layer leaves BN only {SMALL_BATCH} values to average.",
        )

    sizes = ((BATCH_SIZE, LEARNING_RATE), (SMALL_BATCH, LEARNING_RATE * SMALL_BATCH / BATCH_SIZE))
    return Experiment(
        f"At batch size {SMALL_BATCH} GN keeps its accuracy and BN loses some",
        tuple(Run(method, seed, rate, size, epochs) for method in ("GN", "BN") for size, rate in sizes),
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
        steps = [history.steps_to(TARGET_LOSS) for history in histories]
        means = [_mean(steps[start : start + REPEATS]) for start in range(0, len(steps), REPEATS)]
        plain, wn = means[: len(RATES)], means[len(RATES) :]
        fewer = [rate for rate, without, weights in zip(RATES, plain, wn, strict=True) if weights < FEWER * without]
        verdict = "seen" if min(wn) < FEWER * min(plain) else "seen in part" if fewer else "not seen"
        each = "; ".join(
            f"{rate:g}: plain {_steps(without)}, WN {_steps(weights)}"
            for rate, without, weights in zip(RATES, plain, wn, strict=True)
        )
        return Finding(
            verdict,
            f"Steps to a loss of {TARGET_LOSS:g}, mean of {REPEATS} runs, by learning rate: {each}. Clearly fewer with "
            f"WN at {', '.join(map(str, fewer)) or 'none of them'}. Each at its best rate: plain {_steps(min(plain))}, "
            f"WN {_steps(min(wn))}.",
        )

    return Experiment("WN reaches a given loss in fewer steps than the plain weights", runs, judge)


def _mean(steps: Sequence[int | None]) -> float:
    """The mean; infinite if a run never got there."""
    return sum(float("inf") if each is None else each for each in steps) / len(steps)


def _steps(mean: float) -> str:
    return "not in every run" if mean == float("inf") else f"{mean:.0f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
