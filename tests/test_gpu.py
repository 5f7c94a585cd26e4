"""On a GPU: the same numbers by every schedule, of any size; out of a GPU's own library and stream, and back to it."""

import numpy as np
import pytest
from oracles import CASES, derived, standardized, standardized_gradient

import anynorm

pytestmark = [pytest.mark.cells("torch-cuda", "cupy-cuda"), pytest.mark.untracked]


@pytest.mark.parametrize("index", range(len(CASES)), ids=map(str, CASES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_of_the_formula(backend, index, dtype):
    if dtype == "bfloat16" and index % 4:
        pytest.skip(reason="another case has the same loops")
    case, rng, tolerance = CASES[index], np.random.default_rng(0), {"float32": 2e-6, "bfloat16": 2e-2}[dtype]
    x, dy = (backend.array(rng.standard_normal(case.shape) + offset, dtype) for offset in (1, 0))
    params = [backend.array(rng.standard_normal(case.parameter_shape), "float32") for _ in range(case.parameters)]
    y, pullback = anynorm.vjp(case.norm, x, *params, **case.options)
    found, arguments = [y, *pullback(dy)], [*map(backend.numpy, [x, *params]), None][:3]
    expected = derived(case, arguments, backend.numpy(dy))
    for ours, each, kind in zip(found, expected, [dtype, dtype, "float32", "float32"], strict=False):
        room = tolerance if kind == dtype else 1e-5
        backend.check(ours, each, dtype=kind, tolerance=room * max(1, abs(each).max()))


@pytest.mark.parametrize(
    ("offset", "scale", "eps", "bound"),
    [
        (0, 1, 1e-5, 3e-6),
        (1e4, 1, 1e-5, 6e-6),
        (1e6, 1, 1e-5, 6e-5),
        (0, 1e30, 1e-5, 6e-6),
        (0, 1e37, 0, 6e-6),
        (-2e38, 1e37, 0, 6e-6),
        (0, 1e-36, 0, 6e-6),
        (0, 1e-42, 0, 6e-6),
        (0, 1e-20, 1e-5, 1e-6),
    ],
)
@pytest.mark.parametrize(("shape", "axis"), [((64, 1000), 1), ((1000, 48), 0), ((20, 7, 90), (0, 2))], ids=str)
def test_numbers_are_exact_at_every_offset_and_magnitude(backend, offset, scale, eps, bound, shape, axis):
    rng = np.random.default_rng(0)
    numbers = (rng.standard_normal(shape) * scale + offset).astype(np.float32)
    x = backend.array(numbers, "float32")
    y, pullback = anynorm.vjp(anynorm.normalize, x, axis=axis, eps=eps)
    backend.check(y, standardized(numbers, axis, eps).astype(np.float64), dtype="float32", tolerance=bound)
    _, moments = anynorm.normalize(x, axis=axis, eps=eps, return_moments=True)
    kept = tuple(n for i, n in enumerate(shape) if i not in np.atleast_1d(axis))
    expected = numbers.mean(axis=axis, dtype=np.float64)
    least = 1.2e-38 if backend.library == "cupy" else 1.5e-45  # below this CuPy's own kernels take a number for 0
    np.testing.assert_allclose(backend.numpy(moments.mean), expected, atol=2.0**-22 * abs(numbers).max() + least)
    assert tuple(moments.mean.shape) == kept
    if scale == 1 or offset:
        return
    dy = rng.standard_normal(shape).astype(np.float32)
    expected = standardized_gradient(numbers, dy, axis, eps).astype(np.float64)
    if abs(expected).max() < 1e38:
        found = backend.numpy(pullback(backend.array(dy, "float32"))[0])
        np.testing.assert_allclose(found / abs(expected).max(), expected / abs(expected).max(), atol=5e-6)


def test_constants_and_nan_are_what_they_are_elsewhere(backend):
    for value, eps in ((0.0, 0), (0.1, 0), (-7.7e5, 0), (2.2e30, 0), (1e-40, 0), (3e38, 1e-40), (1.0, 1e-300)):
        x = backend.array(np.full((3, 30), value), "float32")
        backend.check(anynorm.layer_norm(x, eps=eps), np.zeros((3, 30)), dtype="float32", tolerance=0)
    numbers = np.random.default_rng(0).standard_normal((4, 30)).astype(np.float32)
    numbers[2, 7] = np.nan
    y = backend.numpy(anynorm.layer_norm(backend.array(numbers, "float32")))
    rows = [0, 1, 3]
    np.testing.assert_allclose(y[rows], standardized(numbers[rows], 1).astype(np.float64), atol=3e-6)
    assert np.isnan(y[2]).all()


def test_a_result_may_go_to_any_place(backend):
    numbers = np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32)
    expected = standardized(numbers, 1).astype(np.float64)
    x = backend.array(numbers, "float32")
    wide = backend.array(np.zeros((6, 64)), "float32")
    for out in (backend.array(np.zeros((6, 32)), "float32"), wide[:, ::2], x):
        assert anynorm.layer_norm(x, out=out) is out
        backend.check(out, expected, dtype="float32", tolerance=1e-6)


@pytest.mark.parametrize(("shape", "axis"), [((300000, 8), 0), ((1, 2**22), 1), ((50000, 40), 1)], ids=str)
def test_many_numbers_are_added_exactly(backend, shape, axis):
    numbers = (np.random.default_rng(0).standard_normal(shape) + 1e4).astype(np.float32)
    dy = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    gamma = np.linspace(1, 2, shape[1], dtype=np.float32).reshape(1, -1)
    x, gamma_, dy_ = (backend.array(each, "float32") for each in (numbers, gamma, dy))
    (y, moments), pullback = anynorm.vjp(anynorm.normalize, x, gamma_, axis=axis, return_moments=True)
    xhat = standardized(numbers, axis).astype(np.float64)
    backend.check(y, xhat * gamma, dtype="float32", tolerance=2e-5)
    np.testing.assert_allclose(backend.numpy(moments.var), numbers.var(axis=axis, dtype=np.float64), rtol=2e-6)
    dx, dgamma = pullback(dy_)
    expected = standardized_gradient(numbers, dy * gamma.astype(np.float64), axis).astype(np.float64)
    backend.check(dx, expected, dtype="float32", tolerance=2e-5)
    products = dy * xhat
    expected = products.sum(axis=0, keepdims=True)
    np.testing.assert_allclose(backend.numpy(dgamma), expected, atol=2e-6 * np.sqrt((products**2).sum(axis=0)).max())


@pytest.mark.cells("cupy-cuda")
def test_work_waits_for_the_stream_of_its_arrays(backend):
    cupy, numbers = backend.xp, np.random.default_rng(0).standard_normal((4096, 1024)).astype(np.float32)
    expected = standardized(numbers, 1).astype(np.float64)
    x = backend.array(numbers, "float32")
    anynorm.layer_norm(x)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        moved = cupy.empty_like(x)
        for _ in range(200):  # so that what comes next has to wait
            moved[...] = x * 2.0
        y = anynorm.layer_norm(moved, eps=4e-5) + 0.0
        stream.synchronize()
    backend.check(y, expected, dtype="float32", tolerance=1e-5)
