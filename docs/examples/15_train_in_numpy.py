"""
Train, save and load a network in NumPy
=======================================

You get a small network with batch norm, trained, saved, loaded and used in NumPy alone. This page is for those who want
batch norm without a framework: each training step uses the statistics of its batch, and inference the running ones.
"""

import tempfile

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import anynorm

# %%
# The data are scikit-learn's handwritten digits: 1,797 images of 8 by 8 pixels, the last 450 of them for the test. The
# network is linear, batch norm, ReLU, linear. The first linear layer needs no bias, as beta is one.

pixels, labels = load_digits(return_X_y=True)
images = np.asarray(pixels, np.float32) / 16
x, x_test, digit, digit_test = images[:-450], images[-450:], labels[:-450], labels[-450:]

rng = np.random.default_rng(0)
w1 = rng.standard_normal((64, 64), dtype=np.float32) / 8
w2 = rng.standard_normal((64, 10), dtype=np.float32) / 8
gamma, beta = np.ones(64, np.float32), np.zeros(64, np.float32)
running = anynorm.RunningStats.init(64, like=x)

# %%
# Training. ``vjp`` returns the result of the norm, here with the moments of the batch, and a function ``pullback``,
# which takes the gradient of the result and returns those of the input, gamma and beta. ``running.update`` returns new
# running statistics: 0.9 times the old ones and 0.1 times those of the batch.

losses = []
for _ in range(600):
    batch = rng.integers(len(x), size=64)
    a = x[batch] @ w1
    (y, moments), pullback = anynorm.vjp(anynorm.batch_norm, a, gamma, beta, return_moments=True)
    running = running.update(moments)
    h = np.maximum(y, 0)
    p = np.exp(h @ w2)
    p /= p.sum(axis=1, keepdims=True)
    losses.append(-np.log(p[range(64), digit[batch]]).mean())

    p[range(64), digit[batch]] -= 1  # now 64 times the gradient of the loss by the logits
    dy = p @ w2.T * (y > 0) / 64
    da, dgamma, dbeta = pullback(dy)
    w2 -= 0.2 * h.T @ p / 64
    w1 -= 0.2 * x[batch].T @ da
    gamma -= 0.2 * dgamma
    beta -= 0.2 * dbeta

# %%
# Save all of it in one file, and load it. What is loaded is what was saved, to the last bit.

with tempfile.TemporaryDirectory() as folder:
    states = {"w1": w1, "gamma": gamma, "beta": beta, "running": running, "w2": w2}
    anynorm.save(states, f"{folder}/digits.npz")
    net = anynorm.load(f"{folder}/digits.npz")
print("in the file:", *net)
assert np.array_equal(net["running"].mean, running.mean)

# %%
# Inference. With ``moments=`` the norm uses the running statistics, and the answer for an image does not depend on the
# other images of the batch.

a = x_test @ net["w1"]
y = anynorm.batch_norm(a, net["gamma"], net["beta"], moments=net["running"])
accuracy = np.mean((np.maximum(y, 0) @ net["w2"]).argmax(axis=1) == digit_test)

# %%
# Two checks: the formula of batch norm, typed by hand in float64; and scikit-learn's logistic regression on the same
# images.

std = np.sqrt(running.var.astype(np.float64) + 1e-5)
by_hand = (a.astype(np.float64) - running.mean) / std * gamma + beta
print(f"largest difference from the formula: {np.abs(y - by_hand).max():.0e}")
assert np.allclose(y, by_hand, atol=1e-5)

logistic = LogisticRegression(max_iter=200).fit(x, digit).score(x_test, digit_test)
print(f"accuracy: {accuracy:.1%}; logistic regression: {logistic:.1%}")
assert accuracy > 0.9

# %%
# On the left, the loss. On the right, the running standard deviation of each of the 64 channels, beside that over all
# training images at once. Batches of 64 are enough to know it well.

exact = anynorm.moments(x @ w1, axis=0)
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
left.semilogy(losses, linewidth=0.8)
left.set(xlabel="step", ylabel="loss of the batch")
right.plot(exact.std(), running.var**0.5, ".")
right.axline((0.5, 0.5), slope=1, color="gray", linewidth=0.8)
right.set(xlabel="exact standard deviation", ylabel="running standard deviation")
plt.show()
