"""
Fold batch norm into convolutions
=================================

For people who deploy a trained network. You get a network without batch norm that gives the same results in less time.

At inference a batch norm is a fixed scale and shift for each channel. ``fold`` puts them into the layer before the
norm, and ``fold_next`` into the layer after it. The layers may be those of any library: here they are PyTorch's.
"""

import copy
import timeit
from collections import OrderedDict
from functools import partial

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

import anynorm

torch.manual_seed(0)
torch.set_num_threads(1)
pixels, digits = load_digits(return_X_y=True)  # 1797 of them, written by hand
images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
labels = torch.tensor(digits)


def network(norms: bool) -> nn.Sequential:
    """Two convolutions and a linear layer, with norms or without."""
    layers = {
        "conv1": nn.Conv2d(1, 32, 3, padding=1),
        "norm1": nn.BatchNorm2d(32),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(32, 32, 3, padding=1),
        "norm2": nn.BatchNorm2d(32),
        "relu2": nn.ReLU(),
        "pool": nn.MaxPool2d(4),
        "flat": nn.Flatten(),
        "norm3": nn.BatchNorm1d(128),
        "linear": nn.Linear(128, 10),
    }
    kept = [name for name in layers if norms or "norm" not in name]
    return nn.Sequential(OrderedDict((name, layers[name]) for name in kept))


model = network(norms=True)
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for batch in torch.randperm(1500).repeat(3).split(100):  # the rest is for the test
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
    optimizer.step()
model.eval().requires_grad_(False)

# %%
# Fold
# ----
# ``from_checkpoint`` reads a norm. Two norms come directly after a convolution: ``fold``. The third comes directly
# before the linear layer: ``fold_next``. The arguments are those of the layer, then those of the norm.

state = model.state_dict()
folded = {name: x for name, x in state.items() if "norm" not in name}

for layer, name in {"conv1": "norm1", "conv2": "norm2"}.items():
    norm = anynorm.from_checkpoint(state, name, dialect="torch")
    w, b = f"{layer}.weight", f"{layer}.bias"
    folded[w], folded[b] = anynorm.fold(
        state[w], state[b], norm.gamma, norm.beta, moments=norm.running, eps=norm.eps
    )  # fmt: skip

norm = anynorm.from_checkpoint(state, "norm3", dialect="torch")
w, b = "linear.weight", "linear.bias"
folded[w], folded[b] = anynorm.fold_next(
    state[w], state[b], norm.gamma, norm.beta, moments=norm.running, eps=norm.eps
)  # fmt: skip

plain = network(norms=False).requires_grad_(False)
plain.load_state_dict(folded)

# %%
# Check
# -----
# PyTorch has a function for a norm after a convolution. It gives the same weight. The results of the two networks are
# compared with those in float64.

weight, bias = fuse_conv_bn_weights(
    state["conv2.weight"], state["conv2.bias"],
    state["norm2.running_mean"], state["norm2.running_var"], 1e-5,
    state["norm2.weight"], state["norm2.bias"],
)  # fmt: skip
torch.testing.assert_close(folded["conv2.weight"], weight)
torch.testing.assert_close(folded["conv2.bias"], bias)

test, answers = images[1500:], labels[1500:]
exact = copy.deepcopy(model).double()(test.double())
for name, each in {"with norms": model, "folded": plain}.items():
    scores = each(test)
    right = (scores.argmax(1) == answers).double().mean()
    error = (scores - exact).abs().max() / exact.abs().max()
    print(f"{name:11} largest error {error:.0e}, {right:.1%} right")
    torch.testing.assert_close(scores, exact.float(), rtol=1e-4, atol=1e-4)

# %%
# Time
# ----
# One image at a time, as a program does that answers one request after another: the best of ten rounds of 50.

times = {}
for name, each in {"with norms": model, "folded": plain}.items():
    rounds = timeit.repeat(partial(each, images[:1]), number=50, repeat=10)
    times[name] = 1e3 * min(rounds) / 50
    print(f"{name:11} {times[name]:.2f} ms")

figure, axes = plt.subplots(figsize=(7, 1.8), layout="constrained")
bars = axes.barh(list(times), list(times.values()), color=["0.7", "tab:blue"])
axes.bar_label(bars, fmt="%.2f ms", padding=3)
axes.set(xlabel="time in ms", xlim=(0, 1.15 * max(times.values())))
axes.invert_yaxis()
plt.show()
