"""`center`: mean-only batch norm, and its gradient."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from replicas import Replicas

import anynorm


def test_it_is_mean_only_batch_norm_as_its_paper_has_it(backend):
    """Salimans & Kingma (2016), section 4: t - mean(t) + b, whose gradient is that of the result less its mean."""
    rng = np.random.default_rng(0)
    t, b, gradient = rng.standard_normal((8, 5)) + 3, rng.standard_normal((1, 5)), rng.standard_normal((8, 5)) + 1
    y, pullback = anynorm.vjp(anynorm.center, backend.array(t), backend.array(b), axis=0)
    backend.check(y, t - t.mean(axis=0) + b)
    dt, db = pullback(backend.array(gradient))
    backend.check(dt, gradient - gradient.mean(axis=0))
    backend.check(db, gradient.sum(axis=0, keepdims=True))
    assert len(anynorm.vjp(anynorm.center, backend.array(t), axis=0)[1](backend.array(gradient))) == 1
    assert anynorm.vjp(anynorm.center, backend.array(t), None, axis=0)[1](backend.array(gradient))[1] is None


@pytest.mark.parametrize("weighted", [False, True])
def test_its_moments_are_those_of_moments(backend, weighted):
    rng = np.random.default_rng(1)
    x = backend.array(rng.standard_normal((4, 3, 5)))
    weights = replace(backend, tracked=False).array(rng.random((4, 1, 5))) if weighted else None
    y, found = anynorm.center(x, axis=(0, 2), weights=weights, return_moments=True)
    expected = anynorm.moments(x, axis=(0, 2), weights=weights)
    for name in ("mean", "var", "count"):
        one, other = getattr(found, name), getattr(expected, name)
        np.testing.assert_allclose(*(backend.numpy(backend.xp.asarray(each)) for each in (one, other)), rtol=1e-6)
    same, given = anynorm.center(x, axis=(0, 2), moments=found, return_moments=True)
    assert given is found
    backend.check(same, backend.numpy(y))


@pytest.mark.cells("numpy", "torch", "fast-cpu")
@pytest.mark.parametrize("number", [3, 6000])
def test_its_gradient_looks_at_no_x(backend, number):
    rng = np.random.default_rng(2)
    numbers, dy = rng.standard_normal((2, number, 4))
    x = replace(backend, tracked=False).array(numbers)
    _, pullback = anynorm.vjp(anynorm.center, x, axis=0)
    x[...] = np.nan
    (dx,) = pullback(replace(backend, tracked=False).array(dy))
    np.testing.assert_allclose(backend.numpy(dx), dy - dy.mean(axis=0), atol=1e-12)


@pytest.mark.cells("numpy", "torch", "strict")
def test_by_moments_that_are_given_its_gradient_is_the_cotangent_in_an_array_of_its_own(backend):
    of, numbers = replace(backend, tracked=False), np.random.default_rng(5).standard_normal((3, 4))
    moments = anynorm.Moments(of.array(np.ones(4)), of.array(np.ones(4)), 3)
    _, pullback = anynorm.vjp(anynorm.center, of.array(numbers), axis=0, moments=moments)
    dy = of.array(numbers)
    (dx,) = pullback(dy)
    of.check(dx, numbers, tolerance=0)
    dx[...] = 7
    of.check(dy, numbers, tolerance=0)


@pytest.mark.parametrize("value", [0.1, 1e6 / 3, 3e38])
def test_equal_numbers_become_beta(backend, value):
    x, beta = backend.array(np.full((7, 30), value), "float32"), backend.array(np.full((1, 30), 0.3), "float32")
    backend.check(anynorm.center(x, beta, axis=1), np.full((7, 30), 0.3), dtype="float32", tolerance=0)


@pytest.mark.cells("numpy", "strict", "torch", "fast-cpu")
@pytest.mark.parametrize("kind", ["none", "a mask", "real"])
@pytest.mark.parametrize("sizes", [(3, 2), (4, 0, 2), (1, 1, 5)], ids=str)
def test_replicas_find_what_one_process_finds(backend, sizes, kind):
    rng, n, of = np.random.default_rng(3), sum(sizes), replace(backend, tracked=False)
    x, dy = rng.standard_normal((2, n, 3, 4)) + 5
    beta, each = rng.standard_normal((1, 3, 1)), rng.standard_normal((n, 1, 4))
    weights = {"none": None, "a mask": rng.random((n, 1, 4)) > 0.3, "real": rng.random((n, 3, 4))}[kind]
    if kind == "a mask":
        x, dy = np.where(weights, x, np.nan), np.where(weights, dy, 0)

    def run(part, shift, **more):
        if weights is not None:
            more["weights"] = of.array(weights[part], "bool" if kind == "a mask" else None)
        arrays = of.array(x[part]), of.array(shift)
        (y, moments), pullback = anynorm.vjp(anynorm.center, *arrays, axis=(0, 2), return_moments=True, **more)
        found = y, *pullback(of.array(dy[part])), moments.mean, moments.var
        return [backend.numpy(array) for array in found]

    cuts = np.cumsum([0, *sizes])
    parts = [slice(*pair) for pair in pairwise(cuts)]
    for own in (False, True):  # a beta of all replicas, and one for each sample
        replicas = Replicas(len(sizes))
        found = replicas.run(
            lambda rank, all_reduce, own=own: run(
                parts[rank], each[parts[rank]] if own else beta, all_reduce=all_reduce
            )
        )
        assert len({tuple(calls) for calls in replicas.calls}) == 1, "equally often, with arrays of equal shape"
        y, dx, dbeta, mean, var = zip(*found, strict=True)
        joined = [np.concatenate(y), np.concatenate(dx), np.concatenate(dbeta) if own else dbeta[0], mean[0], var[0]]
        for shared in (mean, var, *([] if own else [dbeta])):
            for other in shared[1:]:
                np.testing.assert_array_equal(shared[0], other)
        bound = 100 * backend.tolerance
        for one, other in zip(joined, run(slice(0, n), each if own else beta), strict=True):
            np.testing.assert_allclose(one, other, atol=bound, rtol=bound)


@pytest.mark.cells("torch-cpu")
def test_it_is_the_same_where_it_is_compiled(backend):
    x = backend.array(np.random.default_rng(4).standard_normal((6, 8, 40)) * 3 + 1e4, "float32")

    def centred(x):
        return anynorm.center(x, axis=(0, 2))

    expected = centred(x)
    compiled = backend.xp.compile(centred, backend="eager", fullgraph=True)
    backend.check(compiled(x), backend.numpy(expected), dtype="float32", tolerance=1e-6)
