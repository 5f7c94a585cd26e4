"""Every executor gives what the papers' formulas give: one suite for all of them.

The fixture `executor` is in `conftest.py`, the formulas are in `oracles.py`: float64 loops over single numbers, and
whole arrays in NumPy's widest float, held to these loops. An executor that compiles each kind of call runs one of the
parameters, dtypes or sizes of a test for each case, and another of them for the next.
"""

import inner
import numpy as np
import pytest
from oracles import CASES, exact, groups_of

import anynorm

CENTRED = [case for case in CASES if case.norm not in (anynorm.rms_norm, anynorm.weight_norm)]
GIVEN = [case for case in CENTRED if case.norm is not anynorm.layer_norm or case.options == {"axis": 1}]


def runs_if(wanted):
    """Where this is true of the executor and the parameters; elsewhere the test is not collected."""
    return pytest.mark.runs_if.with_args(wanted)


def takes(executor, case):
    return executor.takes(case.norm, case.shape, case.options)


def close(found, expected, bound, *, relative=True, rms=False):
    """To `bound` of the largest number, or of 1 where that is less and `relative` is not set; or of the mean square."""
    if expected is None:
        assert found is None
        return
    expected = np.asarray(expected)
    largest = np.max(np.abs(expected), initial=0.0)
    size = np.longdouble(1) if largest == 0 else largest if relative else max(largest, 1)
    size = size * np.sqrt(np.mean((expected / size) ** 2)) if rms else size
    assert found.shape == expected.shape
    error = np.max(np.abs((found - expected) / size), initial=0.0)
    assert error <= bound, f"off by {float(error):.2g} of {float(size):.2g}, at most {bound:.2g}"


def check(found, expected, bound, **options):
    for one, other in zip(found, expected, strict=True):
        if one is not None or other is not None:
            close(one, other, bound, **options)


def finest(executor):
    """What results in the widest dtype may be off by."""
    return 1e-11 if executor.backend.float64 else 2e-5


PARAMETERS = {
    "short": lambda case: [case.parameter_shape] * 2,
    "gamma alone": lambda case: [case.parameter_shape, None],
    "beta alone": lambda case: [None, case.parameter_shape],
    "none": lambda case: [None, None],
    "for each sample": lambda case: [(case.shape[0], *(1,) * (len(case.shape) - 1)), case.shape],
    "one number": lambda case: [(1,) * len(case.shape)] * 2,
}


def parameters_of(case, kind, rng):
    kinds = list(PARAMETERS)
    if case.norm is anynorm.weight_norm:
        kind = {"beta alone": "short", "none": "one number", "gamma alone": "short"}.get(kind, kind)
    shapes = PARAMETERS[kind](case)[: case.parameters]
    return kinds, [None if shape is None else rng.standard_normal(shape) + 0.5 for shape in shapes]


@runs_if(lambda executor, case: takes(executor, case) and (executor.name != "jit" or CASES.index(case) % 2))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_gradients_and_moments_are_those_of_the_formula(executor, case):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, *case.shape)) * 3 + 1
    for kind in executor.some(list(PARAMETERS), CASES.index(case)):
        _, params = parameters_of(case, kind, rng)
        found = executor.run(case.norm, x, dy, *params, **case.options)
        expected = moments_of(case, exact(case.norm, x, dy, *params, **case.options))
        # of two numbers the gradient is what eps leaves: next to nothing beside dy
        check(found, expected, finest(executor), relative=case.options.get("groups") != 3 or case.shape != (3, 6))


def moments_of(case, of):
    """The norms without a mean return no moments."""
    return of if case in CENTRED else of._replace(mean=None, var=None)


@runs_if(
    lambda executor, case, dtype: (
        takes(executor, case) and dtype in executor.backend.narrow and executor.picks(CASES.index(case) + len(dtype))
    )
)
@pytest.mark.parametrize("case", CASES[::2], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_results_have_the_dtype_of_x_and_gradients_that_of_their_arrays(executor, case, dtype):
    rng, of = np.random.default_rng(2), executor.backend
    x, dy = (of.numpy(of.array(each, dtype)) for each in rng.standard_normal((2, *case.shape)) + 1)
    params = list(rng.standard_normal((case.parameters, *case.parameter_shape)))
    for kind in executor.some(["float32", *(["float64"] if of.float64 else [])], CASES.index(case)):
        wide = [of.numpy(of.array(each, kind)) for each in params]
        found = executor.run(case.norm, x, dy, *wide, dtype=dtype, parameters=kind, **case.options)
        expected = moments_of(case, exact(case.norm, x, dy, *wide, **case.options))
        room = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2e-6}[dtype]
        check(found[:2], expected[:2], room)
        check(found[2:], expected[2:], 2e-6)  # of what is computed in float32, and rounded to no less


