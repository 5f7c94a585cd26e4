"""Integers, bools, and results of another dtype than x: what is computed in which dtype, on every executor."""

import dataclasses

import numpy as np
import pytest
from oracles import only_if, standardized
from replicas import Replicas

import anynorm

WHOLE = ["bool", "uint8", "int8", "uint16", "int16", "int32", "uint32", "int64", "uint64"]
MASK = np.random.default_rng(6).random((6, 5, 12)) > 0.3
NORMS = [
    (anynorm.normalize, {"axis": 1}, 1),
    (anynorm.layer_norm, {"axis": (1, 2)}, (1, 2)),
    (anynorm.batch_norm, {}, (0, 2)),
    (anynorm.instance_norm, {}, 2),
    (anynorm.group_norm, {"groups": 1}, (1, 2)),
]


@pytest.fixture(params=[2**22, 256], ids=["whole", "blocks"])
def block_bytes(request):
    with anynorm.options(block_bytes=request.param, threads=1):
        yield request.param


def integers(dtype, shape=(6, 5, 12)):
    """Numbers over the range of a dtype, as far as float64 holds it."""
    rng = np.random.default_rng(0)
    if dtype == "bool":
        return rng.random(shape) > 0.3
    info = np.iinfo(dtype)
    return rng.integers(max(info.min, -(2**52)), min(info.max, 2**52), shape, dtype=dtype, endpoint=True)


