"""The programs of a GPU, on the processor: what is read off the kernels computes what they do."""

import ml_dtypes
import numpy as np
import pytest
from emulator import launch
from oracles import CASES, derived, standardized, standardized_gradient

import anynorm
from anynorm.arrays import recognize
from anynorm.arrays.numpy import NumpyLibrary
from anynorm.calls import plan as plans
from anynorm.executors.programs import cuda, cuda_run

pytestmark = pytest.mark.cells("numpy")


class Gpu(NumpyLibrary):
    """NumPy as a library that runs programs."""

    programs = "cuda"
    blas_sums = False

    on_host = writable_in_blocks = staticmethod(lambda *arrays: False)
    aligned = staticmethod(lambda x: x.ctypes.data % 16 == 0)
    launch = staticmethod(launch)


@pytest.fixture(autouse=True, params=["one program", "a program for each loop"])
def programs(request, monkeypatch):
    """The programs that were written."""
    monkeypatch.setitem(recognize._libraries, np.ndarray, Gpu("numpy", recognize.library_of("x", np.zeros(1)).xp))
    for cache in (plans._plans, cuda_run._known, cuda_run._programs):
        for key in list(cache):
            monkeypatch.delitem(cache, key)
    if request.param != "one program":
        monkeypatch.setattr(cuda, "splits", lambda groups, length, together: min(3, length))
    yield cuda_run._programs
    plans._plans.clear()
    cuda_run._known.clear()
    cuda_run._programs.clear()


