"""Training: stochastic gradient descent with momentum, at a rate that falls in a straight line to zero."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from anynorm import RunningStats
from anynorm.demo.backends import Backend
from anynorm.demo.digits import TESTED, TRAINED, Digits
from anynorm.demo.layers import cross_entropy
from anynorm.demo.network import METHODS, Layer, Method, forward, initial_layers, initial_running
from anynorm.kernels import Array, Namespace

MOMENTUM = 0.9
WINDOW = 20
"""The loss of one small batch says little: this many are averaged."""


class Run(NamedTuple):
    """One network to train. Runs of one seed start from the same weights and see the digits in the same order."""

    method: str
    seed: int
    learning_rate: float
    batch_size: int
    epochs: int
    target: float | None = None
    """The epoch that first reaches this loss is the last."""

    @property
    def batches(self) -> int:
        """The steps of an epoch; a last batch that would not be full is left out."""
        return TRAINED // self.batch_size

    @property
    def steps(self) -> int:
        """The steps of all epochs."""
        return self.epochs * self.batches


@dataclass(frozen=True)
class History:
    """What came of a run."""

    losses: tuple[tuple[float, ...], ...] = ()
    """For each epoch, the training loss of every batch."""
    accuracies: tuple[float, ...] = ()
    """After each epoch, the share of the test digits that is recognised."""
    seconds: float = 0.0

    @property
    def epoch_losses(self) -> list[float]:
        """The mean training loss of each epoch."""
        return [float(np.mean(each)) for each in self.losses]

    def epochs_to(self, accuracy: float) -> int | None:
        """The first epoch after which the test accuracy was as high as this; None if it never was."""
        return next((epoch for epoch, each in enumerate(self.accuracies, 1) if each >= accuracy), None)

    def steps_to(self, loss: float) -> int | None:
        """The first step after which the training loss, over a window, was as low as this; None if it never was."""
        steps = np.concatenate([np.asarray(each) for each in self.losses])
        if steps.size < WINDOW:
            return None
        reached = np.flatnonzero(np.convolve(steps, np.full(WINDOW, 1 / WINDOW), mode="valid") <= loss)
        return int(reached[0]) + WINDOW if reached.size else None


class State(NamedTuple):
    """All that a step changes."""

    layers: tuple[Layer, ...]
    velocity: tuple[Layer, ...]
    running: tuple[RunningStats[Array] | None, ...]


class Trainer:
    """The digits on a device, and the compiled functions that train networks on them."""

    def __init__(self, backend: Backend, digits: Digits) -> None:
        self._backend = backend
        self._digits = Digits(*map(backend.to_array, digits))
        self._step = {name: self._compiled(_step, method) for name, method in METHODS.items()}
        self._hits = {name: self._compiled(_hits, method) for name, method in METHODS.items()}

    def train(self, run: Run, advance: Callable[[int], None] = lambda _: None) -> History:
        """Train one network; `advance` is told how many steps were done, `run.steps` in all."""
        history, state = History(), self._start(run)
        random, start = np.random.default_rng(run.seed), time.perf_counter()
        # a network that diverges is a result, and no reason to warn of every overflow
        with np.errstate(all="ignore"):
            while len(history.losses) < run.epochs:
                state, losses = self._epoch(run, len(history.losses), state, random.permutation(TRAINED))
                history = History(
                    (*history.losses, losses),
                    (*history.accuracies, self._accuracy(run, state)),
                    time.perf_counter() - start,
                )
                advance(run.batches)
                if run.target is not None and history.steps_to(run.target) is not None:
                    break
        advance(run.steps - len(history.losses) * run.batches)
        return history

    def _compiled(self, function: Callable[..., Any], method: Method) -> Callable[..., Any]:
        return self._backend.compile(partial(function, self._backend.xp, method))

    def _start(self, run: Run) -> State:
        method = METHODS[run.method]
        layers = initial_layers(method, self._backend.to_array, run.seed)
        rest = _each(self._backend.xp.zeros_like, layers)
        return State(layers, rest, initial_running(method, layers))

    def _epoch(self, run: Run, epoch: int, state: State, order: Any) -> tuple[State, tuple[float, ...]]:
        losses = []
        for step in range(run.batches):
            chosen = order[step * run.batch_size : (step + 1) * run.batch_size].astype(np.int32)
            state, loss = self._step[run.method](
                state,
                self._digits.train_images,
                self._digits.train_labels,
                self._backend.to_array(chosen),
                run.learning_rate * (1 - (epoch * run.batches + step) / run.steps),
            )
            losses.append(loss)
        return state, tuple(float(loss) for loss in losses)

    def _accuracy(self, run: Run, state: State) -> float:
        hits = self._hits[run.method](state.layers, state.running, self._digits.test_images, self._digits.test_labels)
        return int(hits) / TESTED


def _step(
    xp: Namespace, method: Method, state: State, images: Array, labels: Array, chosen: Array, rate: float
) -> tuple[State, Array]:
    """The state after one batch, and the loss before it."""
    images, labels = (xp.take(each, chosen, axis=0) for each in (images, labels))
    logits, moments, network_pullback = forward(xp, method, state.layers, images)
    loss, loss_pullback = cross_entropy(xp, logits, labels)
    gradients = network_pullback(loss_pullback(1.0))
    velocity = _each(lambda v, gradient: MOMENTUM * v + gradient, state.velocity, gradients)
    layers = _each(lambda parameter, v: parameter - rate * v, state.layers, velocity)
    running = tuple(
        None if old is None else old.update(batch) for old, batch in zip(state.running, moments, strict=True)
    )
    return State(layers, velocity, running), loss


def _hits(
    xp: Namespace,
    method: Method,
    layers: tuple[Layer, ...],
    running: tuple[RunningStats[Array] | None, ...],
    images: Array,
    labels: Array,
) -> Array:
    """How many images are recognised."""
    logits, _, _ = forward(xp, method, layers, images, running)
    hits = xp.argmax(logits, axis=1) == xp.argmax(labels, axis=1)
    return xp.sum(xp.astype(hits, xp.int32))


def _each(function: Callable[..., Array], *networks: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The function of every number of the networks, layer by layer."""
    return tuple(
        Layer(*(None if parts[0] is None else function(*parts) for parts in zip(*layers, strict=True)))
        for layers in zip(*networks, strict=True)
    )
