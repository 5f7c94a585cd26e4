"""Dask: nothing is computed at a call, and chunks make no difference."""

import numpy as np
import pytest
from oracles import CASES, standardized, values

import anynorm

pytestmark = pytest.mark.cells("dask")


@pytest.fixture
def counted():
    """A scheduler that counts how often it is called."""
    import dask

    calls = []

    def scheduler(graph, keys, **options):
        calls.append(keys)
        return dask.get(graph, keys, **options)

    with dask.config.set(scheduler=scheduler):
        yield calls


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_call_computes_nothing(backend, counted, case):
    rng = np.random.default_rng(0)
    numbers = [rng.standard_normal(case.shape), *rng.standard_normal((case.parameters, *case.parameter_shape))]
    arrays = [backend.array(each) for each in numbers]
    y, pullback = anynorm.vjp(case.norm, *arrays, **case.options)
    gradients = pullback(arrays[0])
    case.norm(*arrays, **case.options)
    assert not counted
    backend.check(y, values(case, *numbers, None)[...] if case.parameters == 1 else values(case, *numbers))
    assert counted
    assert all(tuple(each.shape) == tuple(array.shape) for each, array in zip(gradients, arrays, strict=True))


def divided(n, kind):
    """The sizes of chunks along an axis of n numbers."""
    half = n // 2
    return {
        "one": (n,),
        "single numbers": (1,) * n or (0,),
        "irregular": (n - half, half) if half else (n,),
        "empty first": (0, n - half, half),
        "empty between": (half, 0, 0, n - half),
        "empty last": (n, 0),
    }[kind]


KINDS = ["one", "single numbers", "irregular", "empty first", "empty between", "empty last"]


@pytest.mark.parametrize("index", range(len(CASES)), ids=map(str, CASES))
def test_empty_chunks_and_single_numbers_make_no_difference(index):
    import dask.array

    case, seed = CASES[index], index % 4
    rng = np.random.default_rng([index, seed])
    drop = seed - 1  # an axis of length 1, or of none; or neither
    shape = tuple((seed + index) % 2 if axis == drop else n for axis, n in enumerate(case.shape))
    if len(shape) > 4 or shape[case.options.get("channel_axis", 1) % len(shape)] % case.options.get("groups", 1):
        shape = case.shape

    def lazy(numbers):
        kinds = [KINDS[int(rng.integers(len(KINDS)))] for _ in numbers.shape]
        return dask.array.from_array(numbers, chunks=tuple(map(divided, numbers.shape, kinds)))

    x, dy = rng.standard_normal((2, *shape))
    options, weights = dict(case.options), {}
    if case.norm is anynorm.weight_norm:
        axis = options.get("axis", 0)
        kept = () if axis is None else sorted(each % len(shape) for each in np.atleast_1d(axis))
        parameters = [rng.random([shape[each] for each in kept])]
    else:
        parameters = [
            rng.standard_normal([n if rng.random() < 0.6 else 1 for n in shape]) for _ in range(case.parameters)
        ]
        if seed % 2:
            mask = rng.random([n if rng.random() < 0.6 else 1 for n in shape])
            weights = {"weights": mask > 0.4 if seed == 1 else mask * (mask > 0.3)}
    y, pullback = anynorm.vjp(case.norm, x, *parameters, **options, **weights)
    chunked = lazy(x)
    arguments = [chunked, *map(lazy, parameters)]
    given = {name: lazy(each) for name, each in weights.items()}
    found, back = anynorm.vjp(case.norm, *arguments, **options, **given)
    gradients = back(lazy(dy))
    for one, other in zip((found, *gradients), (y, *pullback(dy)), strict=True):
        assert one.shape == one.compute().shape == other.shape
        np.testing.assert_allclose(one.compute(), other, rtol=1e-10, atol=1e-11)
    if case.norm not in (anynorm.weight_norm, anynorm.rms_norm):
        _, moments = case.norm(x, return_moments=True, **options, **weights)
        _, merged = case.norm(chunked, return_moments=True, **options, **given)
        for name in ("mean", "var", "count"):
            one, other = getattr(merged, name), getattr(moments, name)
            one = one.compute() if hasattr(one, "compute") else one
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-11)


