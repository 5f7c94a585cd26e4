"""Measure candidates in turn, in one process: first whether the result is right, then how long it takes."""

import math
import random
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import formula
from candidates import COPY, PEER, Candidate
from devices import Device, Run
from formula import Arrays
from works import Work

import anynorm

TOLERANCE = {"float64": 1e-12, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Of the largest number of a result: what the formula may lose that is typed in the dtype itself."""
ROUNDS = (9, 200)
"""At least, and at most; 3 where no time is given."""
LEAST_SAMPLE = 1e-3
"""Seconds: what takes less is done several times in a row."""
PAUSE = 1e-2
"""Seconds before a turn: the threads of the candidate before may wait busily for more to do, but not for so long."""
ITEMSIZE = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
LEAST_MEMORY = 2**20
"""Bytes of x below which the system's pages are too coarse to tell."""


@dataclass
class Outcome:
    """How a candidate did; all but `failed` are missing where it failed, and `failed` where it did not."""

    failed: str | None = None
    """Why, in one sentence."""
    ms: float | None = None
    """The median."""
    quartiles_ms: tuple[float, float] | None = None
    to_peer: float | None = None
    """The time divided by that of the native kernel: the median over the rounds."""
    to_formula: float | None = None
    """The time divided by that of the formula typed by hand in the same library."""
    bandwidth: float | None = None
    """What must be read and written, by time, as a share of what the copy does."""
    extra_memory: float | None = None
    """The most that it takes beside what it is given, its results included, in sizes of x."""
    first_call_s: float | None = None
    """The first call, compiling included."""
    error: float | None = None
    """The largest, as a share of the largest number of that result."""


@dataclass
class Row:
    """A work in a dtype, and how each candidate did; one that has no such kernel is missing."""

    work: str
    norm: str
    shape: tuple[int, ...]
    gradient: bool
    dtype: str
    rounds: int = 0
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The row without what is missing."""
        outcomes = {
            name: {key: _brief(value) for key, value in asdict(outcome).items() if value is not None}
            for name, outcome in self.outcomes.items()
        }
        return asdict(self) | {"outcomes": outcomes}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Row":
        """The row that was written."""
        outcomes = {name: Outcome(**outcome) for name, outcome in value["outcomes"].items()}
        return cls(**(value | {"outcomes": outcomes, "shape": tuple(value["shape"])}))


def measure(work: Work, dtype: str, candidates: Sequence[Candidate], device: Device, seconds: float) -> Row:
    """Check every candidate, then let them take turns for about so many seconds."""
    row = Row(work.title, work.norm, work.shape, work.gradient, dtype)
    row.outcomes, runners = _start(work, dtype, candidates, device)
    row.rounds, samples = _take_turns(runners, device, seconds)
    # the arrays that must be read or written once, beside the two of a copy
    traffic = 2.0 if work.gradient else 1.0
    for runner in runners:
        outcome, times = row.outcomes[runner.candidate.name], samples[runner.candidate.name]
        outcome.ms = statistics.median(times) * 1e3
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        outcome.quartiles_ms = (low * 1e3, high * 1e3)
        if runner.candidate.name != COPY:
            hand = runner.candidate.formula
            outcome.to_peer = _ratio(times, samples[PEER]) if PEER in samples else None
            outcome.to_formula = _ratio(times, samples[hand]) if hand in samples else None
            outcome.bandwidth = traffic * _ratio(samples[COPY], times) if COPY in samples else None
    return row


class _Runner(NamedTuple):
    """A candidate whose result is right."""

    candidate: Candidate
    run: Run
    seconds: float
    """About, for one call."""


def _start(
    work: Work, dtype: str, candidates: Sequence[Candidate], device: Device
) -> tuple[dict[str, Outcome], list[_Runner]]:
    """Call each candidate for the first times; what fails is named, and goes no further."""
    numbers = device.numbers(work, dtype)
    expected = _expected(work, numbers, device)
    arrays: dict[str, Arrays | None] = {}
    outcomes: dict[str, Outcome] = {}
    runners: list[_Runner] = []
    for candidate in candidates:
        outcome = Outcome()
        try:
            if candidate.library not in arrays:
                arrays[candidate.library] = device.arrays(candidate.library, numbers)
            given = arrays[candidate.library]
            if given is None:
                continue
            with anynorm.options(engine=candidate.engine):
                runner = _first_calls(work, dtype, candidate, given, expected, device, outcome)
        except Exception as error:  # whatever a library raises, the others are measured
            outcomes[candidate.name] = Outcome(failed=sentence(error))
            continue
        if runner is not None:
            outcomes[candidate.name] = outcome
            runners.append(runner)
    return outcomes, runners


def _first_calls(
    work: Work,
    dtype: str,
    candidate: Candidate,
    arrays: Arrays,
    expected: tuple[Any, ...],
    device: Device,
    outcome: Outcome,
) -> _Runner | None:
    start = time.perf_counter()
    run = candidate.prepare(work, arrays, device)
    if run is None:
        return None
    results = run()
    device.wait(candidate.library, results)
    outcome.first_call_s = time.perf_counter() - start
    if candidate.name != COPY:
        outcome.error = _error(candidate, results, expected, device)
        if not outcome.error <= TOLERANCE[dtype]:
            raise ArithmeticError(
                f"the result must be within {TOLERANCE[dtype]:g} of the float64 formula, as a share of its largest "
                f"number, got {outcome.error:.1e}"
            )
    del results
    seconds = min(_sample(run, candidate, device, 1) for _ in range(2))
    outcome.extra_memory = _extra_memory(run, device, work.size * ITEMSIZE[dtype])
    return _Runner(candidate, run, seconds)


def _extra_memory(run: Run, device: Device, size: int) -> float | None:
    """In sizes of x; None where nobody can tell."""
    if size < LEAST_MEMORY:
        return None
    # JAX frees when it likes, and on a GPU has a pool of its own: its compiler is asked for the plan
    memory = run.planned_memory() if hasattr(run, "planned_memory") else device.extra_memory(run)
    return None if memory is None else memory / size


def _take_turns(runners: list[_Runner], device: Device, seconds: float) -> tuple[int, dict[str, list[float]]]:
    """The seconds of a call, for each candidate and round; in each round in another order."""
    samples: dict[str, list[float]] = {runner.candidate.name: [] for runner in runners}
    if not runners:
        return 0, samples
    numbers = {runner.candidate.name: math.ceil(LEAST_SAMPLE / max(runner.seconds, 1e-7)) for runner in runners}
    one_round = sum(PAUSE + runner.seconds * (1 + numbers[runner.candidate.name]) for runner in runners)
    least, most = ROUNDS
    rounds = max(least, min(most, int(seconds / one_round))) if seconds else 3
    order = random.Random(0)
    for _ in range(rounds):
        for runner in order.sample(runners, len(runners)):
            name = runner.candidate.name
            with anynorm.options(engine=runner.candidate.engine):
                samples[name].append(_sample(runner.run, runner.candidate, device, numbers[name]))
    return rounds, samples


def _sample(run: Run, candidate: Candidate, device: Device, number: int) -> float:
    """The seconds of a call, as the mean of so many in a row; a result is dropped before the next is computed."""
    time.sleep(PAUSE)
    device.wait(candidate.library, run())  # without counting: other arrays are in the cache
    start = time.perf_counter()
    for _ in range(number - 1):
        run()
    device.wait(candidate.library, run())
    return (time.perf_counter() - start) / number


def _expected(work: Work, numbers: Arrays, device: Device) -> tuple[Any, ...]:
    """The float64 formula's results, of the very numbers that the candidates are given."""
    home = device.reference.__name__
    wide = Arrays(*(None if each is None else device.widen(home, each) for each in numbers))
    if work.gradient:
        return formula.gradient(work, device.reference, wide)
    return (formula.forward(work, device.reference, wide)(*wide.differentiated(work)),)


def _error(candidate: Candidate, results: tuple[Any, ...], expected: tuple[Any, ...], device: Device) -> float:
    """The largest of the errors, each as a share of the largest number of that result; NaN where there is one."""
    worst = 0.0
    for result, right in zip(results, expected, strict=True):
        if tuple(result.shape) != tuple(right.shape):
            raise ValueError(f"a result must have shape {tuple(right.shape)}, got {tuple(result.shape)}")
        error = float(abs(device.widen(candidate.library, result) - right).max() / abs(right).max())
        worst = max(worst, error) if error == error else math.nan
        if math.isnan(worst):
            break
    return worst


def _ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The median over the rounds, in each of which both were measured within moments."""
    return statistics.median(time / other for time, other in zip(times, others, strict=True))


def _brief(value: Any) -> Any:
    """A number in four digits, and anything else as it is."""
    if isinstance(value, tuple):
        return [_brief(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def sentence(error: BaseException) -> str:
    """The first line of an error, without the folders of this machine."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = re.sub(r"(?<![\w.])(?:/[\w.+@-]+)+/([\w.+@-]+)", r"\1", lines[0])
    return text if len(text) <= 200 else f"{text[:199]}…"
