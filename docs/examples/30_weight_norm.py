"""
Weight norm that starts from data
=================================

You get a network with weight normalization, whose layers start with outputs of mean 0 and variance 1 and are trained
with mean-only batch norm. This page is for those who follow the paper of Salimans & Kingma (2016) in NumPy.

In short: a weight is ``g * v / ||v||``. ``WeightNorm.fitted`` chooses g by a first batch, ``vjp(weight_norm, v, g)``
gives the gradients of both, and ``center`` is batch norm that takes the mean away and divides by nothing.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import anynorm

# %%
# The data are scikit-learn's handwritten digits. The five layers have directions v that are drawn with a standard
# deviation of 0.05, as in the paper.

pixels, labels = load_digits(return_X_y=True)
images = np.asarray(pixels) / 16
rng = np.random.default_rng(0)
directions = [0.05 * rng.standard_normal((n, 64)) for n in (64, 64, 64, 64, 10)]

# %%
# The start, by section 3 of the paper. A layer is given the first batch with weights of length 1, and g becomes one
# over the standard deviation of what comes out. The second result of ``fitted``, a bias, is not needed here, as
# ``center`` takes the mean away. NumPy confirms that all outputs have a standard deviation of 1.

fitted, h = [], images[:500]
for v in directions:
    moments = anynorm.moments(h @ anynorm.weight_norm(v, np.ones(len(v))).T, axis=0)
    layer, _ = anynorm.WeightNorm.fitted(v, moments)
    fitted.append(layer)
    y = anynorm.center(h @ layer.weight.T, axis=0)
    h = np.maximum(y, 0)
    print(f"layer {len(fitted)}: standard deviations {y.std(axis=0).round(12)[:4]}")
    assert np.allclose(y.std(axis=0), 1)

# %%
# Training by gradient descent. Each layer has two pullbacks: that of its mean-only batch norm, and that of its weight.


def train(layers: list[anynorm.WeightNorm[np.ndarray]]) -> tuple[list[float], float]:
    """The losses, and the accuracy on images that were not trained on."""
    layers, betas = list(layers), [np.zeros((1, len(layer.g))) for layer in layers]
    running = [anynorm.RunningStats.init(len(layer.g), like=images) for layer in layers]
    rng, losses = np.random.default_rng(1), []
    for _ in range(120):
        batch, tape = rng.integers(1344, size=100), []
        h = y = images[batch]
        for i, layer in enumerate(layers):
            w, to_weight = anynorm.vjp(anynorm.weight_norm, layer.v, layer.g)
            a = h @ w.T
            (y, moments), to_a = anynorm.vjp(anynorm.center, a, betas[i], axis=0, return_moments=True)
            running[i] = running[i].update(moments)
            tape.append((h, w, to_weight, to_a))
            h = np.maximum(y, 0)
        p = np.exp(y) / np.exp(y).sum(axis=1, keepdims=True)
        losses.append(-np.log(p[range(100), labels[batch]]).mean())
        dy = (p - np.eye(10)[labels[batch]]) / 100
        for i, (h, w, to_weight, to_a) in reversed([*enumerate(tape)]):
            da, dbeta = to_a(dy)
            dv, dg = to_weight(da.T @ h)
            layers[i] = anynorm.WeightNorm(layers[i].v - 0.1 * dv, layers[i].g - 0.1 * dg)
            betas[i] = betas[i] - 0.1 * dbeta
            dy = da @ w * (h > 0)
    h = y = images[1344:]
    for layer, beta, known in zip(layers, betas, running):
        y = anynorm.center(h @ layer.weight.T, beta, axis=0, moments=known)
        h = np.maximum(y, 0)
    return losses, float(np.mean(y.argmax(axis=1) == labels[1344:]))


# %%
# Without the fit, the numbers vanish from layer to layer, and in 120 steps the network learns nothing.

figure, place = plt.subplots(figsize=(6, 3.2), layout="constrained")
for name, layers in (("fitted to data", fitted), ("as drawn", [*map(anynorm.WeightNorm.from_weight, directions)])):
    losses, accuracy = train(layers)
    place.semilogy(losses, label=f"{name}: test accuracy {accuracy:.1%}")
place.set(xlabel="step", ylabel="loss of the batch")
place.legend()
plt.show()

# %%
# The check of a gradient: equation 3 of the paper, typed by hand.

v, g, dw = fitted[0].v, fitted[0].g, rng.standard_normal((64, 64))
_, pullback = anynorm.vjp(anynorm.weight_norm, v, g)
dv, dg = pullback(dw)
length = np.linalg.norm(v, axis=1)
np.testing.assert_allclose(dg, (dw * v).sum(axis=1) / length, rtol=1e-10)
np.testing.assert_allclose(dv, (g / length)[:, None] * dw - (g * dg / length**2)[:, None] * v, rtol=1e-10)