LAYOUTS = {
    "rows": (anynorm.layer_norm, (32, 1000), {}),
    "long rows": (anynorm.normalize, (2, 9000), {"axis": -1}),
    "rows without a mean": (anynorm.rms_norm, (24, 700), {}),
    "channels": (anynorm.batch_norm, (8, 6, 9, 11), {}),
    "channels last": (anynorm.batch_norm, (8, 9, 11, 6), {"channel_axis": -1}),
    "many samples": (anynorm.batch_norm, (5000, 6), {}),
    "short planes": (anynorm.batch_norm, (700, 3, 2), {}),
    "instances": (anynorm.instance_norm, (4, 4, 12, 13), {}),
    "one group": (anynorm.group_norm, (6, 4, 9, 10), {"groups": 1}),
    "interleaved groups": (anynorm.group_norm, (3, 40, 12), {"groups": 4, "channel_axis": -1}),
    "middle axis": (anynorm.normalize, (4, 300, 5), {"axis": 1}),
}
SIZES = [
    # offset and spread of x, mean and spread of dy, eps; by how much y and dx may be off
    ((0, 1), (0, 1), 1e-5, 3e-6, 4e-6),
    ((1e3, 1), (0, 1), 1e-5, 4e-6, 4e-6),
    ((1e4, 1), (0, 1), 1e-5, 4e-6, 2e-5),
    ((1e6, 1), (0, 1), 1e-5, 6e-5, 6e-5),
    ((0, 1), (1e4, 1), 1e-5, 4e-6, 4e-6),
    ((0, 1), (1e6, 1), 1e-5, 4e-6, 4e-5),
    ((0, 1e37), (0, 1), 0, 6e-6, 2e-5),
    ((0, 1e30), (0, 1), 1e-5, 6e-6, 2e-5),
    ((-2e38, 1e37), (0, 1), 0, 6e-6, 2e-5),
    ((0, 1e-30), (0, 1), 0, 6e-6, 2e-5),
    ((0, 1e-36), (1, 1e-3), 0, 6e-6, 2e-5),
    ((0, 1e-20), (0, 1), 1e-5, 6e-6, 2e-5),
    ((0, 1e20), (0, 1e-12), 1.0, 6e-6, 2e-5),
    ((0, 1e-15), (0, 1e20), 1e-30, 6e-6, 2e-5),
]


def name_of(size):
    (offset, spread), (mean, of_dy), eps, *_ = size
    return f"x {offset:g}±{spread:g}, dy {mean:g}±{of_dy:g}, eps {eps:g}"


@runs_if(
    lambda executor, layout, size: (
        executor.takes(*LAYOUTS[layout])
        and executor.picks(list(LAYOUTS).index(layout) + SIZES.index(size), of=4)
        and (size[0][0] == 0 or layout != "rows without a mean")
    )
)
@pytest.mark.parametrize("size", SIZES, ids=name_of)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_is_exact_at_every_offset_and_magnitude(executor, layout, size):
    (norm, shape, options), rng = LAYOUTS[layout], np.random.default_rng(0)
    (offset, spread), (mean, of_dy), eps, room, of_gradient = size
    with np.errstate(under="ignore"):
        x = (rng.standard_normal(shape) * spread + offset).astype(np.float32)
        dy = (rng.standard_normal(shape) * of_dy + mean).astype(np.float32)
    gamma = np.full((1,) * len(shape), 2.0, np.float32)  # whose products lose nothing
    found = executor.run(norm, x, dy, gamma, dtype="float32", eps=eps, **options)
    expected = exact(norm, x, dy, gamma, eps=eps, **options)
    close(found.y, expected.y, executor.bound(room), rms=True)
    dx, info = expected.dx, np.finfo(np.float32)
    if executor.backend.library == "jax":  # XLA has no subnormal numbers
        dx = np.where(np.abs(dx) < 1.001 * float(info.smallest_normal), found.dx, dx)
    if np.max(np.abs(dx)) < info.max:
        close(found.dx, dx, executor.bound(of_gradient), rms=True)
    if norm is not anynorm.rms_norm:
        unit = np.longdouble(2.0**-23) * np.abs(expected.mean) + np.longdouble(1e-6 * spread)
        close(found.mean / unit, expected.mean / unit, 1, relative=False)


@runs_if(lambda executor: executor.backend.float64)
@pytest.mark.parametrize("size", [(0, 1e307), (0, 1e-300), (0, 1e-310), (0, 1e200), (1e12, 1)], ids=str)
def test_float64_is_exact_at_every_offset_and_magnitude(executor, size):
    rng, (offset, spread) = np.random.default_rng(0), size
    for norm, shape in executor.some([(anynorm.batch_norm, (24, 7, 3)), (anynorm.layer_norm, (24, 100))], 0):
        if executor.takes(norm, shape, {}):
            x, dy = rng.standard_normal(shape) * spread + offset, rng.standard_normal(shape) * max(1, spread * 1e-290)
            found = executor.run(norm, x, dy, dtype="float64", eps=0)
            expected = exact(norm, x, dy, eps=0)
            close(found.y, expected.y, 1e-13 if offset == 0 else 1e-8)
            if np.max(np.abs(expected.dx)) < np.finfo(np.float64).max:
                close(found.dx, expected.dx, 1e-12 if offset == 0 else 1e-8)


