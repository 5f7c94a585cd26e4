"""
Layer norm at each step of an RNN
=================================

You get a recurrent network with layer norm at each time step, trained by backpropagation through time in NumPy. This
page is for those who write their own recurrent cells, and need the gradient of a norm that is used at every step.
"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.nn import functional

import anynorm

# %%
# The data are scikit-learn's handwritten digits, read as sequences of 16 steps with 4 pixels each. The cell is that of
# Ba, Kiros & Hinton (2016), equation 4: ``h = tanh(layer_norm(x @ wx + h @ wh, gamma, beta))``. All steps share one
# gamma and one beta.

pixels, labels = load_digits(return_X_y=True)
images = np.asarray(pixels, np.float32).reshape(-1, 16, 4) / 16
rng = np.random.default_rng(0)
sizes = (4, 64), (64, 64), (64, 10)
wx, wh, wo = (rng.standard_normal(size, dtype=np.float32) / size[0] ** 0.5 for size in sizes)
gamma, beta = np.ones(64, np.float32), np.zeros(64, np.float32)

# %%
# On the way forward, each step keeps its pullback. On the way back they are called in reverse order, and the gradients
# of what all steps share are added up. ``norm`` is a function, so that the figure below can go without one.


def normalized(a: Any) -> Any:
    return anynorm.vjp(anynorm.layer_norm, a, gamma, beta)


def gradients(x: Any, digits: Any, wh: Any, norm: Any = normalized) -> Any:
    """The logits, and the gradients of the parameters and of each step's state."""
    h, tape = np.zeros((len(x), 64), np.float32), []
    for t in range(16):
        y, pullback = norm(x[:, t] @ wx + h @ wh)
        tape.append((x[:, t], h, pullback))
        h = np.tanh(y)
    logits = h @ wo
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    p[range(len(x)), digits] -= 1

    total, states = [h.T @ p / len(x), 0, 0, 0, 0], [p @ wo.T / len(x)]
    for x_t, before, pullback in reversed(tape):
        da, dgamma, dbeta = pullback(states[-1] * (1 - h**2))
        total = [sum(pair) for pair in zip(total, (0, x_t.T @ da, before.T @ da, dgamma, dbeta))]
        states.append(da @ wh.T)
        h = before
    return logits, total, states


# %%
# The check: PyTorch's autograd through the same cell with PyTorch's own layer norm.

params = {"wo": wo, "wx": wx, "wh": wh, "gamma": gamma, "beta": beta}
copy = {name: torch.tensor(each, requires_grad=True) for name, each in params.items()}
h = torch.zeros(64, 64)
x, digits = images[:64], labels[:64]
for step in torch.tensor(x).unbind(dim=1):
    a = step @ copy["wx"] + h @ copy["wh"]
    h = torch.tanh(functional.layer_norm(a, (64,), copy["gamma"], copy["beta"]))
by_torch = torch.autograd.grad(functional.cross_entropy(h @ copy["wo"], torch.tensor(digits)), list(copy.values()))
for name, d, torch_d in zip(params, gradients(x, digits, wh)[1], by_torch):
    error = np.abs(d - torch_d.numpy()).max() / np.abs(d).max()
    print(f"{name:5}  largest difference {error:.0e} of the largest gradient")
    assert error < 1e-5

# %%
# Training, by plain gradient descent.

for _ in range(200):
    batch = rng.integers(1347, size=64)
    _, found, _ = gradients(images[batch], labels[batch], wh)
    for array, d in zip(params.values(), found):
        array -= 0.3 * d
logits, _, _ = gradients(images[1347:], labels[1347:], wh)
print(f"accuracy on images that training has not seen: {np.mean(logits.argmax(axis=1) == labels[1347:]):.1%}")

# %%
# The size of the state's gradient after so many steps back, with the recurrent weights as they are now, half as large
# and twice as large. Without a norm, the gradient vanishes or grows with the weights. With layer norm it does so much
# less. (The state before the first step is left out: it is not part of the network.)

place = plt.subplots(figsize=(6.5, 3.6), layout="constrained")[1]
for color, scale in zip(("C0", "C1", "C2"), (0.5, 1.0, 2.0)):
    for name, style, norm in (("layer norm", "-", normalized), ("no norm", ":", lambda a: (a, lambda dy: (dy, 0, 0)))):
        states = gradients(x, digits, np.float32(scale) * wh, norm)[2]
        lengths = [np.linalg.norm(d) for d in states[:-1]]
        place.semilogy(lengths, style, color=color, label=f"{name}, weights x {scale}")
place.set(xlabel="steps back", ylabel="size of the gradient of h")
place.legend(fontsize=8)
plt.show()
