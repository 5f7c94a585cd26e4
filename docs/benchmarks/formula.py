"""The formulas of the papers as one types them, in any library; in float64 they are what every result is held to."""

from collections.abc import Callable
from typing import Any, NamedTuple

from works import Work

Array = Any
Namespace = Any

EPS = 1e-5


class Arrays(NamedTuple):
    """What a work is given, all of one library."""

    x: Array
    gamma: Array
    beta: Array
    mean: Array
    var: Array
    dy: Array

    def differentiated(self, work: Work) -> tuple[Array, ...]:
        """X and the parameters of the norm: what there is a gradient of."""
        return (self.x, *(getattr(self, name) for name in work.parameters))


def forward(work: Work, xp: Namespace, arrays: Arrays) -> Callable[..., Array]:
    """From x, gamma and, where the norm has one, beta to y."""

    def y(x: Array, gamma: Array, beta: Array | None = None) -> Array:
        normalized, _ = normalize(work, xp, arrays, x.reshape(work.view))
        y = normalized.reshape(work.shape) * gamma.reshape(work.beside)
        return y if beta is None else y + beta.reshape(work.beside)

    return y


def gradient(work: Work, xp: Namespace, arrays: Arrays) -> tuple[Array, ...]:
    """Y and the gradients of sum(y * dy), by the chain rule."""
    x, gamma, *beta = arrays.differentiated(work)
    gamma = gamma.reshape(work.beside)
    normalized, root = normalize(work, xp, arrays, x.reshape(work.view))
    g = (arrays.dy * gamma).reshape(work.view)
    dx = g / root
    if not work.inference:
        along = (g * normalized).sum(axis=work.axes, keepdims=True)
        if work.norm == "weight_norm":
            dx = (g - normalized * along) / root
        elif work.norm == "rms_norm":
            dx = (g - normalized * (along / count(work))) / root
        else:
            dx = (g - g.mean(axis=work.axes, keepdims=True) - normalized * (along / count(work))) / root
    normalized = normalized.reshape(work.shape)
    axes = tuple(axis for axis, n in enumerate(work.beside) if n == 1)
    dgamma = (arrays.dy * normalized).sum(axis=axes)
    if not beta:
        return normalized * gamma, dx.reshape(work.shape), dgamma
    y = normalized * gamma + beta[0].reshape(work.beside)
    return y, dx.reshape(work.shape), dgamma, arrays.dy.sum(axis=axes)


def normalize(work: Work, xp: Namespace, arrays: Arrays, x: Array) -> tuple[Array, Array]:
    """X of mean 0 and variance 1, or of length 1, and the root that it was divided by."""
    axes = work.axes
    if work.norm == "weight_norm":
        root = xp.sqrt((x * x).sum(axis=axes, keepdims=True))
        return x / root, root
    if work.norm == "rms_norm":
        root = xp.sqrt((x * x).mean(axis=axes, keepdims=True) + EPS)
        return x / root, root
    if work.inference:
        mean, var = arrays.mean.reshape(work.beside), arrays.var.reshape(work.beside)
    else:
        biased = {"correction": 0} if xp.__name__ == "torch" else {}  # the others divide by n unless told
        mean, var = x.mean(axis=axes, keepdims=True), x.var(axis=axes, keepdims=True, **biased)
    root = xp.sqrt(var + EPS)
    return (x - mean) / root, root


def count(work: Work) -> int:
    """How many numbers share a mean and a variance."""
    n = 1
    for axis in work.axes:
        n *= work.view[axis]
    return n
