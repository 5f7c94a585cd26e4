"""The speed to reach, and what of it a report reaches."""

from collections.abc import Iterator, Sequence

from candidates import PEER
from measure import Outcome, Row

NUMPY, TORCH = "anynorm, NumPy, numba", "anynorm, PyTorch, numba"
MIB = 2**20


def ratios(rows: Sequence[Row], row: Row, name: str) -> Iterator[tuple[str, float, float]]:
    """For a candidate of a row: what its time is divided by, the ratio, and the most that it may be."""
    if row.dtype != "float32":
        return
    outcome, most = row.outcomes.get(name, Outcome()), _most(row, name)
    measured = {
        PEER: outcome.to_peer,
        "copy": None if row.gradient or not outcome.bandwidth else 1 / outcome.bandwidth,
        "formula": outcome.to_formula,
        "no weights": _to_unweighted(rows, row, name),
    }
    for to, ratio in measured.items():
        if ratio is not None and to in most:
            yield to, ratio, most[to]


def _most(row: Row, name: str) -> dict[str, float]:
    nbytes, in_numpy = 4, name == NUMPY
    for n in row.shape:
        nbytes *= n
    if row.shape in ((8, 64), (32, 64)):
        return {"formula": 1.0 if row.gradient else 0.7} if in_numpy else {PEER: 2.0}
    if nbytes < MIB:
        return {}
    if "masked" in row.work:
        return {"no weights": 1.5} if in_numpy else {}
    beyond_cache = nbytes >= 64 * MIB
    batch_norm = row.norm == "batch_norm"
    if beyond_cache:
        copy = 1.7 if batch_norm else 1.2
        return {PEER: 0.5, "copy": copy} if in_numpy else {PEER: 0.6}
    if row.gradient:
        return {PEER: (0.6 if batch_norm else 1.2) if in_numpy else 1.3}
    slower = row.norm == "layer_norm" or "channels last" in row.work
    return {PEER: 1.2 if slower else 1.0, "copy": 1.4} if in_numpy else {PEER: 1.2}


def _to_unweighted(rows: Sequence[Row], row: Row, name: str) -> float | None:
    for other in rows:
        if row.work == f"{other.work}, random half masked" and row.dtype == other.dtype:
            ms, without = (each.outcomes.get(name, Outcome()).ms for each in (row, other))
            return ms / without if ms and without else None
    return None
