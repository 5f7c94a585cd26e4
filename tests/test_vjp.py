"""`vjp`: what it gives beside the numbers, and what becomes of a pullback; `test_conformance.py` has the numbers."""

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
from oracles import CASES, derived

import anynorm


def test_there_is_a_gradient_for_each_array_that_was_passed(backend):
    x, gamma = backend.array(np.ones((2, 3))), backend.array(np.ones(3))
    dy = backend.array(np.ones((2, 3)))
    assert len(anynorm.vjp(anynorm.layer_norm, x)[1](dy)) == 1
    assert len(anynorm.vjp(anynorm.layer_norm, x, gamma)[1](dy)) == 2
    dx, dgamma, dbeta = anynorm.vjp(anynorm.layer_norm, x, None, gamma)[1](dy)
    assert dgamma is None
    backend.check(dbeta, np.full(3, 2.0))
    dx, dgamma, dbeta = anynorm.vjp(anynorm.layer_norm, x, beta=gamma)[1](dy)
    assert dgamma is None
    backend.check(dbeta, np.full(3, 2.0))
    backend.check(dx, np.zeros((2, 3)))


def test_return_moments_gives_them_beside_y(backend):
    x = backend.array(np.random.default_rng(2).standard_normal((4, 3)))
    (y, moments), pullback = anynorm.vjp(anynorm.batch_norm, x, return_moments=True)
    expected, batch = anynorm.batch_norm(x, return_moments=True)
    tolerance = 1e-15 if backend.tracked else 0  # autograd's node may take a way of its own
    backend.check(y, backend.numpy(expected), tolerance=tolerance)
    backend.check(moments.mean, backend.numpy(batch.mean), tolerance=tolerance)
    assert moments.count == 4
    backend.check(pullback(y)[0], backend.numpy(anynorm.vjp(anynorm.batch_norm, x)[1](y)[0]), tolerance=0)
    (_, used), _ = anynorm.vjp(anynorm.batch_norm, x, moments=batch, return_moments=True)
    assert used is batch


def test_gradients_have_the_dtypes_of_what_they_are_gradients_of(backend):
    rng = np.random.default_rng(3)
    x, gamma = backend.array(rng.standard_normal((2, 3)), "float32"), backend.array(rng.standard_normal(3))
    beta = backend.array(rng.standard_normal((1, 3)), "float32")
    y, pullback = anynorm.vjp(anynorm.layer_norm, x, gamma, beta)
    dx, dgamma, dbeta = pullback(backend.array(rng.standard_normal((2, 3))))
    assert (y.dtype, dx.dtype, dgamma.dtype, dbeta.dtype) == (x.dtype, x.dtype, gamma.dtype, beta.dtype)
    assert (tuple(dgamma.shape), tuple(dbeta.shape)) == ((3,), (1, 3))


@pytest.mark.untracked
@pytest.mark.cells("numpy", "torch", "cupy", "strict")
@pytest.mark.parametrize("number", [3, 6000], ids=["whole", "in blocks"])
@pytest.mark.parametrize("norm", [anynorm.layer_norm, anynorm.batch_norm])
def test_pullback_does_not_mind_what_becomes_of_arrays_other_than_x(backend, norm, number):
    rng = np.random.default_rng(4)
    for parameters in (0, 2):
        numbers = [rng.standard_normal((number, 4)), *rng.standard_normal((parameters, 4))]
        x, *params, dy = map(backend.array, (*numbers, rng.standard_normal((number, 4))))
        expected = anynorm.vjp(norm, *map(backend.array, numbers))[1](dy)
        (y, moments), pullback = anynorm.vjp(norm, x, *params, return_moments=True)
        for array in (y, *params, moments.mean, moments.var):
            array[...] = math.nan
        for _ in range(2):
            for found, each in zip(pullback(dy), expected, strict=True):
                backend.check(found, backend.numpy(each), tolerance=0, dtype=backend.widest)