def normal(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


TOLERANCES = {"float32": 2e-6, "float64": 1e-8, "float16": 2e-3, "bfloat16": 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("index", range(len(CASES)), ids=map(str, CASES))
def test_values_and_gradients_are_those_of_the_formula(programs, index, dtype):
    if dtype != "float32" and index % 7:
        pytest.skip(reason="another case has the same loops")
    kind = getattr(ml_dtypes, dtype, dtype)
    case, dy = CASES[index], normal(CASES[index].shape, kind, 1)
    x = (normal(case.shape) + 1).astype(kind)
    params = [normal(case.parameter_shape, kind, 2 + i) for i in range(case.parameters)]
    y, pullback = anynorm.vjp(case.norm, x, *params, **case.options)
    assert programs
    arguments = [*(each.astype(float) for each in (x, *params)), None][:3]
    found, expected = [y, *pullback(dy)], derived(case, arguments, dy.astype(float))
    for ours, each in zip(found, expected, strict=True):
        assert ours.dtype == kind
        np.testing.assert_allclose(ours.astype(float), each, atol=TOLERANCES[dtype] * max(1, abs(each).max()))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("norm", "shape", "axes", "options"),
    [
        (anynorm.layer_norm, (6, 48), (1,), {}),
        (anynorm.batch_norm, (5, 8, 4, 4), (0, 2, 3), {}),
        (anynorm.group_norm, (3, 8, 4, 4), (2, 3, 4), {"groups": 4}),
        (anynorm.group_norm, (3, 6, 32), (1, 3), {"groups": 2, "channel_axis": -1}),
    ],
    ids=["layer", "batch", "group", "group, channels last"],
)
def test_numbers_side_by_side_are_read_at_once(programs, norm, shape, axes, options, dtype):
    kind = getattr(ml_dtypes, dtype, dtype)
    channels = shape[options.get("channel_axis", 1)]
    x, gamma, dy = (normal(shape) + 3).astype(kind), normal(channels, "float32", 1), normal(shape, kind, 2)
    y, pullback = anynorm.vjp(norm, x, gamma, **options)
    text = "".join(each.text for found in programs.values() for each in found)
    assert f"#define PACK {16 // x.itemsize}\n" in text
    view = {(3, 8, 4, 4): (3, 4, 2, 4, 4), (3, 6, 32): (3, 6, 2, 16)}.get(shape, shape)
    beside = [1] * len(shape)
    beside[options.get("channel_axis", 1)] = channels
    scale = np.broadcast_to(gamma.reshape(beside), shape)
    xhat = standardized(x.astype(float).reshape(view), axes).astype(float).reshape(shape)
    g = dy.astype(float) * scale
    expected = standardized_gradient(x.astype(float).reshape(view), g.reshape(view), axes).astype(float).reshape(shape)
    of_gamma = (dy.astype(float) * xhat).sum(axis=tuple(axis for axis, n in enumerate(beside) if n == 1))
    for ours, each in zip([y, *pullback(dy)], [xhat * scale, expected, of_gamma], strict=True):
        np.testing.assert_allclose(ours.astype(float), each, atol=2 * TOLERANCES[dtype] * max(1, abs(each).max()))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numbers_are_exact_at_every_offset_and_magnitude(dtype):
    sizes = [(0, 1, 1e-5), (1e4, 1, 1e-5), (1e6, 1, 1e-5)]
    sizes += {
        "float32": [(0, 1e37, 0), (-2e38, 1e37, 0), (0, 1e-36, 0), (0, 1e-42, 0), (0, 1e-20, 1e-5), (0, 1e30, 1e-5)],
        "float64": [(0, 1e307, 0), (0, 1e-300, 0), (0, 1e-310, 0), (0, 1e200, 1e-5)],
    }[dtype]
    for offset, scale, eps in sizes:
        x = (normal((24, 1000), "float64") * scale + offset).astype(dtype)
        (y, moments), pullback = anynorm.vjp(anynorm.layer_norm, x, eps=eps, return_moments=True)
        np.testing.assert_allclose(y, standardized(x, 1, eps).astype(float), atol=6e-7)
        assert moments.mean.dtype == moments.var.dtype == dtype
        mean = x.mean(axis=1, dtype=np.longdouble)
        np.testing.assert_allclose(
            moments.mean, mean.astype(float), rtol=2.0**-23, atol=2.0**-50 * abs(x).max() + 1e-45
        )
        dy = normal(x.shape, dtype, 1)
        expected = standardized_gradient(x, dy, 1, eps)
        if abs(expected).max() < np.finfo(dtype).max:
            found = pullback(dy)[0].astype(np.longdouble) / abs(expected).max()
            np.testing.assert_allclose(found.astype(float), (expected / abs(expected).max()).astype(float), atol=3e-7)


def test_constants_have_no_spread_and_nan_stays_in_its_group():
    for value in (0.0, 0.1, -7.7e5, 2.2e30, 3e38, 1e-40):
        for eps in (0, 1e-300, 1e-80, 1e-40, 1e-5):
            x = np.full((3, 30), value, np.float32)
            y, pullback = anynorm.vjp(anynorm.layer_norm, x, eps=eps)
            np.testing.assert_array_equal(y, 0)
            assert np.isfinite(pullback(x * 0 + 1)[0]).all()
    x = normal((4, 30))
    x[2, 7] = np.nan
    y = anynorm.layer_norm(x)
    assert np.isnan(y[2]).all()
    np.testing.assert_allclose(y[[0, 1, 3]], standardized(x[[0, 1, 3]], 1).astype(float), atol=1e-6)


def test_a_cotangent_that_is_the_same_everywhere_has_no_gradient():
    x = normal((5, 1000))
    for shape in ((1000,), (1, 1), None):
        gamma = [] if shape is None else [np.full(shape, 1.7, np.float32)]
        _, pullback = anynorm.vjp(anynorm.layer_norm, x, *gamma)
        dx = pullback(np.full_like(x, 1e4))[0]
        np.testing.assert_allclose(dx, 0, atol=1e-8 if shape == (1000,) else 0)


def test_a_batch_of_another_size_is_the_same_program(programs):
    gamma = np.ones(32, np.float32)

    def run(n):
        for norm, shape, options in (
            (anynorm.layer_norm, (n, 32), {}),
            (anynorm.batch_norm, (n, 32, 3), {}),
            (anynorm.batch_norm, (n, 3, 32), {"channel_axis": -1}),
            (anynorm.group_norm, (n, 3, 32), {"groups": 4, "channel_axis": -1}),
        ):
            x = normal(shape)
            y, pullback = anynorm.vjp(norm, x, gamma, **options)
            assert all(np.isfinite(each).all() for each in (y, *pullback(x)))

    run(20)
    written = len(programs)
    for n in (17, 18, 21):
        run(n)
    assert len(programs) == written
    for n in range(1, 200, 11):  # more threads to a group, or several blocks
        run(n)
    assert len(programs) < 8 * written


def test_any_order_in_memory_is_read_where_it_lies():
    x = normal((6, 32))
    expected = standardized(x, 1).astype(float)
    wide = np.zeros((6, 64), np.float32)
    wide[:, ::2] = x
    for each in (np.asfortranarray(x), wide[:, ::2], x[::-1].copy()[::-1], x[:, ::-1].copy()[:, ::-1]):
        np.testing.assert_allclose(anynorm.layer_norm(each), expected, atol=1e-6)
        y, pullback = anynorm.vjp(anynorm.layer_norm, each, np.ones(32, np.float32))
        dy = np.broadcast_to(np.linspace(0, 1, 32, dtype=np.float32), (6, 32))
        np.testing.assert_allclose(pullback(dy)[0], standardized_gradient(x, dy, 1).astype(float), atol=2e-6)
    rows = np.broadcast_to(x[0], (6, 32))
    np.testing.assert_allclose(anynorm.layer_norm(rows), np.broadcast_to(expected[0], (6, 32)), atol=1e-6)


def test_a_result_may_go_to_any_place():
    x, buffer = normal((6, 32)), np.zeros(7 * 32, np.float32)
    expected, gamma = standardized(x, 1).astype(float), np.ones(32, np.float32)
    whole = buffer[: 6 * 32].reshape(6, 32)
    for out in (np.zeros((6, 64), np.float32)[:, ::2], np.zeros((32, 6), np.float32).T):
        assert anynorm.layer_norm(x, out=out) is out
        np.testing.assert_allclose(out, expected, atol=1e-6)
    whole[...] = x
    np.testing.assert_allclose(anynorm.layer_norm(whole, out=whole), expected, atol=1e-6)
    ordered = np.asfortranarray(x)
    assert anynorm.layer_norm(ordered, out=ordered) is ordered
    np.testing.assert_allclose(ordered, expected, atol=1e-6)
    whole[...] = x
    shifted = buffer[32:].reshape(6, 32)
    np.testing.assert_allclose(anynorm.layer_norm(whole, out=shifted), expected, atol=1e-6)
    square = normal((32, 32))
    wanted = anynorm.layer_norm(square, square[3].copy())
    np.testing.assert_array_equal(anynorm.layer_norm(square.copy(), square[3], out=square), wanted)
    groups = np.zeros((6, 64), np.float32)[:, ::2]
    anynorm.group_norm(x, gamma, groups=4, out=groups)
    np.testing.assert_allclose(groups, anynorm.group_norm(x, gamma, groups=4), atol=1e-6)


@pytest.mark.parametrize("channel_axis", [1, -1])
def test_statistics_that_are_given_are_used(channel_axis):
    x, channels = normal((5, 8, 8)), normal((4, 8))
    beside = (1, 8, 1) if channel_axis == 1 else (1, 1, 8)
    mean, gamma, beta, var = channels[0], channels[1], channels[2], abs(channels[3]) + 0.5
    given = anynorm.RunningStats(mean, var)
    y, pullback = anynorm.vjp(anynorm.batch_norm, x, gamma, beta, moments=given, channel_axis=channel_axis)
    m, v, g, b = (each.astype(float).reshape(beside) for each in (mean, var, gamma, beta))
    xhat, dy = (x - m) / np.sqrt(v + 1e-5), normal(x.shape, seed=1)
    np.testing.assert_allclose(y, xhat * g + b, atol=2e-6)
    axes = tuple(axis for axis in range(3) if beside[axis] == 1)
    expected = dy * g / np.sqrt(v + 1e-5), (dy * xhat).sum(axis=axes), dy.sum(axis=axes, dtype=float)
    for ours, each in zip(pullback(dy), expected, strict=True):
        np.testing.assert_allclose(ours, each, atol=1e-5)


def test_given_statistics_keep_all_the_digits_of_a_large_mean():
    x, dy = normal((40, 3)) + np.float32(1e6), normal((40, 3), seed=1)
    wide, exact = x.astype(float), standardized(x, 0).astype(float)
    given = anynorm.Moments(wide.mean(axis=0), wide.var(axis=0), 40)
    y, pullback = anynorm.vjp(anynorm.batch_norm, x, np.ones(3, np.float32), moments=given)
    np.testing.assert_allclose(y, exact, atol=2e-6)
    np.testing.assert_allclose(pullback(dy)[1], (dy * exact).sum(axis=0), atol=2e-5)
