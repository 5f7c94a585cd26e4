"""How far from float64: large offsets, large and small magnitudes, long leading axes, 2-byte floats."""

import numpy as np
import pytest
from oracles import only_if, standardized, standardized_gradient

import anynorm
from anynorm import kernels

LAYOUTS = {
    "layer": (lambda x, **o: anynorm.layer_norm(x, **o), (256, 1000), (1,)),
    "batch": (lambda x, **o: anynorm.batch_norm(x, **o), (16, 8, 28, 28), (0, 2, 3)),
    "batch, channels last": (lambda x, **o: anynorm.batch_norm(x, channel_axis=-1, **o), (16, 28, 28, 8), (0, 1, 2)),
    "batch, many rows": (lambda x, **o: anynorm.batch_norm(x, **o), (65536, 8), (0,)),
    "batch, many planes": (lambda x, **o: anynorm.batch_norm(x, **o), (65536, 2, 3), (0, 2)),
    "instance": (lambda x, **o: anynorm.instance_norm(x, **o), (8, 4, 32, 32), (2, 3)),
    "one group": (lambda x, **o: anynorm.group_norm(x, groups=1, **o), (8, 4, 32, 32), (1, 2, 3)),
    "middle axis": (lambda x, **o: anynorm.normalize(x, axis=1, **o), (4, 3000, 5), (1,)),
}


@pytest.fixture(params=LAYOUTS)
def layout(request, backend):
    only_if(request.param in ("layer", "batch", "batch, many rows", "one group"), backend, "jax")  # it has no blocks
    return LAYOUTS[request.param]


def float32(shape, offset=0.0, scale=1.0):
    """Normal numbers, rounded to float32, in float64."""
    with np.errstate(under="ignore"):
        return (np.random.default_rng(0).standard_normal(shape) * scale + offset).astype(np.float32).astype(np.float64)


def distance(backend, y, expected):
    return float(np.max(np.abs(backend.numpy(y) - expected)))


@pytest.mark.cells("numpy", "strict", "torch", "jax", "cupy")
@pytest.mark.parametrize(("offset", "bound"), [(0, 3e-6), (1e3, 6e-6), (1e4, 6e-6), (1e6, 6e-5)])
def test_an_offset_costs_no_digits(backend, layout, offset, bound):
    norm, shape, axes = layout
    x = float32(shape, offset)
    assert distance(backend, norm(backend.array(x, "float32")), standardized(x, axes)) <= bound


@pytest.mark.cells("dask")
@pytest.mark.parametrize(("offset", "bound"), [(1e4, 6e-6), (1e6, 6e-5)])
def test_an_offset_costs_no_digits_over_trailing_axes(backend, offset, bound):
    for name in ("layer", "instance", "one group"):
        norm, shape, axes = LAYOUTS[name]
        x = float32(shape, offset)
        assert distance(backend, norm(backend.array(x, "float32")), standardized(x, axes)) <= bound


@pytest.mark.cells("numpy", "torch")
@pytest.mark.parametrize(
    "order", ["fortran", "strided", "transposed", pytest.param("reversed", marks=pytest.mark.cells("numpy"))]
)
def test_order_in_memory_costs_no_digits(backend, layout, order):
    norm, shape, axes = layout
    x = float32(shape, 1e4)
    array = np.asarray(x, dtype=np.float32)
    if order == "fortran":
        array = np.asfortranarray(array)
    elif order == "strided":
        array = np.repeat(array, 2, axis=-1)[..., ::2]
    elif order == "reversed":
        array = array[::-1].copy()[::-1]
    else:
        array = np.ascontiguousarray(array.T).T
    if backend.library == "torch":
        array = backend.xp.from_numpy(array)
    assert distance(backend, norm(array), standardized(x, axes)) <= 6e-6


@pytest.mark.parametrize("eps", [0, 1e-5])
@pytest.mark.parametrize("scale", [1e30, 1e37])
def test_large_magnitudes_are_exact(backend, layout, scale, eps):
    norm, shape, axes = layout
    if backend.library == "dask" and shape[0] == 65536:
        shape = (256, *shape[1:])
    x = float32(shape, scale=scale)
    assert distance(backend, norm(backend.array(x, "float32"), eps=eps), standardized(x, axes, eps)) <= 6e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-36])