def test_a_result_has_the_empty_chunks_of_x():
    import dask.array

    x = dask.array.from_array(np.random.default_rng(0).standard_normal((5, 4)), chunks=((2, 0, 3), (4, 0)))
    for norm, options in ((anynorm.layer_norm, {}), (anynorm.batch_norm, {}), (anynorm.group_norm, {"groups": 2})):
        y, pullback = anynorm.vjp(norm, x, **options)
        assert x.chunks == y.chunks == pullback(y)[0].chunks
        expected = x.compute() + norm(x.compute(), **options)
        np.testing.assert_allclose((x + y).compute(), expected, atol=1e-12)  # Dask adds no others to x


@pytest.mark.parametrize("chunks", [(1, 1, 3), (2, 1, 1), ((0, 2), (0, 0), (1, 0, 2))])
def test_an_axis_without_numbers_may_be_divided(chunks):
    import dask.array

    x = dask.array.ones((2, 0, 3), chunks=chunks)
    for norm, options, shape in (
        (anynorm.group_norm, {"groups": 2}, (2, 2)),
        (anynorm.group_norm, {"groups": 3, "channel_axis": -1}, (2, 3)),
        (anynorm.batch_norm, {"channel_axis": -1}, (3,)),
        (anynorm.instance_norm, {}, (2, 0)),
    ):
        (y, moments), pullback = anynorm.vjp(norm, x, return_moments=True, **options)
        assert y.compute().shape == pullback(x)[0].compute().shape == (2, 0, 3)
        np.testing.assert_array_equal(moments.mean.compute(), np.zeros(shape))


@pytest.mark.parametrize("keep", [(), (4,), (0, 1, 2, 3, 4)], ids=str)
def test_nothing_may_be_left_of_chunks_whose_sizes_are_not_known(keep):
    import dask.array

    x, w = np.random.default_rng(7).standard_normal((2, 6, 4))
    keep = np.isin(np.arange(6), keep)

    def part(numbers, chunks):
        return dask.array.from_array(numbers, chunks=chunks)[dask.array.from_array(keep, chunks=chunks[0])]

    for chunks in ((1, 4), (2, 1), (3, 2), (6, 4)):
        for norm, options in (
            (anynorm.layer_norm, {}), (anynorm.layer_norm, {"axis": 0}), (anynorm.rms_norm, {"axis": None}),
            (anynorm.batch_norm, {}), (anynorm.instance_norm, {"channel_axis": 0}),
        ):  # fmt: skip
            y = norm(x[keep], weights=w[keep] > 0, **options)
            lazy = norm(part(x, chunks), weights=part(w > 0, chunks), **options)
            np.testing.assert_allclose(lazy.compute(), y, atol=1e-12)
            with pytest.raises(ValueError, match=r"^x must have known sizes for a gradient, .*compute_chunk_sizes"):
                anynorm.vjp(norm, part(x, chunks), **options)


def test_a_sum_of_squares_is_not_taken_for_their_mean(backend):
    v, g = np.array([[3.0, 4.0, 0.0, 0.0]]), np.array([[10.0]])  # in chunks of two
    for _ in range(2):
        backend.check(anynorm.rms_norm(backend.array(v), backend.array(g), eps=0), v * 4)
        backend.check(anynorm.weight_norm(backend.array(v), backend.array(g)), v * 2)


def test_masked_chunks_are_refused():
    import dask.array

    masked = dask.array.ma.masked_array(np.ones((2, 3)), mask=np.eye(2, 3, dtype=bool))
    with pytest.raises(
        TypeError, match=r"^x must be a plain array, got one that is masked: write da.ma.getdata\(x\), weights="
    ):
        anynorm.layer_norm(masked)


def test_sizes_that_are_not_known_do_no_harm_where_they_are_not_counted(backend):
    import dask.array

    x = np.random.default_rng(2).standard_normal((6, 4, 5))
    known = x[x[:, 0, 0] > 0]
    unknown = dask.array.from_array(x, chunks=(2, 4, 5))
    unknown = unknown[unknown[:, 0, 0] > 0]
    y, moments = anynorm.layer_norm(unknown, return_moments=True)
    np.testing.assert_allclose(y.compute(), anynorm.layer_norm(known))
    np.testing.assert_allclose(moments.mean.compute(), known.mean(axis=-1))
    np.testing.assert_allclose(anynorm.instance_norm(unknown).compute(), anynorm.instance_norm(known))
    running = anynorm.RunningStats.init(4, like=unknown)
    np.testing.assert_allclose(anynorm.batch_norm(unknown, moments=running).compute(), known / (1 + 1e-5) ** 0.5)


