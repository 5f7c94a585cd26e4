"""`out=`: whatever array it is, it gets the result, or an error before anything is written."""

import dataclasses
import os

import inner
import ml_dtypes
import numpy as np
import pytest
from oracles import CASES, standardized, values

import anynorm


@pytest.fixture(params=[2**22, 32], ids=["whole", "blocks"])
def block_bytes(request):
    with anynorm.options(block_bytes=request.param, threads=1):
        yield request.param


def example(case, shape=None):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(case.shape) + 3
    return x, [rng.standard_normal(shape or case.parameter_shape) for _ in range(case.parameters)]


def expected(case, x, params):
    return values(case, x, *params, *[None] * (2 - len(params)))


@pytest.mark.cells("numpy")
def test_a_pullback_keeps_the_moments_it_was_given(block_bytes):
    x, dy = np.random.default_rng(1).standard_normal((2, 6, 4))
    for size in (1.0, 1e200):
        mean, var = np.zeros(4), np.full(4, size)
        pullback = anynorm.vjp(anynorm.batch_norm, x, moments=anynorm.Moments(mean, var, 5))[1]
        want = pullback(dy)[0]
        mean += 5
        var *= 9
        np.testing.assert_array_equal(pullback(dy)[0], want)


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("index", range(len(CASES)), ids=map(str, CASES))
def test_out_may_lie_in_memory_in_any_way(block_bytes, index):
    case, dtype = (
        CASES[index],
        [np.float16, ">f2", ml_dtypes.bfloat16, np.float32, ">f4", float, "longdouble"][index % 7],
    )
    dtype = np.dtype(dtype)
    x, params = example(case)
    x = x.astype(dtype)
    want = expected(case, x.astype(float), params)
    tolerance = 3 * float(ml_dtypes.finfo(dtype).eps if dtype.itemsize == 2 else max(np.finfo(dtype).eps, 1e-12)) * 10
    wide = np.zeros((*case.shape[:-1], 2 * case.shape[-1]), dtype)
    flat = np.zeros(x.size + 3, dtype)
    for out in (
        np.zeros(case.shape, dtype)[..., ::-1],
        np.zeros(case.shape[::-1], dtype).T,
        wide[..., 1::2],
        flat[3:].reshape(case.shape),
    ):
        assert case.norm(x, *params, out=out, **case.options) is out
        np.testing.assert_allclose(out.astype(float), want, atol=tolerance, rtol=tolerance)
    assert not wide[..., ::2].any()
    assert not flat[:3].any()


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("shape", [(6, 40), (64, 3000)])
def test_half_floats_of_the_other_byte_order_are_computed_in_float32_too(shape):
    x = (np.random.default_rng(1).standard_normal(shape) - 2).astype(np.float16)
    y = anynorm.normalize(x.astype(">f2"), axis=(0, 1))
    assert y.dtype == np.dtype(">f2")
    np.testing.assert_array_equal(y, anynorm.normalize(x, axis=(0, 1)))


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("index", range(len(CASES)), ids=map(str, CASES))
def test_out_may_overlap_x(block_bytes, index):
    case, shift = CASES[index], [-4, -1, 0, 1, 5][index % 5]
    x, params = example(case)
    memory = np.zeros(x.size + 10)
    start = memory[5 : 5 + x.size].reshape(case.shape)
    start[...] = x
    out = memory[5 + shift : 5 + shift + x.size].reshape(case.shape)
    case.norm(start, *params, out=out, **case.options)
    np.testing.assert_allclose(out, expected(case, x, params), atol=1e-11)
    start[...] = x
    turned = start[::-1]
    case.norm(start, *params, out=turned, **case.options)
    np.testing.assert_allclose(turned, expected(case, x, params), atol=1e-11)


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_out_may_be_gamma_or_beta(block_bytes, case):
    x, params = example(case, case.shape)
    want = expected(case, x, params)
    for i in range(len(params)):
        given = [each.copy() for each in params]
        case.norm(x, *given, out=given[i], **case.options)
        np.testing.assert_allclose(given[i], want, atol=1e-11)


@pytest.mark.cells("numpy")
def test_out_may_share_memory_with_moments(block_bytes):
    x = np.random.default_rng(2).standard_normal((6, 4))
    out = np.zeros((6, 4))
    out[0], out[5] = [1, 2, 3, 4], [4, 3, 2, 1]
    moments = anynorm.Moments(out[0], out[5], 9)
    want = (x - out[0]) / np.sqrt(out[5] + 1e-5)
    anynorm.batch_norm(x, moments=moments, out=out)
    np.testing.assert_allclose(out, want, atol=1e-12)


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("axis", [0, 1, None])
def test_out_may_be_the_same_file_mapped_again(tmp_path, block_bytes, axis):
    values = np.random.default_rng(3).standard_normal((40, 50)).astype(np.float32)
    values.tofile(tmp_path / "x")
    for again in (False, True):
        x = np.memmap(tmp_path / "x", np.float32, "r+", shape=(40, 50))
        x[...] = values
        out = np.memmap(tmp_path / "x", np.float32, "r+", shape=(40, 50)) if again else x
        anynorm.normalize(np.asarray(x), axis=axis, out=out)
        want = standardized(values, axis if axis is not None else (0, 1))
        np.testing.assert_allclose(np.fromfile(tmp_path / "x", np.float32).reshape(40, 50), want, atol=1e-5)


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("mode", ["r", "c"])
@pytest.mark.parametrize("name", ["str", "path", "symbolic link", "hard link", "none"])
def test_out_may_be_another_part_of_the_same_file_by_any_name(tmp_path, block_bytes, name, mode):
    values = np.random.default_rng(5).standard_normal(40 * 50 + 7).astype(np.float32)
    want = standardized(values[:2000].reshape(40, 50), 1)
    path, other = tmp_path / "x", tmp_path / "other"
    for first, second in ((0, 7), (7, 0)):
        np.roll(values, first).tofile(path)
        other.unlink(missing_ok=True)
        if "link" in name:
            other.symlink_to(path) if name == "symbolic link" else other.hardlink_to(path)
        with path.open("r+b", buffering=0) as unnamed, os.fdopen(os.dup(unnamed.fileno()), "r+b") as file:
            one, again = {"str": (str(path), str(path)), "path": (path, str(path)), "none": (file, path)}.get(
                name, (str(path), str(other))
            )
            x = np.memmap(one, np.float32, mode, offset=4 * first, shape=(40, 50))
            out = np.memmap(again, np.float32, "r+", offset=4 * second, shape=(40, 50))
            anynorm.layer_norm(x, out=out)
            np.testing.assert_allclose(out, want, atol=1e-5)
            del x, out


