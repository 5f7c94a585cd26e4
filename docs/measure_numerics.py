"""Measure how far float32 normalization is from float64 of the same input, and print it as Markdown.

    pip install '.[torch,jax]' && python docs/measure_numerics.py

Every column gets the same float32 numbers, on the CPU. The error is the largest absolute one in the result, whose
standard deviation is 1; the reference is the formula in NumPy's widest float.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

import anynorm

Array = Any


class Measure(NamedTuple):
    """A norm, as this library, as PyTorch and as a formula in NumPy have it."""

    title: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    """The axes that share a mean and a variance."""
    norm: Callable[..., Array]
    torchs: Callable[..., Array]


MEASURES = (
    Measure(
        "Layer norm, shape (256, 1000)",
        (256, 1000),
        (1,),
        anynorm.layer_norm,
        lambda torch, x, eps: torch.nn.functional.layer_norm(x, x.shape[1:], eps=eps),
    ),
    Measure(
        "Batch norm, shape (16, 8, 28, 28)",
        (16, 8, 28, 28),
        (0, 2, 3),
        anynorm.batch_norm,
        lambda torch, x, eps: torch.nn.functional.batch_norm(x, None, None, training=True, eps=eps),
    ),
    Measure(
        "Batch norm, channels last, shape (65536, 8)",
        (65536, 8),
        (0,),
        anynorm.batch_norm,
        lambda torch, x, eps: torch.nn.functional.batch_norm(x, None, None, training=True, eps=eps),
    ),
)


class Input(NamedTuple):
    """Normal numbers of mean `offset` and standard deviation `scale`: 0 and 1 where the title says nothing."""

    title: str
    offset: float
    scale: float
    eps: float


INPUTS = (
    Input("mean 0", 0, 1, 1e-5),
    Input("mean 1e3", 1e3, 1, 1e-5),
    Input("mean 1e4", 1e4, 1, 1e-5),
    Input("mean 1e6", 1e6, 1, 1e-5),
    Input("std 1e30", 0, 1e30, 1e-5),
    Input("std 1e-30, eps 0", 0, 1e-30, 0),
)


def numbers(measure: Measure, given: Input) -> Array:
    """The input in float32."""
    x = np.random.default_rng(0).standard_normal(measure.shape)
    return (x * given.scale + given.offset).astype(np.float32)


def formula(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    """What one types: equation 1 in NumPy, in the dtype of x."""
    mean, var = x.mean(axis=axes, keepdims=True), x.var(axis=axes, keepdims=True)
    return (x - mean) / np.sqrt(var + eps)


def ours(library: str) -> Callable[[Measure, Array, float], Array]:
    """Of anynorm, on arrays of a library."""
    return lambda measure, x, eps: measure.norm(import_module(library).asarray(x), eps=eps)


def torchs(measure: Measure, x: Array, eps: float) -> Array:
    """Of PyTorch itself."""
    torch = import_module("torch")
    return measure.torchs(torch, torch.asarray(x), eps)


COLUMNS: dict[str, Callable[[Measure, Array, float], Array]] = {
    "anynorm, NumPy": ours("numpy"),
    "anynorm, PyTorch": ours("torch"),
    "anynorm, JAX": ours("jax.numpy"),
    "torch.nn.functional": torchs,
    "formula in NumPy": lambda measure, x, eps: formula(x, measure.axes, eps),
}


def error(column: str, measure: Measure, given: Input) -> float | None:
    """The largest absolute error; None where such an eps is refused."""
    x = numbers(measure, given)
    with np.errstate(all="ignore"):
        try:
            y = COLUMNS[column](measure, x, given.eps)
        except ValueError:
            return None
        expected = formula(x.astype(np.longdouble), measure.axes, given.eps)
        return float(np.max(np.abs(np.asarray(y, dtype=np.float64) - expected)))


def table(measure: Measure) -> list[str]:
    """The lines of a Markdown table: a row for each input, a column for each way to normalize it."""
    lines = [f"| input | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    for given in INPUTS:
        errors = (error(column, measure, given) for column in COLUMNS)
        lines.append(f"| {given.title} | {' | '.join(map(show, errors))} |")
    return lines


def show(number: float | None) -> str:
    """An error in two digits."""
    if number is None:
        return "eps refused"
    return f"{number:.1e}" if np.isfinite(number) else "NaN or inf"


def main() -> None:
    """Print every table, and the versions that it was measured with."""
    for measure in MEASURES:
        print(f"{measure.title}:", "", *table(measure), sep="\n", end="\n\n")
    versions = [f"{name} {import_module(name).__version__}" for name in ("numpy", "torch", "jax")]
    print(f"Measured with {', '.join(versions)}, on a CPU.")


if __name__ == "__main__":
    main()
