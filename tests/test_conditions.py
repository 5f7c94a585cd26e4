"""Results are exact however large the means of x and of dy are beside their spreads, and of whatever magnitude."""

import numpy as np
import pytest

import anynorm

WORKS = [
    (anynorm.layer_norm, (512, 96), (96,), {}),
    (anynorm.layer_norm, (128, 12, 32), None, {"axis": (1, 2)}),
    (anynorm.rms_norm, (512, 96), (96,), {}),
    (anynorm.batch_norm, (16, 12, 20, 20), (12,), {}),
    (anynorm.batch_norm, (2000, 24), (24,), {"channel_axis": -1}),
    (anynorm.group_norm, (8, 12, 20, 20), (12,), {"groups": 3}),
    (anynorm.group_norm, (8, 20, 20, 12), (12,), {"groups": 3, "channel_axis": -1}),
    (anynorm.instance_norm, (16, 12, 20, 20), (12,), {}),
]
MEANS = [0, 0.2, 0.6, 0.9, 1.1, 30, 1e4]


def error(found, exact):
    """The largest, beside the root of the mean square."""
    exact = np.asarray(exact)
    return np.max(np.abs(found - exact)) / np.sqrt(np.mean(exact**2))


def formula(x, dy, gamma, *, axes, eps=1e-5, centred=True, sums=False):
    """y and dx in NumPy's widest float."""
    x, dy, gamma = (np.asarray(each).astype(np.longdouble) for each in (x, dy, gamma))
    mean = np.sum if sums else np.mean
    d = x - x.mean(axis=axes, keepdims=True) if centred else x
    root = np.sqrt(mean(d * d, axis=axes, keepdims=True) + np.longdouble(eps))
    xhat, g = d / root, dy * gamma
    lost = g.mean(axis=axes, keepdims=True) if centred else 0
    return xhat * gamma, (g - lost - xhat * mean(g * xhat, axis=axes, keepdims=True)) / root


@pytest.mark.cells("numpy", "torch")
@pytest.mark.parametrize("block_bytes", [2**12, 2**22])
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize(("norm", "shape", "of", "options"), WORKS, ids=lambda each: getattr(each, "__name__", None))
def test_means_of_any_size_beside_the_spread(backend, norm, shape, of, options, mean, block_bytes):
    rng = np.random.default_rng(7)
    x, dy = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    params = [] if of is None else [rng.standard_normal(of).astype(np.float32)]
    for values, cotangent in ((x + np.float32(mean), dy), (x, dy + np.float32(mean))):
        wide = [each.astype(np.float64) for each in (values, *params)]
        y, pullback = anynorm.vjp(norm, *wide, **options)
        exact = [y, *pullback(cotangent.astype(np.float64))]
        with anynorm.options(block_bytes=block_bytes):
            y, pullback = anynorm.vjp(norm, *(backend.array(each, "float32") for each in (values, *params)), **options)
            found = [y, *pullback(backend.array(cotangent, "float32"))]
        for ours, each in zip(found[:2], exact[:2], strict=True):
            # a sum of gradients that are nearly all mean has as many digits less
            assert error(backend.numpy(ours), each) < 4e-6 * max(1, 1e-4 * mean)
        for ours, each in zip(found[2:], exact[2:], strict=True):
            assert error(backend.numpy(ours), each) < 4e-6 * max(1, mean)


@pytest.mark.cells("numpy", "torch", "strict")
@pytest.mark.parametrize("block_bytes", [2**12, 2**22])
@pytest.mark.parametrize("parameters", [0, 1, 2])
@pytest.mark.parametrize(
    ("norm", "shape", "of", "options"),
    [
        (anynorm.layer_norm, (4001, 8), (8,), {}),
        (anynorm.rms_norm, (4001, 5), (5,), {}),
        (anynorm.layer_norm, (17000, 1), (1,), {}),
        (anynorm.layer_norm, (17000, 1, 1), (1, 1), {"axis": (1, 2)}),
        (anynorm.instance_norm, (34, 500, 1), (500,), {}),
        (anynorm.batch_norm, (1, 17000), (17000,), {}),
        (anynorm.instance_norm, (4000, 1, 8), (1,), {}),
        (anynorm.normalize, (4000, 12), (1, 1), {"axis": 1}),
    ],
)
def test_groups_of_few_numbers_with_and_without_parameters(backend, norm, shape, of, options, parameters, block_bytes):
    rng = np.random.default_rng(7)
    x, dy = rng.standard_normal((2, *shape)).astype(np.float32)
    params = list(rng.standard_normal((2, *of)).astype(np.float32))[:parameters]
    y, pullback = anynorm.vjp(norm, *(each.astype(np.float64) for each in (x, *params)), **options)
    exact = [y, *pullback(dy.astype(np.float64))]
    with anynorm.options(block_bytes=block_bytes):
        y, pullback = anynorm.vjp(norm, *(backend.array(each, "float32") for each in (x, *params)), **options)
        found = [y, *pullback(backend.array(dy, "float32"))]
    for ours, each in zip(found, exact, strict=True):
        np.testing.assert_allclose(backend.numpy(ours), each, rtol=0, atol=5e-6 * max(1, np.max(np.abs(each))))


