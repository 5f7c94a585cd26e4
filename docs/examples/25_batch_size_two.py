"""
Batches of two: batch norm or group norm
========================================

You see how the error of a network depends on the batch size, with batch norm and with group norm. This page is for
those whose memory holds only a few samples at a time, and who must choose a norm.

In short: batch norm takes its mean and variance from the batch, so a batch of two says little. Group norm takes them
from groups of channels of one sample, and does not see the batch at all.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn import functional

import anynorm

# %%
# First what happens to two samples. Of two numbers, batch norm leaves only which one is larger: each becomes about 1 or
# -1. Group norm, here with 8 groups of 8 channels, keeps more.

pixels, labels = load_digits(return_X_y=True)
images = np.asarray(pixels, np.float32) / 16
w = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32) / 8
two = images[:2] @ w
by_batch, by_group = anynorm.batch_norm(two), anynorm.group_norm(two, groups=8)
print("batch norm, first channels:", *by_batch[:, :6].round(3), sep="\n")
print("group norm, first channels:", *by_group[:, :6].round(3), sep="\n")

# %%
# The check: PyTorch gives the same numbers.

tensor = torch.tensor(two)
in_torch = functional.batch_norm(tensor, None, None, training=True).numpy()
print(f"batch norm: largest difference {np.abs(by_batch - in_torch).max():.0e}")
assert np.allclose(by_batch, in_torch, atol=1e-4)
in_torch = functional.group_norm(tensor, 8).numpy()
print(f"group norm: largest difference {np.abs(by_group - in_torch).max():.0e}")
assert np.allclose(by_group, in_torch, atol=1e-4)

# %%
# The network is linear, norm, ReLU, linear, and is trained for one epoch by gradient descent. The norms are used
# without gamma and beta, to keep the code short. The step size follows the batch size, as in Wu & He's "Group
# Normalization" (2018), whose figure 1 this page repeats on a small scale.


def test_error(size: int, groups: int | None) -> float:
    """Train with batches of this size, by batch norm where there are no groups."""
    rng = np.random.default_rng(0)
    w1 = rng.standard_normal((64, 64), dtype=np.float32) / 8
    w2 = rng.standard_normal((64, 10), dtype=np.float32) / 8
    running = anynorm.RunningStats.init(64, like=images)
    for batch in rng.permutation(1344).reshape(-1, size):
        a = images[batch] @ w1
        if groups:
            y, pullback = anynorm.vjp(anynorm.group_norm, a, groups=groups)
        else:
            (y, moments), pullback = anynorm.vjp(anynorm.batch_norm, a, return_moments=True)
            running = running.update(moments)
        h = np.maximum(y, 0)
        p = np.exp(h @ w2)
        p /= p.sum(axis=1, keepdims=True)
        p[range(size), labels[batch]] -= 1
        (da,) = pullback(p @ w2.T * (y > 0) / size)
        w2 -= 0.2 / 32 * h.T @ p
        w1 -= 0.2 * size / 32 * images[batch].T @ da

    a = images[1344:] @ w1
    if groups:
        y = anynorm.group_norm(a, groups=groups)
    else:
        y = anynorm.batch_norm(a, moments=running)
    guess = (np.maximum(y, 0) @ w2).argmax(axis=1)
    return float(np.mean(guess != labels[1344:]))


sizes = (2, 4, 8, 16, 32)
batch_errors = [test_error(size, groups=None) for size in sizes]
group_errors = [test_error(size, groups=8) for size in sizes]
print("batch size ", *(f"{size:6}" for size in sizes))
print("batch norm ", *(f"{error:6.1%}" for error in batch_errors))
print("group norm ", *(f"{error:6.1%}" for error in group_errors))
assert batch_errors[0] > 1.3 * group_errors[0]

# %%
# At batches of 16 and more the two are about alike. Group norm does the same in training and inference, and keeps no
# running statistics. These are errors on 453 images, so one image is 0.2 %.

figure, place = plt.subplots(figsize=(6, 3.4), layout="constrained")
place.semilogx(sizes, 100 * np.array(batch_errors), "o-", base=2, label="batch norm")
place.semilogx(sizes, 100 * np.array(group_errors), "s-", base=2, label="group norm")
place.set(xlabel="batch size", ylabel="test error in %", ylim=(0, None))
place.legend()
plt.show()