def test_small_magnitudes_are_exact_with_no_eps(backend, layout, scale):
    norm, shape, axes = layout
    if backend.library == "dask" and shape[0] == 65536:
        shape = (256, *shape[1:])
    x = float32(shape, scale=scale)
    assert distance(backend, norm(backend.array(x, "float32"), eps=0), standardized(x, axes, 0)) <= 6e-6


def test_small_magnitudes_beside_an_eps_are_scaled_by_it(backend):
    x = float32((4, 100), scale=1e-30)
    y = backend.numpy(anynorm.layer_norm(backend.array(x, "float32")))
    np.testing.assert_allclose(y * 1e30, standardized(x, 1).astype(np.float64) * 1e30, rtol=1e-5, atol=1e-5 * 300)


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


@pytest.mark.parametrize("scale", [1e37, 1e30, 1.0, 1e-30, 1e-36])
def test_gradients_are_exact_at_every_magnitude(backend, scale):
    x, dy = float32((5, 64), scale=scale), np.random.default_rng(1).standard_normal((5, 64))
    _, pullback = anynorm.vjp(anynorm.layer_norm, backend.array(x, "float32"), eps=0)
    (dx,) = pullback(backend.array(dy, "float32"))
    flushed = float(np.finfo(np.float32).smallest_normal)  # what XLA makes 0 of, on a CPU
    assert distance(backend, dx, standardized_gradient(x, dy, 1, 0)) <= max(2e-5 / scale, flushed)


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


@pytest.mark.cells("numpy", "torch")
def test_a_power_of_two_is_looked_for_only_where_it_is_needed(backend, monkeypatch):
    calls = []
    scaled = kernels.scale_of
    monkeypatch.setattr(
        "anynorm.kernels.standardizing.scale_of", lambda *args, **options: calls.append(1) or scaled(*args, **options)
    )
    x = backend.array(float32((8, 64)), "float32")
    on_gpu = backend.library == "torch" and x.is_cuda  # there a look at the numbers costs more than the pass it saves
    with anynorm.options(engine="auto" if backend.library == "cupy" else "arrays"):  # programs on a processor need none
        for norm in (anynorm.layer_norm, anynorm.batch_norm, anynorm.rms_norm):
            norm(x)
            norm(x, eps=0)
        assert len(calls) == (6 if on_gpu else 0)
        for scale, eps, needed in ((1e30, 1e-5, True), (1e-30, 1e-5, False), (1e-30, 0, True)):
            calls.clear()
            anynorm.layer_norm(x * scale, eps=eps)
            assert len(calls) == (needed or on_gpu)


def test_moments_are_exact_at_an_offset_and_where_a_power_of_two_is_taken_out(backend):
    for offset, scale, tolerance in ((1e4, 1.0, 1e-7), (0.0, 1e15, 2e-6), (1e18, 1e17, 2e-6), (0.0, 1e-15, 2e-6)):
        x = float32((6, 4000), offset, scale)
        for eps in (0, 1e-5):
            _, moments = anynorm.layer_norm(backend.array(x, "float32"), eps=eps, return_moments=True)
            mean, var = backend.numpy(moments.mean), backend.numpy(moments.var)
            np.testing.assert_allclose(mean, x.mean(axis=1), rtol=tolerance, atol=1e-6 * scale)
            if eps == 0 or scale >= 1:  # beside an eps a tiny variance is not asked for
                np.testing.assert_allclose(var, x.var(axis=1), rtol=2e-6)


@pytest.mark.parametrize(
    ("scale", "eps"),
    [(1e-20, 1e-38), (1e-15, 1e-30), (1e20, 1.0), (1e20, 1e38), (1e16, 1e30), (1.0, 1e-20)],
)
def test_an_eps_of_the_size_of_the_variance_counts_at_every_magnitude(backend, scale, eps):
    x = float32((4, 500), scale=scale)
    y = anynorm.layer_norm(backend.array(x, "float32"), eps=eps)
    assert distance(backend, y, standardized(x, 1, eps)) <= 6e-6