def array(backend, values):
    """An array of the values' own dtype; `Backend.array` goes by way of float64."""
    if backend.library == "torch":
        return backend.xp.from_numpy(np.ascontiguousarray(values)).to(backend.device)
    if backend.library == "dask":
        return backend.xp.from_array(values, chunks=tuple(max(1, -(-n // 2)) for n in values.shape))
    dtype = backend.xp.bool if backend.library == "strict" and values.dtype == bool else values.dtype.name
    if backend.library == "strict":
        dtype = getattr(backend.xp, str(values.dtype))
    return backend.xp.asarray(values, dtype=dtype, device=None if backend.library == "numpy" else backend.device)


def has(backend, dtype):
    return "64" not in dtype or backend.float64 or "no_x64" not in str(backend.device)


@pytest.mark.untracked
@pytest.mark.parametrize("dtype", WHOLE)
def test_moments_of_integers_are_float32_or_float64(backend, block_bytes, dtype):
    only_if((block_bytes > 256) == (dtype != "int32") and dtype in ("bool", "uint8", "int32"), backend, "strict")
    only_if(block_bytes > 256, backend, "jax", "dask")  # which take no blocks
    if not has(backend, dtype):
        pytest.skip(reason="there are none")
    x, wide = integers(dtype), integers(dtype).astype(np.float64)
    expected, short = "float32" if x.itemsize <= 2 else "float64", x.itemsize <= 2
    for axis in (0, 2, (0, 2), None)[:: 1 if backend.library in ("numpy", "torch") else 3]:
        given, weights = array(backend, x), backend.array(MASK, "bool")
        if not short and not backend.float64:
            with pytest.raises(
                ValueError, match=rf"^x of .*{dtype} has moments in float64, which array_api_strict has not"
            ):
                anynorm.moments(given, axis=axis)
            expected = "float32"
            found = anynorm.moments(given, axis=axis, dtype="float32")
        else:
            found = anynorm.moments(given, axis=axis)
        size, bound = np.max(np.abs(wide)), 1e-13 if expected == "float64" else 1e-6
        for mean, var, of in (
            (wide.mean(axis), wide.var(axis), found),
            (*weighted(wide, axis), anynorm.moments(given, axis=axis, weights=weights, dtype=expected)),
        ):
            assert str(of.mean.dtype).endswith(expected)
            assert of.mean.dtype == of.var.dtype
            np.testing.assert_allclose(backend.numpy(of.mean), mean, rtol=0, atol=bound * size)
            np.testing.assert_allclose(backend.numpy(of.var), var, rtol=0, atol=bound * size**2)


def weighted(x, axis):
    mean = np.average(x, axis, MASK, keepdims=True)
    return np.squeeze(mean, axis), np.average((x - mean) ** 2, axis, MASK)


@pytest.mark.untracked
@pytest.mark.cells("numpy", "torch", "strict")
@pytest.mark.parametrize("dtype", WHOLE)
def test_integers_are_normalized_into_out(backend, block_bytes, dtype):
    only_if((block_bytes > 256) == (dtype != "int32") and dtype in ("bool", "uint8", "int32"), backend, "strict")
    if not has(backend, dtype):
        pytest.skip(reason="there are none")
    x, wide = integers(dtype), integers(dtype).astype(np.float64)
    gamma = np.random.default_rng(1).standard_normal(5)
    room = {"float16": 4e-3, "float32": 2e-6, "float64": 1e-12}
    dtypes = room if backend.library != "strict" else [backend.widest]
    for (norm, options, axes), into in zip(NORMS, [*dtypes] * 5, strict=False):
        out, given = backend.array(np.zeros(x.shape), into), array(backend, x)
        y, moments = norm(given, out=out, return_moments=True, **options)
        assert y is out
        expected = standardized(wide, axes).astype(np.float64)
        np.testing.assert_allclose(backend.numpy(out), expected, rtol=room[into], atol=room[into])
        size = np.max(np.abs(wide))
        np.testing.assert_allclose(backend.numpy(moments.mean).ravel(), wide.mean(axes).ravel(), atol=1e-6 * size)
        if norm is anynorm.batch_norm and backend.library != "strict":
            again = norm(given, backend.array(gamma), moments=moments, out=backend.array(np.zeros(x.shape), into))
            np.testing.assert_allclose(
                backend.numpy(again), expected * gamma[:, None], rtol=4 * room[into], atol=4 * room[into]
            )


@pytest.mark.untracked
def test_without_out_integers_are_refused_with_the_cast_to_write(backend):
    x = array(backend, integers("uint8"))
    with pytest.raises(TypeError, match=r"^x must have a real floating dtype, got .*uint8: write .*float32.*$"):
        anynorm.layer_norm(x)
    with pytest.raises(TypeError, match=r"^x must have a real floating dtype, got .*uint8"):  # it takes no mean away
        anynorm.rms_norm(x, out=backend.array(np.zeros(x.shape)))


@pytest.mark.untracked
@pytest.mark.cells("numpy", "torch", "strict")
@pytest.mark.parametrize("pair", ["float32 float64", "float64 float32", "float16 float32", "float32 bfloat16"])
def test_out_may_have_another_floating_dtype(backend, block_bytes, pair):
    own, into = pair.split()
    if backend.library == "strict" and ("16" in pair or not backend.float64):
        pytest.skip(reason="there are none")
    values = np.random.default_rng(2).standard_normal((6, 5, 12)) + 3
    x, room = backend.array(values, own), {"float64": 1e-12, "float32": 1e-6, "bfloat16": 1e-2}[into]
    wide = backend.numpy(x)
    for norm, options, axes in NORMS[1:3]:
        out = backend.array(np.zeros(values.shape), into)
        assert norm(x, out=out, **options) is out
        expected = standardized(wide, axes).astype(np.float64)
        np.testing.assert_allclose(backend.numpy(out), expected, rtol=room, atol=room)  # computed in the wider of both
    out = backend.array(np.zeros(values.shape), into)
    anynorm.weight_norm(x, backend.array(np.ones(6)), out=out)
    np.testing.assert_allclose(backend.numpy(out), wide / np.sqrt((wide**2).sum((1, 2), keepdims=True)), rtol=room)


@pytest.mark.untracked
@pytest.mark.cells("numpy", "torch")
def test_gradients_have_the_dtypes_of_their_arrays_whatever_out_has(backend, block_bytes):
    rng = np.random.default_rng(3)
    values, gamma, dy = rng.standard_normal((6, 5, 12)), rng.standard_normal(5), rng.standard_normal((6, 5, 12))
    x, parameters = backend.array(values, "float32"), [backend.array(gamma, "float32")] * 2
    expected = anynorm.vjp(anynorm.batch_norm, x, *parameters)[1](backend.array(dy, "float32"))
    for into in ("float16", "float64"):
        y, pullback = anynorm.vjp(anynorm.batch_norm, x, *parameters, out=backend.array(np.zeros(values.shape), into))
        for dtype in ("float32", "float64"):
            for found, other in zip(pullback(backend.array(dy, dtype)), expected, strict=True):
                backend.check(found, backend.numpy(other), dtype="float32", tolerance=2e-5)


@pytest.mark.untracked
@pytest.mark.cells("numpy", "torch")
def test_integers_have_no_gradient_and_parameters_beside_them_have(backend, block_bytes):
    x, dy = integers("int16"), np.random.default_rng(4).standard_normal((6, 5, 12))
    xhat = standardized(x, (0, 2)).astype(np.float64)
    ones = backend.array(np.ones(5), "float32")
    out = backend.array(np.zeros(x.shape), "float32")
    for given in ([ones, ones], [ones], [None, ones], []):
        _, pullback = anynorm.vjp(anynorm.batch_norm, array(backend, x), *given, out=out)
        dx, *others = pullback(backend.array(dy, "float32"))
        assert dx is None
        for found, expected, each in zip(others, (dy * xhat, dy), given, strict=False):
            assert (found is None) is (each is None)
            if found is not None:
                backend.check(found, expected.sum((0, 2)), dtype="float32", tolerance=2e-5)


@pytest.mark.untracked
@pytest.mark.cells("numpy", "torch")
def test_replicas_may_have_integers(backend):
    x = integers("uint8")
    out = backend.array(np.zeros(x.shape), "float32")

    def part(rank, all_reduce):
        rows = slice(0, 2) if rank else slice(2, 6)
        return anynorm.batch_norm(array(backend, x[rows]), out=out[rows], all_reduce=all_reduce)

    Replicas(2).run(part)
    np.testing.assert_allclose(backend.numpy(out), standardized(x, (0, 2)).astype(float), atol=1e-5)


@pytest.mark.untracked
@pytest.mark.cells("numpy", "torch")
@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
def test_out_may_lie_where_the_integers_do(backend, block_bytes, dtype):
    x = integers(dtype, (40, 25))
    expected = standardized(x, 1).astype(float)
    for start in (0, 8):
        memory = np.zeros(8 * x.size + 64, np.uint8)
        given, out = (memory[i:][: x.size * np.dtype(each).itemsize] for i, each in ((8, dtype), (start, np.float32)))
        given, out = given.view(dtype).reshape(x.shape), out.view(np.float32).reshape(x.shape)
        given[...] = x
        if backend.library == "torch":
            given, out = backend.xp.from_numpy(given), backend.xp.from_numpy(out)
        anynorm.layer_norm(given, out=out)
        np.testing.assert_allclose(np.asarray(out), expected, atol=1e-5)


@pytest.mark.untracked
def test_moments_of_a_wider_dtype_are_computed_in_it(backend, block_bytes):
    only_if(block_bytes > 256, backend)
    if not backend.float64:
        with pytest.raises(ValueError, match=r"^dtype must be one that array_api_strict has here, got float64$"):
            anynorm.moments(backend.array(np.ones((2, 3))), axis=0, dtype="float64")
        return
    values = (np.random.default_rng(5).standard_normal((40, 6)) + 1e4).astype(np.float32)
    x = backend.array(values, "float32")
    for dtype in ("float64", backend.xp.float64):
        found = anynorm.moments(x, axis=0, dtype=dtype)
        backend.check(found.mean, values.astype(np.float64).mean(0), dtype="float64", tolerance=1e-15)
        backend.check(found.var, values.astype(np.float64).var(0), dtype="float64", tolerance=1e-14)
    narrow = anynorm.moments(backend.array(values), axis=0, dtype="float32")
    backend.check(narrow.mean, values.astype(np.float64).mean(0), dtype="float32", tolerance=1e-7)
    backend.check(narrow.var, values.astype(np.float64).var(0), dtype="float32", tolerance=2e-7)


@pytest.mark.untracked
def test_what_is_no_floating_dtype_of_the_library_is_refused(backend):
    x = backend.array(np.ones((2, 3)))
    name = "array_api_strict" if backend.library == "strict" else backend.library
    for wrong in ("float65", "int32", "sum", 3, None.__class__, "float8_e4m3fn"):
        with pytest.raises(
            TypeError, match=rf"^dtype must be a real floating dtype of {name} or the name of one, got "
        ):
            anynorm.moments(x, axis=0, dtype=wrong)
    if backend.library in ("numpy", "strict"):
        with pytest.raises(ValueError, match=rf"^dtype must be one that {name} has here, got bfloat16$"):
            anynorm.moments(x, axis=0, dtype="bfloat16")
    if backend.library == "numpy":
        assert anynorm.moments(x, axis=0, dtype=float).mean.dtype == np.float64
        assert anynorm.moments(x, axis=0, dtype=np.longdouble).mean.dtype == np.longdouble
        assert anynorm.moments(x, axis=0, dtype=np.dtype(">f4")).mean.dtype == np.float32


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("dtype", ["complex64", "M8[s]", "m8[s]", "O", "U3"])
def test_what_is_no_number_has_no_moments(dtype):
    with pytest.raises(TypeError, match=r"^x must have a real floating dtype, got "):
        anynorm.moments(np.zeros((2, 3), dtype), axis=0)


@pytest.mark.cells("jax")
def test_without_float64_jax_says_so_and_long_integers_need_a_dtype(backend):
    import jax

    x = integers("int32", (6, 5)) // 2**10
    for wide in (True, False, True):  # a plan that was made before knows no better
        with jax.enable_x64(wide):
            given = jax.numpy.asarray(x)
            if wide:
                assert anynorm.moments(given, axis=0).mean.dtype == np.float64
                continue
            with pytest.raises(
                ValueError, match=r"^x of int32 has moments in float64, which jax has not here: give dtype="
            ):
                anynorm.moments(given, axis=0)
            with pytest.raises(ValueError, match=r"^dtype must be one that jax has here, got float64$"):
                anynorm.moments(given, axis=0, dtype="float64")
            found = jax.jit(lambda x: anynorm.moments(x, axis=0, dtype="float32"))(given)
            np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-6, atol=1)


@pytest.mark.cells("dask")
def test_the_dtype_of_a_dask_chunk_is_that_of_the_call():
    import dask.array as da

    x = integers("uint8", (64, 30))
    found = anynorm.moments(da.from_array(x, chunks=(7, 30)), axis=0)
    assert found.mean.dtype == found.mean.compute().dtype == np.float32


@pytest.mark.untracked
def test_given_moments_have_all_their_digits_beside_integers(backend):
    only_if(backend.library in ("numpy", "torch"), backend)
    if backend.library not in ("numpy", "torch"):
        pytest.skip(reason="there is no out")
    x = integers("int16")
    given = anynorm.moments(array(backend, x), axis=(0, 2), dtype="float64")
    out = backend.array(np.zeros(x.shape), "float32")
    anynorm.batch_norm(array(backend, x), moments=given, out=out)
    np.testing.assert_allclose(backend.numpy(out), standardized(x, (0, 2)).astype(float), atol=1e-6)
    assert dataclasses.replace(given).mean is given.mean