@pytest.mark.cells("numpy", "torch")
@pytest.mark.parametrize("size", [1e11, 1e13, 1e17, 1e-13])
@pytest.mark.parametrize(
    ("norm", "shape", "options"),
    [(anynorm.layer_norm, (64, 8192), {}), (anynorm.rms_norm, (64, 8192), {}), (anynorm.batch_norm, (8, 5, 9000), {})],
)
def test_a_gradient_beside_numbers_of_any_size(backend, norm, shape, options, size):
    rng = np.random.default_rng(3)
    x = (rng.standard_normal(shape) * size).astype(np.float32)
    dy = (x / size + 0.5 * rng.standard_normal(shape)).astype(np.float32)  # much of it lies along x
    exact = anynorm.vjp(norm, x.astype(np.float64), eps=0.0)[1](dy.astype(np.float64))[0]
    found = anynorm.vjp(norm, backend.array(x, "float32"), eps=0.0)[1](backend.array(dy, "float32"))[0]
    assert error(backend.numpy(found), exact) < 4e-6


@pytest.mark.cells("numpy", "torch")
def test_the_gradient_of_rows_of_one_number_and_but_one_other(backend):
    rng = np.random.default_rng(5)
    x = np.full((4, 65537), 333.33334, np.float32)
    x[:, 7] = np.nextafter(x[:, 7], np.float32(1e9))
    dy = rng.standard_normal(x.shape).astype(np.float32)
    exact = anynorm.vjp(anynorm.layer_norm, x.astype(np.float64), eps=0.0)[1](dy.astype(np.float64))[0]
    found = anynorm.vjp(anynorm.layer_norm, backend.array(x, "float32"), eps=0.0)[1](backend.array(dy, "float32"))[0]
    assert np.max(np.abs(backend.numpy(found) - exact)) < 4e-6 * np.max(np.abs(exact))


@pytest.mark.cells("numpy", "torch")
@pytest.mark.parametrize("block_bytes", [2**12, 2**22])
@pytest.mark.parametrize("mean", [*MEANS, 3.9, 4.1])
@pytest.mark.parametrize("shape", [(16, 12, 20, 20), (3, 12, 40, 40), (2000, 12)])
def test_given_means_of_any_size_beside_the_spread(backend, shape, mean, block_bytes):
    rng = np.random.default_rng(7)
    gamma, beta = rng.standard_normal((2, 12)).astype(np.float32)
    means, var = mean * rng.choice([-1, 1], 12).astype(np.float32), rng.uniform(0.9, 1.1, 12).astype(np.float32)
    beside = (12, *(1 for _ in shape[2:]))
    x = (rng.standard_normal(shape) + means.reshape(beside)).astype(np.float32)
    wide = [each.astype(np.float64).reshape(beside) for each in (means, var, gamma, beta)]
    exact = (x - wide[0]) / np.sqrt(wide[1] + 1e-5) * wide[2] + wide[3]
    with anynorm.options(block_bytes=block_bytes):
        arrays = [backend.array(each, "float32") for each in (x, gamma, beta, means, var)]
        given = anynorm.RunningStats(*arrays[3:])
        found = backend.numpy(anynorm.batch_norm(*arrays[:3], moments=given))
    assert np.max(np.abs(found - exact)) < 3e-6


@pytest.mark.cells("numpy", "torch", "dask")
@pytest.mark.parametrize("norm", [anynorm.layer_norm, anynorm.rms_norm])
def test_a_gradient_of_which_most_lies_along_x_beside_a_gamma_that_is_small(backend, norm):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 512)) * 1e16).astype(np.float32)
    dy = (3 * x / 1e16 + rng.standard_normal(x.shape)).astype(np.float32)
    gamma = np.full((1, 1), 1e-14, np.float32)
    exact = formula(x, dy, gamma, axes=1, centred=norm is anynorm.layer_norm)[1]
    for rows in (64, 8):
        arrays = [backend.array(each, "float32") for each in (x[:rows], gamma)]
        found = backend.numpy(anynorm.vjp(norm, *arrays)[1](backend.array(dy[:rows], "float32"))[0])
        assert np.max(np.abs(found - exact[:rows])) < 2e-6 * np.max(np.abs(exact[:rows]))


