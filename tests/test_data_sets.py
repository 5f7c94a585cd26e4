"""Moments of whole data sets, against scikit-learn, SciPy and float64 on all numbers at once."""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from oracles import oracle

import anynorm


def arrays(backend, parts, dtype=None):
    """Constants: nothing here is recorded."""
    plain = dataclasses.replace(backend, tracked=False)
    return [plain.array(each, dtype) for each in parts]


def chunks(*sizes, features=4, offset=3.0):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((n, features)) * (i + 1) + offset for i, n in enumerate(sizes)]


@pytest.mark.cells("numpy", "torch", "strict", "dask")
def test_weights_come_as_an_array_beside_the_batches_or_from_a_function(backend):
    parts = chunks(6, 2, 9)
    weights = [np.random.default_rng(i).random((len(each), 1)) for i, each in enumerate(parts)]
    column, whole = np.array([1.0, 0.0, 2.0, 3.0]), np.concatenate(parts)
    given, beside = arrays(backend, parts), arrays(backend, weights)
    ways = [
        (beside, np.concatenate(weights)),
        (iter(beside), np.concatenate(weights)),
        (arrays(backend, [column])[0], column),
        (lambda batch: batch > 3, whole > 3),
    ]
    for how, expected in ways:
        found = anynorm.Moments.over(iter(given), axis=None, weights=how)
        share = np.broadcast_to(expected, whole.shape) / np.sum(np.broadcast_to(expected, whole.shape))
        mean = np.sum(share * whole)
        backend.check(found.mean, mean)
        backend.check(found.var, np.sum(share * (whole - mean) ** 2))
        np.testing.assert_allclose(backend.numpy(found.count), np.broadcast_to(expected, whole.shape).sum(), rtol=1e-6)


@pytest.mark.cells("numpy")
def test_weights_that_do_not_go_with_the_batches_are_refused():
    parts = chunks(3, 4)
    for error, message, weights in (
        (TypeError, "weights must be an array, an iterable of arrays or a function, got float", 1.0),
        (ValueError, "weights must be as many as batches, got fewer", [np.ones((3, 1))]),
        (ValueError, "weights must be as many as batches, got more", [np.ones((n, 1)) for n in (3, 4, 1)]),
        (TypeError, "weights must be an array, got int", [1, 2]),
        (ValueError, r"weights must broadcast to the shape of x, \(4, 4\), got \(3, 1\)", np.ones((3, 1))),
        (TypeError, "weights must be a plain array, got MaskedArray: .*", np.ma.ones((1, 4))),
    ):
        with pytest.raises(error, match=f"^{message}$"):
            anynorm.Moments.over(parts, axis=0, weights=weights)


@pytest.mark.cells("numpy", "torch")
def test_missing_values_and_sample_weights_are_those_of_scikit_learn(backend):
    scaler = oracle("sklearn.preprocessing").StandardScaler()
    rng, parts = np.random.default_rng(1), chunks(7, 6, 20, 5)  # it makes NaN of a batch without a value
    weights = [rng.random(len(each)) for each in parts]
    for each, own in zip(parts, weights, strict=True):
        each[rng.random(each.shape) < 0.2] = np.nan
        with np.errstate(all="ignore"):  # a batch may hold nothing
            scaler.partial_fit(each, sample_weight=own)
    xp = backend.xp
    beside = [np.isfinite(each) * own[:, None] for each, own in zip(parts, weights, strict=True)]
    found = anynorm.Moments.over(arrays(backend, parts), axis=0, weights=arrays(backend, beside))
    backend.check(found.mean, scaler.mean_)
    backend.check(found.var, scaler.var_)
    backend.check(found.count, scaler.n_samples_seen_)
    alone = oracle("sklearn.preprocessing").StandardScaler()
    for each in parts:
        with np.errstate(all="ignore"):
            alone.partial_fit(each)
    found = anynorm.Moments.over(arrays(backend, parts), axis=0, weights=xp.isfinite)
    backend.check(found.mean, alone.mean_)
    backend.check(found.std(), alone.scale_)


