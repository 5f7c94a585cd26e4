"""How far from float64: large offsets, large and small magnitudes, long leading axes, 2-byte floats."""

import numpy as np
import pytest
from oracles import exact, standardized, standardized_gradient

import anynorm


def float32(shape, offset=0.0, scale=1.0):
    """Normal numbers, rounded to float32, in float64."""
    with np.errstate(under="ignore"):
        return (np.random.default_rng(0).standard_normal(shape) * scale + offset).astype(np.float32).astype(np.float64)


def distance(backend, y, expected):
    return float(np.max(np.abs(backend.numpy(y) - expected)))


@pytest.mark.parametrize("limit", ["max", "smallest_normal"])
def test_the_largest_and_the_smallest_normal_number(backend, limit):
    signs = np.array([[1.0, -1, 1, 1, -1], [1, 1, 1, 1, -1]])
    for dtype in ("float32", backend.widest):
        size = getattr(np.finfo(dtype), limit)
        x = signs * float(size)
        y = anynorm.layer_norm(backend.array(x, dtype), eps=0)
        backend.check(y, standardized(signs, 1, 0).astype(np.float64), dtype=dtype, tolerance=2e-6)
        rms = anynorm.rms_norm(backend.array(x, dtype), eps=0)
        backend.check(rms, signs, dtype=dtype, tolerance=2e-6)
        weight = anynorm.weight_norm(backend.array(x, dtype), backend.array(np.ones(2), dtype))
        backend.check(weight, signs / 5**0.5, dtype=dtype, tolerance=2e-6)


@pytest.mark.parametrize("rows", [50, 20000], ids=["whole", "in blocks"])
def test_given_moments_keep_all_the_digits_of_a_large_mean(backend, rows):
    x, dy = float32((rows, 4), offset=1e6), np.random.default_rng(1).standard_normal((rows, 4))
    exact, wide = standardized(x, 0).astype(np.float64), x.astype(np.float64)
    batch = anynorm.moments(backend.array(x, "float32"), axis=0)
    given = [batch]
    if backend.float64:
        running = anynorm.RunningStats.init(4, like=backend.array(wide), momentum=None)
        mean, var = backend.array(wide.mean(axis=0)), backend.array(wide.var(axis=0))
        given += [running.update(batch), anynorm.RunningStats(mean, var, rows)]
    gamma = backend.array(np.ones(4), "float32")
    for moments in given:
        y, pullback = anynorm.vjp(anynorm.batch_norm, backend.array(x, "float32"), gamma, moments=moments)
        backend.check(y, exact, dtype="float32", tolerance=2e-6)
        dgamma = backend.numpy(pullback(backend.array(dy, "float32"))[1])
        np.testing.assert_allclose(dgamma, (dy * exact).sum(axis=0), atol=2e-6 * rows**0.5, rtol=2e-6)


def test_groups_of_very_different_magnitudes_stand_side_by_side(backend):
    scales = np.array([[1e-37], [1e-30], [1e-12], [1.0], [1e12], [1e30], [1e37]])
    x = float32((7, 200)) * scales
    x = x.astype(np.float32).astype(np.float64)
    y = anynorm.layer_norm(backend.array(x, "float32"), eps=0)
    assert distance(backend, y, standardized(x, 1, 0)) <= 6e-6
    rms = anynorm.rms_norm(backend.array(x, "float32"), eps=0)
    assert distance(backend, rms, x / np.sqrt((x**2).mean(axis=1, keepdims=True))) <= 6e-6
    w = anynorm.weight_norm(backend.array(x, "float32"), backend.array(np.ones(7), "float32"))
    assert distance(backend, w, x / np.sqrt((x**2).sum(axis=1, keepdims=True))) <= 6e-6


