"""What mypy, strict, and pyright infer for a user: they read this file, and nothing runs it."""

from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

import anynorm

Floats = NDArray[np.float32]
Vector = np.ndarray[tuple[int], np.dtype[np.float32]]


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


def step(x: "np.ndarray[tuple[int, int], np.dtype[np.float32]]", gamma: Vector) -> None:
    """The statistics of one array update and join those that began with another."""
    running, batch = anynorm.RunningStats.init(3, like=gamma), anynorm.moments(x, axis=0)
    assert_type(running.update(batch).merge(running), anynorm.RunningStats[Vector])
    assert_type(anynorm.moments(gamma, axis=0).merge(batch), anynorm.Moments[Vector])


def begin(x: Floats, batches: list[Floats]) -> None:
    """Class methods infer the arrays from what they are given; what is loaded needs no annotation."""
    assert_type(anynorm.RunningStats.init(3, like=x), anynorm.RunningStats[Floats])
    assert_type(anynorm.Moments.over(batches, axis=0), anynorm.Moments[Floats])
    assert_type(anynorm.WeightNorm.from_weight(x).weight, Floats)
    running = anynorm.RunningStats.load("running.npz")
    assert_type(running, anynorm.RunningStats[Any])
    weight = anynorm.WeightNorm.load("weight.npz", like=x)
    assert_type(weight.to(x), anynorm.WeightNorm[Any])
    batch = anynorm.Moments.load("moments.npz")
    assert_type(batch.merge(batch), anynorm.Moments[Any])
    states = anynorm.load("states.npz")
    assert_type(states, dict[str, Any])
