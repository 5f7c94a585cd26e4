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
    weights: Array | None = None

    def differentiated(self, work: Work) -> tuple[Array, ...]:
        """X and the parameters of the norm: what there is a gradient of."""
        return (self.x, *(getattr(self, name) for name in work.parameters))


def forward(work: Work, xp: Namespace, arrays: Arrays) -> Callable[..., Array]:
    """From x, gamma and, where the norm has one, beta to y."""
    # all that is known before is found before: a small array would feel it
    normalize, view, shape, beside = normalization(work, xp, arrays), work.view, work.shape, work.beside

    def y(x: Array, gamma: Array, beta: Array | None = None) -> Array:
        normalized, _ = normalize(x)
        return normalized * gamma if beta is None else normalized * gamma + beta

    def y_reshaped(x: Array, gamma: Array, beta: Array | None = None) -> Array:
        normalized, _ = normalize(x.reshape(view))
        y = normalized.reshape(shape) * gamma.reshape(beside)
        return y if beta is None else y + beta.reshape(beside)

    plain = view == shape and beside == (*(1 for _ in shape[1:]), shape[-1])
    return y if plain else y_reshaped


def gradient(work: Work, xp: Namespace, arrays: Arrays) -> tuple[Array, ...]:
    """Y and the gradients of sum(y * dy), by the chain rule."""
    x, gamma, *beta = arrays.differentiated(work)
    gamma = gamma.reshape(work.beside)
    normalized, root = normalization(work, xp, arrays)(x.reshape(work.view))
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


def normalization(work: Work, xp: Namespace, arrays: Arrays) -> Callable[[Array], tuple[Array, Array]]:
    """From x to x of mean 0 and variance 1, or of length 1, and the root that it was divided by."""
    over = {"axis": work.axes, "keepdims": True}
    biased = {"correction": 0} if xp.__name__ == "torch" else {}  # the others divide by n unless told

    def to_length_1(x: Array) -> tuple[Array, Array]:
        root = xp.sqrt((x * x).sum(**over))
        return x / root, root

    def to_square_1(x: Array) -> tuple[Array, Array]:
        root = xp.sqrt((x * x).mean(**over) + EPS)
        return x / root, root

    def to_variance_1(x: Array) -> tuple[Array, Array]:
        root = xp.sqrt(x.var(**over, **biased) + EPS)
        return (x - x.mean(**over)) / root, root

    def to_weighted_variance_1(x: Array) -> tuple[Array, Array]:
        count = weights.sum(**over)
        deviation = x - (weights * x).sum(**over) / count
        root = xp.sqrt((weights * deviation * deviation).sum(**over) / count + EPS)
        return deviation / root, root

    def given(x: Array) -> tuple[Array, Array]:
        root = xp.sqrt(var + EPS)
        return (x - mean) / root, root

    if work.inference:
        mean, var = arrays.mean.reshape(work.beside), arrays.var.reshape(work.beside)
        return given
    if work.masked:
        weights = arrays.weights
        return to_weighted_variance_1
    return {"weight_norm": to_length_1, "rms_norm": to_square_1}.get(work.norm, to_variance_1)


def count(work: Work) -> int:
    """How many numbers share a mean and a variance."""
    n = 1
    for axis in work.axes:
        n *= work.view[axis]
    return n