@pytest.mark.cells("numpy", "strict", "torch", "jax", "cupy")
@pytest.mark.parametrize("offset", [0, 1e4])
@pytest.mark.parametrize("plane", [(), (2,)])
def test_parameter_gradients_over_many_rows_are_exact(backend, plane, offset):
    shape, axes = (65536, 3, *plane), (0, 2)[: 1 + len(plane)]
    x, dy = float32(shape, offset), float32(shape, 2.0)
    gamma = backend.array(np.ones(3), "float32")
    _, pullback = anynorm.vjp(anynorm.batch_norm, backend.array(x, "float32"), gamma, gamma)
    dx, dgamma, dbeta = (backend.numpy(each) for each in pullback(backend.array(dy, "float32")))
    xhat = standardized(x, axes)
    np.testing.assert_allclose(dx, standardized_gradient(x, dy, axes), rtol=0, atol=2e-5)
    np.testing.assert_allclose(dbeta, dy.sum(axis=axes), rtol=2e-6)
    np.testing.assert_allclose(dgamma, (dy * xhat).sum(axis=axes).astype(np.float64), rtol=0, atol=x.size // 3 * 2e-6)


def test_two_byte_floats_are_computed_in_float32(backend):
    for dtype in backend.narrow:
        x = backend.array(float32((64, 500), 100.0, 300.0), dtype)  # its variance is infinite in float16
        ulp = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2e-6}[dtype]
        expected = standardized(backend.numpy(x), 1).astype(np.float64)
        backend.check(anynorm.layer_norm(x), expected, dtype=dtype, tolerance=ulp)
        moments = anynorm.moments(x, axis=1)
        backend.check(moments.var, backend.numpy(x).var(axis=1), dtype="float32", tolerance=2e-6)


@pytest.mark.cells("torch")
def test_bfloat16_layer_norm_is_torchs_own(backend):
    torch = backend.xp
    x = backend.array(float32((64, 500)), "bfloat16").detach()
    ours, theirs = anynorm.layer_norm(x), torch.nn.functional.layer_norm(x, (500,))
    assert (ours == theirs).float().mean() > 0.999  # but for ties that float32 rounds either way
    assert torch.allclose(ours, theirs, rtol=2.0**-7, atol=0)


def test_moments_are_exact_at_an_offset_and_where_a_power_of_two_is_taken_out(backend):
    for offset, scale, tolerance in ((1e4, 1.0, 1e-7), (0.0, 1e15, 2e-6), (1e18, 1e17, 2e-6), (0.0, 1e-15, 2e-6)):
        x = float32((6, 4000), offset, scale)
        for eps in (0, 1e-5):
            _, moments = anynorm.layer_norm(backend.array(x, "float32"), eps=eps, return_moments=True)
            mean, var = backend.numpy(moments.mean), backend.numpy(moments.var)
            np.testing.assert_allclose(mean, x.mean(axis=1), rtol=tolerance, atol=1e-6 * scale)
            if eps == 0 or scale >= 1:  # beside an eps a tiny variance is not asked for
                np.testing.assert_allclose(var, x.var(axis=1), rtol=2e-6)


def test_a_cotangent_may_have_another_dtype(backend):
    x, dy = float32((5, 64)), np.random.default_rng(3).standard_normal((5, 64))
    for dtype in {backend.widest, *backend.narrow} - {"bfloat16"}:
        cotangent = backend.array(dy, dtype)
        (dx,) = anynorm.vjp(anynorm.layer_norm, backend.array(x, "float32"))[1](cotangent)
        expected = standardized_gradient(x, backend.numpy(cotangent), 1).astype(np.float64)
        backend.check(dx, expected, dtype="float32", tolerance=2e-5)


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_a_mean_is_right_to_the_last_bit_over_a_leading_axis(backend, offset):
    x = float32((250, 8), offset)
    mean = backend.numpy(anynorm.moments(backend.array(x, "float32"), axis=0).mean)
    np.testing.assert_allclose(mean, x.mean(axis=0), rtol=2.0**-24 * 1.01)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e13, 1e18, 1e30])
def test_a_constant_group_has_the_gradient_of_its_eps_beside_any_other(backend, value):
    x = np.array([[value] * 4, [3e38, 1.0, 1.0, 1.0]])
    dy = np.tile(np.arange(4.0), (2, 1))
    (dx,) = anynorm.vjp(anynorm.layer_norm, backend.array(x, "float32"))[1](backend.array(dy, "float32"))
    np.testing.assert_allclose(backend.numpy(dx)[0], (dy[0] - 1.5) / 1e-5**0.5, rtol=1e-5)


def test_a_group_whose_sum_overflows_is_told_among_ordinary_ones(backend):
    x = np.asarray([[1, 2, 3, 4], [3e38, 3e38, 3e38, -3e38], [5, 6, 8, 7]], dtype=np.float32)
    y = anynorm.layer_norm(backend.array(x, "float32"))
    backend.check(y, standardized(x.astype(np.float64), 1).astype(float), dtype="float32", tolerance=1e-5)


