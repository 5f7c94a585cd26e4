"""The executors that the conformance suite runs on: what each needs, and a call by way of it."""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import inner
import numpy as np
import pytest
from backends import BACKENDS, CELL, EVERY, Backend, drawn, two_devices
from emulator import launch
from oracles import Exact
from replicas import Replicas

import anynorm

WIDE = ("programs", "autograd, programs", "cuda", "cuda, groups in parts")
"""Those that add in float64 whatever is added."""


@dataclass(frozen=True)
class Executor:
    """A way to run a call, on the arrays of a backend."""

    name: str
    backend: Backend
    options: dict[str, Any] = field(default_factory=dict)
    compiles: bool = False
    """Each kind of call is compiled, or is a graph of its own, or is checked at every step: some kinds must do."""

    def __repr__(self) -> str:
        return f"{self.name}-{self.backend!r}"

    def picks(self, number, of=3) -> bool:
        """All numbers in NumPy; elsewhere one in so many, and half of these where it takes longest."""
        if self.backend.library in ("cubed", "ndonnx", "sparse"):
            return number % (4 * of) == 0
        if self.name.startswith("cuda") or self.name.endswith("programs") or self.backend.library == "jax":
            return (number + of * (self.name in ("cuda", "jit", "programs"))) % (2 * of) == 0
        return (self.backend.library == "numpy" and not self.compiles) or number % of == 0

    def some(self, cases, number):
        """All cases in NumPy; elsewhere two, and other two for each number; one, where each is compiled."""
        if self.backend.library == "numpy" and not self.compiles:
            return cases
        return [cases[(number + i) % len(cases)] for i in range(1 if self.compiles else 2)]

    def takes(self, norm, shape, options) -> bool:
        """Whether it runs such calls."""
        if self.name == "replicas":
            return norm is anynorm.batch_norm and options.get("channel_axis", 1) % len(shape) != 0
        return True

    def bound(self, arrays: float, others: float | None = None) -> float:
        """How far off a result in float32 may be: by array operations; in a library that orders them by itself."""
        if self.name in WIDE:
            return 6e-7
        return arrays if others is None or self.backend.library in ("numpy", "torch", "cupy") else others

    def run(self, norm, x, dy, gamma=None, beta=None, *, dtype=None, parameters=None, lie=None, **options) -> Exact:
        """What the norm and its pullback give, in float64; of arrays in `dtype`, that `lie` places in memory."""
        n, of = len(x) if x.ndim else 1, self.backend
        dtype, kind = dtype or of.widest, parameters or dtype
        weights, moments = options.pop("weights", None), options.pop("moments", None)
        constant = replace(of, tracked=False)
        if moments is not None:
            options["moments"] = anynorm.Moments(*(constant.array(each, dtype) for each in moments), 3)

        def call(rows, **more):
            def part(array):
                if rows is None or array.ndim != x.ndim or len(array) != n:
                    return array
                return array[rows] if n > 1 or array is x or array is dy else array

            if weights is not None:
                name = str(weights.dtype) if weights.dtype.kind in "bi" else kind
                more["weights"] = constant.array(part(weights), name)
            given = [place(of, part(x), dtype, lie)]
            given += [None if each is None else of.array(part(each), kind) for each in (gamma, beta)]
            with anynorm.options(**self._options(x)):
                return self._call(norm, given, place(constant, part(dy), dtype, lie), {**options, **more})

        if self.name != "replicas":
            return call(None)
        cut = min(n, 1)  # a replica has one sample, or all others, or none
        parts = Replicas(3).run(
            lambda rank, all_reduce: call([slice(0, cut), slice(cut, cut), slice(cut, n)][rank], all_reduce=all_reduce)
        )
        joined = []
        for name, every in zip(Exact._fields, zip(*parts, strict=True), strict=True):
            whole = {"dgamma": gamma, "dbeta": beta}.get(name, x if name in ("y", "dx") else None)
            if whole is not None and whole.ndim == x.ndim:  # each replica has a part of it, or of its gradient
                joined.append(np.concatenate(every) if len(whole) == n and (n > 1 or whole is x) else sum(every))
                continue
            for each in every[1:]:
                np.testing.assert_array_equal(each, every[0])
            joined.append(every[0])
        return Exact(*joined)

    def _options(self, x):
        """Blocks of 16 bytes where x is small; elsewhere of more, so that there are some hundreds at most."""
        if self.options.get("block_bytes") != 16:
            return self.options
        more = 8 if self.backend.library == "strict" else 1  # which checks each of its operations
        return {**self.options, "block_bytes": more * (16 if x.size <= 300 else 512 if x.size <= 1000 else 16384)}

    def _call(self, norm, arrays, dy, options):
        """Forward alone, and with its pullback, which must agree; what they give is what the arrays are."""
        without = (anynorm.rms_norm, anynorm.weight_norm, anynorm.denormalize)
        import_of, has_moments = self.backend.numpy, norm not in without
        arguments = arrays[: 2 if norm in (anynorm.weight_norm, anynorm.center) else 3]
        while arguments[-1] is None:
            arguments.pop()
        if has_moments:
            options = {**options, "return_moments": True}
        if self.name == "jit":
            y, moments, gradients = _jitted(norm, arguments, dy, options)
        elif self.name.startswith("autograd"):
            y, moments = _pair(norm(*arguments, **options), has_moments)
            wanted = [each for each in arguments if each is not None]
            found = iter(self.backend.xp.autograd.grad(y, wanted, dy))
            gradients = [None if each is None else next(found) for each in arguments]
        else:
            found, pullback = anynorm.vjp(norm, *arguments, **options)
            y, moments = _pair(found, has_moments)
            gradients = pullback(dy)
            if not self.compiles:
                alone = _pair(norm(*arguments, **options), has_moments)[0]
                np.testing.assert_allclose(import_of(alone), import_of(y), rtol=1e-6 if y.dtype == dy.dtype else 1e-2)
        x = arguments[0]
        assert (type(y), y.dtype, tuple(y.shape)) == (type(x), x.dtype, tuple(x.shape))
        for one, other in zip(gradients, arguments, strict=True):
            assert (one is None) is (other is None)
            if one is not None:
                assert (type(one), one.dtype, tuple(one.shape)) == (type(other), other.dtype, tuple(other.shape))
        gradients = [None if each is None else import_of(each) for each in gradients]
        statistics = (None, None) if moments is None else map(import_of, (moments.mean, moments.var))
        return Exact(import_of(y), *[*gradients, None, None][:3], *statistics)


