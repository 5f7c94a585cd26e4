"""What the norms must give, from the papers' formulas: a sum over the set of each element, one element at a time."""

import math
import os
import pickle
import tracemalloc
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import pytest

import anynorm


class Case(NamedTuple):
    """A norm on a shape, and what the paper says of it."""

    norm: Callable[..., Any]
    shape: tuple[int, ...]
    options: dict[str, Any]
    set_of: Callable[[tuple[int, ...]], Any]
    """The name of the set that an element is normalized with: Wu & He (2018), eq. 3 to 7."""
    parameter_of: Callable[[tuple[int, ...]], tuple[int, ...]]
    """The index of an element's gamma and beta."""
    parameter_shape: tuple[int, ...]

    def __str__(self) -> str:
        options = "-".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.norm.__name__}-{'x'.join(map(str, self.shape))}-{options}".replace(" ", "")

    @property
    def parameters(self) -> int:
        """How many there are: of `center` beta, which the functions below take in the place of gamma."""
        return 1 if self.norm in (anynorm.weight_norm, anynorm.center) else 2


CASES = [
    Case(anynorm.layer_norm, (3, 4, 5), {}, lambda i: i[:2], lambda i: i[2:], (5,)),
    Case(anynorm.layer_norm, (3, 4, 5), {"axis": (-1, 1)}, lambda i: i[0], lambda i: i[1:], (4, 5)),
    Case(anynorm.layer_norm, (3, 4, 5), {"axis": 1}, lambda i: (i[0], i[2]), lambda i: (i[1],), (4,)),
    Case(anynorm.layer_norm, (7,), {"axis": 0}, lambda i: 0, lambda i: i, (7,)),
    Case(anynorm.rms_norm, (3, 4, 5), {}, lambda i: i[:2], lambda i: i[2:], (5,)),
    Case(anynorm.rms_norm, (3, 4, 5), {"axis": (0, 2)}, lambda i: i[1], lambda i: (i[0], i[2]), (3, 5)),
    Case(anynorm.normalize, (3, 4, 5), {"axis": (0, 2)}, lambda i: i[1], lambda i: (i[0], i[2]), (3, 5)),
    Case(anynorm.normalize, (3, 4), {"axis": None}, lambda i: 0, lambda i: i, (3, 4)),
    Case(anynorm.batch_norm, (4, 3, 2, 2), {}, lambda i: i[1], lambda i: (i[1],), (3,)),
    Case(anynorm.batch_norm, (6, 3), {}, lambda i: i[1], lambda i: (i[1],), (3,)),
    Case(anynorm.batch_norm, (4, 2, 2, 3), {"channel_axis": -1}, lambda i: i[3], lambda i: (i[3],), (3,)),
    Case(anynorm.instance_norm, (3, 2, 4, 2), {}, lambda i: i[:2], lambda i: (i[1],), (2,)),
    Case(anynorm.instance_norm, (3, 5, 2), {"channel_axis": -1}, lambda i: (i[0], i[2]), lambda i: (i[2],), (2,)),
    Case(anynorm.instance_norm, (3, 5), {"channel_axis": 0}, lambda i: i[0], lambda i: (i[0],), (3,)),
    Case(anynorm.group_norm, (3, 6, 4), {"groups": 2}, lambda i: (i[0], i[1] // 3), lambda i: (i[1],), (6,)),
    Case(anynorm.group_norm, (3, 6), {"groups": 3}, lambda i: (i[0], i[1] // 2), lambda i: (i[1],), (6,)),
    Case(
        anynorm.group_norm,
        (2, 3, 2, 4),
        {"groups": 2, "channel_axis": -1},
        lambda i: (i[0], i[3] // 2),
        lambda i: (i[3],),
        (4,),
    ),
    Case(anynorm.group_norm, (4, 5), {"groups": 2, "channel_axis": 0}, lambda i: i[0] // 2, lambda i: (i[0],), (4,)),
    Case(anynorm.weight_norm, (4, 3, 2), {}, lambda i: i[0], lambda i: (i[0],), (4,)),
    Case(anynorm.weight_norm, (4, 3, 2), {"axis": (0, -1)}, lambda i: (i[0], i[2]), lambda i: (i[0], i[2]), (4, 2)),
    Case(anynorm.weight_norm, (4, 3), {"axis": None}, lambda i: 0, lambda i: (), ()),
    Case(anynorm.center, (3, 4, 5), {"axis": (0, 2)}, lambda i: i[1], lambda i: (i[0], i[2]), (3, 5)),
    Case(anynorm.center, (3, 4, 5), {"axis": -1}, lambda i: i[:2], lambda i: i[2:], (5,)),
]


def values(case: Case, x: Any, gamma: Any, beta: Any, eps: float = 1e-5, given: Any = None, weights: Any = None) -> Any:
    """The result of a case in float64; `given` has (mean, var) for each set, in place of the set's own."""
    sets: dict[Any, list[tuple[float, float]]] = defaultdict(list)
    weights = np.broadcast_to(1.0 if weights is None else weights, case.shape)
    for index in np.ndindex(*case.shape):
        sets[case.set_of(index)].append((x[index], float(weights[index])))
    if given is None:
        given = {name: statistics(case, numbers) for name, numbers in sets.items()}
    y = np.empty(case.shape)
    for index in np.ndindex(*case.shape):
        mean, var = given[case.set_of(index)]
        if case.norm is anynorm.center:
            y[index] = 0.0 if var == math.inf else x[index] - mean
            y[index] += _at(case, gamma, index, 0.0)
            continue
        scale = _at(case, gamma, index, 1.0)
        y[index] = scale * (x[index] - mean) / math.sqrt(var + (0 if case.norm is anynorm.weight_norm else eps))
        y[index] += _at(case, beta, index, 0.0)
    return y


def statistics(case: Case, numbers: list[tuple[float, float]]) -> tuple[float, float]:
    """Mean and variance of numbers and their weights, as the norm of the case has them; without weight all is 0."""
    total = math.fsum(weight for _, weight in numbers)
    if case.norm is anynorm.weight_norm:
        return 0.0, math.fsum(number * number for number, _ in numbers)
    if total == 0:
        return 0.0, math.inf
    mean = 0.0 if case.norm is anynorm.rms_norm else math.fsum(w * number for number, w in numbers) / total
    return mean, math.fsum(w * (number - mean) ** 2 for number, w in numbers) / total


def gradient(function: Callable[[Any], Any], x: Any, dy: Any, step: float = 1e-5) -> Any:
    """The gradient of sum(function(x) * dy), by central differences with one Richardson step: error O(step**4)."""
    found = np.empty(x.shape)
    for index in np.ndindex(*x.shape):

        def slope(h: float, index: Any = index) -> float:
            up, down = x.copy(), x.copy()
            up[index] += h
            down[index] -= h
            return float(np.sum((function(up) - function(down)) * dy)) / (2 * h)

        found[index] = (4 * slope(step) - slope(2 * step)) / 3
    return found


def derived(case: Case, arguments: list[Any], dy: Any, step: float = 1e-5, **rest: Any) -> list[Any]:
    """The result, and the gradient of sum(result * dy) by each argument: found once for all devices of a library."""
    key = pickle.dumps((str(case), arguments, dy, step, rest))
    if key not in _derived:

        def of_one(position: int) -> Callable[[Any], Any]:
            before, after = arguments[:position], arguments[position + 1 :]
            return lambda value: values(case, *before, value, *after, **rest)

        given = [i for i, each in enumerate(arguments) if each is not None]
        found = [gradient(of_one(i), arguments[i], dy, step) for i in given]
        _derived[key] = [values(case, *arguments, **rest), *found]
    return _derived[key]


_derived: dict[bytes, list[Any]] = {}


class Exact(NamedTuple):
    """What a call and its pullback must give."""

    y: Any
    dx: Any
    dgamma: Any
    dbeta: Any
    mean: Any
    var: Any


def groups_of(norm: Callable[..., Any], shape: tuple[int, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """A shape in which the numbers that share a mean lie along whole axes, these axes, and the shape of a parameter."""
    every = range(len(shape))
    if "channel_axis" in options or norm in (anynorm.batch_norm, anynorm.instance_norm, anynorm.group_norm):
        channel = options.get("channel_axis", 1) % len(shape)
        beside = tuple(n if axis == channel else 1 for axis, n in enumerate(shape))
        kept = {channel} if norm is anynorm.batch_norm else {0, channel}
        if norm is not anynorm.group_norm:
            return shape, tuple(axis for axis in every if axis not in kept), beside
        groups = options["groups"]
        view = (*shape[:channel], groups, shape[channel] // groups, *shape[channel + 1 :])
        kept = {0, channel} if channel else {0}
        return view, tuple(axis for axis in range(len(view)) if axis not in kept), beside
    axis = options.get("axis", 0 if norm is anynorm.weight_norm else -1)
    axes = set(every) if axis is None else {each % len(shape) for each in np.atleast_1d(axis)}
    if norm is anynorm.weight_norm:  # its axis names what keeps a norm
        axes = set(every) - axes if axis is not None else axes
        return shape, tuple(sorted(axes)), tuple(1 if each in axes else n for each, n in enumerate(shape))
    return shape, tuple(sorted(axes)), tuple(n if each in axes else 1 for each, n in enumerate(shape))


def exact(norm, x, dy, gamma=None, beta=None, *, eps=1e-5, weights=None, moments=None, **options) -> Exact:
    """The papers' formulas and their derivative by the chain rule, on whole arrays in NumPy's widest float.

    `moments` are a mean and a variance for each group. A number without weight has no part in the statistics, nor,
    if it is NaN or inf, in any gradient; a group without weight is beta. `test_oracles.py` holds this to the loop over
    single numbers above.
    """
    options = {name: each for name, each in options.items() if name in ("axis", "channel_axis", "groups")}
    if norm is anynorm.denormalize:
        return way_back(x, dy, gamma, beta, eps, moments, **options)
    divides = norm is not anynorm.center
    gamma, beta = (gamma, beta) if divides else (None, gamma)
    view, axes, beside = groups_of(norm, x.shape, options)
    x, dy = (np.asarray(each).astype(np.longdouble) for each in (x, dy))
    shape, centred, sums = x.shape, norm not in (anynorm.rms_norm, anynorm.weight_norm), norm is anynorm.weight_norm
    given = [None if each is None else np.asarray(each).astype(np.longdouble) for each in (gamma, beta)]
    full = [each if each is None or each.ndim == x.ndim else each.reshape(beside) for each in given]
    weights = np.broadcast_to(np.asarray(1.0 if weights is None else weights).astype(np.longdouble), shape)

    def add(values):
        return values.sum(axis=axes, keepdims=True)

    weights, x, g = weights.reshape(view), x.reshape(view), dy.reshape(view)
    total = add(weights)
    share = weights if sums else np.divide(weights, total, out=np.zeros(view, np.longdouble), where=total > 0)
    if moments is None:
        mean = add(share * np.where(weights > 0, x, 0)) if centred else np.zeros_like(total)
        mean = mean + add(share * np.where(weights > 0, x - mean, 0)) if centred else mean
        d = np.where(total > 0, x - mean, 0)
        var = add(share * np.where(weights > 0, d, 0) ** 2)
    else:
        mean, var = (np.asarray(each).astype(np.longdouble).reshape(total.shape) for each in moments)
        d = x - mean
    root = np.sqrt(var + (0 if sums else np.longdouble(eps))) if divides else np.ones_like(var)
    rstd = np.divide(1, root, out=np.zeros_like(root), where=(root > 0) & (total > 0))
    xhat = d * rstd
    factor = 1 if full[0] is None else np.broadcast_to(full[0], shape).reshape(view)
    y, known = (xhat * factor).reshape(shape), np.where((weights == 0) & ~np.isfinite(xhat), 0, xhat)
    g, of_parameters = g * factor, [(g * known).reshape(shape), dy]
    lost = (share * add(g) if centred else 0) + (share * known * add(g * known) if divides else 0)
    lost = 0 if moments is not None else lost
    found = []
    for each, wide, parameter in zip(of_parameters, full, given, strict=True):
        if parameter is None:
            found.append(None)
            continue
        spread = tuple(axis for axis, n in enumerate(wide.shape) if n == 1)
        found.append(each.sum(axis=spread, keepdims=True).reshape(parameter.shape))
    if not divides:
        found.reverse()
    return Exact(
        y + (0 if full[1] is None else full[1]),
        ((g - lost) * rstd).reshape(shape),
        *found,
        mean.squeeze(axes),
        var.squeeze(axes),
    )


def way_back(y, dx, gamma, beta, eps, moments, *, axis) -> Exact:
    """(y - beta) / gamma * sqrt(var + eps) + mean and its derivative, `dx` being the cotangent."""
    _, axes, beside = groups_of(anynorm.denormalize, y.shape, {"axis": axis})
    y, dx, *given = (np.asarray(each).astype(np.longdouble) for each in (y, dx, *moments))
    mean, var = (np.expand_dims(each, axes) for each in given)
    root = np.sqrt(var + np.longdouble(eps))
    root = np.where(root == 0, 1, root)
    gamma, beta = (None if each is None else np.asarray(each).astype(np.longdouble) for each in (gamma, beta))
    full = [each if each is None or each.ndim == y.ndim else each.reshape(beside) for each in (gamma, beta)]
    scale, shift = (np.longdouble(i) if each is None else each for i, each in zip((1, 0), full, strict=True))
    dy, found = dx * root / scale, []
    for each, wide, parameter in zip((-dy * (y - shift) / scale, -dy), full, (gamma, beta), strict=True):
        if parameter is None:
            found.append(None)
            continue
        spread = tuple(i for i, n in enumerate(wide.shape) if n == 1)
        found.append(each.sum(axis=spread, keepdims=True).reshape(parameter.shape))
    return Exact((y - shift) / scale * root + mean, dy, *found, None, None)


def standardized(x: Any, axes: Any, eps: float = 1e-5) -> Any:
    """Equation 1 on a whole array, in the widest float there is."""
    x = np.asarray(x).astype(np.longdouble)
    mean = x.mean(axis=axes, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(axis=axes, keepdims=True) + eps)


def standardized_gradient(x: Any, dy: Any, axes: Any, eps: float = 1e-5) -> Any:
    """The derivative of equation 1, by the chain rule of Ioffe & Szegedy (2015), section 3, step by step as printed."""
    x, dy = (np.asarray(each).astype(np.longdouble) for each in (x, dy))
    m = x.size // x.sum(axis=axes).size
    mean = x.mean(axis=axes, keepdims=True)
    var = ((x - mean) ** 2).mean(axis=axes, keepdims=True) + eps
    dvar = (dy * (x - mean)).sum(axis=axes, keepdims=True) * (-0.5) * var**-1.5
    dmean = -dy.sum(axis=axes, keepdims=True) / np.sqrt(var) - 2 * dvar * (x - mean).mean(axis=axes, keepdims=True)
    return dy / np.sqrt(var) + dvar * 2 * (x - mean) / m + dmean / m


def _at(case: Case, parameter: Any, index: tuple[int, ...], default: float) -> float:
    if parameter is None:
        return default
    if parameter.shape == case.parameter_shape:
        return parameter[case.parameter_of(index)]
    return parameter[tuple(0 if n == 1 else i for i, n in zip(index, parameter.shape, strict=True))]


def only_if(wanted, backend, *libraries):
    """Where each case takes long, some of the cases must do: in a graph of its own, or compiled for each new shape."""
    long = backend.library in (libraries or ("jax", "dask")) or os.environ.get("ANYNORM_ENGINE") == "numba"
    if long and not wanted:
        pytest.skip(reason="takes too long, and shows nothing new")


oracle = partial(pytest.importorskip, reason="it comes with the cells that have an oracle")


measured = pytest.mark.skipif(
    not hasattr(np, "vecdot"), reason="before NumPy 2 the products of array-api-compat take memory of their own"
)


by_arrays = pytest.mark.skipif(os.environ.get("ANYNORM_ENGINE") == "numba", reason="about blocks of array operations")


def peak(call):
    """The memory that a call takes at its peak, but for what it leaves behind in this library."""
    anynorm.layer_norm(np.ones((1024, 1024), np.float32))
    if find_spec("numba") is not None and os.environ.get("ANYNORM_ENGINE") != "arrays":  # to compile takes much more
        call()
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
