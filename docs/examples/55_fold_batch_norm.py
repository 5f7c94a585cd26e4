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

import torch
from sklearn.datasets import load_digits
from torch import nn

import anynorm

torch.manual_seed(0)
torch.set_num_threads(1)
pixels, digits = load_digits(return_X_y=True)  # 1797 of them, written by hand
images, labels = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(digits)

conv2, norm2 = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)
model = nn.Sequential(
    OrderedDict(
        conv1=nn.Conv2d(1, 32, 3, padding=1),
        norm1=nn.BatchNorm2d(32),
        relu1=nn.ReLU(),
        conv2=conv2,
        norm2=norm2,
        relu2=nn.ReLU(),
        pool=nn.MaxPool2d(4),
        flat=nn.Flatten(),
        norm3=nn.BatchNorm1d(128),
        linear=nn.Linear(128, 10),
    )
)
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
    layer_and_norm = state[w], state[b], norm.gamma, norm.beta
    folded[w], folded[b] = anynorm.fold(*layer_and_norm, moments=norm.running, eps=norm.eps)

norm = anynorm.from_checkpoint(state, "norm3", dialect="torch")
w, b = "linear.weight", "linear.bias"
layer_and_norm = state[w], state[b], norm.gamma, norm.beta
folded[w], folded[b] = anynorm.fold_next(*layer_and_norm, moments=norm.running, eps=norm.eps)

plain = copy.deepcopy(model)
for name in ("norm1", "norm2", "norm3"):
    setattr(plain, name, nn.Identity())
plain.load_state_dict(folded)

# %%
# Check, and time
# ---------------
# PyTorch has a function for a norm after a convolution. It gives the same weight and bias.

fused = nn.utils.fuse_conv_bn_eval(conv2, norm2)
torch.testing.assert_close(folded["conv2.weight"], fused.weight)
torch.testing.assert_close(folded["conv2.bias"], fused.bias)

# %%
# Both networks are compared with the first one in float64. The time is that of one image, the best of ten rounds of 50.

exact = copy.deepcopy(model).double()(images.double())

print("            largest error   right   one image")
for name, each in {"with norms": model, "folded": plain}.items():
    scores = each(images)
    error = (scores - exact).abs().max() / exact.abs().max()
    right = (scores.argmax(1) == labels)[1500:].double().mean()
    seconds = min(timeit.repeat(partial(each, images[:1]), number=50, repeat=10)) / 50
    print(f"{name:11} {error:13.0e} {right:7.1%} {1e3 * seconds:8.2f} ms")
    assert error < 1e-5