@pytest.mark.parametrize("correction", [0, 1])
def test_standard_scores_are_those_of_scipy(backend, correction):
    stats = oracle("scipy.stats")
    x = chunks(12)[0]
    holes = np.where(np.random.default_rng(2).random(x.shape) < 0.3, np.nan, x)
    (given, gaps) = arrays(backend, [x, holes])
    moments = anynorm.moments(given, axis=0)
    backend.check((given - moments.mean) / moments.std(correction), stats.zscore(x, ddof=correction))
    seen = anynorm.moments(gaps, axis=0, weights=backend.xp.isfinite(gaps))
    expected = stats.zscore(holes, ddof=correction, nan_policy="omit")
    backend.check((gaps - seen.mean) / seen.std(correction=correction), expected)


@pytest.mark.cells("numpy", "torch", "strict", "dask")
def test_float32_in_float64_is_exact_over_many_batches(backend):
    if not backend.float64:
        pytest.skip(reason="there is no float64")
    slow = backend.library in ("jax", "dask", "strict")
    parts = [each.astype(np.float32) for each in chunks(*[3, 50, 1, 17] * (2 if slow else 40), offset=1e4)]
    whole = np.concatenate(parts)
    exact = [[Fraction(float(number)) for number in column] for column in whole.T]
    means = [sum(column) / len(column) for column in exact]
    spread = [sum((x - m) ** 2 for x in column) / len(column) for column, m in zip(exact, means, strict=True)]
    found = anynorm.Moments.over(arrays(backend, parts, "float32"), axis=0, dtype="float64")
    backend.check(found.mean, np.array(means, float), dtype="float64", tolerance=1e-15)
    np.testing.assert_allclose(backend.numpy(found.var), np.array(spread, float), rtol=1e-15)
    assert found.count == len(whole)


@pytest.mark.cells("numpy", "torch", "strict", "dask")
def test_batches_of_integers_are_those_of_their_values(backend):
    plain = dataclasses.replace(backend, tracked=False)
    parts = [np.random.default_rng(n).integers(0, 255, (n, 4)) for n in (5, 2, 30)]
    whole = np.concatenate(parts)
    found = anynorm.Moments.over([plain.array(each, "uint8") for each in parts], axis=0)
    plain.check(found.mean, whole.mean(0), dtype="float32", tolerance=1e-6)
    plain.check(found.std(), whole.std(0), dtype="float32", tolerance=1e-6)


@pytest.mark.cells("numpy", "torch", "strict")
def test_batches_of_several_dtypes_have_moments_of_that_of_the_first_or_of_the_one_that_is_asked_for(backend):
    if not backend.float64:
        pytest.skip(reason="there is one dtype")
    parts, own = chunks(5, 4), ("float32", "float64")
    whole = np.concatenate([parts[0].astype(np.float32), parts[1]])
    given = [arrays(backend, [each], dtype)[0] for each, dtype in zip(parts, own, strict=True)]
    backend.check(anynorm.Moments.over(given, axis=0).mean, whole.mean(axis=0), dtype="float32", tolerance=1e-6)
    backend.check(anynorm.Moments.over(given[::-1], axis=0).mean, whole.mean(axis=0), dtype="float64", tolerance=1e-6)
    found = anynorm.Moments.over(given, axis=0, dtype="float64")
    backend.check(found.std(), whole.std(axis=0), dtype="float64", tolerance=1e-15)


def test_a_small_spread_beside_a_large_mean_is_not_lost(backend):
    (x,) = arrays(backend, [np.array([10000.0, 10001.0, 10002.0])], "float32")  # as E[x**2] - E[x]**2 it is 0
    moments = anynorm.moments(x, axis=0)
    backend.check(moments.std(), np.sqrt(2 / 3), dtype="float32", tolerance=1e-7)
    backend.check(moments.std(correction=1), 1.0, dtype="float32", tolerance=1e-7)
    (flat,) = arrays(backend, [np.full(7, 10000.1)], "float32")  # and a flat series comes back to the last bit
    moments = anynorm.Moments.over([flat, flat[:3]], axis=0)
    assert float(moments.std()) == 0
    y = anynorm.normalize(flat, axis=0, moments=moments)
    back = y * moments.std() + moments.mean
    np.testing.assert_array_equal(backend.numpy(back), backend.numpy(flat))


