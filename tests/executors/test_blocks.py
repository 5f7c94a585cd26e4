"""Large arrays are run in blocks, which shows in memory and nowhere else."""

import numpy as np
import pytest
from oracles import by_arrays, only_if, standardized, standardized_gradient

import anynorm
from anynorm import calls
from anynorm.arrays.recognize import library_of
from anynorm.calls import layouts
from anynorm.calls.blocks import blocks


@pytest.mark.cells("numpy", "torch")
def test_a_group_without_numbers_leaves_the_gradient_of_the_others_exact(backend):
    x = np.random.default_rng(4).standard_normal((4, 50_000)) + 1e6
    dy = np.random.default_rng(5).standard_normal(x.shape)
    given = backend.array(x, "float32")
    broken = x.copy()
    broken[3] = np.nan
    gradients = []
    for each in (given, backend.array(broken, "float32")):
        _, pullback = anynorm.vjp(anynorm.layer_norm, each)
        gradients.append(backend.numpy(pullback(backend.array(dy, "float32"))[0])[:3])
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-5)


SHORT_RUNS = [
    (anynorm.group_norm, (3, 5, 8, 12), {"groups": 4, "channel_axis": -1}),
    (anynorm.group_norm, (2, 40, 62), {"groups": 2, "channel_axis": -1}),
    (anynorm.batch_norm, (30, 4, 3, 3), {}),
    (anynorm.batch_norm, (600, 3, 2), {}),
]
"""Groups that lie in memory in short runs among those of others."""


@pytest.mark.parametrize(
    ("norm", "shape", "options", "expected"),
    [
        *((*each, True) for each in SHORT_RUNS),
        (anynorm.group_norm, (3, 5, 8, 64), {"groups": 2, "channel_axis": -1}, False),
        (anynorm.group_norm, (3, 12, 5, 8), {"groups": 4}, False),
        (anynorm.group_norm, (3, 15, 12), {"groups": 4, "channel_axis": -1}, False),
        (anynorm.batch_norm, (40, 6, 6, 6), {}, False),
        (anynorm.batch_norm, (40, 9, 6), {"channel_axis": 2}, False),
    ],
)
def test_which_groups_are_strewn_over_memory(norm, shape, options, expected):
    entry = layouts.GROUP if norm is anynorm.group_norm else layouts.BATCH
    options = {"channel_axis": 1, **options}
    call = calls.prepare(entry, tuple(options[name] for name in entry.options), np.ones(shape), eps=1e-5)
    assert call.plan.interleaved is expected


@pytest.mark.cells("numpy", "torch")
@pytest.mark.parametrize("block_bytes", [2**22, 2**10], ids=["whole", "in blocks"])
def test_channels_last_stay_last_in_memory(backend, block_bytes):
    rng = np.random.default_rng(8)
    shape = (3, 7, 5, 4)
    x, dy, place = (np.moveaxis(rng.standard_normal(shape), -1, 1) for _ in range(3))
    if backend.library == "torch":
        x, dy, place = map(backend.xp.from_numpy, (x, dy, place))
    if backend.tracked:
        x.requires_grad_()
    for norm, options in (
        (anynorm.batch_norm, {}),
        (anynorm.group_norm, {"groups": 2}),
        (anynorm.instance_norm, {}),
        (anynorm.layer_norm, {"axis": (1, 2, 3)}),
    ):
        with anynorm.options(block_bytes=block_bytes):
            (y, moments), pullback = anynorm.vjp(norm, x, return_moments=True, **options)
            found = [y, *pullback(dy)]
            if backend.tracked:
                found += backend.xp.autograd.grad(norm(x, **options), x, dy)
                backend.check(found[2], backend.numpy(found[1]), tolerance=1e-12)
            else:
                assert norm(x, out=place, **options) is place
                backend.check(place, backend.numpy(y), tolerance=1e-12)
            if norm is anynorm.batch_norm:
                backend.check(norm(x, moments=moments), backend.numpy(y))
            for each in found:
                assert library_of("y", each).memory_order(each) == (0, 2, 3, 1)