def test_arrays_of_unknown_sizes_go_together():
    import dask.array

    x = np.random.default_rng(4).standard_normal((9, 4))
    known, all_of_it = x[x[:, 0] > 0], dask.array.from_array(x, chunks=(5, 4))
    unknown = all_of_it[all_of_it[:, 0] > 0]
    for norm, of, options in (
        (anynorm.batch_norm, lambda x: (x,), lambda x: {"weights": x > -0.5}),
        (anynorm.layer_norm, lambda x: (x, x), lambda x: {}),
        (anynorm.layer_norm, lambda x: (x, x[:, :1], x), lambda x: {"weights": x[:, 1:2] > 0}),
        (anynorm.layer_norm, lambda x: (x, x[:, 0]), lambda x: {"axis": 0}),
        (anynorm.weight_norm, lambda x: (x, x[:, 0] ** 2), lambda x: {}),
    ):
        y = norm(*of(unknown), **options(unknown))
        np.testing.assert_allclose(y.compute(), norm(*of(known), **options(known)), atol=1e-12)


def test_sizes_that_are_not_known_are_counted_as_they_are_computed():
    import dask.array

    x = np.random.default_rng(2).standard_normal((12, 4, 5))
    keep = (x[:, 0, 0] > 0) & (np.arange(12) > 3)  # nothing is left of the first chunk
    unknown = dask.array.from_array(x, chunks=(3, 4, 5))[dask.array.from_array(keep, chunks=3)]
    known, beta = x[keep], np.arange(4.0)
    y, batch = anynorm.batch_norm(unknown, None, dask.array.from_array(beta), return_moments=True)
    expected, exact = anynorm.batch_norm(known, None, beta, return_moments=True)
    np.testing.assert_allclose(y.compute(), expected, atol=1e-12)
    np.testing.assert_allclose(batch.mean.compute(), exact.mean)
    np.testing.assert_array_equal(batch.count.compute(), [exact.count] * 4)
    for momentum in (0.9, None):
        running = anynorm.RunningStats.init(4, like=unknown, momentum=momentum, correction=1).update(batch)
        eager = anynorm.RunningStats.init(4, like=known, momentum=momentum, correction=1).update(exact)
        np.testing.assert_allclose(running.var.compute(), eager.var)
    nothing = dask.array.from_array(x, chunks=(3, 4, 5))[dask.array.zeros(12, dtype=bool, chunks=3)]
    assert anynorm.batch_norm(nothing).compute().shape == (0, 4, 5)
    w, g = anynorm.weight_norm(unknown[:, 0, 0], dask.array.ones(()), axis=None), known[:, 0, 0]
    np.testing.assert_allclose(w.compute(), g / np.linalg.norm(g))


def test_sizes_that_are_not_known_and_must_be_are_asked_for():
    import dask.array

    unknown = dask.array.ones((6, 4), chunks=2)
    unknown = unknown[unknown[:, 0] > 0]
    with pytest.raises(ValueError, match=r"^x must have known sizes .*: call x.compute_chunk_sizes\(\) first$"):
        anynorm.group_norm(unknown, groups=2)
    with pytest.raises(ValueError, match=r"^arrays must be divided as x is .*: call compute_chunk_sizes\(\) on each"):
        anynorm.batch_norm(unknown, weights=dask.array.ones((6, 4), chunks=6)[dask.array.ones(6, chunks=6) > 0])
    known = dask.array.ones((6, 4), chunks=2)
    for name, arrays, dy in (("x", (unknown,), known), ("gamma", (known, unknown), known), ("dy", (known,), unknown)):
        with pytest.raises(
            ValueError, match=rf"^{name} must have known sizes for a gradient, .*: call {name}.compute_chunk_sizes\(\)"
        ):
            anynorm.vjp(anynorm.layer_norm, *arrays)[1](dy)
    known = unknown.compute_chunk_sizes()
    assert anynorm.vjp(anynorm.layer_norm, known)[1](known)[0].compute().shape == (6, 4)