def test_too_few_values_have_no_corrected_spread(backend):
    one, two = arrays(backend, [np.ones((1, 3)), np.arange(6.0).reshape(2, 3)])
    message = r"^statistics of one value have no variance with correction=1, got count 1: "
    with pytest.raises(ValueError, match=message):
        anynorm.moments(one, axis=0).std(1)
    plain = dataclasses.replace(backend, tracked=False)
    found = anynorm.moments(two, axis=0, weights=plain.array([[True, True, False], [True, False, False]], "bool"))
    backend.check(found.std(1), [np.sqrt(4.5), np.nan, np.nan])
    backend.check(found.std(), [1.5, 0, 0])


@pytest.mark.cells("numpy", "torch")
def test_a_column_of_missing_values_counts_nothing_and_an_array_is_its_rows(backend):
    x = np.array([[1.0, np.nan], [3.0, np.nan], [8.0, np.nan]])
    (given,) = arrays(backend, [x])
    seen = anynorm.Moments.over([given], axis=0, weights=backend.xp.isfinite)
    for found, expected in ((seen.mean, [4, 0]), (seen.std(), [x[:, 0].std(), 0]), (seen.count, [3, 0])):
        np.testing.assert_allclose(np.asarray(found), expected)
    rows = anynorm.Moments.over(given[:, :1], axis=0)  # as `[x]` is not
    np.testing.assert_allclose([float(rows.mean), float(rows.var)], [4, x[:, 0].var()])
    assert tuple(anynorm.Moments.over([given[:, :1]], axis=0).mean.shape) == (1,)


@pytest.mark.cells("numpy")
def test_images_that_go_and_come_back_are_rounded_to_the_integers_that_they_were(backend):
    images = np.random.default_rng(5).integers(0, 256, (6, 9, 9, 3)).astype(np.uint8)
    y, moments = anynorm.normalize(images, axis=(0, 1, 2), return_moments=True, out=np.empty(images.shape, np.float32))
    back = anynorm.denormalize(y, axis=(0, 1, 2), moments=moments)
    assert np.any(back.astype(np.uint8) != images)
    np.testing.assert_array_equal(np.round(back).astype(np.uint8), images)


def test_a_mixture_of_data_sets_has_the_shares_that_are_asked_for(backend):
    one, other = chunks(9, 3)
    found = [anynorm.moments(each, axis=0) for each in arrays(backend, [one, other])]
    halves = found[0].scaled(1 / 9).merge(found[1].scaled(1 / 3))
    mean = (one.mean(0) + other.mean(0)) / 2
    backend.check(halves.mean, mean)
    backend.check(halves.var, (((one - mean) ** 2).mean(0) + ((other - mean) ** 2).mean(0)) / 2)
    assert found[0].scaled(3).count == 27
    assert type(found[0].scaled(3).count) is int
    none = found[0].scaled(0).merge(found[1])
    backend.check(none.mean, other.mean(0))
    plain = dataclasses.replace(backend, tracked=False)
    masked = anynorm.moments(arrays(backend, [one])[0], axis=0, weights=plain.array(one > 3, "bool"))
    for factor in (3, 0.5):
        np.testing.assert_allclose(plain.numpy(masked.scaled(factor).count), (one > 3).sum(0) * factor)
    whole = anynorm.Moments(*arrays(backend, [np.zeros(2), np.ones(2)]), plain.array([3, 4], "int32"))
    for factor in (2, 1.5):
        np.testing.assert_allclose(plain.numpy(whole.scaled(factor).count), np.array([3, 4]) * factor)


@pytest.mark.cells("strict", "jax")
def test_a_count_in_two_parts_is_exact_times_a_whole_number(backend):
    plain = dataclasses.replace(backend, tracked=False)
    if plain.float64 and backend.library == "strict":
        pytest.skip(reason="a count is one number there")
    zeros = plain.array(np.zeros(2), "float32")
    if backend.library == "strict":
        moments = anynorm.Moments(np.zeros(2), np.zeros(2), np.array([2**30 + 1, 7])).to(zeros).scaled(5)
        total = plain.numpy(moments.count) + plain.numpy(moments._count_rest)
    else:
        import jax

        with jax.enable_x64(False):
            moments = anynorm.Moments(np.zeros(2), np.zeros(2), np.array([2**30 + 1, 7])).to(zeros).scaled(5)
            total = np.asarray(moments.count, float) + np.asarray(moments._count_rest, float)
    np.testing.assert_array_equal(total, [5 * (2**30 + 1), 35])
