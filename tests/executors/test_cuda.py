"""The programs of a GPU, on the processor: what is read off the kernels computes what they do."""

import inner
import ml_dtypes
import numpy as np
import pytest
from emulator import launch
from oracles import standardized, standardized_gradient

import anynorm

pytestmark = pytest.mark.cells("numpy")


@pytest.fixture(autouse=True, params=["one program", "a program for each loop"])
def programs(request, monkeypatch):
    """NumPy as a library that runs programs; those that were written."""
    with inner.emulated_gpu(monkeypatch, launch, None if request.param == "one program" else 3) as written:
        yield written


def normal(shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


TOLERANCES = {"float32": 2e-6, "float64": 1e-8, "float16": 2e-3, "bfloat16": 2e-2}


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
    for n in range(1, 200, 40):  # more threads to a group, or several blocks
        run(n)
    assert len(programs) < 8 * written


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


def test_given_statistics_keep_all_the_digits_of_a_large_mean():
    x, dy = normal((40, 3)) + np.float32(1e6), normal((40, 3), seed=1)
    wide, exact = x.astype(float), standardized(x, 0).astype(float)
    given = anynorm.Moments(wide.mean(axis=0), wide.var(axis=0), 40)
    y, pullback = anynorm.vjp(anynorm.batch_norm, x, np.ones(3, np.float32), moments=given)
    np.testing.assert_allclose(y, exact, atol=2e-6)
    np.testing.assert_allclose(pullback(dy)[1], (dy * exact).sum(axis=0), atol=2e-5)


@pytest.mark.parametrize(("own", "into"), [("float32", "float16"), ("float16", "float64"), ("uint8", "float32")])
def test_what_is_read_and_written_may_be_of_two_dtypes(programs, own, into):
    x, dy = (normal((6, 48)) * 20 + 100).astype(own), normal((6, 48), "float32", 1)
    y, pullback = anynorm.vjp(anynorm.layer_norm, x, out=np.zeros(x.shape, into))
    room = {"float16": 4e-3, "float32": 2e-6, "float64": 1e-11}[into]
    np.testing.assert_allclose(y.astype(float), standardized(x, 1).astype(float), rtol=room, atol=room)
    (dx,) = pullback(dy)
    if own == "uint8":
        assert dx is None
    else:
        assert dx.dtype == x.dtype
        np.testing.assert_allclose(dx.astype(float), standardized_gradient(x, dy, 1).astype(float), atol=1e-4)
    assert bool(programs) is (own == "float32")  # what is computed in a wider dtype than its own is no program
    found = anynorm.moments(x, axis=1, dtype="float64")
    np.testing.assert_allclose(found.mean, x.astype(float).mean(1), rtol=1e-14)
    np.testing.assert_allclose(found.var, x.astype(float).var(1), rtol=1e-12)
