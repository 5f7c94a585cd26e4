"""One small convolutional network, and the ways to normalize it.

conv3x3(16) - norm - relu - pool - conv3x3(32) - norm - relu - pool - dense(64) - norm - relu - dense(10)
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

import anynorm
from anynorm.demo.layers import Pullback, conv3x3, dense, pool2x2, relu, shift
from anynorm.kernels import Array, Namespace


class Method(NamedTuple):
    """A way to normalize the network: its activations by `norm`, or its weights."""

    title: str
    norm: Callable[..., Any] | None = None
    options: Mapping[str, Any] = {}
    needs_space: bool = False
    """Whether the norm has nothing to average over in a map of one pixel, and leaves it alone."""
    weights: bool = False


METHODS = {
    "plain": Method("no normalization"),
    "BN": Method("batch norm", anynorm.batch_norm, {"channel_axis": -1}),
    "LN": Method("layer norm", anynorm.layer_norm, {"axis": (1, 2, 3)}),
    "RMS": Method("RMS norm", anynorm.rms_norm, {"axis": (1, 2, 3)}),
    "IN": Method("instance norm", anynorm.instance_norm, {"channel_axis": -1}, needs_space=True),
    "GN": Method("group norm", anynorm.group_norm, {"groups": 4, "channel_axis": -1}),
    "WN": Method("weight norm", weights=True),
    "WN+MBN": Method("WN, mean-only BN", anynorm.center, {"axis": (0, 1, 2)}, weights=True),
}
RUNNING = (anynorm.batch_norm, anynorm.center)
"""The norms that take statistics of the batch, and keep running ones."""


class Stage(NamedTuple):
    """A layer of the network, without its numbers."""

    product: Callable[[Namespace, Array, Array], tuple[Array, Pullback]]
    inputs: int
    features: int
    pooled: bool = False
    last: bool = False


STAGES = (
    Stage(conv3x3, 9 * 1, 16, pooled=True),
    Stage(conv3x3, 9 * 16, 32, pooled=True),
    Stage(dense, 2 * 2 * 32, 64),
    Stage(dense, 64, 10, last=True),
)


class Layer(NamedTuple):
    """The numbers of a layer, or their gradients."""

    weight: Array
    """Shape (inputs, features); for weight normalization, the direction v."""
    scale: Array | None
    """gamma of a norm, shape (1, 1, 1, features); g of weight normalization, shape (features,); None without either."""
    shift: Array
    """beta of a norm, or the bias, shape (1, 1, 1, features)."""


def initial_layers(method: Method, to_array: Callable[[Any], Array], seed: int) -> tuple[Layer, ...]:
    """He's random weights, gamma 1, beta 0: for one seed, the same function whichever the method but for the norms."""
    random = np.random.default_rng(seed)
    return tuple(_initial_layer(method, stage, to_array, random) for stage in STAGES)


def initial_running(method: Method, layers: tuple[Layer, ...]) -> tuple[anynorm.RunningStats[Array] | None, ...]:
    """The running statistics of each layer that has them."""
    if method.norm not in RUNNING:
        return (None,) * len(layers)
    return tuple(
        None if layer.scale is None else anynorm.RunningStats.init(layer.shift.shape[-1], like=layer.shift)
        for layer in layers
    )


def forward(
    xp: Namespace,
    method: Method,
    layers: tuple[Layer, ...],
    images: Array,
    running: tuple[anynorm.RunningStats[Array] | None, ...] | None = None,
) -> tuple[Array, list[Any], Callable[[Array], tuple[Layer, ...]]]:
    """The logits of each class; the moments that norms of the batch took; and the pullback from logits to all layers.

    With `running`, a norm that keeps running statistics normalizes with them: inference. Without, with the batch's own.
    """
    x, moments, pullbacks = images, [], []
    for stage, layer, known in zip(STAGES, layers, running or (None,) * len(layers), strict=True):
        x, taken, pullback = _stage_forward(xp, method, stage, layer, x, known)
        moments.append(taken)
        pullbacks.append(pullback)

    def pullback_all(dlogits: Array) -> tuple[Layer, ...]:
        dx, gradients = xp.reshape(dlogits, x.shape), []
        for pullback in reversed(pullbacks):
            dx, gradient = pullback(dx)
            gradients.append(gradient)
        return tuple(reversed(gradients))

    return xp.reshape(x, (x.shape[0], -1)), moments, pullback_all


def _initial_layer(
    method: Method, stage: Stage, to_array: Callable[[Any], Array], random: np.random.Generator
) -> Layer:
    gain = 1 if stage.last else 2
    weight = random.standard_normal((stage.inputs, stage.features)) * math.sqrt(gain / stage.inputs)
    weight, zeros, ones = (
        to_array(np.asarray(each, dtype=np.float32))
        for each in (weight, np.zeros((1, 1, 1, stage.features)), np.ones((1, 1, 1, stage.features)))
    )
    if method.weights:
        state = anynorm.WeightNorm.from_weight(weight, axis=1)
        return Layer(state.v, state.g, zeros)
    normalized = method.norm is not None and not stage.last and not (method.needs_space and stage.product is dense)
    return Layer(weight, ones if normalized else None, zeros)


def _stage_forward(
    xp: Namespace, method: Method, stage: Stage, layer: Layer, x: Array, known: anynorm.RunningStats[Array] | None
) -> tuple[Array, Any, Callable[[Array], tuple[Array, Layer]]]:
    weight, weight_pullback = _weight(method, layer)
    y, product_pullback = stage.product(xp, x, weight)
    y, moments, norm_pullback = _normalized(xp, method, layer, y, known)
    afterwards = []
    if not stage.last:
        y, relu_pullback = relu(xp, y)
        afterwards.append(relu_pullback)
    if stage.pooled:
        y, pool_pullback = pool2x2(xp, y)
        afterwards.append(pool_pullback)

    def pullback(dy: Array) -> tuple[Array, Layer]:
        for each in reversed(afterwards):
            dy = each(dy)
        dy, dgamma, dshift = norm_pullback(dy)
        dx, dweight = product_pullback(dy)
        dweight, dg = weight_pullback(dweight)
        return dx, Layer(dweight, dg if method.weights else dgamma, dshift)

    return y, moments, pullback


def _weight(method: Method, layer: Layer) -> tuple[Array, Pullback]:
    """The weight that the layer multiplies by."""
    if method.weights:
        return anynorm.vjp(anynorm.weight_norm, layer.weight, layer.scale, axis=1)
    return layer.weight, lambda dweight: (dweight, None)


def _normalized(
    xp: Namespace, method: Method, layer: Layer, y: Array, known: anynorm.RunningStats[Array] | None
) -> tuple[Array, Any, Pullback]:
    if method.norm is None or layer.scale is None:
        y, shift_pullback = shift(xp, y, layer.shift)

        def pullback(dy: Array) -> tuple[Array, None, Array]:
            dy, dshift = shift_pullback(dy)
            return dy, None, dshift

        return y, None, pullback
    parameters = (layer.shift,) if method.weights else (layer.scale, layer.shift)  # a scale of weights is theirs
    if method.norm not in RUNNING:
        y, norm_pullback = anynorm.vjp(method.norm, y, *parameters, **method.options)
        return y, None, norm_pullback
    (y, moments), norm_pullback = anynorm.vjp(
        method.norm, y, *parameters, return_moments=True, moments=known, **method.options
    )

    def pullback_of_batch(dy: Array) -> tuple[Array, Array | None, Array]:
        dy, *dgamma, dshift = norm_pullback(dy)
        return dy, dgamma[0] if dgamma else None, dshift

    return y, moments, pullback_of_batch
