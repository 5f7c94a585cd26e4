"""The way back from a norm: it undoes what the norm did, to the last digits, with the statistics of other data too."""

import re
from dataclasses import replace

import numpy as np
import pytest
from oracles import oracle

import anynorm

SIZES = [
    # dtype, offset, spread; by how many units in the last place of a group's largest number a round trip may be off
    *(("float32", offset, spread) for offset in (0.0, 1e4, 1e6) for spread in (1.0, 1e-30, 1e15)),
    *(("float64", offset, spread) for offset in (0.0, 1e6) for spread in (1.0, 1e30)),
]


def untracked(backend):
    return replace(backend, tracked=False)


@pytest.mark.parametrize("eps", [1e-5, 0])
@pytest.mark.parametrize(("dtype", "offset", "spread"), SIZES, ids=str)
def test_a_round_trip_loses_next_to_nothing(backend, dtype, offset, spread, eps):
    if dtype == "float64" and not backend.float64:
        pytest.skip(reason="it has no float64")
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((6, 40, 5)) * spread + offset).astype(dtype)
    x[0], x[1, :, 0], x[2, 0] = offset + spread / 3, spread / 7, 0  # flat groups, and one that is nearly so
    groups = np.broadcast_to(np.abs(x).max(axis=1, keepdims=True), x.shape)
    given = backend.array(x, dtype)
    moments = anynorm.moments(given, axis=1)
    parameters = [(None, None)]
    if spread != 1e-30:  # beside a beta nothing would be left of it
        parameters.append((rng.uniform(0.5, 2, (1, 40, 1)), rng.standard_normal((1, 1, 5)) / 2))
    for some in parameters:
        gamma, beta = (None if each is None else backend.array(each, dtype) for each in some)
        y = anynorm.normalize(given, gamma, beta, axis=1, moments=moments, eps=eps)
        back = anynorm.denormalize(y, gamma, beta, axis=1, moments=moments, eps=eps)
        assert (type(back), back.dtype, tuple(back.shape)) == (type(given), given.dtype, x.shape)
        found = backend.numpy(back)
        units = np.abs(found - x) / np.spacing(groups)
        assert np.max(units[2:]) <= (2 if offset else 4), np.max(units[2:])
        np.testing.assert_array_equal(found[0], x[0])
        np.testing.assert_array_equal(found[1, :, 0], x[1, :, 0])


NORMS = [
    (anynorm.normalize, {"axis": (0, 2, 3)}, (0, 2, 3), None),
    (anynorm.layer_norm, {"axis": (-1, 1)}, (1, 3), None),
    (anynorm.batch_norm, {}, (0, 2, 3), None),
    (anynorm.instance_norm, {"channel_axis": -1}, (1, 2), None),
    (anynorm.group_norm, {"groups": 2}, (2, 3, 4), (3, 2, 2, 5, 6)),
]


@pytest.mark.parametrize(("norm", "options", "axis", "split"), NORMS, ids=lambda each: getattr(each, "__name__", ""))
def test_every_norm_with_a_mean_has_a_way_back(backend, norm, options, axis, split):
    numbers = np.random.default_rng(1).standard_normal((3, 4, 5, 6)) * 2 + 7
    x = backend.array(numbers)
    y, moments = norm(x, return_moments=True, **options)
    if split is not None:
        y = backend.xp.reshape(y, split)
    back = anynorm.denormalize(y, axis=axis, moments=moments)
    backend.check(backend.xp.reshape(back, numbers.shape), numbers, tolerance=10 * backend.tolerance)
    other = norm(backend.array(numbers[:, ::-1].copy()), **options, moments=moments)
    assert tuple(other.shape) == numbers.shape


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_is_the_inverse_transform_of_a_standard_scaler_also_of_new_rows(dtype):
    scalers = oracle("sklearn.preprocessing")
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((100, 5)) * [1, 1e-3, 1e3, 5, 1] + [0, 1e3, -1e4, 3, 2]).astype(dtype)
    x[:, 4] = 10001  # the root of a constant is 1 there too
    scaler = scalers.StandardScaler().fit(x.astype(np.float64))
    rows = rng.standard_normal((7, 5)).astype(dtype)
    found = anynorm.denormalize(rows, axis=0, moments=anynorm.moments(x, axis=0), eps=0)
    np.testing.assert_allclose(found, scaler.inverse_transform(rows), rtol=2e-6 if dtype == "float32" else 1e-12)