@pytest.mark.cells("numpy", "torch")
@pytest.mark.parametrize("size", [0, 1e-25, 1e-12, 1e25])
def test_a_gradient_of_any_size(backend, size):
    rng = np.random.default_rng(3)
    x, random = (rng.standard_normal(shape).astype(np.float32) for shape in ((512, 96), 96))
    # beside ones, as a gamma that rounds dy before its mean goes would cost what is looked for
    for offset, gamma in ((0, random), (5, random), (1e4, np.ones_like(random))):
        dy = ((rng.standard_normal((512, 96)) + offset) * size).astype(np.float32)
        dy[::7] = 0  # padding
        wide = [each.astype(np.float64) for each in (x, gamma)]
        exact = anynorm.vjp(anynorm.layer_norm, *wide)[1](dy.astype(np.float64))
        with anynorm.options(block_bytes=2**14):
            found = anynorm.vjp(anynorm.layer_norm, *(backend.array(each, "float32") for each in (x, gamma)))[1](
                backend.array(dy, "float32")
            )
        for ours, each, scale in zip(found, exact, (max(abs(gamma)), np.sqrt(512) * max(1, offset / 5)), strict=True):
            np.testing.assert_allclose(backend.numpy(ours), each, rtol=0, atol=6e-6 * size * scale)


@pytest.mark.cells("numpy", "torch")
def test_a_gamma_of_zeros_and_of_extremes(backend):
    rng = np.random.default_rng(5)
    x, dy = (rng.standard_normal((16, 6, 20, 20)).astype(np.float32) for _ in range(2))
    gamma = np.asarray([0, 1, -0.0, 1e-39, 1e30, -2], np.float32)
    wide = [each.astype(np.float64) for each in (x, gamma)]
    y, pullback = anynorm.vjp(anynorm.batch_norm, *wide)
    exact = [y, *pullback(dy.astype(np.float64))]
    with anynorm.options(block_bytes=2**14):
        y, pullback = anynorm.vjp(anynorm.batch_norm, *(backend.array(each, "float32") for each in (x, gamma)))
        found = [y, *pullback(backend.array(dy, "float32"))]
    for ours, each in zip(found[:2], exact[:2], strict=True):
        for channel in range(6):
            unit = max(abs(float(gamma[channel])), 1e-38)
            atol = 6e-6 * unit
            np.testing.assert_allclose(backend.numpy(ours)[:, channel], each[:, channel], rtol=0, atol=atol)


@pytest.mark.cells("numpy", "torch")
@pytest.mark.parametrize(("size", "gamma"), [(1, [1, 0]), (1e-12, [1, 1e30]), (1e15, [1, 1e-30])])
def test_a_gamma_that_makes_too_much_or_too_little_of_the_scale(backend, size, gamma):
    rng, gamma = np.random.default_rng(5), np.asarray(gamma, np.float32)
    x, dy = ((size * rng.standard_normal((16, 2, 30, 30))).astype(np.float32) for size in (size, 1))
    beta, wide = np.zeros(2, np.float32), [each.astype(np.float64) for each in (x, gamma)]
    y, pullback = anynorm.vjp(anynorm.batch_norm, *wide, eps=0.0)
    exact = [y, pullback(dy.astype(np.float64))[0]]
    with anynorm.options(block_bytes=2**14):
        arrays = [backend.array(each, "float32") for each in (x, gamma, beta)]
        y, pullback = anynorm.vjp(anynorm.batch_norm, *arrays, eps=0.0)
        found = [y, pullback(backend.array(dy, "float32"))[0]]
    for ours, each in zip(found, exact, strict=True):
        for channel in range(2):
            most = np.max(np.abs(each[:, channel]))
            if most < np.finfo(np.float32).max:
                np.testing.assert_allclose(
                    backend.numpy(ours)[:, channel], each[:, channel], rtol=0, atol=max(4e-6 * most, 2e-45)
                )


@pytest.mark.cells("numpy", "torch")
@pytest.mark.parametrize("other", [0, 1])
def test_rows_of_one_number_and_but_one_other(backend, other):
    value = np.random.default_rng(5).uniform(1, 2, (200, 1)).astype(np.float32)
    x = np.repeat(value, 1001, axis=1)
    x[:, 7] += np.float32(other * 2.0**-23)
    exact = anynorm.layer_norm(x.astype(np.float64), eps=0.0)
    with anynorm.options(block_bytes=2**16):
        found = anynorm.layer_norm(backend.array(x, "float32"), eps=0.0)
    np.testing.assert_allclose(backend.numpy(found), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.cells("dask")
@pytest.mark.parametrize(
    ("norm", "shape"), [(anynorm.batch_norm, (16, 12, 20, 20)), (anynorm.instance_norm, (4, 12, 40, 40))]
)
def test_a_gradient_that_is_nearly_all_mean_in_chunks(backend, norm, shape):
    rng = np.random.default_rng(7)
    x, dy = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    gamma, dy = rng.standard_normal(12).astype(np.float32), dy + np.float32(1e4)
    exact = anynorm.vjp(norm, x.astype(np.float64), gamma.astype(np.float64))[1](dy.astype(np.float64))[0]
    pullback = anynorm.vjp(norm, *(backend.array(each, "float32") for each in (x, gamma)))[1]
    assert error(backend.numpy(pullback(backend.array(dy, "float32"))[0]), exact) < 4e-6