@pytest.mark.parametrize("chunks", [(4, 6, 5), (1, 6, 5), (3, 2, 2), ((0, 3, 1), (2, 4), (5,)), (2, 3, 1)])
def test_gradients_do_not_depend_on_chunks(chunks):
    import dask.array

    x, dy = np.random.default_rng(1).standard_normal((2, 4, 6, 5))
    for norm, options, shapes in (
        (anynorm.layer_norm, {}, [(5,), (4, 1, 5)]),
        (anynorm.rms_norm, {"axis": None}, [(4, 6, 5), None]),
        (anynorm.batch_norm, {}, [(6,), (1, 6, 5)]),
        (anynorm.batch_norm, {}, [None, (4, 6, 5)]),
        (anynorm.group_norm, {"groups": 2}, [(6,), (4, 6, 1)]),
        (anynorm.weight_norm, {}, [(4,)]),
        (anynorm.weight_norm, {"axis": (1, 2)}, [(6, 5)]),
    ):
        parameters = [None if shape is None else np.random.default_rng(2).standard_normal(shape) for shape in shapes]
        lazy = [None if each is None else dask.array.from_array(each, chunks=2) for each in parameters]
        y, pullback = anynorm.vjp(norm, dask.array.from_array(x, chunks=chunks), *lazy, **options)
        expected, exact = anynorm.vjp(norm, x, *parameters, **options)
        np.testing.assert_allclose(y.compute(), expected, atol=1e-12)
        for found, want in zip(pullback(dask.array.from_array(dy, chunks=3)), exact(dy), strict=True):
            assert (found is None) is (want is None)
            if found is not None:
                assert found.shape == want.shape
                np.testing.assert_allclose(found.compute(), want, atol=1e-12)


@pytest.mark.parametrize(
    ("chunks", "size", "padding"),
    [
        ((4, 6, 5), 1.0, np.nan),
        ((3, 2, 2), 1.0, None),
        ((3, 2, 2), 1e308, 1e30),
        (((0, 3, 1), (2, 4), (5,)), 1e-305, np.nan),
    ],
)
def test_weights_are_divided_with_the_array(chunks, size, padding):
    import dask.array

    rng = np.random.default_rng(5)
    x, dy = rng.standard_normal((2, 4, 6, 5))
    for norm, options, shapes, narrow in (
        (anynorm.layer_norm, {}, [(5,), (4, 1, 5)], (5,)),
        (anynorm.rms_norm, {"axis": None}, [(4, 6, 5), None], (4, 1, 5)),
        (anynorm.batch_norm, {}, [(6,), (1, 6, 5)], (4, 6, 5)),
        (anynorm.batch_norm, {}, [None, (4, 6, 5)], (4, 1, 5)),
        (anynorm.group_norm, {"groups": 2}, [(6,), (4, 6, 1)], (4, 6, 1)),
        (anynorm.instance_norm, {}, [None, (6,)], (1, 6, 1)),
    ):
        weights = rng.random(narrow) * (rng.random(narrow) > 0.4) * size
        weights = weights > 0 if size == 1 and padding is None else weights
        given = x if padding is None else np.where(weights > 0, x, padding)
        cotangent = np.where(weights > 0, dy, 0)
        parameters = [None if shape is None else rng.standard_normal(shape) for shape in shapes]
        lazy = [None if each is None else dask.array.from_array(each, chunks=2) for each in parameters]
        chunked = dask.array.from_array(weights, chunks=2)
        y, pullback = anynorm.vjp(norm, dask.array.from_array(given, chunks=chunks), *lazy, weights=chunked, **options)
        expected, exact = anynorm.vjp(norm, given, *parameters, weights=weights, **options)
        with np.errstate(all="ignore"):
            np.testing.assert_allclose(y.compute(), expected, rtol=1e-10, atol=1e-11)
            for found, want in zip(pullback(dask.array.from_array(cotangent, 3)), exact(cotangent), strict=True):
                if want is not None:
                    np.testing.assert_allclose(found.compute(), want, rtol=1e-10, atol=1e-11)


