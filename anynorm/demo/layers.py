"""The layers of the network that are not normalization: each returns its value and its pullback, as `anynorm.vjp` does.

Maps have shape (N, height, width, channels); the channels are last, so that a convolution is one matrix product.
"""

from collections.abc import Callable
from typing import Any

from anynorm.kernels import Array, Namespace

Pullback = Callable[[Array], Any]


def conv3x3(xp: Namespace, x: Array, weight: Array) -> tuple[Array, Pullback]:
    """3x3 convolution, the border padded with zeros; weight has shape (9 * channels, features)."""
    patches = _patches(xp, x)
    features = weight.shape[1]

    def pullback(dy: Array) -> tuple[Array, Array]:
        dweight = xp.matmul(_rows(xp, patches).T, _rows(xp, dy))
        return _product(xp, _patches(xp, dy), turned()), dweight

    def turned() -> Array:
        """The weight of the transposed convolution: each kernel rotated by half a turn, features for channels."""
        kernels = xp.flip(xp.reshape(weight, (9, -1, features)), axis=0)
        return xp.reshape(xp.permute_dims(kernels, (0, 2, 1)), (9 * features, -1))

    return _product(xp, patches, weight), pullback


def dense(xp: Namespace, x: Array, weight: Array) -> tuple[Array, Pullback]:
    """A fully connected layer; its result is a map of one pixel."""
    flat = xp.reshape(x, (x.shape[0], -1))

    def pullback(dy: Array) -> tuple[Array, Array]:
        dy = _rows(xp, dy)
        return xp.reshape(xp.matmul(dy, weight.T), x.shape), xp.matmul(flat.T, dy)

    return xp.reshape(xp.matmul(flat, weight), (x.shape[0], 1, 1, -1)), pullback


def shift(xp: Namespace, x: Array, by: Array) -> tuple[Array, Pullback]:
    """The sum x + by, where `by` has shape (1, 1, 1, channels)."""

    def pullback(dy: Array) -> tuple[Array, Array]:
        return dy, xp.sum(dy, axis=(0, 1, 2), keepdims=True)

    return x + by, pullback


def relu(xp: Namespace, x: Array) -> tuple[Array, Pullback]:
    """The positive part of x."""
    positive = xp.astype(x > 0, x.dtype)

    def pullback(dy: Array) -> Array:
        return dy * positive

    return x * positive, pullback


def pool2x2(xp: Namespace, x: Array) -> tuple[Array, Pullback]:
    """The mean of every 2x2 pixels."""
    n, height, width, channels = x.shape
    y = (x[:, ::2, ::2, :] + x[:, 1::2, ::2, :] + x[:, ::2, 1::2, :] + x[:, 1::2, 1::2, :]) / 4

    def pullback(dy: Array) -> Array:
        dy = xp.reshape(dy / 4, (n, height // 2, 1, width // 2, 1, channels))
        return xp.reshape(xp.broadcast_to(dy, (n, height // 2, 2, width // 2, 2, channels)), x.shape)

    return y, pullback


def cross_entropy(xp: Namespace, logits: Array, labels: Array) -> tuple[Array, Pullback]:
    """The mean over the samples of -log softmax(logits) at the label; labels are rows of one 1 among zeros."""
    logits = logits - xp.max(logits, axis=1, keepdims=True)
    exponentials = xp.exp(logits)
    sums = xp.sum(exponentials, axis=1, keepdims=True)
    losses = xp.sum(labels * (xp.log(sums) - logits), axis=1)

    def pullback(dloss: Array) -> Array:
        return (exponentials / sums - labels) * (dloss / logits.shape[0])

    return xp.mean(losses), pullback


def _patches(xp: Namespace, x: Array) -> Array:
    """The 3x3 neighbourhood of every pixel, along the channels."""
    height, width = x.shape[1:3]
    rows = xp.zeros_like(x[:, :1, :, :])
    x = xp.concat([rows, x, rows], axis=1)
    columns = xp.zeros_like(x[:, :, :1, :])
    x = xp.concat([columns, x, columns], axis=2)
    return xp.concat([x[:, i : i + height, j : j + width, :] for i in range(3) for j in range(3)], axis=3)


def _product(xp: Namespace, patches: Array, weight: Array) -> Array:
    return xp.reshape(xp.matmul(_rows(xp, patches), weight), (*patches.shape[:3], -1))


def _rows(xp: Namespace, x: Array) -> Array:
    """Every pixel of every sample as a row."""
    return xp.reshape(x, (-1, x.shape[-1]))