@runs_if(
    lambda executor, layout, value: (
        executor.takes(*LAYOUTS[layout]) and executor.picks(list(LAYOUTS).index(layout) + len(str(value)))
    )
)
@pytest.mark.parametrize("value", [0.0, 0.1, -1e4 / 3, 7.7e5, 2.2e30, 3.3e-30, 3e38])
@pytest.mark.parametrize("layout", ["rows", "channels", "channels last", "interleaved groups", "short planes"])
def test_a_constant_is_beta_and_has_the_gradient_of_its_eps(executor, layout, value):
    norm, shape, options = LAYOUTS[layout]
    rng, shape = np.random.default_rng(0), tuple(min(n, 12) for n in shape)
    x, beta = np.full(shape, value, np.float32), np.float32(0.3)
    dy = rng.standard_normal(shape).astype(np.float32)
    for eps in executor.some([0, 1e-5, 1e-30, 1e-40], 1):
        found = executor.run(norm, x, dy, None, np.full((1,) * len(shape), beta), dtype="float32", eps=eps, **options)
        np.testing.assert_array_equal(found.y, np.full(shape, beta))
        np.testing.assert_array_equal(found.var, np.zeros(found.var.shape))
        np.testing.assert_array_equal(found.mean, np.full(found.mean.shape, np.float32(value)))
        assert np.all(np.isfinite(found.dx))
        if eps >= 1e-30:
            close(found.dx, exact(norm, x * 0, dy, eps=eps, **options).dx, 2e-6)