def test_moments_with_weights_are_merged_over_chunks():
    import dask.array

    rng = np.random.default_rng(6)
    x = (rng.standard_normal((6000, 3)) + 1e4).astype(np.float32)
    for weights in (rng.random((6000, 3)) > 0.5, rng.random((6000, 1), dtype=np.float32), np.arange(6000)[:, None] < 9):
        every = np.broadcast_to(weights, x.shape).astype(np.longdouble)
        mean = np.average(x.astype(np.longdouble), axis=0, weights=every)
        var = np.average((x - mean) ** 2, axis=0, weights=every)
        lazy = dask.array.from_array(weights, chunks=(500, 1))
        moments = anynorm.moments(dask.array.from_array(x, chunks=(1000, 2)), axis=0, weights=lazy)
        assert (moments.mean.dtype, moments.count.dtype, moments.count.compute().dtype) == ("f4", "f8", "f8")
        np.testing.assert_allclose(moments.mean.compute(), mean.astype(float), rtol=1e-7)
        np.testing.assert_allclose(moments.var.compute(), var.astype(float), rtol=1e-5)
        np.testing.assert_allclose(moments.count.compute(), every.sum(axis=0).astype(float), rtol=1e-14)
        running = anynorm.RunningStats.init(3, like=lazy.astype("f4"), momentum=None).update(moments)
        np.testing.assert_allclose(running.var.compute(), var.astype(float), rtol=1e-5)


def test_weights_that_are_no_numbers_are_an_error_once_they_are_computed():
    import dask.array

    x = dask.array.ones((6, 4), chunks=(3, 4))
    for axis in (0, 1):
        y = anynorm.layer_norm(x, weights=dask.array.from_array(np.full((6, 1), -1.0), chunks=3), axis=axis)
        with pytest.raises(ValueError, match="weights must be finite and at least 0 everywhere"):
            y.compute()


@pytest.mark.parametrize("eps", [0, 1e-5])
@pytest.mark.parametrize("sizes", [(1e30, 1.0), (1e-30, 1e-36), (1.0, 1e-30), (3e37, 1e-38)])
def test_chunks_may_differ_in_size_by_any_power(sizes, eps):
    import dask.array

    x = np.random.default_rng(3).standard_normal((600, 3)) * np.repeat(sizes, 300)[:, None]
    x[:, 2] = sizes[0]
    x = x.astype(np.float32)
    chunked = dask.array.from_array(x, chunks=(100, 2))
    y, batch = anynorm.batch_norm(chunked, eps=eps, return_moments=True)
    y, mean = y.compute(), batch.mean.compute()
    np.testing.assert_allclose(y[:, :2], standardized(x[:, :2], 0, eps).astype(np.float64), rtol=0, atol=6e-6)
    np.testing.assert_array_equal(y[:, 2], 0)
    np.testing.assert_allclose(mean, x.mean(axis=0, dtype=np.float64), rtol=1e-6, atol=1e-7 * max(sizes))


def test_half_precision_and_sums_over_long_leading_axes_are_exact():
    import dask.array

    x = (np.random.default_rng(4).standard_normal((65536, 3)) + 1e4).astype(np.float32)
    for chunks in ((65536, 3), (10000, 2)):
        y, batch = anynorm.batch_norm(dask.array.from_array(x, chunks=chunks), return_moments=True)
        np.testing.assert_allclose(y.compute(), standardized(x, 0).astype(np.float64), rtol=0, atol=2e-6)
        np.testing.assert_allclose(batch.mean.compute(), x.mean(axis=0, dtype=np.float64), rtol=1e-7)
    half = (x - 1e4).astype(np.float16) * 300
    y = anynorm.batch_norm(dask.array.from_array(half, chunks=(10000, 2)))
    assert y.dtype == y.compute().dtype == np.float16
    np.testing.assert_allclose(y.compute(), standardized(half, 0).astype(np.float64), rtol=1e-3, atol=1e-3)


def test_a_part_of_a_result_asks_for_no_more_of_x_than_it_needs():
    import dask.array

    seen = []

    def made(block_info=None):
        seen.append(block_info[None]["chunk-location"])
        return np.ones(block_info[None]["chunk-shape"])

    x = dask.array.map_blocks(made, chunks=((2,) * 10, (3,) * 2), dtype=float, meta=np.empty((0, 0)))
    anynorm.layer_norm(x)[:2].compute()
    assert sorted(seen) == [(0, 0), (0, 0), (0, 1), (0, 1)]  # for the statistics, and again
    seen.clear()
    anynorm.moments(x, axis=-1).mean[:2].compute()
    assert sorted(seen) == [(0, 0), (0, 1)]
    seen.clear()
    anynorm.layer_norm(x.rechunk((2, 6)))[:2].compute()
    assert sorted(seen) == [(0, 0), (0, 1)]


