"""
Recipes: FiLM, SPADE, RevIN and other norms
===========================================

For people who look for a norm by name and do not find a function of that name. Each recipe is a few lines with the
functions that are there, and each is checked against the formula of its paper, written in NumPy.

The calls are the same with the arrays of any other library. Gradients come from ``vjp``, or from PyTorch or JAX. The
last section says what is not offered, and what to use instead.
"""

from typing import Any

import numpy as np

import anynorm

rng = np.random.default_rng(0)
x = rng.normal(3.0, 2.0, (8, 6, 5, 5))  # images: (N, C, H, W)
tokens = rng.normal(3.0, 2.0, (8, 20, 6))  # sequences: (N, T, C)
gamma, beta = rng.normal(size=(2, 6))
EPS = 1e-5  # the default of every function


# prints the largest difference, and fails if it is more than rounding
def check(name: str, got: Any, formula: Any) -> None:
    np.testing.assert_allclose(got, formula, rtol=1e-9, atol=1e-9)
    print(f"{name:22} largest difference {abs(got - formula).max():.0e}")


# the formula that most papers begin with
def standardized(x: Any, axis: int | tuple[int, ...]) -> Any:
    return (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + EPS)


# %%
# FiLM and conditional batch norm
# -------------------------------
# A scale and a shift for each sample and channel, which another network makes (`Perez et al., 2018
# <https://arxiv.org/abs/1709.07871>`_, eq. 2). In every norm gamma and beta may have as many axes as x: they then
# broadcast to it.

scale, shift = rng.normal(size=(2, 8, 6, 1, 1))

y = anynorm.batch_norm(x, scale, shift)

check("FiLM", y, scale * standardized(x, (0, 2, 3)) + shift)

# %%
# AdaLN
# -----
# Layer norm with a scale and a shift for each sample, as in diffusion transformers (`Peebles & Xie, 2023
# <https://arxiv.org/abs/2212.09748>`_): the network makes the difference of the scale from 1.

scale, shift = rng.normal(size=(2, 8, 1, 6))

y = anynorm.layer_norm(tokens, 1 + scale, shift)

check("AdaLN", y, standardized(tokens, -1) * (1 + scale) + shift)

# %%
# SPADE
# -----
# Batch norm with a scale and a shift for each pixel, made of a map of labels (`Park et al., 2019
# <https://arxiv.org/abs/1903.07291>`_, eq. 1).

scale, shift = rng.normal(size=(2, 8, 6, 5, 5))

y = anynorm.batch_norm(x, scale, shift)

check("SPADE", y, scale * standardized(x, (0, 2, 3)) + shift)

# %%
# Weight standardization
# ----------------------
# Each output of a convolution gets a weight with mean 0 and variance 1 (`Qiao et al., 2019
# <https://arxiv.org/abs/1903.10520>`_).

w = rng.normal(0.1, 0.3, (16, 6, 3, 3))  # (out, in, *kernel)

standard = anynorm.normalize(w, axis=(1, 2, 3))

check("weight standardization", standard, standardized(w, (1, 2, 3)))

# %%
# Unit norm
# ---------
# Rows of length 1, as for cosine similarity: weight norm in which every length is 1. ``axis`` names the axes that keep
# a length of their own. A row of zeros stays zero.

unit = anynorm.weight_norm(tokens, np.ones((8, 20)), axis=(0, 1))

check("unit norm", unit, tokens / np.linalg.norm(tokens, axis=-1, keepdims=True))

# %%
# Filter response normalization
# -----------------------------
# RMS norm over the space, then a threshold that is learned (`Singh & Krishnan, 2020
# <https://arxiv.org/abs/1911.09737>`_, eq. 1 to 3).

scale, shift, threshold = rng.normal(size=(3, 1, 6, 1, 1))

y = np.maximum(anynorm.rms_norm(x, scale, shift, axis=(2, 3), eps=1e-6), threshold)

nu2 = np.mean(x**2, axis=(2, 3), keepdims=True)
check("FRN", y, np.maximum(scale * x / np.sqrt(nu2 + 1e-6) + shift, threshold))

# %%
# Partial RMS norm
# ----------------
# The root mean square of the first features, here of half of them, divides all (`Zhang & Sennrich, 2019
# <https://arxiv.org/abs/1910.07467>`_, pRMSNorm).

y = anynorm.rms_norm(tokens, gamma, weights=np.arange(6) < 3)

