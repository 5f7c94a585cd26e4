"""
The norms of a PyTorch checkpoint in NumPy
==========================================

You get the predictions of a trained PyTorch model from its checkpoint, computed in NumPy, without PyTorch. This page is
for those who have a model from PyTorch and must run it where PyTorch is not wanted: a small server, a CuPy program.
"""

import tempfile
from collections import OrderedDict

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from safetensors.numpy import load_file
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

import anynorm

# %%
# In PyTorch: a small convolutional network with a batch norm and a layer norm is trained on scikit-learn's handwritten
# digits, and its ``state_dict`` is saved.

pixels, labels = load_digits(return_X_y=True)
images = np.asarray(pixels, np.float32).reshape(-1, 1, 8, 8) / 16
x, x_test, digits = torch.tensor(images[:1344]), images[1344:], torch.tensor(labels)

torch.manual_seed(0)
layers: dict[str, nn.Module] = {
    "conv": nn.Conv2d(1, 16, 3),
    "bn": nn.BatchNorm2d(16),
    "relu1": nn.ReLU(),
    "flatten": nn.Flatten(),
    "fc": nn.Linear(576, 64),
    "ln": nn.LayerNorm(64),
    "relu2": nn.ReLU(),
    "out": nn.Linear(64, 10),
}
model = nn.Sequential(OrderedDict(layers))
for batch in torch.cat([torch.randperm(1344) for _ in range(4)]).reshape(-1, 64):
    loss = nn.functional.cross_entropy(model(x[batch]), digits[batch])
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), gradients):
            parameter.sub_(0.2 * gradient)

folder = tempfile.TemporaryDirectory()
save_file(model.state_dict(), f"{folder.name}/model.safetensors")

# %%
# In NumPy: a checkpoint is a mapping of names to arrays. ``from_checkpoint`` reads one norm out of it, and translates
# PyTorch's conventions: here momentum is the weight of the old value, and ``correction=1`` stands for the unbiased
# variance. Eps is not in a checkpoint: it is PyTorch's default, 1e-5, unless you say ``eps=``.
#
# For a GPU, make the arrays CuPy's first: ``{name: cupy.asarray(array) for name, array in state.items()}``. The calls
# of anynorm below stay as they are.

state = load_file(f"{folder.name}/model.safetensors")
bn = anynorm.from_checkpoint(state, "bn", dialect="torch")
ln = anynorm.from_checkpoint(state, "ln", dialect="torch")
print(f"batch norm: momentum {bn.running.momentum}, correction {bn.running.correction}")
print(f"layer norm: {ln}")

# %%
# The network in NumPy. ``moments=bn.running`` is what ``model.eval()`` says in PyTorch.

windows = sliding_window_view(x_test, (3, 3), axis=(2, 3))
h = np.einsum("nchwij,ocij->nohw", windows, state["conv.weight"], optimize=True)
h += state["conv.bias"][:, None, None]
h = anynorm.batch_norm(h, bn.gamma, bn.beta, moments=bn.running, eps=bn.eps)
h = np.maximum(h, 0).reshape(len(h), -1) @ state["fc.weight"].T + state["fc.bias"]
h = anynorm.layer_norm(h, ln.gamma, ln.beta, eps=ln.eps)
logits = np.maximum(h, 0) @ state["out.weight"].T + state["out.bias"]

# %%
# The check: PyTorch's own logits for the same images.

with torch.no_grad():
    in_torch = model.eval()(torch.tensor(x_test)).numpy()
print(f"logits up to {np.abs(in_torch).max():.1f}")
print(f"largest difference from PyTorch {np.abs(logits - in_torch).max():.0e}")
assert np.allclose(logits, in_torch, atol=1e-4)
guess = logits.argmax(axis=1)
print(f"test accuracy {np.mean(guess == labels[1344:]):.1%}")

# %%
# Some of the images, and what the network in NumPy reads.

figure, places = plt.subplots(2, 8, figsize=(8, 2.6), layout="constrained")
for place, image, digit in zip(places.flat, x_test[:, 0], guess):
    place.imshow(image, cmap="gray_r")
    place.set_title(digit, fontsize=10)
    place.axis("off")
plt.show()