@pytest.mark.untracked
@pytest.mark.cells("torch-cpu")  # on a GPU xhat is kept
@pytest.mark.parametrize("norm", [anynorm.layer_norm, anynorm.rms_norm, anynorm.batch_norm])
def test_an_x_that_was_written_to_is_refused_unless_it_makes_no_difference(backend, norm):
    rng = np.random.default_rng(14)
    for number in (3, 6000):
        x, dy = map(backend.array, rng.standard_normal((2, number, 6)))
        (expected,) = (pullback := anynorm.vjp(norm, x)[1])(dy)
        x += 1
        if number == 3:
            backend.check(pullback(dy)[0], backend.numpy(expected), tolerance=0, dtype=backend.widest)
        else:
            with pytest.raises(ValueError, match="^x must be to the pullback what it was to vjp, got"):
                pullback(dy)


@pytest.mark.untracked
@pytest.mark.cells("numpy", "torch-cpu")  # on a GPU xhat is kept
def test_an_x_that_is_not_read_may_be_written_to(backend):
    x, dy = map(backend.array, np.random.default_rng(17).standard_normal((2, 6000, 6)))
    moments = anynorm.batch_norm(x, return_moments=True)[1]
    pullback = anynorm.vjp(anynorm.batch_norm, x, None, moments.mean, moments=moments)[1]
    expected = pullback(dy)[0]
    x[...] = math.nan
    backend.check(pullback(dy)[0], backend.numpy(expected), tolerance=0, dtype=backend.widest)


@pytest.mark.untracked
@pytest.mark.cells("numpy", "torch-cpu")  # on a GPU xhat is kept
def test_a_pullback_of_another_x_is_not_held_to_the_first(backend):
    x, dy = map(backend.array, np.random.default_rng(18).standard_normal((2, 6000, 6)))
    x += 1
    pullback = anynorm.vjp(anynorm.layer_norm, x)[1]
    other = dataclasses.replace(pullback, x=backend.array(backend.numpy(x)))
    (expected,) = pullback(dy)
    x += 1
    backend.check(other(dy)[0], backend.numpy(expected), tolerance=0, dtype=backend.widest)


@pytest.mark.untracked
@pytest.mark.cells("torch-cpu")
def test_pytorch_tells_of_each_number_that_was_written_to(backend):
    x = backend.array(np.random.default_rng(15).standard_normal((4, 5, 1000)))
    pullback = anynorm.vjp(anynorm.batch_norm, x)[1]
    pullback(x)
    x[2, 3, 400] += 1
    with pytest.raises(ValueError, match="^x must be to the pullback what it was to vjp, got"):
        pullback(x)


def replay(pullback):
    return pickle.loads(pickle.dumps(pullback))


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, replay])
@pytest.mark.parametrize("case", CASES[::5], ids=str)
def test_a_copy_of_a_pullback_and_one_from_a_pickle_are_the_derivative_too(backend, case, again):
    rng = np.random.default_rng(19)
    x, dy = rng.standard_normal(case.shape) + 1, rng.standard_normal(case.shape)
    params = [rng.standard_normal(case.parameter_shape) for _ in range(case.parameters)]
    y, pullback = anynorm.vjp(case.norm, backend.array(x), *map(backend.array, params), **case.options)
    if backend.tracked and again is copy.deepcopy:
        with pytest.raises(TypeError, match="^a pullback of what autograd records cannot be deep-copied: detach what "):
            again(pullback)
        return
    copied = again(pullback)
    assert type(copied) is type(pullback)
    _, *derivatives = derived(case, [x, *params, None][:3], dy)
    for found, each in zip(copied(backend.array(dy)), derivatives, strict=True):
        backend.check(found, each, tolerance=max(backend.tolerance, 1e-8))


@pytest.mark.untracked
@pytest.mark.cells("numpy", "torch-cpu")
def test_a_deep_copy_of_a_pullback_has_an_x_of_its_own(backend):
    x, dy = map(backend.array, np.random.default_rng(20).standard_normal((2, 6000, 6)))
    pullback = anynorm.vjp(anynorm.layer_norm, x)[1]
    copied, (expected,) = copy.deepcopy(pullback), pullback(dy)
    x[...] = math.nan
    backend.check(copied(dy)[0], backend.numpy(expected), tolerance=1e-14, dtype=backend.widest)
