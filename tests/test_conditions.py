"""Results are exact however large the means of x and of dy are beside their spreads, and of whatever magnitude."""

import numpy as np
import pytest
from oracles import only_if

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


def formula(x, dy, gamma, *, axes, eps=1e-5, centred=True, sums=False, weights=1.0, given=None):
    """y, dx and the root of the variance and eps, in NumPy's widest float."""
    x, dy, gamma, weights = (np.asarray(each).astype(np.longdouble) for each in (x, dy, gamma, weights))

    def add(values):
        return values.sum(axis=axes, keepdims=True)

    share = np.broadcast_to(weights, x.shape) / (1 if sums else add(np.broadcast_to(weights, x.shape)))
    mean, var = (each.astype(np.longdouble) for each in given) if given else (add(share * x) if centred else 0, None)
    d = x - mean
    root = np.sqrt((add(share * d * d) if given is None else var) + np.longdouble(eps))
    xhat, g = d / root, dy * gamma
    lost = (share * add(g) if centred else 0) + share * xhat * add(g * xhat) if given is None else 0
    return xhat * gamma, (g - lost) / root, root


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


def drawn(seed):
    """A call on arrays of random magnitudes: what it is given, and the formula's arguments."""
    rng = np.random.default_rng(seed)
    dtype = np.float32 if rng.random() < 0.75 else np.float64
    info = np.finfo(dtype)
    low, high = np.log10(float(info.smallest_normal)), np.log10(float(info.max))

    def magnitude():
        return 10.0 ** rng.uniform(low + 1, high - 1) if rng.random() < 0.8 else 1.0

    shape = ((6, 64), (3, 4, 40), (40, 5))[rng.integers(3)]
    kind = rng.choice(["normalize", "rms_norm", "weight_norm", "weights", "moments"])
    axes = (len(shape) - 1,) if rng.random() < 0.5 else (0, *range(2, len(shape)))
    kept = tuple(1 if axis in axes else n for axis, n in enumerate(shape))
    size, eps = magnitude(), rng.choice([0.0, 1e-5, magnitude()])
    x = rng.standard_normal(shape) * size * 10.0 ** rng.integers(-2, 3, kept)
    dy = (rng.standard_normal(shape) + rng.choice([0, 1, 100])) * magnitude()
    varies = kind != "weight_norm" and rng.random() < 0.5
    gamma = rng.standard_normal([n if (axis in axes) == varies else 1 for axis, n in enumerate(shape)]) * magnitude()
    how, options = {"axes": axes, "eps": eps, "centred": kind not in ("rms_norm", "weight_norm")}, {}
    if kind == "weights":
        options["weights"] = how["weights"] = (rng.random(shape) + 0.01) * 10.0 ** rng.uniform(low + 3, high - 3)
    elif kind == "moments":
        root = size if rng.random() < 0.6 and low < 2 * np.log10(size) < high else magnitude() ** 0.5
        how["given"] = [rng.standard_normal(kept) * size * rng.choice([0, 1, 10]), rng.uniform(0.5, 2, kept) * root**2]
    elif kind == "weight_norm":
        how["eps"], how["sums"] = 0.0, True
    cast = [each.astype(dtype) for each in (x, dy, gamma, *how.get("given", []))]
    if "weights" in how:
        options["weights"] = how["weights"] = how["weights"].astype(dtype)
    if "given" in how:
        how["given"] = cast[3:]
    return kind, dtype, cast[:3], how, options


@pytest.mark.cells("numpy", "torch", "strict", "dask")
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of drawing, and of Dask's merging
@pytest.mark.parametrize("block_bytes", [256, 2**22])
def test_numbers_of_any_magnitude_give_what_the_formula_gives(backend, block_bytes):
    only_if(block_bytes == 256, backend, "dask", "strict")
    compared, many = 0, backend.library in ("numpy", "torch")
    for seed in range(150 if many else 30):
        kind, dtype, (x, dy, gamma), how, options = drawn(seed)
        if not all(np.isfinite(each).all() for each in (x, dy, gamma)):
            continue
        name, axes = np.dtype(dtype).name, how["axes"]
        if not backend.float64 and name == "float64":
            continue
        other = {key: backend.array(each, name) for key, each in options.items()}
        kept = tuple(n for axis, n in enumerate(x.shape) if axis not in axes)
        if "given" in how:
            if not all(np.isfinite(each).all() for each in how["given"]):
                continue
            other["moments"] = anynorm.Moments(*(backend.array(each.reshape(kept), name) for each in how["given"]), 1)
        if kind == "weight_norm":
            other["axis"] = tuple(axis for axis in range(x.ndim) if axis not in axes)
        else:
            other |= {"axis": axes, "eps": float(how["eps"])}
        norm = {"rms_norm": anynorm.rms_norm, "weight_norm": anynorm.weight_norm}.get(kind, anynorm.normalize)
        with anynorm.options(block_bytes=block_bytes, threads=1):
            y, pullback = anynorm.vjp(norm, *(backend.array(each, name) for each in (x, gamma)), **other)
            found = [backend.numpy(y), backend.numpy(pullback(backend.array(dy, name))[0])]
        *exact, root = formula(x, dy, gamma, **how)
        info, n = np.finfo(dtype), np.prod([x.shape[axis] for axis in axes])
        largest = [
            abs(each).max(axis=axes, keepdims=True) for each in (*exact, x, dy * gamma.astype(np.longdouble) / root)
        ]
        normal = [each >= float(info.smallest_normal) for each in (largest[2] / 10, root, *largest[:2])]
        for ours, each, top, size in zip(found, exact, largest, (largest[0], largest[3]), strict=False):
            told = normal[0] & (normal[1] | (how["eps"] != 0)) & (top >= float(info.smallest_normal))
            told &= (size <= float(info.max) / n) & (top > size / 1000)
            error = abs(ours - each).max(axis=axes, keepdims=True)[told] / size[told]
            compared += error.size
            assert np.all(error <= (4e-6 if dtype == np.float32 else 1e-14)), (seed, kind, dtype)
    assert compared > (400 if many else 50)
