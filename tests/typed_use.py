"""What mypy, strict, infers for a user: it reads this file, and nothing runs it."""

from typing import assert_type

import numpy as np
from numpy.typing import NDArray

import anynorm

Floats = NDArray[np.float32]


def use(x: Floats, gamma: NDArray[np.float64]) -> None:
    """A result has the type of x, whatever gamma has; moments come where they are asked for."""
    assert_type(anynorm.layer_norm(x, gamma), Floats)
    assert_type(anynorm.rms_norm(x, gamma), Floats)
    assert_type(anynorm.weight_norm(x, gamma), Floats)
    w, b = anynorm.fold(x, gamma, None, None, moments=anynorm.moments(x, axis=0))
    assert_type((w, b), tuple[Floats, Floats])
    y, batch = anynorm.normalize(x, axis=0, return_moments=True)
    assert_type(batch, anynorm.Moments[Floats])
    assert_type(batch.std(correction=1), Floats)
    assert_type(anynorm.Moments.over([x], axis=0, weights=np.isfinite, dtype="float64"), anynorm.Moments[Floats])
    running = anynorm.RunningStats.init((3,), like=x, debias=True).update(batch)
    assert_type(running, anynorm.RunningStats[Floats])
    assert_type(anynorm.batch_norm(y, moments=running), Floats)
    assert_type(
        anynorm.batch_norm(x, moments=running, return_moments=True), tuple[Floats, anynorm.RunningStats[Floats]]
    )
    assert_type(anynorm.group_norm(x, groups=3, return_moments=True), tuple[Floats, anynorm.Moments[Floats]])
    assert_type(anynorm.instance_norm(x, moments=running, return_moments=True)[1], anynorm.RunningStats[Floats])
    assert_type(anynorm.denormalize(y, gamma, axis=0, moments=batch), Floats)
    assert_type(anynorm.center(x, axis=0, return_moments=True), tuple[Floats, anynorm.Moments[Floats]])


def differentiate(x: Floats, gamma: Floats) -> None:
    """A pullback gives one gradient for each array that was passed, of its type."""
    y, pullback = anynorm.vjp(anynorm.layer_norm, x, gamma, None, eps=1e-3)
    assert_type(y, Floats)
    assert_type(pullback(y), tuple[Floats, Floats, None])
    (y, batch), pull = anynorm.vjp(anynorm.batch_norm, x, return_moments=True)
    assert_type(batch, anynorm.Moments[Floats])
    (dx,) = pull(y)
    assert_type(dx, Floats)