def test_norms_in_a_row_read_the_source_once_more_for_each():
    import dask.array

    seen = []

    def made(block_info=None):
        seen.append(1)
        return np.random.default_rng(block_info[None]["chunk-location"]).standard_normal((2, 3))

    y = x = dask.array.map_blocks(made, chunks=((2,) * 3, (3,)), dtype=float, meta=np.empty((0, 0)))
    for depth in (1, 2, 3):
        y = anynorm.batch_norm(y + 1)
        seen.clear()
        y.compute()
        assert len(seen) == 3 * (depth + 1)
    expected = x.compute()
    for _ in range(3):
        expected = anynorm.batch_norm(expected + 1)
    np.testing.assert_allclose(y.compute(), expected)


def test_the_same_call_has_the_same_names():
    import dask.array

    x = dask.array.ones((6, 4), chunks=2)
    for norm in (anynorm.batch_norm, anynorm.layer_norm, anynorm.rms_norm):
        assert norm(x).name == norm(x).name != norm(x, eps=1e-3).name
        assert set(norm(x).dask.to_dict()) == set(norm(x).dask.to_dict())


ODD = {
    "nan": lambda x: np.where(np.arange(5) == 1, np.nan, x),
    "inf": lambda x: np.where(np.arange(5) == 1, np.inf, x),
    "both": lambda x: np.where(np.arange(5) == 1, np.inf, np.where(np.arange(5) == 2, -np.inf, x)),
    "largest": lambda x: np.sign(x) * np.finfo(np.float32).max,
    "smallest": lambda x: x * np.finfo(np.float32).tiny,
    "zero": lambda x: 0 * x,
}


def arrays_in(found):
    """All that is lazy in a result."""
    if isinstance(found, tuple):
        return [array for each in found for array in arrays_in(each)]
    if isinstance(found, (anynorm.Moments, anynorm.RunningStats)):
        return arrays_in((found.mean, found.var, found._rest, found._var_rest, found.count))
    return [found] if hasattr(found, "compute") else []


@pytest.mark.parametrize("chunks", [(2, 2, 3), (4, 6, 5)], ids=["parts", "whole"])
@pytest.mark.parametrize("kind", ODD)
def test_what_is_quiet_at_once_is_quiet_when_it_is_computed(kind, chunks):
    """Warnings are errors here."""
    import dask
    import dask.array

    def lazy(numbers, dtype="f4"):
        return dask.array.from_array(numbers.astype(dtype), chunks=chunks)

    rng = np.random.default_rng(11)
    with np.errstate(all="ignore"):
        x = lazy(ODD[kind](rng.standard_normal((4, 6, 5))))
        gamma = dask.array.from_array(np.full((1, 1, 1), 1e300))  # which float32 has no room for
        mask = lazy((rng.random((4, 6, 5)) > 0.3) * (np.arange(6) != 1)[:, None], bool)
    found = []
    for norm, options in (
        (anynorm.layer_norm, {}),
        (anynorm.layer_norm, {"axis": (0, 1)}),
        (anynorm.batch_norm, {}),
        (anynorm.instance_norm, {}),
        (anynorm.group_norm, {"groups": 2}),
        (anynorm.rms_norm, {}),
    ):
        for given in ({}, {"weights": mask}):
            y, pullback = anynorm.vjp(norm, x, gamma, eps=0, **given, **options)
            found += [y, pullback(x)]
            if norm is not anynorm.rms_norm:
                found.append(norm(x, return_moments=True, **given, **options)[1])
    found.append(anynorm.WeightNorm.from_weight(x).g)
    found.append(anynorm.vjp(anynorm.weight_norm, x, x[:, 0, 0])[1](x))
    half = dask.array.from_array(np.zeros(1, np.float16))
    for given in ({}, {"weights": mask}):
        one, other = (anynorm.moments(each, axis=(0, 2), **given) for each in (x, -x))
        merged = one.merge(other)
        found += [
            merged,
            merged.to(half),
            anynorm.batch_norm(x, moments=merged),
            anynorm.batch_norm(x, moments=one.to(half)),
        ]
        for momentum in (None, 0.9, 0.0):
            start = anynorm.RunningStats.init(6, like=x, momentum=momentum, correction=1)
            found.append(start.update(one).update(merged))
    dask.compute(*arrays_in(tuple(found)))