@pytest.mark.parametrize("value", [3e38, 1e30, 1.0, 1e-30, 0.0])
@pytest.mark.parametrize("eps", [1e-20, 1e-40, 1e-80, 1e-300])
def test_a_constant_beside_the_smallest_eps_has_no_spread(backend, value, eps):
    x = backend.array(np.full((2, 3), value), "float32")
    backend.check(anynorm.layer_norm(x, eps=eps), np.zeros((2, 3)), dtype="float32", tolerance=0)
    (dx,) = anynorm.vjp(anynorm.layer_norm, x, eps=eps)[1](x * 0 + 1)
    assert np.all(np.isfinite(backend.numpy(dx)))


def test_a_cotangent_with_a_large_mean_costs_no_digits(backend):
    x, dy = float32((5, 1000)), float32((5, 1000), 1e4)
    (dx,) = anynorm.vjp(anynorm.layer_norm, backend.array(x, "float32"))[1](backend.array(dy, "float32"))
    assert distance(backend, dx, standardized_gradient(x, dy, 1)) <= 1e-2  # rounding of dy * xhat, 1e4 in size
    whole = np.full((5, 1000), 1e4)
    (dx,) = anynorm.vjp(anynorm.layer_norm, backend.array(x, "float32"))[1](backend.array(whole, "float32"))
    assert distance(backend, dx, 0.0) == 0


def test_a_cotangent_may_have_another_dtype(backend):
    x, dy = float32((5, 64)), np.random.default_rng(3).standard_normal((5, 64))
    for dtype in {backend.widest, *backend.narrow} - {"bfloat16"}:
        cotangent = backend.array(dy, dtype)
        (dx,) = anynorm.vjp(anynorm.layer_norm, backend.array(x, "float32"))[1](cotangent)
        expected = standardized_gradient(x, backend.numpy(cotangent), 1).astype(np.float64)
        backend.check(dx, expected, dtype="float32", tolerance=2e-5)


@pytest.mark.cells("numpy", "strict", "torch", "jax", "cupy")
def test_the_limits_are_what_they_say(backend):
    for dtype in {"float32", backend.widest}:
        info = np.finfo(dtype)
        limits = kernels.limits(backend.xp, backend.array(np.ones(1), dtype).dtype)
        largest, smallest = float(info.max), float(info.smallest_normal)
        for level in (limits.large, largest / limits.step / limits.further, limits.small * limits.step):
            assert level**2 * 2.0**31 <= largest
        for level in (limits.small, limits.large / limits.step, smallest * limits.step * limits.further):
            assert (level * float(info.eps) / 2) ** 2 >= smallest


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_a_mean_is_right_to_the_last_bit_over_a_leading_axis(backend, offset):
    x = float32((250, 8), offset)
    mean = backend.numpy(anynorm.moments(backend.array(x, "float32"), axis=0).mean)
    np.testing.assert_allclose(mean, x.mean(axis=0), rtol=2.0**-24 * 1.01)


def test_a_cotangent_is_centred_in_two_stages(backend):
    x, dy = float32((250, 8)), float32((250, 8), 1e6)
    (dx,) = anynorm.vjp(anynorm.batch_norm, backend.array(x, "float32"))[1](backend.array(dy, "float32"))
    assert distance(backend, dx, standardized_gradient(x, dy, 0)) <= 2e-5


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
    x, dy = float32((200000, 3), 1e4), float32((200000, 3), 1e3)
    weights = backend.array(np.full((1, 1), 0.3), "float32") if weighted else None
    beta = backend.array(np.zeros(3), "float32")
    with anynorm.options(block_bytes=2**12):
        y, pullback = anynorm.vjp(anynorm.batch_norm, backend.array(x, "float32"), beta + 1, beta, weights=weights)
        _, _, dbeta = pullback(backend.array(dy, "float32"))
    assert distance(backend, y, standardized(x, 0)) <= 2e-6
    np.testing.assert_allclose(backend.numpy(dbeta), dy.sum(axis=0), rtol=5e-7)