ORDERS = {
    "as they are": lambda x: x,
    "every other": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "backwards": lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
    "on odd bytes": lambda x: np.rec.fromarrays([x, np.zeros(x.shape, np.int8)], names="x,pad").x,
}


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("n", [8000, 60000])
def test_long_sums_of_one_sign_are_exact_in_any_order_in_memory(backend, n, order):
    x, dy, each = float32((2, n), 1e6), float32((2, n), 1e3), np.abs(float32((2, n)))
    arrays = [order(np.asarray(every, np.float32)) for every in (x, dy, each)]
    square = (x**2).mean(axis=1, keepdims=True)
    y, pullback = anynorm.vjp(anynorm.rms_norm, arrays[0], eps=0)
    assert distance(backend, y, x / np.sqrt(square)) <= 3e-7
    assert distance(backend, anynorm.rms_norm(arrays[0], eps=0, out=order(np.zeros_like(arrays[0]))), y) <= 3e-7
    size = 1e3 / np.sqrt(square)
    dx = (dy - x * (dy * x).mean(axis=1, keepdims=True) / square) / np.sqrt(square)
    assert distance(backend, pullback(arrays[1])[0] / size, dx / size) <= 1e-6
    weighed = (x**2 * each).sum(axis=1, keepdims=True) / each.sum(axis=1, keepdims=True)
    y = anynorm.rms_norm(arrays[0], eps=0, weights=arrays[2])
    assert distance(backend, y, x / np.sqrt(weighed)) <= 5e-7


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_what_stands_beside_x_may_lie_in_any_order_in_memory(backend, order):
    x = np.where(np.arange(120000).reshape(2, 60000) % 2 == 0, np.float32(1.1), np.float32(-1.1))  # all round alike
    out, weights = order(np.zeros_like(x)), order(np.full_like(x, 1.1))
    want = standardized(x.astype(np.float64), 1)
    assert distance(backend, anynorm.rms_norm(x, weights=weights), want) <= 3e-7
    x += np.float32(20)
    assert distance(backend, anynorm.layer_norm(x, out=out), standardized(x.astype(np.float64), 1)) <= 3e-7


@pytest.mark.cells("numpy", "torch")
@pytest.mark.parametrize("weighted", [False, True])
def test_thousands_of_parts_are_added_exactly(backend, weighted):
    x, dy = float32((30000, 3), 1e4), float32((30000, 3), 1e3)
    weights = backend.array(np.full((1, 1), 0.3), "float32") if weighted else None
    beta = backend.array(np.zeros(3), "float32")
    with anynorm.options(block_bytes=2**10):
        y, pullback = anynorm.vjp(anynorm.batch_norm, backend.array(x, "float32"), beta + 1, beta, weights=weights)
        _, _, dbeta = pullback(backend.array(dy, "float32"))
    assert distance(backend, y, standardized(x, 0)) <= 2e-6
    np.testing.assert_allclose(backend.numpy(dbeta), dy.sum(axis=0), rtol=5e-7)


def error(found, exact):
    """The largest, beside the root of the mean square."""
    exact = np.asarray(exact)
    return np.max(np.abs(found - exact)) / np.sqrt(np.mean(exact**2))


@pytest.mark.cells("numpy", "torch", "strict")
@pytest.mark.parametrize("block_bytes", [2**12, 2**22])
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
def test_groups_of_few_numbers_with_and_without_parameters(backend, norm, shape, of, options, block_bytes):
    rng, parameters = np.random.default_rng(7), (len(shape) + shape[-1]) % 3
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


@pytest.mark.cells("numpy", "torch", "dask")
@pytest.mark.parametrize("norm", [anynorm.layer_norm, anynorm.rms_norm])
def test_a_gradient_of_which_most_lies_along_x_beside_a_gamma_that_is_small(backend, norm):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((64, 512)) * 1e16).astype(np.float32)
    dy = (3 * x / 1e16 + rng.standard_normal(x.shape)).astype(np.float32)
    gamma = np.full((1, 1), 1e-14, np.float32)
    of_all = exact(norm, x, dy, gamma).dx
    for rows in (64, 8):
        arrays = [backend.array(each, "float32") for each in (x[:rows], gamma)]
        found = backend.numpy(anynorm.vjp(norm, *arrays)[1](backend.array(dy[:rows], "float32"))[0])
        assert np.max(np.abs(found - of_all[:rows])) < 2e-6 * np.max(np.abs(of_all[:rows]))


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