@pytest.mark.cells("torch")
def test_out_may_be_a_neighbour_in_an_array_of_numpy(backend):
    memory = np.random.default_rng(4).standard_normal(200 * 300 + 7).astype(np.float32)
    x, out = (backend.xp.from_numpy(memory[i : i + 60000]).reshape(200, 300) for i in (0, 7))
    want = standardized(x.numpy().copy(), 1)
    anynorm.layer_norm(x, out=out)
    np.testing.assert_allclose(out.numpy(), want, atol=1e-5)


@pytest.mark.cells("numpy", "torch")
@pytest.mark.parametrize("axis", [0, 1])
def test_out_beside_x_in_one_array_takes_no_other(backend, monkeypatch, axis):
    memory = backend.array(np.random.default_rng(5).standard_normal((2, 300, 256) if axis == 0 else (300, 2, 256)))
    memory = memory.detach() if backend.library == "torch" else memory
    x, out = (memory[i] if axis == 0 else memory[:, i] for i in (0, 1))
    want = standardized(backend.numpy(x).copy(), 1)
    if axis == 0 or backend.library == "numpy":  # where rows take turns PyTorch's addresses do not tell
        inner.refuse_other_arrays(monkeypatch, tuple(x.shape))
    anynorm.layer_norm(x, out=out)
    np.testing.assert_allclose(backend.numpy(out), want, atol=1e-5)


def wrong(backend):
    ones = np.ones((4, 6))
    yield backend.array(np.ones((4, 1))), ValueError, "out must have the shape of x"
    yield backend.array(np.ones((24,))), ValueError, "out must have the shape of x"
    yield backend.array(ones, "int32"), TypeError, "out must have a real floating dtype, got .*int32"
    yield [[0.0] * 6] * 4, TypeError, "out must be an array, got list"


@pytest.mark.parametrize("norm", [anynorm.layer_norm, anynorm.rms_norm, anynorm.batch_norm])
def test_out_that_does_not_fit_is_refused_before_anything_is_written(backend, norm):
    backend = dataclasses.replace(backend, tracked=False)
    x = backend.array(np.arange(24.0).reshape(4, 6))
    for out, error, message in wrong(backend):
        with pytest.raises(error, match=message):
            norm(x, out=out)
        if not isinstance(out, list):
            assert np.all(backend.numpy(out) == 1)


@pytest.mark.cells("jax", "dask")
def test_an_immutable_out_is_refused(backend):
    x = backend.array(np.ones((4, 6)))
    with pytest.raises(ValueError, match="out must be writeable"):
        anynorm.layer_norm(x, out=x)


@pytest.mark.cells("numpy")
def test_a_read_only_out_is_refused():
    x = np.arange(24.0).reshape(4, 6)
    frozen = np.zeros((4, 6))
    frozen.flags.writeable = False
    for out in (frozen, np.broadcast_to(np.zeros(6), (4, 6))):
        with pytest.raises(ValueError, match="out must be writeable"):
            anynorm.layer_norm(x, out=out)


@pytest.mark.cells("torch")
@pytest.mark.parametrize("n", [4, 300])
def test_pytorch_is_not_written_to_while_autograd_records(backend, n):
    torch = backend.xp
    x, out = torch.randn(n, n), torch.zeros(n, n)
    tracked = x.clone().requires_grad_()
    weight = torch.ones(n, requires_grad=True)
    for call in (
        lambda: anynorm.layer_norm(tracked, out=out),
        lambda: anynorm.layer_norm(x, weight, out=out),
        lambda: anynorm.layer_norm(tracked, out=tracked),
        lambda: anynorm.layer_norm(x, out=tracked),
        lambda: anynorm.vjp(anynorm.layer_norm, tracked, out=out),
    ):
        with pytest.raises(ValueError, match="out must not be given while autograd records"):
            call()
    assert not out.any()
    assert not out.requires_grad
    with torch.no_grad():
        anynorm.layer_norm(tracked, weight, out=tracked)
    np.testing.assert_allclose(tracked.detach().numpy(), standardized(x.numpy(), 1), atol=1e-5)


@pytest.mark.cells("torch")
@pytest.mark.parametrize("n", [4, 300])
def test_a_tensor_that_cannot_be_written_to_is_refused(backend, n):
    torch = backend.xp
    with torch.inference_mode():
        inference = torch.zeros(n, n)
    for out in (torch.zeros(n).expand(n, n), inference):
        with pytest.raises(ValueError, match="out must be writeable"):
            anynorm.layer_norm(torch.ones(n, n), out=out)