@runs_if(
    lambda executor, layout, bad: (
        executor.takes(*LAYOUTS[layout]) and executor.picks(list(LAYOUTS).index(layout) + len(str(bad)))
    )
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30, 1e-30, 0.0])
@pytest.mark.parametrize("layout", ["rows", "channels", "channels last", "interleaved groups", "middle axis"])
def test_an_odd_group_leaves_the_others_alone(executor, layout, bad):
    norm, shape, options = LAYOUTS[layout]
    shape, rng = tuple(min(n, 20) for n in shape), np.random.default_rng(3)
    x, dy = rng.standard_normal((2, *shape))
    groups = np.reshape(np.arange(x.size), shape)
    label = exact(norm, groups, dy, **options).mean  # another number for each group
    odd = label.ravel()[label.size // 2]
    view = np.broadcast_to(_spread(norm, label, shape, options), shape) == odd
    first = np.flatnonzero(view)[3]
    if np.isfinite(bad):
        x[view] *= bad
    else:
        x.flat[first] = bad
    found = executor.run(norm, x, dy, eps=0, dtype="float32", **options)
    x, dy = (each.astype(np.float32) for each in (x, dy))
    expected = exact(norm, np.where(view, 0 if bad != 1e-30 else x, x), dy, eps=0, **options)
    keep = ~view
    close(found.y[keep], expected.y[keep], 1e-5)
    close(found.dx[keep], expected.dx[keep], 1e-4)
    if not np.isfinite(bad):
        assert np.isnan(found.y.flat[first])
        assert np.all(np.isnan(found.y[view]) | (found.y[view] == 0))
        assert np.isnan(found.dx[view]).any()
        assert np.isnan(found.var.ravel()[label.size // 2])
    assert np.isfinite(np.delete(found.var.ravel(), label.size // 2)).all() or bad == 1e30


def _spread(norm, label, shape, options):
    """The numbers of groups beside the numbers in them."""
    view, axes, _ = groups_of(norm, shape, options)
    beside = tuple(1 if axis in axes else n for axis, n in enumerate(view))
    return np.broadcast_to(label.reshape(beside), view).reshape(shape)


ORDERS = {
    "fortran": np.asfortranarray,
    "the first axes exchanged": lambda x: np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1),
    "every other": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "repeated": lambda x: np.lib.stride_tricks.as_strided(x, x.shape, (0, *x.strides[1:])),
    "channels last": lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1),
    "reversed": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "on odd bytes": lambda x: np.rec.fromarrays([x, np.zeros(x.shape, np.int8)], names="x,pad").x,
}


@pytest.mark.cells("numpy", "torch-cpu", "fast-cpu", "dask")
@runs_if(
    lambda executor, case, order: (
        takes(executor, case)
        and (executor.backend.library == "numpy" or order not in ("reversed", "on odd bytes"))
        and (executor.name != "replicas" or order != "repeated")  # each would repeat a sample of its own
        and executor.picks(CASES.index(case) + list(ORDERS).index(order), of=4)
    )
)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", [case for case in CASES if len(case.shape) > 1], ids=str)
def test_x_and_dy_may_lie_in_memory_in_any_order(executor, case, order):
    rng, lie = np.random.default_rng(6), ORDERS[order]
    x, dy = rng.standard_normal((2, *case.shape)) + 2
    params = list(rng.standard_normal((case.parameters, *case.parameter_shape)))
    found = executor.run(case.norm, x, dy, *params, lie=lie, **case.options)
    expected = exact(case.norm, *(np.ascontiguousarray(lie(each)) for each in (x, dy)), *params, **case.options)
    check(found, moments_of(case, expected), 1e-11, relative=False)


@pytest.mark.cells("numpy", "strict", "torch", "cupy", "fast-cpu")
@runs_if(
    lambda executor, case: (
        not executor.backend.tracked and executor.name != "replicas" and executor.picks(CASES.index(case))
    )
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_result_goes_where_out_says(executor, case):
    rng, of = np.random.default_rng(7), executor.backend
    x, dy = rng.standard_normal((2, *case.shape)) + 2
    params = list(rng.standard_normal((case.parameters, *case.parameter_shape)))
    expected = exact(case.norm, x, dy, *params, **case.options)
    bound = finest(executor) if of.float64 else 1e-4
    for in_place in (False, True):
        array, *given = (of.array(each) for each in (x, *params))
        out = array if in_place else of.array(np.full(case.shape, 7.0))
        with anynorm.options(**executor.options):
            assert case.norm(array, *given, out=out, **case.options) is out
            close(of.numpy(out), expected.y, bound)
            array = out = of.array(x)
            y, pullback = anynorm.vjp(case.norm, array, *given, out=out, **case.options)
            assert y is out
            found = [of.numpy(each) for each in (y, *pullback(of.array(dy)))]
        for one, other in zip(found, expected, strict=False):
            close(one, other, 10 * bound)


def weights_of(kind, shape, rng):
    """Weights that broadcast to an array of this shape."""
    return {
        "a mask": lambda: rng.random(shape) > 0.3,
        "real numbers": lambda: rng.random((*shape[:-1], 1)) * (rng.random((*shape[:-1], 1)) > 0.2),
        "integers": lambda: rng.integers(0, 4, (1, *shape[1:])).astype(np.int8),
        "a mask of the last axis": lambda: np.arange(shape[-1]) != 1,
        "one number": lambda: np.asarray(0.25),
        "padding": lambda: rng.random(shape) > 0.4,
        "of any size": lambda: rng.random(shape) * 10.0 ** rng.integers(-9, 9, shape),
    }[kind]()


KINDS = ["a mask", "real numbers", "integers", "a mask of the last axis", "one number", "padding", "of any size"]


@runs_if(
    lambda executor, case: takes(executor, case) and (not executor.compiles or executor.picks(CASES.index(case), of=2))
)
@pytest.mark.parametrize("case", [case for case in CASES if case.norm is not anynorm.weight_norm], ids=str)
def test_each_number_counts_as_its_weight_says(executor, case):
    rng = np.random.default_rng(8)
    for kind in executor.some(KINDS, CASES.index(case)):
        x, dy = rng.standard_normal((2, *case.shape)) + 1
        params, weights = rng.standard_normal((2, *case.parameter_shape)), weights_of(kind, case.shape, rng)
        if kind == "padding":
            x = np.where(weights, x, rng.choice([np.nan, np.inf, -1e30], case.shape))
            dy = np.where(weights, dy, 0)
        found = executor.run(case.norm, x, dy, *params, weights=weights, **case.options)
        expected = moments_of(case, exact(case.norm, x, dy, *params, weights=weights, **case.options))
        real = np.isfinite(np.asarray(expected.y)) & (np.abs(expected.y) < 1e20)
        bound = finest(executor) * 10
        close(found.y[real], expected.y[real], bound)
        few = case.options.get("groups") == 3 and case.shape == (3, 6)  # as above
        check(found[1:], expected[1:], bound, relative=not few)
        if kind == "padding":
            assert np.all(found.dx[~weights] == 0)


@runs_if(lambda executor, eps, fill: executor.picks(len(str(fill)) + len(str(eps)), of=2))
@pytest.mark.parametrize("eps", [0, 1e-5])
@pytest.mark.parametrize("fill", [0.0, 7.0, np.nan, np.inf, 1e30])
def test_a_group_without_weight_is_beta_and_has_no_gradient(executor, fill, eps):
    norm, options = (anynorm.batch_norm, {}) if executor.name == "replicas" else (anynorm.instance_norm, {})
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((2, 6, 3, 4))
    gamma, beta = rng.standard_normal((2, 3))
    weights = np.ones((1, 3, 1)) if norm is anynorm.batch_norm else np.ones((6, 1, 1))
    empty = (slice(None), 1) if norm is anynorm.batch_norm else (1,)
    weights[0 if norm is anynorm.batch_norm else 1, 1 if norm is anynorm.batch_norm else 0] = 0
    x[empty] = fill
    found = executor.run(norm, x, dy, gamma, beta, weights=weights, eps=eps, **options)
    expected = exact(norm, np.where(np.broadcast_to(weights, x.shape) > 0, x, 0), dy, gamma, beta,
                     weights=weights, eps=eps, **options)  # fmt: skip
    check(found, expected, finest(executor) * 10)
    of_beta = np.broadcast_to(beta[:, None], x.shape)[empty].astype(executor.backend.widest)
    np.testing.assert_array_equal(found.y[empty], of_beta)
    assert not found.dx[empty].any()


@runs_if(lambda executor, value: executor.picks(value != 0.1))
@pytest.mark.parametrize("value", [1001.0, 0.1, 1e6 / 3, 1e20 / 3])
def test_equal_numbers_of_unequal_weights_have_no_spread(executor, value):
    rng = np.random.default_rng(17)
    weights = (rng.random((40, 3)) ** 8 * 10.0 ** rng.integers(-6, 6, (40, 3))).astype(np.float32)
    weights[rng.random((40, 3)) > 0.8] = 0
    weights[0] = 1
    beta = np.asarray([1.0, 2.0, 3.0])
    for padding in (value, 0.0, np.nan):
        x = np.where(weights > 0, value, padding)
        for eps in executor.some([0, 1e-5], 0):
            found = executor.run(
                anynorm.batch_norm, x, weights * 0, None, beta, weights=weights, dtype="float32", eps=eps
            )
            assert np.all((found.y == beta)[weights > 0])
            assert not np.any(found.var)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("mean", [0.0, 1e4, 1e6])
def test_weights_cost_no_digits(executor, offset, mean):
    rng = np.random.default_rng(8)
    x, dy = (rng.standard_normal((60, 3, 40)) + each for each in (offset, mean))
    weights = (rng.random((60, 1, 40)) * (rng.random((60, 1, 40)) > 0.3)).astype(np.float32)
    weights[20:40] *= np.float32(1e-20)  # parts of next to no weight
    weights[40:50] *= np.float32(1e-36)
    x, dy = (each.astype(np.float32) for each in (x, dy * (weights > 0)))
    found = executor.run(anynorm.batch_norm, x, dy, dtype="float32", weights=weights)
    expected = exact(anynorm.batch_norm, x, dy, weights=weights)
    close(found.y, expected.y, 2e-5)
    close(found.dx, expected.dx, 4e-6 if offset == 0 else 2e-5)


@runs_if(lambda executor, case: takes(executor, case) and executor.picks(GIVEN.index(case), of=2))
@pytest.mark.parametrize("case", GIVEN, ids=str)
def test_given_moments_are_constants(executor, case):
    rng = np.random.default_rng(5)
    x, dy = rng.standard_normal((2, *case.shape))
    kept = exact(case.norm, x, dy, **case.options).mean.shape
    moments = rng.standard_normal(kept), rng.random(kept) + 0.1
    for kind in executor.some(list(PARAMETERS), GIVEN.index(case)):
        _, params = parameters_of(case, kind, rng)
        found = executor.run(case.norm, x, dy, *params, moments=moments, **case.options)
        check(found, exact(case.norm, x, dy, *params, moments=moments, **case.options), finest(executor))


BACK = [((3, 4, 5), (0, 2)), ((3, 4, 5), -1), ((6, 3), 0), ((40, 5, 30), (0, 2)), ((8, 60), 1), ((7,), 0)]


@runs_if(lambda executor, index: executor.name != "replicas" and executor.picks(index, of=1))
@pytest.mark.parametrize("index", range(len(BACK)), ids=[str(each) for each in BACK])
def test_the_way_back_is_its_formula(executor, index):
    rng, (shape, axis) = np.random.default_rng(5), BACK[index]
    y, dx = rng.standard_normal((2, *shape))
    axes = tuple(i % len(shape) for i in np.atleast_1d(axis))
    moments = [f([n for i, n in enumerate(shape) if i not in axes]) for f in (rng.standard_normal, rng.random)]
    short, kept = (tuple(n if (i in axes) == own else 1 for i, n in enumerate(shape)) for own in (True, False))
    kinds = [(kept, kept), (None, None), (short, short), (None, kept), (kept, None), (shape, kept), (short, shape)]
    widest, narrow = executor.backend.widest, [each for each in executor.backend.narrow if each != "bfloat16"]
    for sizes, dtype in executor.some([*zip(kinds, [widest, *narrow, widest] * 4, strict=False)], index):
        gamma, beta = (None if size is None else rng.standard_normal(size) for size in sizes)
        gamma = None if gamma is None else gamma + np.sign(gamma) * 0.5
        numbers = [executor.backend.numpy(executor.backend.array(each, dtype)) for each in (y, dx)]
        options = {"axis": axis, "moments": moments}
        found = executor.run(anynorm.denormalize, *numbers, gamma, beta, dtype=dtype, parameters=widest, **options)
        room = {"float16": 1e-3, "float32": 2e-6}.get(dtype, finest(executor))
        check(found, exact(anynorm.denormalize, *numbers, gamma, beta, **options), room)


def drawn_back(seed):
    """The arrays of a way back whose result is in range, whatever lies between."""
    rng = np.random.default_rng(seed)
    dtype, most = (np.float32, 37) if rng.random() < 0.7 else (np.float64, 300)
    of_gamma, root = rng.uniform(-most, most), rng.uniform(-most, most) / 2.1
    least, largest = max(-most, -most - root + of_gamma), min(most, most - root + of_gamma)
    size = rng.uniform(least, largest) if least + 1 < largest else 0.0
    y, dx = rng.standard_normal((2, 3, 5, 8))
    beside = [(1, 5, 1), (3, 1, 8), (1, 1, 1)][seed % 3]
    gamma = rng.uniform(0.5, 2, beside) * rng.choice([-1, 1], beside)
    mean, var = rng.standard_normal(5) * rng.choice([0, 1, 100]), rng.uniform(0.5, 2, 5)
    result = 10.0 ** (size - of_gamma + root)
    with np.errstate(all="ignore"):
        of_y = (y * 10.0**size, rng.standard_normal(beside) * 10.0**size)
        given = (mean * result, var * 10.0 ** (2 * root))
        every = [each.astype(dtype) for each in (of_y[0], dx * 10.0**size, gamma * 10.0**of_gamma, of_y[1], *given)]
    return every, float(np.log10(np.finfo(dtype).max) - 2) > abs(np.log10(result))


@runs_if(lambda executor: executor.name not in ("replicas", "cuda, groups in parts"))
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_the_way_back_of_numbers_of_any_magnitude_is_its_formula(executor):
    many, compared = 2 if executor.name.startswith("cuda") else 8 if executor.compiles else 20, 0
    for seed in range(many):
        (y, dx, gamma, beta, *moments), in_range = drawn_back(seed)
        if not in_range or (y.dtype == np.float64 and not executor.backend.float64):
            continue
        options = {"axis": (0, 2), "moments": moments, "eps": 0}
        found = executor.run(anynorm.denormalize, y, dx, gamma, beta, dtype=str(y.dtype), **options)
        expected = exact(anynorm.denormalize, y, dx, gamma, beta, **options)
        for one, other in zip(found[:2], expected[:2], strict=True):
            if executor.backend.library == "jax" and min(abs(each).max() for each in (y, dx, other)) < 1e-31:
                continue  # as above
            close(one, other, 2e-6 if y.dtype == np.float32 else 4e-15)
            compared += 1
    assert compared > many / 2


@runs_if(lambda executor, size: executor.name != "replicas" and executor.picks(CENTER_SIZES.index(size)))
@pytest.mark.parametrize("size", CENTER_SIZES := [(1e6, 1), (0, 1e37), (-2e38, 1e37), (0, 1e-36), (1e4, 1)], ids=str)
def test_center_is_exact_at_every_offset_and_magnitude(executor, size):
    rng, (offset, spread) = np.random.default_rng(0), size
    for shape, axis in executor.some(
        [((8, 6, 99), (0, 2)), ((32, 1000), -1), ((5000, 6), 0)], CENTER_SIZES.index(size)
    ):
        x = (rng.standard_normal(shape) * spread + offset).astype(np.float32)
        dy = (rng.standard_normal(shape) * 1e-2 + 1).astype(np.float32)
        found = executor.run(anynorm.center, x, dy, dtype="float32", axis=axis)
        expected = exact(anynorm.center, x, dy, axis=axis)
        y = expected.y
        if executor.backend.library == "jax":  # XLA has no subnormal numbers
            y = np.where(np.abs(y) < float(np.finfo(np.float32).smallest_normal), found.y, y)
        close(found.y, y, executor.bound(3e-7))
        if executor.name != "jit":  # JAX differentiates by itself, and does not take the mean of dy away first
            close(found.dx, expected.dx, executor.bound(3e-6))
        unit = np.longdouble(2.0**-23) * np.abs(expected.mean) + np.longdouble(1e-6 * spread)
        close(found.mean / unit, expected.mean / unit, 1, relative=False)


@runs_if(lambda executor, offset, shape: executor.picks(offset not in (0.9, 1e6)))
@pytest.mark.parametrize("offset", [0.2, 0.9, 3.9, 4.1, 30, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(16, 12, 5, 5), (500, 12)])
def test_given_means_of_any_size_beside_the_spread(executor, shape, offset):
    rng = np.random.default_rng(7)
    gamma, beta = rng.standard_normal((2, 12)).astype(np.float32)
    mean, var = (offset * rng.choice([-1, 1], 12)).astype(np.float32), rng.uniform(0.9, 1.1, 12).astype(np.float32)
    beside = (12, *(1 for _ in shape[2:]))
    x = (rng.standard_normal(shape) + mean.reshape(beside)).astype(np.float32)
    dy = rng.standard_normal(shape).astype(np.float32)
    found = executor.run(anynorm.batch_norm, x, dy, gamma, beta, moments=(mean, var), dtype="float32")
    expected = exact(anynorm.batch_norm, x, dy, gamma, beta, moments=(mean, var))
    close(found.y, expected.y, 1e-6)
    close(found.dx, expected.dx, 2e-6)
    close(found.dgamma, expected.dgamma, 1e-5)


def drawn(seed):
    """A call of any norm on a small array of any shape, with parameters, weights, padding or moments, or without."""
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(2, 5))
    shape = tuple(int(rng.integers(1, 7)) for _ in range(rank))
    norm, options = anynorm.normalize, {"eps": rng.choice([1e-5, 1e-3])}
    kind = rng.choice(["axes", "batch", "instance", "group", "rms"], p=[0.4, 0.25, 0.1, 0.15, 0.1])
    if kind in ("axes", "rms"):
        norm = anynorm.rms_norm if kind == "rms" else rng.choice([anynorm.normalize, anynorm.layer_norm])
        options["axis"] = tuple(int(i) for i in np.flatnonzero(rng.random(rank) < 0.5)) or (int(rng.integers(rank)),)
    else:
        axis = int(rng.choice([1, rank - 1]))
        options["channel_axis"] = axis if rng.random() < 0.5 else axis - rank
        norm = {"batch": anynorm.batch_norm, "instance": anynorm.instance_norm, "group": anynorm.group_norm}[kind]
        norm = anynorm.batch_norm if norm is anynorm.instance_norm and rank == 2 else norm
        if kind == "group":
            options["groups"] = int(rng.choice([n for n in range(1, shape[axis] + 1) if shape[axis] % n == 0]))
    x, dy = rng.standard_normal((2, *shape))
    x = x * 10.0 ** rng.integers(0, 3) + rng.choice([0, 5, 100])
    sizes = [tuple(int(n) if rng.random() < 0.5 else 1 for n in shape) for _ in range(2)]
    gamma, beta = (None if rng.random() < 0.2 else rng.standard_normal(size) for size in sizes)
    more = rng.random()
    if more < 0.2 and norm in (anynorm.normalize, anynorm.batch_norm):
        kept = exact(norm, x, dy, **options).mean.shape
        options["moments"] = rng.standard_normal(kept), rng.random(kept) + 0.5
    elif more < 0.6:
        narrow = tuple(int(n) if rng.random() < 0.6 else 1 for n in shape)
        weights = rng.random(narrow) * (rng.random(narrow) > rng.choice([0, 0.3, 0.8])) * 10.0 ** rng.choice([0, -20])
        options["weights"] = weights > 0 if rng.random() < 0.5 else weights
        padding = rng.choice([0, 1e30, np.nan, np.inf])
        lost = (np.broadcast_to(options["weights"], shape) == 0) & (rng.random(shape) > 0.5)
        x, dy = (x, dy) if padding == 0 else (np.where(lost, padding, x), np.where(lost, 0, dy))
    return norm, x, dy, gamma, beta, options


@pytest.mark.parametrize("part", range(4))
def test_calls_of_any_kind_on_arrays_of_any_shape(executor, part):
    many = {"numpy": 25, "torch": 10}.get(executor.backend.library, 6)
    for seed in range(part, (3 if executor.compiles else many) * 4, 4):
        norm, x, dy, gamma, beta, options = drawn(seed)
        if not executor.takes(norm, x.shape, options):
            continue
        weights = options.get("weights")
        dy = dy if weights is None else np.where(np.isfinite(x), dy, 0)
        found = executor.run(norm, x, dy, gamma, beta, **options)
        expected = exact(norm, x, dy, gamma, beta, **options)
        if executor.name == "replicas" and weights is not None and not np.all(expected.var):
            continue  # beside equal numbers over replicas one without weight is not what the formula says
        known = np.isfinite(np.asarray(expected.y)) & (np.abs(np.nan_to_num(expected.y)) < 1e20)
        where, bound = f"seed {seed}", 1e-9 if executor.backend.float64 else 2e-3
        np.testing.assert_allclose(found.y[known], expected.y[known].astype(float), bound, bound, err_msg=where)
        for one, other in zip(found[1:], expected[1:], strict=True):
            assert (one is None) is (other is None) or norm is anynorm.rms_norm
            if one is not None:
                np.testing.assert_allclose(one, np.asarray(other).astype(float), bound, bound, err_msg=where)


def of_any_magnitude(seed):
    """A call on arrays of random magnitudes, those of each group and of what stands beside x too."""
    rng = np.random.default_rng(seed)
    dtype = np.float32 if rng.random() < 0.75 else np.float64
    info = np.finfo(dtype)
    low, high = np.log10(float(info.smallest_normal)), np.log10(float(info.max))

    def magnitude():
        return 10.0 ** rng.uniform(low + 1, high - 1) if rng.random() < 0.8 else 1.0

    shape = ((6, 64), (3, 4, 40), (40, 5))[rng.integers(3)]
    norm = rng.choice([anynorm.normalize, anynorm.rms_norm, anynorm.weight_norm, anynorm.batch_norm])
    kind = rng.choice(["plain", "weights", "moments"])
    axes = (len(shape) - 1,) if rng.random() < 0.5 and norm is not anynorm.batch_norm else (0, *range(2, len(shape)))
    kept = tuple(1 if axis in axes else n for axis, n in enumerate(shape))
    size, eps = magnitude(), float(rng.choice([0.0, 1e-5, magnitude()]))
    x = rng.standard_normal(shape) * size * 10.0 ** rng.integers(-2, 3, kept)
    dy = (rng.standard_normal(shape) + rng.choice([0, 1, 100])) * magnitude()
    varies = norm is not anynorm.weight_norm and rng.random() < 0.5
    gamma = rng.standard_normal([n if (axis in axes) == varies else 1 for axis, n in enumerate(shape)]) * magnitude()
    options = {} if norm is anynorm.batch_norm else {"axis": axes}
    if norm is anynorm.weight_norm:
        options["axis"], eps = tuple(axis for axis in range(len(shape)) if axis not in axes), 0.0
    elif kind == "weights":
        options["weights"] = ((rng.random(shape) + 0.01) * 10.0 ** rng.uniform(low + 3, high - 3)).astype(dtype)
    elif kind == "moments" and norm is not anynorm.rms_norm:
        root = size if rng.random() < 0.6 and low < 2 * np.log10(size) < high else magnitude() ** 0.5
        given = rng.standard_normal(kept) * size * rng.choice([0, 1, 10]), rng.uniform(0.5, 2, kept) * root**2
        groups = tuple(n for axis, n in enumerate(shape) if axis not in axes)
        options["moments"] = [each.astype(dtype).reshape(groups) for each in given]
    with np.errstate(all="ignore"):
        x, dy, gamma = (each.astype(dtype) for each in (x, dy, gamma))
    return norm, axes, eps, x, dy, gamma, options


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of drawing, and of Dask's merging
def test_numbers_of_any_magnitude_give_what_the_formula_gives(executor):
    compared, many = 0, executor.backend.library == "numpy" and not executor.compiles
    few = executor.compiles or executor.backend.library == "mlx"  # the next asks for a product that no float32 holds
    for seed in range(40 if many else 6 if few else 30):
        norm, axes, eps, x, dy, gamma, options = of_any_magnitude(seed)
        given = options.get("moments", [])
        if not all(np.isfinite(each).all() for each in (x, dy, gamma, *given)) or (
            x.dtype == np.float64 and not executor.backend.float64
        ):
            continue
        if not executor.takes(norm, x.shape, options):
            continue
        how = {} if norm is anynorm.weight_norm else {"eps": eps}
        found = executor.run(norm, x, dy, gamma, dtype=str(x.dtype), **how, **options)
        expected = exact(norm, x, dy, gamma, **how, **options)
        info, n = np.finfo(x.dtype), np.prod([x.shape[axis] for axis in axes])
        root = np.sqrt(np.expand_dims(expected.var, axes) + np.longdouble(eps))
        g = dy * gamma.astype(np.longdouble) / root
        largest = [abs(each).max(axis=axes, keepdims=True) for each in (expected.y, expected.dx, x, g)]
        least, most = float(info.smallest_normal), float(info.max)
        told = (largest[2] / 10 >= least) & ((root >= least) | (eps != 0))
        for ours, each, top, size in zip(found[:2], expected[:2], largest[:2], (largest[0], largest[3]), strict=True):
            if ours is found.dx and executor.name == "jit":  # JAX differentiates by itself
                continue
            seen = told & (top >= least) & (size <= most / n) & (top > size / 1000)
            error = abs(ours - each).max(axis=axes, keepdims=True)[seen] / size[seen]
            compared += error.size
            assert np.all(error <= (4e-6 if x.dtype == np.float32 else 1e-14)), (seed, norm, x.dtype)
    assert compared > (30 if many else 5)


@pytest.mark.cells("numpy", "strict", "torch", "fast-cpu", "cupy")
@runs_if(lambda executor, case: takes(executor, case) and executor.picks(CASES.index(case), of=7))
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_the_executor_is_the_one_that_is_named(executor, case, monkeypatch):
    name = {"replicas": "whole", "autograd": "whole", "autograd, in blocks": "blocks"}.get(executor.name, executor.name)
    name = "programs" if name in ("cuda", "cuda, groups in parts", "autograd, programs") else name
    ran = inner.count_calls(monkeypatch, name)
    x = np.random.default_rng(0).standard_normal((2, *case.shape))
    executor.run(case.norm, *x, *np.ones((case.parameters, *case.parameter_shape)), **case.options)
    assert ran