@pytest.mark.cells("torch")
def test_reversible_instance_norm_is_that_of_its_paper_forward_and_backward(backend):
    """Kim et al. (2022), eq. 1 to 3, around a forecast of another length; the statistics are detached, as published."""
    torch, rng = backend.xp, np.random.default_rng(3)
    numbers = [rng.standard_normal((4, 24, 3)) * [1, 5, 0.1] + [100, 0, -3], rng.standard_normal((8, 24)) / 5]
    numbers += [rng.uniform(0.5, 2, 3), rng.standard_normal(3), rng.standard_normal((4, 8, 3))]
    found = []
    for published in (True, False):
        x, w, gamma, beta, dy = (torch.tensor(each, requires_grad=i < 4) for i, each in enumerate(numbers))
        if published:
            mean = torch.mean(x, dim=1, keepdim=True).detach()
            stdev = torch.sqrt(torch.var(x, dim=1, keepdim=True, unbiased=False) + 1e-5).detach()
            y = w @ ((x - mean) / stdev * gamma + beta)
            y = (y - beta) / gamma * stdev + mean
        else:
            moments, rows = anynorm.moments(x, axis=1), [each.reshape(1, 1, 3) for each in (gamma, beta)]
            y = w @ anynorm.normalize(x, *rows, axis=1, moments=moments)
            y = anynorm.denormalize(y, *rows, axis=1, moments=moments)
        y.backward(dy)
        found.append([y.detach(), *(each.grad for each in (x, w, gamma, beta))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.cells("torch")
def test_autograd_differentiates_it_twice(backend):
    if not backend.tracked:
        pytest.skip(reason="nothing is recorded")
    torch, rng = backend.xp, np.random.default_rng(4)
    moments = anynorm.Moments(*(torch.tensor(rng.uniform(1, 2, 4)) for _ in range(2)), 3)
    arrays = [torch.tensor(rng.uniform(1, 2, shape), requires_grad=True) for shape in ((3, 4), (1, 4), (3, 1))]
    assert torch.autograd.gradcheck(lambda *each: anynorm.denormalize(*each, axis=0, moments=moments), arrays)
    assert torch.autograd.gradgradcheck(lambda *each: anynorm.denormalize(*each, axis=0, moments=moments), arrays)
    beta = torch.tensor(rng.standard_normal((1, 4)), requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, beta: anynorm.center(x, beta, axis=0), [arrays[0], beta])


def test_an_image_takes_on_the_statistics_of_another(backend):
    """Huang & Belongie (2017), eq. 8: adaptive instance normalization; the other may have another size."""
    rng = np.random.default_rng(5)
    x, style = rng.standard_normal((2, 3, 8, 9)) * 3 + 1, rng.standard_normal((2, 3, 5, 5)) * 2 - 4
    mean, std = (f(x, axis=(2, 3), keepdims=True) for f in (np.mean, np.std))
    other, spread = (f(style, axis=(2, 3), keepdims=True) for f in (np.mean, np.std))
    y = anynorm.instance_norm(backend.array(x), eps=0)
    moments = anynorm.moments(untracked(backend).array(style), axis=(2, 3))
    found = anynorm.denormalize(y, axis=(2, 3), moments=moments, eps=0)
    backend.check(found, spread * (x - mean) / std + other, tolerance=10 * backend.tolerance)


def refused(error, message, function, *args, **options):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        function(*args, **options)


def test_what_has_no_way_back_is_refused(backend):
    y, of = backend.array(np.ones((2, 3))), untracked(backend)
    moments = anynorm.Moments(of.array(np.ones(2)), of.array(np.ones(2)), 3)
    gamma = backend.array([1.0, 0.0, -1.0])
    if backend.library != "dask":  # which does not look before it computes
        message = "gamma must be other than 0 everywhere, got an array with 0"
        refused(ValueError, message, anynorm.denormalize, y, gamma, axis=1, moments=moments)
        refused(ValueError, message, anynorm.vjp, anynorm.denormalize, y, gamma, axis=1, moments=moments)
    message = "moments must be Moments or RunningStats, got NoneType"
    refused(TypeError, message, anynorm.denormalize, y, axis=1, moments=None)
    refused(TypeError, message, anynorm.vjp, anynorm.denormalize, y, axis=1, moments=None)
    refused(ValueError, "moments.mean must have shape (3,), got (2,)", anynorm.denormalize, y, axis=0, moments=moments)
    refused(TypeError, "y must be an array, got list", anynorm.denormalize, [1.0], axis=0, moments=moments)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'moments'$"):
        anynorm.denormalize(y, axis=1)
    found = anynorm.denormalize(y[:0, ...], axis=1, moments=anynorm.Moments(moments.mean[:0], moments.var[:0], 3))
    assert tuple(found.shape) == (0, 3)


@pytest.mark.untracked
@pytest.mark.cells("numpy", "torch", "strict")
def test_nothing_that_was_given_is_changed_and_the_pullback_needs_its_own_alone(backend):
    rng = np.random.default_rng(6)
    y, gamma, beta, dx = (rng.uniform(1, 2, shape) for shape in ((3, 4), (4,), (1, 4), (3, 4)))
    moments = anynorm.Moments(*(backend.array(each) for each in rng.uniform(1, 2, (2, 3))), 4)
    given = [backend.array(each) for each in (y, gamma, beta)]
    _, pullback = anynorm.vjp(anynorm.denormalize, *given, axis=1, moments=moments)
    expected = [backend.numpy(each) for each in pullback(backend.array(dx))]
    for each, before in zip(given, (y, gamma, beta), strict=True):
        np.testing.assert_array_equal(backend.numpy(each), before.astype(backend.widest))
    for each in given[1:]:
        each[...] = 7
    for one, other in zip(pullback(backend.array(dx)), expected, strict=True):
        np.testing.assert_array_equal(backend.numpy(one), other)


@pytest.mark.cells("numpy", "torch", "strict")
@pytest.mark.untracked
@pytest.mark.parametrize("block_bytes", [64, 2**22])
def test_it_is_rounded_once_to_the_dtype_of_out(backend, block_bytes):
    if not backend.float64:
        pytest.skip(reason="there is no wider dtype")
    rng = np.random.default_rng(6)
    y, mean, var = rng.standard_normal((6, 50)).astype(np.float32), rng.standard_normal(6) + 1e4, rng.random(6) + 1
    moments = anynorm.Moments(backend.array(mean), backend.array(var), 50)
    out = backend.array(np.zeros(y.shape))
    with anynorm.options(block_bytes=block_bytes):
        anynorm.denormalize(backend.array(y, "float32"), axis=1, moments=moments, eps=0, out=out)
    np.testing.assert_allclose(backend.numpy(out), y * np.sqrt(var)[:, None] + mean[:, None], rtol=1e-15)
