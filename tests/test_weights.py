"""Weights and masks: sums of the definition, one number at a time; repetition; padding; and what must not be."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import CASES, derived, measured, only_if, peak

import anynorm

WEIGHTED = [case for case in CASES if case.norm is not anynorm.weight_norm]
QUICK = pytest.mark.cells("numpy", "strict", "torch", "cupy")
KINDS = ["mask", "reals", "integers", "mask of the last axis", "one weight"]


def weights_of(kind, shape, rng):
    """Weights that broadcast to an array of this shape, and their dtype."""
    if kind == "mask":
        return rng.random(shape) > 0.3, "bool"
    if kind == "reals":
        return rng.random((*shape[:-1], 1)) * (rng.random((*shape[:-1], 1)) > 0.2), None
    if kind == "integers":
        return rng.integers(0, 4, (1, *shape[1:])), "int8"
    if kind == "mask of the last axis":
        return np.arange(shape[-1]) != 1, "bool"
    return np.asarray(0.25), None


def constant(backend, numbers, dtype=None):
    """An array without a gradient: masks and integers have none."""
    return untracked(backend).array(numbers, dtype)


def untracked(backend):
    """The backend without a gradient."""
    return replace(backend, tracked=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", WEIGHTED, ids=str)
def test_each_number_counts_as_its_weight_says(backend, case, kind):
    only_if((kind == "mask" and len(case.shape) == 4) or case is WEIGHTED[1], backend)
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal(case.shape) + 1, rng.standard_normal(case.shape)
    params = [rng.standard_normal(case.parameter_shape) for _ in range(2)]
    numbers, dtype = weights_of(kind, case.shape, rng)
    weights = constant(backend, numbers, dtype)
    arrays = [backend.array(each) for each in (x, *params)]
    expected, *derivatives = derived(case, [x, *params], dy, weights=numbers)
    backend.check(case.norm(*arrays, weights=weights, **case.options), expected)
    y, pullback = anynorm.vjp(case.norm, *arrays, weights=weights, **case.options)
    backend.check(y, expected)
    for found, each in zip(pullback(backend.array(dy)), derivatives, strict=True):
        backend.check(found, each, tolerance=max(backend.tolerance, 1e-8))


def test_moments_are_weighted_and_the_count_is_the_sum_of_the_weights(backend):
    rng = np.random.default_rng(1)
    x, weights = rng.standard_normal((4, 3, 5)), rng.integers(0, 3, (4, 1, 5))
    found = anynorm.moments(backend.array(x), axis=(0, 2), weights=constant(backend, weights, "int32"))
    every = np.broadcast_to(weights, x.shape)
    mean = np.average(x, axis=(0, 2), weights=every)
    backend.check(found.mean, mean)
    backend.check(found.var, np.average((x - mean[:, None]) ** 2, axis=(0, 2), weights=every))
    backend.check(found.count, every.sum(axis=(0, 2)).astype(float))
    _, batch = anynorm.batch_norm(backend.array(x), weights=constant(backend, weights, "int32"), return_moments=True)
    backend.check(batch.count, every.sum(axis=(0, 2)).astype(float))
    _, each = anynorm.group_norm(
        backend.array(x), weights=constant(backend, weights, "int32"), groups=3, return_moments=True
    )
    backend.check(each.count, every.sum(axis=2).astype(float))


@pytest.mark.cells("jax", "torch")
@pytest.mark.parametrize("eps", [0, 1e-24, 1e-26, 1e-36])
def test_recorded_gradients_of_equal_numbers_are_those_of_the_formula_beside_others(backend, eps):
    if backend.library == "jax":
        from jax import grad
    else:
        from torch.func import grad
    x, dy = (backend.array(each, "float32") for each in ([[1.0, 1.0, 3.0, 4.0]], [[1.0, 2.0, 3.0, 5.0]]))
    mask = constant(backend, np.asarray([True, True, False, False]), "bool")
    found = grad(lambda x: (anynorm.layer_norm(x, eps=eps, weights=mask) * dy).sum())(x)
    expected = np.asarray([[1 - 5.5, 2 - 5.5, 3, 5]])
    np.testing.assert_allclose(backend.numpy(found) * (eps or 1) ** 0.5, expected, rtol=1e-6)


@pytest.mark.cells("jax")
def test_integers_are_weights_where_nothing_is_promoted(backend):
    import jax

    x, weights = backend.array(np.arange(8.0).reshape(4, 2)), backend.xp.asarray([[1], [0], [2], [1]])
    expected = anynorm.vjp(anynorm.batch_norm, x, weights=backend.array(weights))[1](x)[0]
    with jax.numpy_dtype_promotion("strict"):
        backend.check(anynorm.vjp(anynorm.batch_norm, x, weights=weights)[1](x)[0], backend.numpy(expected))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_weight_too_large_for_the_dtype_is_named(dtype):
    with pytest.raises(ValueError, match=r"^weights must have their largest in the range of float32, got 1e\+300$"):
        anynorm.layer_norm(np.ones((2, 3), dtype), weights=np.full(3, 1e300))


def test_weights_whose_sum_is_no_float_count_as_inf(backend):
    """No float32, that is: in float64 it is one."""
    x, weights = backend.array(np.full((4, 2), 3.0), "float32"), np.full((4, 1), 3e38, np.float32)
    found = anynorm.moments(x, axis=0, weights=constant(backend, weights, "float32"))
    exact = 4 * float(np.float32(3e38)) if backend.float64 else np.inf
    assert np.all(backend.numpy(found.count) == exact)
    backend.check(found.mean, np.full(2, 3.0), dtype="float32")


@QUICK
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_whole_weights_are_repetitions(backend, data, seed):
    norm, options, axis = data.draw(
        st.sampled_from(
            [
                (anynorm.layer_norm, {"axis": (1, 2)}, 2),
                (anynorm.batch_norm, {}, 0),
                (anynorm.instance_norm, {}, 2),
                (anynorm.group_norm, {"groups": 2}, 2),
                (anynorm.rms_norm, {}, 2),
                (anynorm.normalize, {"axis": (0, 1)}, 0),
            ]
        )
    )
    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((2, 4, 4, 5))[:, :3], rng.standard_normal((2, 4, 4, 5))[:, :3]
    x, dy = x[0], dy[0]
    times = np.asarray(data.draw(st.lists(st.integers(0, 3), min_size=x.shape[axis], max_size=x.shape[axis])))
    if not times.any():
        times[0] = 1
    shape = tuple(-1 if each == axis else 1 for each in range(3))
    weights, gamma = times.reshape(shape), rng.standard_normal((1, 4, 1))
    dy = dy * (weights > 0)  # what is repeated 0 times has no gradient

    def repeated(array):
        return np.repeat(array, times, axis=axis)

    y, pullback = anynorm.vjp(
        norm, backend.array(x), backend.array(gamma), weights=constant(backend, weights, "int32"), **options
    )
    other, other_pullback = anynorm.vjp(norm, backend.array(repeated(x)), backend.array(gamma), **options)
    tolerance = 1e-3 if not backend.float64 else 1e-8
    np.testing.assert_allclose(repeated(backend.numpy(y)), backend.numpy(other), rtol=tolerance, atol=tolerance)
    dx, dgamma = map(backend.numpy, pullback(backend.array(dy)))
    shares = repeated(dy / np.maximum(weights, 1))
    each, other_dgamma = map(backend.numpy, other_pullback(backend.array(shares)))
    np.testing.assert_allclose(repeated(dx / np.maximum(weights, 1)), each, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(dgamma, other_dgamma, rtol=tolerance, atol=tolerance)


LENGTHS = [3, 5, 1, 0]
PADDED = [
    (anynorm.layer_norm, {"axis": (1, 2)}, True),
    (anynorm.layer_norm, {"axis": 1}, True),
    (anynorm.rms_norm, {"axis": (1, 2)}, True),
    (anynorm.instance_norm, {}, True),
    (anynorm.group_norm, {"groups": 2}, True),
    (anynorm.batch_norm, {}, False),
    (anynorm.normalize, {"axis": (0, 2)}, False),
]


@pytest.mark.parametrize("padding", [0.0, np.nan, np.inf, -1e30])
@pytest.mark.parametrize(("norm", "options", "alone"), PADDED, ids=lambda each: getattr(each, "__name__", str(each)))
def test_a_mask_of_a_padded_batch_is_the_computation_without_padding(backend, norm, options, alone, padding):
    only_if(np.isnan(padding), backend)
    rng = np.random.default_rng(2)
    shape = (len(LENGTHS), 4, max(LENGTHS))
    x, dy, gamma, beta = (rng.standard_normal(s) for s in (shape, shape, (1, 4, 1), (1, 4, 1)))
    mask = np.arange(shape[2]) < np.asarray(LENGTHS)[:, None, None]
    padded, dy = np.where(mask, x, padding), np.where(mask, dy, 0)
    arrays = map(backend.array, (padded, gamma, beta))
    y, pullback = anynorm.vjp(norm, *arrays, weights=constant(backend, mask, "bool"), **options)
    dx, *parameters = map(backend.numpy, pullback(backend.array(dy)))
    # each sample by itself without its padding; or all numbers of the batch as one long sample
    parts = [(slice(i, i + 1), slice(None), slice(0, n)) for i, n in enumerate(LENGTHS) if n]
    whole = [np.concatenate([array[part] for part in parts], axis=2) for array in (x, dy)]
    pieces = [(x[part], dy[part]) for part in parts] if alone else [whole]
    expected, totals = [], [0.0, 0.0]
    for piece, dpiece in pieces:
        y_alone, pull = anynorm.vjp(norm, *map(backend.array, (piece, gamma, beta)), **options)
        dx_alone, *parameters_alone = map(backend.numpy, pull(backend.array(dpiece)))
        expected.append((backend.numpy(y_alone), dx_alone))
        totals = [total + each for total, each in zip(totals, parameters_alone, strict=True)]
    tolerance = max(backend.tolerance, 1e-10) * 10
    for position, found in enumerate((backend.numpy(y), dx)):
        kept = np.concatenate([found[part] for part in parts], axis=2)
        np.testing.assert_allclose(
            kept, np.concatenate([each[position] for each in expected], axis=2), rtol=tolerance, atol=tolerance
        )
    assert np.all(dx[~np.broadcast_to(mask, shape)] == 0)
    for found, total in zip(parameters, totals, strict=True):
        np.testing.assert_allclose(found, total, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("eps", [1e-5, 0])
@pytest.mark.parametrize("fill", [0.0, 7.0, np.nan, np.inf])
def test_a_group_without_weight_gives_beta_and_no_gradient(backend, eps, fill):
    only_if((eps == 0) == np.isnan(fill) and fill != 7, backend)
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((3, 2, 4)), rng.standard_normal((3, 2, 4))
    x[1] = fill
    x[1, 0, 0] = 3.0
    weights = np.ones((3, 1, 1))
    weights[1] = 0
    for norm in (anynorm.instance_norm, anynorm.layer_norm, anynorm.rms_norm):
        shape = (x.shape[1],) if norm is anynorm.instance_norm else (x.shape[2],)
        gamma, beta = rng.standard_normal(shape), rng.standard_normal(shape)
        y, pullback = anynorm.vjp(
            norm, *map(backend.array, (x, gamma, beta)), weights=constant(backend, weights), eps=eps
        )
        dx, dgamma, dbeta = map(backend.numpy, pullback(backend.array(dy)))
        full = beta[:, None] if norm is anynorm.instance_norm else beta
        np.testing.assert_allclose(backend.numpy(y)[1], np.broadcast_to(full, (2, 4)), rtol=1e-6)
        assert np.all(dx[1] == 0)
        axes = (0, 2) if norm is anynorm.instance_norm else (0, 1)
        np.testing.assert_allclose(dbeta, dy.sum(axis=axes), rtol=1e-5, atol=1e-5)
        assert np.all(np.isfinite(dgamma))


@pytest.mark.parametrize("momentum", [0.9, None])
def test_a_channel_without_weight_leaves_the_running_statistics_alone(backend, momentum):
    x = np.random.default_rng(4).standard_normal((6, 3))
    x[:, 1] = np.nan
    mask = np.asarray([True, False, True])
    running = anynorm.RunningStats(
        backend.array([1.0, 2.0, 3.0]), backend.array([4.0, 5.0, 6.0]), 7, momentum=momentum, correction=1
    )
    y, batch = anynorm.batch_norm(backend.array(x), weights=constant(backend, mask, "bool"), return_moments=True)
    assert np.all(backend.numpy(y)[:, 1] == 0)
    backend.check(batch.count, [6.0, 0.0, 6.0])
    updated = running.update(batch)
    mean, var = backend.numpy(updated.mean), backend.numpy(updated.var)
    assert mean[1] == 2
    np.testing.assert_allclose(var[1], 5, rtol=1e-6)
    kept = anynorm.moments(backend.array(x[:, [0, 2]]), axis=0)
    other = anynorm.RunningStats(
        backend.array([1.0, 3.0]), backend.array([4.0, 6.0]), 7, momentum=momentum, correction=1
    ).update(kept)
    np.testing.assert_allclose(mean[[0, 2]], backend.numpy(other.mean), rtol=1e-5)
    np.testing.assert_allclose(var[[0, 2]], backend.numpy(other.var), rtol=1e-5)
    np.testing.assert_array_equal(backend.numpy(updated.count), [13, 7, 13])
    nothing = running.update(anynorm.moments(backend.array(x), axis=0, weights=constant(backend, False, "bool")))
    np.testing.assert_allclose(backend.numpy(nothing.mean), [1, 2, 3], rtol=1e-6)
    np.testing.assert_allclose(backend.numpy(nothing.var), [4, 5, 6], rtol=1e-6)


@QUICK
def test_equal_weights_change_nothing(backend):
    rng = np.random.default_rng(5)
    x, dy, gamma = rng.standard_normal((4, 6, 5)), rng.standard_normal((4, 6, 5)), rng.standard_normal(6)
    for weights, dtype in ((True, "bool"), (3, "uint8"), (0.1, None), (np.full((4, 1, 1), 1e-30), None)):
        for norm, options in ((anynorm.batch_norm, {}), (anynorm.group_norm, {"groups": 2})):
            expected, pull = anynorm.vjp(norm, backend.array(x), backend.array(gamma), **options)
            given = constant(backend, weights, dtype)
            y, pullback = anynorm.vjp(norm, backend.array(x), backend.array(gamma), weights=given, **options)
            backend.check(y, backend.numpy(expected))
            for found, each in zip(pullback(backend.array(dy)), pull(backend.array(dy)), strict=True):
                backend.check(found, backend.numpy(each))


def test_weights_make_no_difference_to_moments_that_are_given(backend):
    x = backend.array(np.random.default_rng(6).standard_normal((4, 3)))
    batch = anynorm.moments(x, axis=0)
    weights = constant(backend, [[True], [False], [True], [True]], "bool")
    y, used = anynorm.batch_norm(x, moments=batch, weights=weights, return_moments=True)
    backend.check(y, backend.numpy(anynorm.batch_norm(x, moments=batch)), tolerance=0)
    assert used is batch


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "float16", "float32", "bfloat16"])
def test_the_dtype_of_weights_is_theirs_alone(backend, dtype):
    if dtype in ("bfloat16", "float16") and dtype not in backend.narrow:
        pytest.skip(reason=f"{backend.library} has no {dtype}")
    rng = np.random.default_rng(7)
    weights = rng.integers(0, 2, (4, 1)).astype(float)
    weights[0] = 1
    x = rng.standard_normal((4, 3))
    mean = np.average(x, axis=0, weights=weights[:, 0])
    var = np.average((x - mean) ** 2, axis=0, weights=weights[:, 0])
    for name in ("float32", *(["float16"] if "float16" in backend.narrow else [])):
        array = backend.array(x, name)
        given = constant(backend, weights, dtype)
        y, batch = anynorm.batch_norm(array, weights=given, return_moments=True)
        backend.check(y, (x - mean) / np.sqrt(var + 1e-5), dtype=name, tolerance=1e-2 if name == "float16" else 1e-5)
        backend.check(batch.count, np.full(3, weights.sum()), dtype=backend.widest)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
def test_float32_keeps_its_digits_at_an_offset(backend, offset):
    rng = np.random.default_rng(8)
    x = (rng.standard_normal((64, 3, 40)) + offset).astype(np.float32)
    weights = (rng.random((64, 1, 40)) * (rng.random((64, 1, 40)) > 0.3)).astype(np.float32)
    wide, every = x.astype(np.longdouble), np.broadcast_to(weights, x.shape).astype(np.longdouble)
    mean = np.average(wide, axis=(0, 2), weights=every, keepdims=True)
    var = np.average((wide - mean) ** 2, axis=(0, 2), weights=every, keepdims=True)
    expected = (wide - mean) / np.sqrt(var + 1e-5)
    y = anynorm.batch_norm(backend.array(x, "float32"), weights=constant(backend, weights, "float32"))
    backend.check(y, expected.astype(float), dtype="float32", tolerance=2e-5)


@pytest.mark.parametrize("mean", [0, 10, 1e4, 1e6])
@pytest.mark.parametrize("block_bytes", [2**10, 2**12, 2**22])
@pytest.mark.parametrize(
    ("norm", "shape", "of"),
    [
        (anynorm.layer_norm, (48, 70), (70,)),
        (anynorm.instance_norm, (4, 6, 9, 11), None),
        (anynorm.batch_norm, (40, 6, 9), (6,)),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_a_gradient_that_is_nearly_all_mean(backend, norm, shape, of, block_bytes, mean):
    only_if(mean != 1e4 and block_bytes > 2**10, backend, "strict")
    only_if(mean == 1e6 and block_bytes == 2**22, backend, "jax")  # which has no blocks
    rng = np.random.default_rng(18)
    x, dy = rng.standard_normal((2, *shape)).astype(np.float32)
    mask = rng.random(shape) > 0.4
    mask[3:9] = False  # parts, or groups, without weight
    dy = (dy + np.float32(mean)) * mask
    gamma = [] if of is None else [np.full(of, 2.0, dtype=np.float32)]  # whose products lose nothing
    wide = [each.astype(np.float64) for each in (x, *gamma)]
    exact = anynorm.vjp(norm, *wide, weights=mask)[1](dy.astype(np.float64))[0]
    with anynorm.options(block_bytes=block_bytes):
        arrays = [backend.array(each, "float32") for each in (x, *gamma)]
        pullback = anynorm.vjp(norm, *arrays, weights=constant(backend, mask, "bool"))[1]
        found = backend.numpy(pullback(backend.array(dy, "float32"))[0])
    assert np.max(np.abs(found - exact)) < 4e-6 * np.max(np.abs(exact))


@pytest.mark.parametrize("size", [1.0, 1e10, 1e20])
@pytest.mark.parametrize("tiny", [1e-20, 1e-36, 1e-44])
@pytest.mark.parametrize("block_bytes", [2**8, 2**10])
def test_parts_that_weigh_next_to_nothing_in_a_gradient(backend, tiny, size, block_bytes):
    only_if((tiny == 1e-36) == (size == 1e10) and block_bytes == 2**10, backend, "strict")
    only_if(block_bytes == 2**8, backend)
    rng = np.random.default_rng(19)
    x, dy = rng.standard_normal((2, 60, 3, 5)).astype(np.float32)
    weights = rng.random((60, 1, 5)).astype(np.float32)
    weights[20:40] *= np.float32(tiny)
    dy *= np.float32(size)
    wide = x.astype(np.float64)
    exact = anynorm.vjp(anynorm.batch_norm, wide, weights=weights)[1](dy.astype(np.float64))[0]
    with anynorm.options(block_bytes=block_bytes):
        given = constant(backend, weights, "float32")
        pullback = anynorm.vjp(anynorm.batch_norm, backend.array(x, "float32"), weights=given)[1]
        found = backend.numpy(pullback(backend.array(dy, "float32"))[0])
    assert np.max(np.abs(found - exact)) < 4e-6 * np.max(np.abs(exact))


@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize("weight", [1e30, 1.0, 1e-30])
def test_numbers_and_weights_of_any_size(backend, size, weight):
    rng = np.random.default_rng(9)
    x, mask = rng.standard_normal((8, 5)).astype(np.float32), rng.random((8, 5)) > 0.3
    mask[:2] = True
    big, weights = (x * np.float32(size)), mask * np.float32(weight)
    big[~mask] = 1e30  # padding has no say in the power of two
    mean = np.average(x, axis=0, weights=mask)
    expected = (x - mean) / np.sqrt(np.average((x - mean) ** 2, axis=0, weights=mask))
    given = constant(backend, weights, "float32")
    y, pullback = anynorm.vjp(anynorm.batch_norm, backend.array(big, "float32"), weights=given, eps=0)
    (dx,) = pullback(backend.array(mask.astype(float), "float32"))
    np.testing.assert_allclose(backend.numpy(y)[mask], expected[mask], rtol=1e-4, atol=1e-4)
    assert np.all(np.isfinite(backend.numpy(dx)))
    for fill in (x[0, 0], 0.0):
        constants = np.where(mask, fill, big).astype(np.float32)
        y = anynorm.batch_norm(backend.array(constants, "float32"), weights=given, eps=0)
        assert np.all(backend.numpy(y)[mask] == 0)


@pytest.mark.parametrize("eps", [0, 1e-5])
@pytest.mark.parametrize("value", [1001.0, 0.1, 1e6 / 3, 1e20 / 3])
@pytest.mark.parametrize("block_bytes", [64, 128, 2**22])
def test_equal_numbers_of_unequal_weights_have_no_spread(backend, value, eps, block_bytes):
    only_if(value == 0.1 and block_bytes != 128, backend, "dask")
    only_if(value == 0.1 and block_bytes == 2**22, backend, "jax")  # which has no blocks
    only_if(value == 0.1 and block_bytes > 64, backend, "strict")
    rng = np.random.default_rng(17)
    weights = (rng.random((40, 3)) ** 8 * 10.0 ** rng.integers(-6, 6, (40, 3))).astype(np.float32)
    weights[rng.random((40, 3)) > 0.8] = 0
    weights[0] = 1
    beta = np.asarray([1.0, 2.0, 3.0])
    for padding in (value, 0.0, np.nan):
        x = np.where(weights > 0, value, padding)
        arrays = backend.array(x, "float32"), None, backend.array(beta, "float32")
        given = constant(backend, weights, "float32")
        with anynorm.options(block_bytes=block_bytes):
            y = backend.numpy(anynorm.batch_norm(*arrays, weights=given, eps=eps))
            assert np.all((y == beta)[weights > 0])
            assert not np.any(backend.numpy(anynorm.moments(arrays[0], axis=0, weights=given).var))


@pytest.mark.cells("numpy", "strict", "torch")
def test_equal_numbers_become_beta_whatever_rounding_leaves_of_their_mean(backend):
    rng = np.random.default_rng(0)
    value, weights = rng.standard_normal(20) * 10.0 ** rng.integers(0, 6, 20), rng.random((4, 1, 300))
    x, beta = np.broadcast_to(value[:, None], (4, 20, 300)), rng.standard_normal(20)
    with anynorm.options(block_bytes=8192):  # a group is in one block
        y = anynorm.instance_norm(
            *(backend.array(x, "float32"), None, backend.array(beta, "float32")),
            weights=constant(backend, weights, "float32"),
            eps=1e-12,
        )
    expected = np.broadcast_to(beta.astype(np.float32)[:, None], x.shape)
    np.testing.assert_array_equal(backend.numpy(y), expected)


def test_a_weight_that_is_negative_or_not_finite_is_an_error(backend):
    x = backend.array(np.ones((2, 3)))
    for bad in (-1.0, np.nan, np.inf):
        weights = constant(backend, [1.0, bad, 1.0])
        if backend.library == "dask":
            anynorm.layer_norm(x, weights=weights)  # lazy
            continue
        with pytest.raises(ValueError, match="weights must be finite and at least 0 everywhere"):
            anynorm.layer_norm(x, weights=weights)
        with pytest.raises(ValueError, match="weights must be finite"):
            anynorm.vjp(anynorm.rms_norm, x, weights=weights)
        with pytest.raises(ValueError, match="weights must be finite"):
            anynorm.moments(x, axis=0, weights=weights)


def test_weights_that_do_not_fit_are_an_error(backend):
    x = backend.array(np.ones((2, 3)))
    for shape in ((2,), (3, 3), (1, 2, 3), (2, 3, 1), (0,)):
        with pytest.raises(ValueError, match=r"weights must broadcast to the shape of x, \(2, 3\), got"):
            anynorm.layer_norm(x, weights=constant(backend, np.ones(shape), "bool"))
    for wrong in ([True, False, True], 1.0, "mask"):
        with pytest.raises(TypeError, match="weights must be an array"):
            anynorm.layer_norm(x, weights=wrong)
    if backend.library != "numpy":
        with pytest.raises(TypeError, match="x and weights must come from one array library"):
            anynorm.layer_norm(x, weights=np.ones(3))
    if backend.library != "strict":  # some of its devices have no complex numbers
        with pytest.raises(TypeError, match="weights must have a bool, integer or real floating dtype, got"):
            anynorm.layer_norm(x, weights=constant(backend, np.ones(3), "complex64"))


def test_the_result_goes_where_out_says(backend):
    if backend.library not in ("numpy", "strict", "torch", "cupy") or backend.tracked:
        pytest.skip(reason="cannot be written to")
    x, weights = np.random.default_rng(10).standard_normal((4, 3)), np.asarray([[1.0], [0.0], [2.0], [1.0]])
    expected = anynorm.batch_norm(backend.array(x), weights=constant(backend, weights))
    array = backend.array(x)
    assert anynorm.batch_norm(array, weights=constant(backend, weights), out=array) is array
    backend.check(array, backend.numpy(expected), tolerance=0)


def test_the_page_about_masks_does_as_it_says(backend):
    text = (Path(__file__).parents[1] / "docs" / "masks.md").read_text()
    section = re.search(r"^### Padded sequences$(.*?)^## ", text, re.MULTILINE | re.DOTALL)[1]
    rng = np.random.default_rng(16)
    x, dy, lengths = rng.standard_normal((3, 2, 4)), rng.standard_normal((3, 2, 4)), np.asarray([4, 1, 2])
    own = untracked(backend)
    where = {} if backend.library == "dask" else {"device": backend.device}
    arange = backend.xp.arange(4, **where) if backend.library not in ("numpy", "cupy") else backend.xp.arange(4)
    xp = SimpleNamespace(arange=lambda n: arange, where=backend.xp.where, zeros_like=backend.xp.zeros_like)
    names = {
        "anynorm": anynorm,
        "xp": xp,
        "x": own.array(x),
        "dy": own.array(dy),
        "lengths": own.array(lengths, "int32"),
    }
    names |= {"gamma": own.array([1.0, 2.0]), "beta": own.array([0.0, 1.0])}
    names["running"] = anynorm.RunningStats.init(2, like=names["x"], momentum=0)
    for each in re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
        exec(each, names)
    real = np.concatenate([x[i, :, :n] for i, n in enumerate(lengths)], axis=1)
    own.check(names["running"].mean, real.mean(axis=1))
    own.check(names["running"].var, real.var(axis=1))
    _, pullback = anynorm.vjp(anynorm.group_norm, own.array(x[2:, :, :2]), names["gamma"], names["beta"], groups=1)
    alone = own.numpy(pullback(own.array(dy[2:, :, :2]))[0])
    np.testing.assert_allclose(own.numpy(names["dx"])[2:, :, :2], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.cells("numpy", "strict", "torch")
@pytest.mark.parametrize("blocks", [1, 64])
@pytest.mark.parametrize("case", WEIGHTED, ids=str)
def test_blocks_make_no_difference(backend, case, blocks):
    only_if(blocks == 1, backend, "strict")
    rng = np.random.default_rng(11)
    x, dy = rng.standard_normal(case.shape) + 1e2, rng.standard_normal(case.shape)
    mask = rng.random(case.shape) > 0.3
    x[~mask] = np.where(rng.random(case.shape) > 0.5, np.nan, 1e30)[~mask]
    arrays = [backend.array(each) for each in (x, *(rng.standard_normal(case.parameter_shape) for _ in range(2)))]
    options = {"weights": constant(backend, mask, "bool")} | case.options
    y, pullback = anynorm.vjp(case.norm, *arrays, **options)
    expected = pullback(backend.array(dy * mask))
    nbytes = x.size * (8 if backend.float64 else 4)  # as a block makes several arrays, even one so large is divided
    with anynorm.options(block_bytes=max(1, nbytes // blocks), threads=2):
        found, pullback = anynorm.vjp(case.norm, *arrays, **options)
        gradients = pullback(backend.array(dy * mask))
        backend.check(case.norm(*arrays, **options), backend.numpy(y))
    backend.check(found, backend.numpy(y))
    for one, other in zip(gradients, expected, strict=True):
        backend.check(one, backend.numpy(other))


@pytest.mark.cells("numpy", "torch")
@given(
    shape=st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple),
    block_bytes=st.integers(1, 3000),
    data=st.data(),
)
def test_any_size_of_block_gives_the_result_of_the_definition(backend, shape, block_bytes, data):
    axes = tuple(sorted(data.draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))))
    narrow = tuple(data.draw(st.sampled_from([1, n])) for n in shape)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    weights = rng.random(narrow) * (rng.random(narrow) > data.draw(st.sampled_from([0, 0.3, 0.9])))
    weights *= 10.0 ** data.draw(st.sampled_from([0, 0, 30, -30]))
    every = np.broadcast_to(weights, shape)
    x, dy, gamma = rng.standard_normal((3, *shape))
    x += 5
    total = every.sum(axes, keepdims=True)
    share = np.divide(every, total, out=np.zeros(shape), where=total > 0)
    mean = (share * x).sum(axes, keepdims=True)
    var = (share * (x - mean) ** 2).sum(axes, keepdims=True)
    rstd = 1 / np.sqrt(var + 1e-5)
    xhat = np.where(total > 0, (x - mean) * rstd, 0)
    padding = data.draw(st.sampled_from([0, 1e30, np.nan, np.inf]))
    lost = (every == 0) & (rng.random(shape) > 0.5) if padding else np.zeros(shape, bool)
    kept = ~lost | (total == 0)
    g = np.where(lost, 0, dy) * gamma * (total > 0)
    xhat_lost, expected = np.where(lost, 0, xhat), np.where(lost & (total > 0), np.nan, xhat * gamma)
    leaning = [(each * np.where(lost, 0, 1)).sum(axes, keepdims=True) for each in (g, g * xhat_lost)]
    dx = rstd * (g - share * leaning[0] - share * xhat_lost * leaning[1])
    dy = np.where(lost, 0, dy)
    with anynorm.options(block_bytes=block_bytes, threads=2):
        given = constant(backend, weights)
        array = untracked(backend).array(np.where(lost, padding, x))
        y, pullback = anynorm.vjp(anynorm.layer_norm, array, untracked(backend).array(gamma), weights=given, axis=axes)
        found = [backend.numpy(each) for each in pullback(untracked(backend).array(dy))]
        moments = anynorm.moments(array, axis=axes, weights=given)
    seen = ~np.isnan(expected)
    np.testing.assert_allclose(backend.numpy(y)[seen], expected[seen], atol=1e-9)
    assert padding == 1e30 or not np.isfinite(backend.numpy(y)[~seen]).any()
    np.testing.assert_allclose(backend.numpy(moments.mean), mean.squeeze(axes), atol=1e-11, rtol=1e-11)
    np.testing.assert_allclose(backend.numpy(moments.var), var.squeeze(axes), atol=1e-11, rtol=1e-11)
    np.testing.assert_allclose(backend.numpy(moments.count), total.squeeze(axes), rtol=1e-11)
    np.testing.assert_allclose(found[0][kept & seen], dx[kept & seen], atol=1e-8)
    np.testing.assert_allclose(found[1][seen], (dy * xhat_lost)[seen], atol=1e-8)


@pytest.mark.cells("numpy", "torch", "strict")
@pytest.mark.parametrize("eps", [0, 1e-5])
@pytest.mark.parametrize("size", [1e30, 1e-30])
@pytest.mark.parametrize("block_bytes", [64, 512])
def test_numbers_of_any_size_in_groups_that_are_split(backend, size, eps, block_bytes):
    only_if(block_bytes == 512, backend, "strict")
    rng = np.random.default_rng(17)
    x, dy, mask = rng.standard_normal((40, 3, 5)), rng.standard_normal((40, 3, 5)), rng.random((40, 1, 5)) > 0.4
    mask[3:9] = False  # parts without weight
    x[:, 1] *= size
    x[:, 2] = size  # a constant
    given = np.where(mask, x, np.nan).astype(np.float32)
    wide, every = given.astype(np.float64), np.broadcast_to(mask, x.shape)
    with anynorm.options(block_bytes=block_bytes):
        y, pullback = anynorm.vjp(
            anynorm.batch_norm, backend.array(given, "float32"), weights=constant(backend, mask, "bool"), eps=eps
        )
        (dx,) = map(backend.numpy, pullback(backend.array(np.where(mask, dy, 0), "float32")))
    y = backend.numpy(y)
    for channel in (0, 1):
        numbers = wide[:, channel][every[:, channel]]
        expected = (numbers - numbers.mean()) / np.sqrt(numbers.var() + eps)
        np.testing.assert_allclose(y[:, channel][every[:, channel]], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(y[:, 2][every[:, 2]], 0)
    assert np.isfinite(dx).all()


@pytest.mark.cells("numpy")
def test_the_pullback_keeps_weights_of_its_own():
    rng = np.random.default_rng(18)
    for shape in ((3, 4), (300, 400)):
        x, weights = rng.standard_normal(shape), rng.random(shape)
        expected = anynorm.vjp(anynorm.layer_norm, x, weights=weights)[1](x)[0]
        given = weights.copy()
        _, pullback = anynorm.vjp(anynorm.layer_norm, x, weights=given, out=given)
        np.testing.assert_allclose(pullback(x)[0], expected)
        again = weights.copy()
        np.testing.assert_allclose(
            anynorm.layer_norm(x, weights=again, out=again), anynorm.layer_norm(x, weights=weights)
        )


LARGE = [
    (anynorm.layer_norm, (2**15, 256), {}, [(2**15, 256), (2**15, 1), (256,)]),
    (anynorm.normalize, (8, 1024, 1024), {"axis": None}, [(8, 1024, 1024), (1024, 1)]),
    (anynorm.layer_norm, (1024, 8192), {"axis": 0}, [(1024, 8192)]),
    (anynorm.batch_norm, (8, 64, 128, 128), {}, [(8, 64, 128, 128), (8, 1, 128, 128)]),
    (anynorm.batch_norm, (8, 128, 128, 64), {"channel_axis": -1}, [(8, 128, 128, 64), (8, 128, 128, 1)]),
    (anynorm.group_norm, (8, 128, 128, 64), {"channel_axis": -1, "groups": 32}, [(8, 128, 128, 64)]),
    (anynorm.rms_norm, (2**15, 256), {}, [(2**15, 256)]),
]


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("kind", ["mask", "reals", "padding"])
@pytest.mark.parametrize(
    ("norm", "shape", "options", "narrow"), LARGE, ids=lambda each: getattr(each, "__name__", str(each))
)
@measured
def test_a_call_takes_eight_megabytes_beside_its_output(norm, shape, options, narrow, kind):
    rng = np.random.default_rng(12)
    x = rng.standard_normal(shape, dtype=np.float32)
    for each in narrow if kind == "mask" else narrow[:1]:
        weights = rng.random(each, dtype=np.float32) if kind == "reals" else rng.random(each) > 0.5
        given = np.where(weights, x, np.float32(np.nan)) if kind == "padding" else x
        assert peak(lambda given=given, weights=weights: norm(given, weights=weights, **options)) < x.nbytes + 8e6
        _, pullback = anynorm.vjp(norm, given, weights=weights, **options)
        assert peak(lambda pullback=pullback: pullback(x)) < x.nbytes + 8e6
        assert peak(lambda given=given, weights=weights: norm(given, weights=weights, out=given, **options)) < 8e6


@pytest.mark.cells("numpy")
def test_float32_is_exact_where_groups_are_large():
    rng = np.random.default_rng(12)
    x, mask = rng.standard_normal((16, 64, 128, 128), dtype=np.float32), rng.random((16, 1, 128, 128)) > 0.5
    x += 1e3
    y, moments = anynorm.batch_norm(x, weights=mask, return_moments=True)
    every = np.broadcast_to(mask[:, 0], (16, 128, 128))
    wide = x[:, 5].astype(np.float64)
    d = wide - wide[every].mean()
    np.testing.assert_allclose(y[:, 5], d / np.sqrt((d[every] ** 2).mean() + 1e-5), rtol=0, atol=5e-6)
    np.testing.assert_allclose(moments.var[5], (d[every] ** 2).mean(), rtol=2e-6)
    np.testing.assert_array_equal(moments.count, np.full(64, mask.sum()))


def composed(xp, x, gamma, beta, weights, axes, eps=1e-5):
    """The definition, for automatic differentiation."""
    total = (weights + 0 * x).sum(axes, keepdims=True)
    mean = (weights * x).sum(axes, keepdims=True) / total
    var = (weights * (x - mean) ** 2).sum(axes, keepdims=True) / total
    return (x - mean) / xp.sqrt(var + eps) * gamma + beta


@pytest.mark.cells("torch")
def test_autograd_differentiates_the_definition(backend):
    import torch

    rng = np.random.default_rng(12)
    x, gamma, beta, dy = (
        torch.tensor(rng.standard_normal(shape), device=backend.device, requires_grad=True)
        for shape in ((4, 3, 5), (1, 3, 1), (1, 3, 1), (4, 3, 5))
    )
    weights = torch.tensor(rng.random((4, 1, 5)), device=backend.device, requires_grad=True)
    weights.data[0, 0, :3] = 0

    def norm(x, gamma, beta):
        return anynorm.batch_norm(x, gamma, beta, weights=weights)

    found = torch.autograd.grad(norm(x, gamma, beta), (x, gamma, beta), dy)
    expected = torch.autograd.grad(composed(torch, x, gamma, beta, weights.detach(), (0, 2)), (x, gamma, beta), dy)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(norm, (x, gamma, beta))
    assert torch.autograd.gradgradcheck(norm, (x, gamma, beta))
    loss = norm(x, gamma, beta)
    assert torch.autograd.grad((loss**2).sum(), weights, allow_unused=True) == (None,)
    mapped = torch.func.vmap(lambda x: anynorm.instance_norm(x, channel_axis=0, weights=weights[0].detach()))(x)
    torch.testing.assert_close(mapped, anynorm.instance_norm(x, weights=weights[:1].detach()))


@pytest.mark.cells("torch")
@pytest.mark.parametrize("padding", [np.nan, np.inf, 1e30])
def test_padding_does_not_reach_the_gradients_of_autograd(backend, padding):
    import torch

    rng = np.random.default_rng(13)
    x, mask = rng.standard_normal((4, 3, 5)), np.arange(5) < np.asarray([[[5]], [[2]], [[0]], [[3]]])
    x = torch.tensor(np.where(mask, x, padding), device=backend.device, requires_grad=True)
    gamma = torch.ones(3, dtype=torch.float64, device=backend.device, requires_grad=True)
    mask = torch.tensor(mask, device=backend.device)
    clean = torch.where(mask, x.detach(), 0).requires_grad_()
    grads = []
    for each in (x, clean):
        y = anynorm.batch_norm(each, gamma, weights=mask)
        grads.append(torch.autograd.grad(torch.where(mask, y, 0).square().sum(), (each, gamma), create_graph=True))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    second = torch.autograd.grad(grads[0][0].square().sum(), x)[0]
    assert bool(torch.isfinite(second).all())


@pytest.mark.cells("jax")
def test_jax_differentiates_the_definition_and_padding_does_not_reach_it(backend):
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(14)
    x, dy, gamma, beta = (rng.standard_normal(shape) for shape in ((4, 3, 5), (4, 3, 5), (1, 3, 1), (1, 3, 1)))
    weights = rng.random((4, 1, 5)) * (rng.random((4, 1, 5)) > 0.3)
    dy = np.where(weights > 0, dy, 0)

    def norm(x, gamma, beta, weights):
        return anynorm.batch_norm(x, gamma, beta, weights=weights)

    def formula(x, gamma, beta):
        return composed(jnp, x, gamma, beta, weights, (0, 2))

    _, pull = jax.vjp(formula, *map(backend.array, (x, gamma, beta)))
    expected = pull(backend.array(dy))
    for padding in (np.nan, np.inf, 1e30, 0.0):
        padded = backend.array(np.where(weights > 0, x, padding))

        @jax.jit
        def gradients(padded, gamma, beta, weights, dy):
            _, pull = jax.vjp(norm, padded, gamma, beta, weights)
            y, pullback = anynorm.vjp(anynorm.batch_norm, padded, gamma, beta, weights=weights)
            return pull(dy), jax.tree.map(lambda leaf: leaf * 1, pullback)

        (*found, of_weights), pullback = gradients(padded, *map(backend.array, (gamma, beta, weights, dy)))
        assert not np.any(backend.numpy(of_weights))
        for one, own, other in zip(found, pullback(backend.array(dy)), expected, strict=True):
            backend.check(one, backend.numpy(other), tolerance=1e-10)
            backend.check(own, backend.numpy(other), tolerance=1e-10)
    bad = jax.jit(norm)(*map(backend.array, (x, gamma, beta, -weights)))
    assert bad.shape == x.shape  # traced numbers are not looked at


@pytest.mark.cells("jax")
@pytest.mark.parametrize("momentum", [0.9, None])
def test_running_statistics_pass_over_an_empty_channel_under_jit(backend, momentum):
    import jax

    x = np.random.default_rng(15).standard_normal((6, 3))
    x[:, 1] = np.nan
    running = anynorm.RunningStats(
        *map(backend.array, ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])), backend.array(np.full(3, 7.0)), momentum=momentum
    )

    @jax.jit
    def step(running, x, mask):
        return running.update(anynorm.batch_norm(x, weights=mask, return_moments=True)[1])

    updated = step(running, backend.array(x), backend.array([True, False, True], "bool"))
    assert (float(updated.mean[1]), float(updated.var[1]), float(updated.count[1])) == (2.0, 5.0, 7.0)
    assert np.all(np.isfinite(backend.numpy(updated.mean)))


@pytest.mark.cells("numpy", "torch")
@pytest.mark.parametrize("scale", [1e39, 1e300, 1e-46, 1e-300])
def test_weights_beyond_the_dtype_of_the_computation_are_refused(backend, scale):
    x, weights = backend.array(np.ones((2, 3)), "float32"), constant(backend, np.array([0.0, 1.0, 2.0]) * scale)
    message = f"^weights must have their largest in the range of float32, got {2 * scale:g}$".replace("+", r"\+")
    with pytest.raises(ValueError, match=message):
        anynorm.layer_norm(x, weights=weights)
    x = backend.array(np.ones((2, 3)), "float64")
    assert not np.any(backend.numpy(anynorm.layer_norm(x, weights=weights)))


def counted(backend, moments):
    """The count to all the digits that are kept of it."""
    rest = 0 if moments._count_rest is None else backend.numpy(moments._count_rest)
    return backend.numpy(moments.count) + rest  # in float64


@pytest.mark.cells("numpy", "strict", "torch", "jax", "dask")
@pytest.mark.parametrize("kind", ["one", "mask", "rows", "integers", "fractions"])
def test_the_sum_of_weights_is_exact_beyond_the_digits_of_float32(backend, kind):
    own = untracked(backend)
    n = 2**24 + 3
    if kind in ("mask", "rows") and backend.library == "strict":
        n = 2**12 + 3
    shape, times = (1, n), 1
    weights = {
        "one": lambda: np.ones((1, 1), bool),
        "mask": lambda: np.arange(n)[None] != 5,
        "rows": lambda: np.ones((1, n), np.float32),
        "integers": lambda: np.full((1, 1), 123_457, np.int32),
        "fractions": lambda: np.full((1, 1), 0.1, np.float32),
    }[kind]()
    if weights.size == 1:
        times = n
    exact = float(weights.astype(np.float64).sum()) * times
    if backend.library == "dask":
        import dask.array

        x, given = dask.array.ones(shape, dtype="f4", chunks=(1, 2**22)), dask.array.from_array(weights, (1, 2**22))
    else:
        x, given = own.array(np.ones(shape), "float32"), own.array(weights, str(weights.dtype))
    found = anynorm.moments(x, axis=1, weights=given)
    tolerance = 0 if backend.float64 and kind != "fractions" else 1e-14
    np.testing.assert_allclose(counted(own, found), [exact], rtol=tolerance)
    assert found.count.dtype == own.dtype(own.widest)


def test_weights_of_each_group_are_counted_beside_others(backend):
    own, rng = untracked(backend), np.random.default_rng(12)
    x, weights = rng.standard_normal((3, 4, 5)), rng.integers(2**20, 2**21, (3, 1, 5))
    for norm, options, axes in (
        (anynorm.batch_norm, {}, (0, 2)),
        (anynorm.instance_norm, {}, (2,)),
        (anynorm.group_norm, {"groups": 1}, (1, 2)),
        (anynorm.normalize, {"axis": 1}, (1,)),
    ):
        y, found = norm(own.array(x, "float32"), weights=own.array(weights, "int32"), return_moments=True, **options)
        exact = np.broadcast_to(weights, x.shape).sum(axis=axes).astype(float)
        exact = exact[:, None] if norm is anynorm.group_norm else exact
        np.testing.assert_array_equal(counted(own, found), exact)


@QUICK
def test_blocks_count_exactly(backend):
    own = untracked(backend)
    x, weights = np.ones((64, 3, 40)), np.random.default_rng(13).integers(2**20, 2**23, (64, 3, 40))
    with anynorm.options(block_bytes=2048):
        found = anynorm.moments(own.array(x, "float32"), axis=(0, 2), weights=own.array(weights, "int32"))
    np.testing.assert_array_equal(counted(own, found), weights.sum(axis=(0, 2)).astype(float))


def test_a_group_without_weight_gives_beta_whatever_stands_in_it_and_given_moments_are_arithmetic(backend):
    own, rng = untracked(backend), np.random.default_rng(14)
    x, beta = rng.standard_normal((3, 4)), rng.standard_normal(4)
    x[1] = [5.0, np.nan, -np.inf, 2.0]
    weights = own.array(np.asarray([[1.0], [0.0], [1.0]]))
    array, eps = own.array(x), 0.25
    y, used = anynorm.normalize(array, None, own.array(beta), axis=1, weights=weights, eps=eps, return_moments=True)
    np.testing.assert_allclose(own.numpy(y)[1], beta, rtol=1e-6)
    moments = anynorm.moments(array, axis=1, weights=weights)
    plain = np.where(np.arange(3)[:, None] == 1, 0, x)
    for found in (used, moments):
        own.check(found.mean, plain.mean(axis=1))
        own.check(found.var, plain.var(axis=1))
        np.testing.assert_array_equal(own.numpy(found.count), [4, 0, 4])
        y = own.numpy(anynorm.normalize(array, None, own.array(beta), axis=1, moments=found, weights=weights, eps=eps))
        np.testing.assert_allclose(y[1], x[1] / np.sqrt(eps) + beta, rtol=1e-6)


@QUICK
def test_a_large_group_without_weight_gives_beta_whatever_stands_in_it(backend):
    own, rng = untracked(backend), np.random.default_rng(15)
    x, beta = rng.standard_normal((8, 4, 600)).astype(np.float32), np.arange(4.0)
    x[:, 1] = np.inf
    x[3, 1, 5], x[4, 1, 7] = np.nan, 1e30
    weights = own.array(np.asarray([1, 0, 1, 1])[None, :, None], "int32")
    for block in (2**10, 2**22):
        with anynorm.options(block_bytes=block):
            y, pullback = anynorm.vjp(
                anynorm.batch_norm, own.array(x, "float32"), None, own.array(beta, "float32"), weights=weights
            )
            np.testing.assert_array_equal(own.numpy(y)[:, 1], 1.0)
            assert np.all(own.numpy(pullback(own.array(np.ones_like(x), "float32"))[0])[:, 1] == 0)