def _pair(found, has_moments):
    return found if has_moments else (found, None)


def _jitted(norm, arguments, dy, options):
    """Through the transformations of JAX, and its own differentiation."""
    import jax

    present = [each for each in arguments if each is not None]

    def function(*given):
        given = iter(given)
        found = norm(*(None if each is None else next(given) for each in arguments), **options)
        return (found[0], (found[1].mean, found[1].var)) if isinstance(found, tuple) else (found, None)

    @jax.jit
    def both(given, dy):
        y, pullback, statistics = jax.vjp(function, *given, has_aux=True)
        return y, statistics, pullback(dy)

    y, statistics, found = both(present, dy)
    found = iter(found)
    moments = None if statistics is None else anynorm.Moments(*statistics, 1)
    return y, moments, [None if each is None else next(found) for each in arguments]


def place(backend, values, dtype, lie):
    """An array of the backend; as `lie` orders its numbers in memory."""
    if lie is None:
        return backend.array(values, dtype)
    array = lie(np.asarray(values).astype(dtype))
    if backend.library == "torch":
        return backend.xp.from_numpy(array).requires_grad_(backend.tracked)
    if backend.library == "dask":
        return backend.xp.from_array(array, chunks=(-(-len(array) // 2), *array.shape[1:])).map_blocks(lie)
    return array


BLOCKS = {"engine": "arrays", "block_bytes": 16, "threads": 2}
WHOLE = {"engine": "arrays", "block_bytes": 2**40}
MAKE = {
    "numpy": [("whole", WHOLE), ("blocks", BLOCKS), ("replicas", WHOLE), ("cuda", {}), ("cuda, groups in parts", {})],
    "strict": [("whole", WHOLE), ("blocks", BLOCKS), ("replicas", WHOLE)],
    "torch": [("whole", WHOLE), ("blocks", BLOCKS), ("replicas", WHOLE)],
    "recorded": [("autograd", WHOLE), ("autograd, in blocks", BLOCKS)],
    "fast": [("programs", {"engine": "numba"})],
    "jax": [("whole", {}), ("jit", {})],
    "dask": [("chunks", {})],
    "cupy": [("whole", WHOLE), ("programs", {})],
    "mlx": [("whole", {})],
    "ndonnx": [("whole", {})],
    "others": [("whole", {})],
}
"""The executors of a cell."""
SLOW = ("cubed", "ndonnx")
"""Libraries of which each operation takes milliseconds: what they run."""
PART = ("test_values_gradients_and_moments_are_those_of_the_formula", "test_given_moments_are_constants")
COMPILED = ("cuda", "cuda, groups in parts", "programs", "jit", "chunks")


def executors(cell, backends):
    """All of them, on each of the cell's backends."""
    found = []
    for backend in backends:
        kind = "recorded" if backend.tracked and cell != "fast" else cell
        for name, options in MAKE[kind]:
            name = "autograd, programs" if backend.tracked and cell == "fast" else name
            if cell != "strict" or name == "whole" or backend.device == two_devices(backend)[0]:
                compiles = name in COMPILED or cell in ("fast", "jax", "strict", "others", "ndonnx")
                found.append(Executor(name, backend, options, compiles))
    return found


def pytest_generate_tests(metafunc):
    if "executor" in metafunc.fixturenames:
        cell, found = metafunc.config.stash[CELL], metafunc.config.stash[BACKENDS]
        metafunc.parametrize("executor", executors(cell.library, found), ids=repr, indirect=True)


def pytest_collection_modifyitems(config, items):
    every, _ = config.stash[EVERY]
    in_turn, others = [], []
    for item in items:
        given = item.callspec.params if hasattr(item, "callspec") else {}
        executor = given.get("executor")
        if executor is None:
            continue
        wanted = executor.backend.library not in SLOW or item.originalname in PART
        for marker in item.iter_markers("runs_if"):
            names = marker.args[0].__code__.co_varnames[: marker.args[0].__code__.co_argcount]
            wanted = wanted and marker.args[0](*(given[name] for name in names))
        if not wanted:
            others.append(item)
        elif every > 1 or executor.name != "whole":  # which runs all cases where all are to run
            in_turn.append(item)
    others += drawn(in_turn, "executor", every)[1]
    left = set(others)
    items[:] = [item for item in items if item not in left]
    config.hook.pytest_deselected(items=others)


@pytest.fixture
def executor(request, monkeypatch):
    """An executor at work."""
    splits = {"cuda": None, "cuda, groups in parts": 3}
    name = request.param.name
    with inner.emulated_gpu(monkeypatch, launch, splits[name]) if name in splits else nullcontext():
        yield request.param