square = np.mean(tokens[..., :3] ** 2, axis=-1, keepdims=True)
check("partial RMS norm", y, tokens / np.sqrt(square + EPS) * gamma)

# %%
# Batch renormalization
# ---------------------
# Two numbers for each channel, r and d, bring the result of the batch near to that of the running statistics (`Ioffe,
# 2017 <https://arxiv.org/abs/1702.03275>`_, algorithm 1). They scale and shift, so they go into gamma and beta. To
# gradients they are constants, as in the paper: moments carry no gradient. (The paper keeps a running standard
# deviation; ``RunningStats`` keeps the variance.)

running = anynorm.RunningStats(np.full(6, 2.5), np.full(6, 5.0))

batch = anynorm.moments(x, axis=(0, 2, 3))
sigma_batch, sigma = np.sqrt(batch.var + EPS), np.sqrt(running.var + EPS)
r = np.clip(sigma_batch / sigma, 1 / 1.1, 1.1)
d = np.clip((batch.mean - running.mean) / sigma, -0.5, 0.5)
y = anynorm.batch_norm(x, gamma * r, gamma * d + beta)
running = running.update(batch)

r, d, gamma4, beta4 = (each[:, None, None] for each in (r, d, gamma, beta))
check("batch renormalization", y, gamma4 * (standardized(x, (0, 2, 3)) * r + d) + beta4)

# %%
# Precise batch norm
# ------------------
# After training, the statistics of the whole training set take the place of the running ones (`Wu & Johnson, 2021
# <https://arxiv.org/abs/2105.07576>`_, section 3). ``Moments.over`` takes the inputs of the norm batch by batch.

batches = [rng.normal(3.0, 2.0, (n, 6, 5, 5)) for n in (8, 8, 8, 8)]

precise = anynorm.Moments.over(batches, axis=(0, 2, 3))
y = anynorm.batch_norm(x, gamma, beta, moments=precise)

check("precise batch norm", precise.var, np.concatenate(batches).var((0, 2, 3)))

# %%
# RevIN
# -----
# A series is normalized by its own past, and the forecast goes back to its scale (`Kim et al., 2022
# <https://openreview.net/forum?id=cGDAkQo1C0p>`_, eq. 2 and 3). The network of this example repeats what it is given.

past = rng.normal(10.0, 4.0, (8, 20, 6))  # (series, time, variables)
scale, shift = gamma.reshape(1, 1, 6), beta.reshape(1, 1, 6)

y, seen = anynorm.normalize(past, scale, shift, axis=1, return_moments=True)
forecast = anynorm.denormalize(y[:, -5:], scale, shift, axis=1, moments=seen)

check("RevIN, there", y, standardized(past, 1) * scale + shift)
check("RevIN, back", forecast, past[:, -5:])

# %%
# NaN as missing
# --------------
# What has weight 0 may be NaN. It stays NaN; ``where`` puts the mean, which is 0, in its place.

gaps = np.where(rng.random(x.shape) < 0.2, np.nan, x)
there = np.isfinite(gaps)

y = anynorm.batch_norm(gaps, weights=there)
filled = np.where(there, y, 0.0)

mean, var = (f(gaps, axis=(0, 2, 3), keepdims=True) for f in (np.nanmean, np.nanvar))
check("NaN as missing", filled, np.nan_to_num((gaps - mean) / np.sqrt(var + EPS)))

# %%
# What is not offered, and why
# ----------------------------
# - **Min-max, quantile and robust scaling.** They use the order of the numbers. The functions here use means and
#   variances. scikit-learn has ``MinMaxScaler``, ``QuantileTransformer`` and ``RobustScaler``.
# - **Results in 8-bit integers.** Each runtime rounds in its own way. :doc:`Fold the norm <55_fold_batch_norm>` into
#   the layer beside it, and let the runtime quantize that layer.
# - **Spectral norm.** It divides by a singular value, which takes an iteration with its own state. For one matrix write
#   ``w / np.linalg.norm(w, 2)``. PyTorch, Flax and Equinox have it for training.
# - **Local response normalization.** Each channel has a window of neighbours, and windows overlap: they are not groups.
#   PyTorch has ``torch.nn.functional.local_response_norm``.
# - **EvoNorm.** The norm and the activation are one formula, and each variant has another. ``moments`` gives the
#   variances in it.
# - **DyT.** It has no statistics: ``gamma * np.tanh(alpha * x) + beta``.
# - **Layer classes.** Each framework has its own, and a function works in all of them. Keep gamma and beta in a layer
#   of your framework, and call the function there.
