"""The edges that the design defines, the same on every library."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from oracles import CASES, only_if, standardized

import anynorm


def test_an_eps_too_large_for_the_dtype_gives_beta(backend):
    x, beta = np.asarray([[1.0, 2.0, 6.0]]), np.asarray([1.0, 2.0, 3.0])
    y = anynorm.layer_norm(backend.array(x, "float32"), None, backend.array(beta, "float32"), eps=1e300)
    backend.check(y, beta[None].astype(np.float32), dtype="float32", tolerance=0)


@pytest.mark.parametrize(("n", "value"), [(3, 0.1), (15, 1 / 3), (257, 7.7e5), (1000, 2.2e30), (100003, 1 / 3)])
def test_a_constant_of_any_length_has_no_spread(backend, n, value):
    y = anynorm.layer_norm(backend.array(np.full((2, n), value), "float32"), eps=0)
    backend.check(y, np.zeros((2, n)), dtype="float32", tolerance=0)


@pytest.mark.cells("numpy", "dask")
@pytest.mark.parametrize("rows", [3, 3000], ids=["whole", "in blocks"])
def test_a_long_double_without_spread_is_as_any_other(backend, rows):
    x, zeros, dy = (backend.array(np.full((rows, 4), value), "longdouble") for value in (2.5, 0, 1))
    y, pullback = anynorm.vjp(anynorm.layer_norm, x, eps=0)
    w, towards = anynorm.vjp(anynorm.weight_norm, zeros, backend.array(np.ones(rows), "longdouble"))
    for found in (y, w, anynorm.rms_norm(zeros, eps=0)):
        backend.check(found, np.zeros((rows, 4)), dtype="longdouble", tolerance=0)
    for each in (*pullback(dy), *towards(dy)):
        assert np.all(np.isfinite(backend.numpy(each)))
    numbers = np.random.default_rng(0).standard_normal((rows, 4))
    for power in (-1000, 1000) if np.finfo(np.longdouble).maxexp > 2000 else ():  # no double is so small or so large
        found = anynorm.layer_norm(
            backend.array(np.ldexp(numbers.astype(np.longdouble), 2 * power), "longdouble"), eps=0
        )
        backend.check(found, standardized(numbers, 1, 0), dtype="longdouble", tolerance=1e-15)


@pytest.mark.parametrize("eps", [0, 1e-5])
def test_one_value_in_a_group_gives_beta(backend, eps):
    beta = backend.array([5.0, 7.0])
    for norm, shape, options in (
        (anynorm.batch_norm, (1, 2), {}),
        (anynorm.batch_norm, (1, 2, 1, 1), {}),
        (anynorm.instance_norm, (3, 2, 1), {}),
        (anynorm.group_norm, (3, 2), {"groups": 2}),
    ):
        x = backend.array(np.random.default_rng(0).standard_normal(shape))
        y, moments = norm(x, None, beta, eps=eps, return_moments=True, **options)
        expected = np.broadcast_to(np.reshape([5.0, 7.0], (1, 2, *(1,) * (len(shape) - 2))), shape)
        backend.check(y, expected, tolerance=0)
        assert moments.count == 1
        backend.check(moments.var, np.zeros(tuple(moments.var.shape)), tolerance=0)
        dx = anynorm.vjp(norm, x, None, beta, eps=eps, **options)[1](x)[0]
        backend.check(dx, np.zeros(shape), tolerance=0)


@pytest.mark.parametrize(
    ("norm", "shape", "options", "parameter"),
    [
        (anynorm.batch_norm, (0, 3, 4), {}, 3),
        (anynorm.batch_norm, (2, 3, 0), {}, 3),
        (anynorm.batch_norm, (2, 0, 4), {}, 0),
        (anynorm.layer_norm, (0, 3), {}, 3),
        (anynorm.layer_norm, (3, 0), {}, 0),
        (anynorm.instance_norm, (0, 3, 4), {}, 3),
        (anynorm.instance_norm, (2, 3, 0), {}, 3),
        (anynorm.group_norm, (0, 4, 3), {"groups": 2}, 4),
        (anynorm.group_norm, (2, 0, 3), {"groups": 2}, 0),
        (anynorm.normalize, (0, 3), {"axis": (0, 1)}, (0, 3)),
        (anynorm.rms_norm, (0, 3), {}, 3),
        (anynorm.rms_norm, (3, 0), {}, 0),
        (anynorm.weight_norm, (0, 3), {}, 0),
        (anynorm.weight_norm, (3, 0), {}, 3),
    ],
)
def test_an_empty_array_gives_an_empty_array(backend, norm, shape, options, parameter):
    count = 1 if norm is anynorm.weight_norm else 2
    params = [np.ones(parameter)] * count
    x, given = backend.array(np.ones(shape)), [backend.array(each) for each in params]
    backend.check(norm(x, *given, **options), np.ones(shape))
    y, pullback = anynorm.vjp(norm, x, *given, **options)
    dx, *gradients = pullback(x)
    backend.check(dx, np.ones(shape))
    for found, each in zip(gradients, params, strict=True):
        backend.check(found, np.zeros(each.shape))


EMPTY = [(2, 4, 0), (2, 0, 4), (0, 4, 2), (4, 0, 0), (0, 4), (4, 0), (2, 4, 0, 2), (300, 4, 0), (0,)]
EVERY_NORM = [
    *((norm, {"axis": axis}) for norm in (anynorm.layer_norm, anynorm.rms_norm, anynorm.normalize) for axis in (-1, 0)),
    (anynorm.normalize, {"axis": None}),
    *((norm, {"channel_axis": axis}) for norm in (anynorm.batch_norm, anynorm.instance_norm) for axis in (1, -1)),
    *((anynorm.group_norm, {"groups": 2, "channel_axis": axis}) for axis in (1, -1, 0)),
    *((anynorm.weight_norm, {"axis": axis}) for axis in (0, -1, None)),
]
SOME = {"jax": 47, "dask": 23}
"""One in so many of the cases must do."""


def of_groups(norm, shape, options):
    """The axes that are kept, the shape of the statistics, that of a short parameter, and the numbers of a group."""
    every = range(len(shape))
    axis = options.get("channel_axis", options.get("axis"))
    axes = [*every] if axis is None else [axis % len(shape)]
    if norm is anynorm.weight_norm:
        kept = [] if axis is None else axes
        return tuple(shape[each] for each in kept), tuple(shape[each] for each in kept), None
    if "channel_axis" not in options:
        kept = [each for each in every if each not in axes]
        count = math.prod(shape[each] for each in axes)
        return tuple(shape[each] for each in kept), tuple(shape[each] for each in axes), count
    sample = [0] if norm is not anynorm.batch_norm and axes != [0] else []
    count = math.prod(shape[each] for each in every if each not in (*sample, *axes))
    short = (shape[axes[0]],)
    if norm is anynorm.group_norm:
        groups = options["groups"]
        return (*(shape[each] for each in sample), groups), short, count * short[0] // groups
    return (*(shape[each] for each in sample), *short), short, count


def fits(norm, shape, options):
    """Whether an array of this shape has such a norm."""
    axis = options.get("channel_axis", options.get("axis")) or 0
    rank = 3 if norm is anynorm.instance_norm else 2 if norm is anynorm.batch_norm else 1
    groups = options.get("groups", 1)
    return len(shape) >= rank and axis < len(shape) and shape[axis] % groups == 0


WITHOUT = [(norm, options, shape) for norm, options in EVERY_NORM for shape in EMPTY if fits(norm, shape, options)][::2]


@pytest.mark.parametrize(("norm", "options", "shape"), WITHOUT, ids=lambda each: getattr(each, "__name__", str(each)))
def test_an_empty_axis_goes_with_everything(backend, norm, options, shape):
    number = EVERY_NORM.index((norm, options)) + EMPTY.index(shape)
    only_if(number % 13 == 0, backend, "jax")
    only_if(number % 4 == 0, backend, "strict")
    kept, short, count = of_groups(norm, shape, options)
    rank, constant = len(shape), replace(backend, tracked=False)
    if norm is anynorm.weight_norm:
        cases = [((short,), None, False)]
    else:
        sizes = [(), shape, (*shape[:-1], 1), (1, *shape[1:]), (1,) * rank]
        given = [None, *product(sizes, ("bool", backend.widest))]
        parameters = [(), (short,), (None, (1,) * rank), (shape, short), ((*shape[:-1], 1), None)]
        taken = [False] + [True] * (norm in (anynorm.normalize, anynorm.batch_norm))
        cases = [*product(parameters, given, taken)]
        step = SOME.get(backend.library, 7)  # which divides no number of cases: in other shapes they are others
        cases = cases[number % step :: step]
    for i, case in enumerate(cases):
        with anynorm.options(block_bytes=16 if i % 2 else 2**18):
            check_empty(backend, constant, norm, dict(options), shape, kept, count, *case)


def check_empty(backend, constant, norm, options, shape, kept, count, sizes, given, taken):
    """What a norm of an array without numbers is: nothing; the moments and the gradients of parameters, zeros."""
    rng = np.random.default_rng(0)
    nothing, x = np.ones(shape), backend.array(np.ones(shape))
    parameters = [None if size is None else backend.array(rng.random(size)) for size in sizes]
    if given is not None:
        size, dtype = given
        options["weights"] = constant.array(rng.random(size) > 0.4 if dtype == "bool" else rng.random(size), dtype)
    if taken:
        options["moments"] = anynorm.Moments(*(constant.array(np.ones(kept)) for _ in range(2)), 3)
    if norm not in (anynorm.weight_norm, anynorm.rms_norm) and not taken:
        _, moments = norm(x, *parameters, return_moments=True, **options)
        found = [moments]
        if "axis" in options:
            found.append(anynorm.moments(x, axis=options["axis"], weights=options.get("weights")))
        if count == 0:
            found += [moments.merge(moments)]
        for each in found:
            constant.check(each.mean, np.zeros(kept))
            constant.check(each.var, np.zeros(kept))
            if given is None or count == 0:
                assert np.all(
                    backend.numpy(each.count) == count if hasattr(each.count, "shape") else each.count == count
                )
        if norm is anynorm.batch_norm:
            for momentum, correction in product((0.9, None), (0, 1)):
                running = anynorm.RunningStats.init(*kept, like=x, momentum=momentum, correction=correction)
                constant.check(running.update(moments).mean, np.zeros(kept))
                constant.check(running.update(moments).var, np.ones(kept))
    backend.check(norm(x, *parameters, **options), nothing)
    if backend.library in ("numpy", "strict", "torch") and not backend.tracked:
        out = backend.array(nothing)
        assert norm(x, *parameters, out=out, **options) is out if norm is not anynorm.weight_norm else True
    y, pullback = anynorm.vjp(norm, x, *parameters, **options)
    backend.check(y, nothing)
    dx, *gradients = pullback(constant.array(nothing))
    backend.check(dx, nothing)
    for found, size in zip(gradients, sizes, strict=True):
        assert (found is None) is (size is None)
        if size is not None:
            backend.check(found, np.zeros(size))
    if backend.tracked:
        (norm(x, *parameters, **options).sum() + 0).backward()
        for each, size in zip((x, *parameters), (shape, *sizes), strict=True):
            if each is not None:
                constant.check(each.grad, np.zeros(size))


@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0), (0, 0)], ids=str)
def test_batches_of_nothing_are_as_none(backend, shape):
    backend = replace(backend, tracked=False)
    empty = backend.array(np.ones(shape))
    axis = tuple(each for each in range(len(shape)) if each != 1)
    nothing = anynorm.Moments.over([empty, empty, empty], axis=axis)
    assert nothing.count == 0
    for each in (nothing.mean, nothing.var):
        backend.check(each, np.zeros(shape[1]))


def test_an_empty_batch_has_empty_moments_and_leaves_the_statistics_alone(backend):
    x = backend.array(np.ones((0, 3, 4)))
    y, batch = anynorm.batch_norm(x, return_moments=True)
    backend.check(batch.mean, np.zeros(3))
    backend.check(batch.var, np.zeros(3))
    assert batch.count == 0
    for momentum in (0.9, None):
        for correction in (0, 1):
            running = anynorm.RunningStats.init(3, like=x, momentum=momentum, correction=correction)
            assert running.update(batch) is running
    full = anynorm.moments(backend.array(np.arange(6.0).reshape(2, 3)), axis=0)
    for merged in (full.merge(batch), batch.merge(full)):
        backend.check(merged.mean, [1.5, 2.5, 3.5])
        backend.check(merged.var, [2.25, 2.25, 2.25])
        assert merged.count == 2


def test_a_zero_row_has_weight_zero_and_a_finite_gradient(backend):
    v, g = np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([2.0, 10.0])
    w, pullback = anynorm.vjp(anynorm.weight_norm, backend.array(v), backend.array(g))
    backend.check(w, [[0.0, 0.0], [6.0, 8.0]])
    dv, dg = (backend.numpy(each) for each in pullback(backend.array([[1.0, -1.0], [1.0, -1.0]])))
    assert np.all(np.isfinite(dv))
    assert np.all(np.isfinite(dg))
    np.testing.assert_allclose(dg, [0.0, -0.2], atol=1e-6)
    state = anynorm.WeightNorm.from_weight(backend.array(v))
    backend.check(state.g, [0.0, 5.0])
    backend.check(state.weight, v)


@pytest.mark.parametrize("eps", [0, 1e-5])
@pytest.mark.parametrize("rows", [4, 30000], ids=["whole", "in blocks"])
def test_a_given_variance_below_0_is_refused_and_has_no_root_where_it_cannot_be_read(backend, rows, eps):
    x, (mean, var) = backend.array(np.ones((rows, 2)), "float32"), np.array([[0.0, 0.0], [-1.0, 4.0]])
    mean, var = backend.array(mean, "float32"), backend.array(var, "float32")
    if backend.library in ("numpy", "strict", "torch", "jax"):
        with pytest.raises(ValueError, match=r"^var must be at least 0 everywhere, got an array with less$"):
            anynorm.Moments(mean, var, 5)

    def results(x, mean, var):
        given = anynorm.Moments(mean, var, 5)
        y, pullback = anynorm.vjp(anynorm.batch_norm, x, moments=given, eps=eps)
        return y, anynorm.batch_norm(x, moments=given, eps=eps), *pullback(x)

    if backend.library in ("numpy", "strict", "torch"):
        return
    if backend.library == "jax":
        import jax

        results = jax.jit(results)
    for found in results(x, mean, var):
        bad, good = backend.numpy(found).T
        assert np.all(np.isnan(bad))
        np.testing.assert_allclose(good, 0.5, rtol=1e-5)


@pytest.mark.parametrize(("shape", "axis"), [((5,), 0), ((2, 3), (0, 1)), ((0,), 0)], ids=str)
def test_a_weight_of_single_numbers_has_their_signs(backend, shape, axis):
    n = math.prod(shape)
    v, g, dy = (np.reshape(each, shape) for each in (np.arange(n) - 2.0, np.arange(n) + 1.0, np.arange(n) - 4.0))
    w, pullback = anynorm.vjp(anynorm.weight_norm, backend.array(v), backend.array(g), axis=axis)
    backend.check(w, g * np.sign(v))
    backend.check(anynorm.WeightNorm(backend.array(v), backend.array(g), axis=axis).weight, g * np.sign(v))
    dv, dg = pullback(backend.array(dy))
    backend.check(dg, dy * np.sign(v))
    backend.check(dv, np.where(v == 0, g * dy, 0.0))


@pytest.mark.cells("numpy", "torch", "cupy", "strict")
def test_nothing_of_the_callers_is_changed(backend):
    rng = np.random.default_rng(1)
    for case in CASES:
        numbers = [rng.standard_normal(case.shape), *rng.standard_normal((case.parameters, *case.parameter_shape))]
        given = [backend.array(each) for each in numbers]
        _, pullback = anynorm.vjp(case.norm, *given, **case.options)
        dy = backend.array(numbers[0])
        pullback(dy)
        case.norm(*given, **case.options)
        for array, each in zip([*given, dy], [*numbers, numbers[0]], strict=True):
            backend.check(array, each, tolerance=0 if backend.float64 else None)


@pytest.mark.cells("numpy")
def test_read_only_broadcast_and_memory_mapped_arrays_come_in(tmp_path):
    x = np.random.default_rng(2).standard_normal((4, 6))
    expected = anynorm.layer_norm(x)
    frozen = x.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(anynorm.layer_norm(frozen), expected)
    wide = np.broadcast_to(x[:1], (4, 6))
    np.testing.assert_allclose(anynorm.layer_norm(wide), np.broadcast_to(expected[:1], (4, 6)), rtol=1e-14)
    mapped = np.memmap(tmp_path / "x", dtype=np.float64, mode="w+", shape=(4, 6))
    mapped[...] = x
    np.testing.assert_array_equal(anynorm.layer_norm(mapped), expected)
    gamma = np.broadcast_to(np.float64(2), (6,))
    np.testing.assert_array_equal(anynorm.layer_norm(x, gamma), 2 * expected)


@pytest.mark.cells("numpy")
def test_a_gradient_never_shares_memory_with_the_cotangent():
    x, dy, beta = np.random.default_rng(3).standard_normal((3, 4, 5))
    for axis in (0, None):
        _, pullback = anynorm.vjp(anynorm.layer_norm, x, None, beta, axis=axis)
        assert not any(np.shares_memory(each, dy) for each in pullback(dy) if each is not None)
    _, pullback = anynorm.vjp(anynorm.batch_norm, x, moments=anynorm.Moments(np.zeros(5), np.ones(5), 1), eps=0)
    assert not np.shares_memory(pullback(dy)[0], dy)


@pytest.mark.cells("numpy")
def test_a_result_never_shares_memory_with_an_argument():
    for case in CASES:
        for shape in (case.shape, tuple(1 for _ in case.shape)):
            if shape != case.shape and case.options.get("groups", 1) > 1:
                continue
            x = np.random.default_rng(3).standard_normal(shape)
            params = [np.ones(()) if case.parameter_shape == () else np.ones((1,) * len(shape))] * (
                case.norm is anynorm.weight_norm
            )
            y, pullback = anynorm.vjp(case.norm, x, *params, **case.options)
            assert not np.shares_memory(case.norm(x, *params, **case.options), x)
            assert not np.shares_memory(y, x)
            assert not any(np.shares_memory(each, x) for each in pullback(x))


@pytest.mark.parametrize("value", [-1e36, 1e30, 1e-30])
def test_equal_numbers_that_keep_their_mean_have_the_length_one(backend, value):
    x = backend.array(np.full((2, 4), value), "float32")
    y, pullback = anynorm.vjp(anynorm.rms_norm, x, eps=0)
    backend.check(y, np.full((2, 4), np.sign(value)), dtype="float32", tolerance=1e-6)
    (dx,) = pullback(backend.array([[1.0, 2.0, 3.0, 5.0]] * 2, "float32"))
    np.testing.assert_allclose(backend.numpy(dx) * abs(value), [[-1.75, -0.75, 0.25, 2.25]] * 2, rtol=1e-5)