@pytest.mark.cells("numpy", "strict")
@pytest.mark.parametrize("block_bytes", [16, 256])
def test_beta_is_not_lost_in_a_group_of_almost_no_spread(backend, block_bytes):
    only_if(block_bytes == 256, backend, "strict")
    x = np.full((1000, 2), 1e6)
    x[7] += 1
    beta = np.array([3.0, -4.0])
    with anynorm.options(block_bytes=block_bytes):
        y = anynorm.batch_norm(backend.array(x, "float32"), None, backend.array(beta, "float32"), eps=0)
    backend.check(y, standardized(x, 0, 0) + beta, dtype="float32", tolerance=1e-5)


@pytest.mark.cells("numpy", "strict", "torch")
@pytest.mark.parametrize(("shape", "axis"), [((16, 512), 1), ((2048, 4), 0)])
@pytest.mark.parametrize(("offset", "scale"), [(1e6, 1e-22), (1e3, 1e-20), (1e2, 1e-23), (1e4, 1e-27), (1e6, 1e-16)])
def test_a_mean_is_taken_from_a_spread_whose_square_underflows(backend, shape, axis, offset, scale):
    x = ((np.random.default_rng(0).random(shape) + offset) * scale).astype(np.float32)
    with anynorm.options(block_bytes=4096):
        y = backend.numpy(anynorm.normalize(backend.array(x, "float32"), axis=axis))
    expected = standardized(x, axis).astype(np.float64)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@by_arrays
@pytest.mark.cells("numpy", "strict", "torch")
@pytest.mark.parametrize("weighted", [False, True])
def test_the_mean_of_a_cotangent_is_taken_before_a_gamma_that_does_not_fold(backend, weighted):
    x, dy = np.random.default_rng(0).standard_normal((2, 4096, 3))
    x[:, 0] *= 1e15  # rstd * gamma is subnormal there
    gamma, dy = np.array([1e-25, 1.0, 1.0]), dy + 1e5
    x, gamma, dy = (each.astype(np.float32) for each in (x, gamma, dy))
    weights = {"weights": backend.array(np.ones((4096, 1)), "float32")} if weighted else {}
    with anynorm.options(block_bytes=4096):
        arrays = (backend.array(each, "float32") for each in (x, gamma))
        _, pullback = anynorm.vjp(anynorm.batch_norm, *arrays, **weights)
        dx = backend.numpy(pullback(backend.array(dy, "float32"))[0])
    expected = (standardized_gradient(x, dy, 0) * gamma).astype(np.float64)
    sizes = np.abs(expected).max(axis=0)
    np.testing.assert_allclose(dx / sizes, expected / sizes, rtol=0, atol=5e-6)


@by_arrays
@pytest.mark.cells("numpy")
@pytest.mark.parametrize("dtype", ["float32", "float64", ">f4"])
@pytest.mark.parametrize("n", [1, 257, 4095, 16385, 40000])
def test_sums_by_blas_are_as_exact_as_those_of_numpy(n, dtype):
    x = (np.random.default_rng(n).standard_normal((3, n)) + 10).astype(dtype)
    exact = np.asarray(x, np.longdouble)
    mean, var = exact.mean(axis=1), exact.var(axis=1)
    least = float(np.finfo(x.dtype).eps)
    for view, axis in ((x, 1), (x[:, ::-1], 1), (x.T, 0), (np.ascontiguousarray(x.T), 0)):
        moments = anynorm.moments(view, axis=axis)
        numpy = np.abs(x.var(axis=1) - var)
        assert np.all(np.abs(moments.mean - mean) <= 10 * least)
        assert np.all(np.abs(moments.var - var) <= 4 * numpy + 8 * least)


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("even", [1, 4])
@pytest.mark.parametrize("shape", [(4096, 1024), (5000, 700), (1000003, 3), (300, 5000)])
def test_blocks_of_many_rows_have_an_even_number_of_them(shape, even):
    most = 655360
    rows = [block[0].stop - block[0].start for (block,) in blocks(shape, (1,), most, most, even)]
    assert sum(rows) == shape[0]
    assert max(rows) * shape[1] <= most
    assert all(n % 32 == 0 for n in rows[:-1]) or rows[0] <= 256
