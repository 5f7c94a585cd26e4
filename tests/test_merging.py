"""Merging and pooling: in any order, channel by channel, as exact as one pass over everything."""

import dataclasses
import io
import itertools
import sys
from dataclasses import replace
from fractions import Fraction

import inner
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import anynorm

numbers = st.floats(-100, 100, width=32)


def moments(backend, x, axis=0):
    """Of an array in float64: its moments in float32, with what rounding takes from the mean."""
    mean, var = x.mean(axis=axis), x.var(axis=axis)
    rest = mean - mean.astype(np.float32)
    return anynorm.Moments._with_rest(*(backend.array(each, "float32") for each in (mean, rest, var)), x.shape[0])


def both(backend, value):
    """The mean to the digits that are kept of it."""
    return backend.numpy(value.mean) + backend.numpy(value._rest)


def as_state(value):
    state = anynorm.RunningStats(value.mean, value.var, value.count, momentum=None)
    return state._carrying(value._rest)


@given(
    parts=st.lists(
        arrays(np.float64, st.tuples(st.integers(1, 9), st.just(2)), elements=numbers), min_size=1, max_size=8
    ),
    offset=st.sampled_from([0.0, 1e3, 1e6]),
    data=st.data(),
)
def test_float32_parts_merge_in_any_order_and_grouping_as_exactly_as_one_pass(backend, parts, offset, data):
    parts = [part + offset for part in parts]
    whole = np.concatenate(parts)
    mean, var = whole.mean(axis=0), whole.var(axis=0)
    spread = np.abs(whole - mean).max() + 1e-6
    for make in (lambda value: value, as_state):
        left = [make(moments(backend, part)) for part in data.draw(st.permutations(parts))]
        while len(left) > 1:  # a tree that is drawn, too
            first = left.pop(data.draw(st.integers(0, len(left) - 1)))
            left[at] = left[at := data.draw(st.integers(0, len(left) - 1))].merge(first)
        (merged,) = left
        np.testing.assert_allclose(both(backend, merged), mean, rtol=1e-13, atol=2e-6 * spread)
        np.testing.assert_allclose(backend.numpy(merged.mean), mean, rtol=1e-7, atol=2e-6 * spread)
        np.testing.assert_allclose(backend.numpy(merged.var), var, rtol=1e-5, atol=2e-6 * spread**2)
        assert merged.count == len(whole)
        assert merged.mean.dtype == merged.var.dtype == backend.array(0.0, "float32").dtype


def counts(backend, values, whole):
    """One count for each group."""
    found = backend.array(values, "float32")
    found = found.detach() if backend.library == "torch" else found
    xp = inner.library_of("count", found).xp
    return xp.astype(found, xp.int32) if whole else found


@given(
    x=arrays(np.float64, st.tuples(st.integers(1, 12), st.just(4)), elements=numbers),
    whole=st.booleans(),
    data=st.data(),
)
def test_each_channel_is_merged_by_its_own_count(backend, x, whole, data):
    there = data.draw(arrays(bool, x.shape))
    part = data.draw(arrays(np.int64, x.shape[0], elements=st.integers(0, 2)))

    def seen(chosen):
        """Mean, variance and count of each channel where it was there; where it never was, NaN."""
        with np.errstate(all="ignore"):
            n = chosen.sum(axis=0)
            mean = np.where(chosen, x, 0).sum(axis=0) / n
            return mean, (np.where(chosen, x - mean, 0) ** 2).sum(axis=0) / n, n

    values = [seen(there & (part == each)[:, None]) for each in range(3)]
    parts = [
        anynorm.Moments(backend.array(mean), backend.array(var), counts(backend, n, whole)) for mean, var, n in values
    ]
    mean, var, n = seen(there)
    for merged in (parts[0].merge(*parts[1:]), parts[2].merge(parts[0].merge(parts[1]))):
        np.testing.assert_array_equal(backend.numpy(merged.count), n)
        for found, expected in ((merged.mean, mean), (merged.var, var)):
            scale = max(1e-9, backend.tolerance) * 1e4
            np.testing.assert_allclose(backend.numpy(found), expected, rtol=scale, atol=scale)  # NaN where NaN is due


def test_a_running_channel_that_saw_nothing_stays_as_it_was(backend):
    nan = float("nan")
    batch = anynorm.Moments(backend.array([3.0, nan]), backend.array([2.0, nan]), counts(backend, [4, 0], whole=True))
    for momentum, correction in ((0.75, 0), (0.75, 1), (None, 0), (None, 1)):
        start = anynorm.RunningStats.init(2, like=backend.array(0.0), momentum=momentum, correction=correction)
        running = start.update(batch)
        bessel, new = (4 / 3 if correction else 1), (1 if momentum is None else 0.25)
        backend.check(running.mean, [new * 3, 0])
        backend.check(running.var, [(1 - new) + new * bessel * 2, 1])
        np.testing.assert_array_equal(backend.numpy(running.count), [4, 0])
        again = running.update(batch)
        assert np.all(np.isfinite(backend.numpy(again.var)))
        if momentum is None:
            merged = running.merge(running)
            backend.check(merged.mean, backend.numpy(again.mean))
            backend.check(merged.var, backend.numpy(again.var))


def test_a_wider_state_moves_by_all_digits_of_a_narrower_batch(backend):
    if not backend.float64:
        return
    x = np.random.default_rng(3).standard_normal((8, 2)) + 1e6
    start = anynorm.RunningStats.init(2, like=backend.array(0.0), momentum=0.75)
    running = start.update(moments(backend, x))
    backend.check(running.mean, 0.25 * x.mean(axis=0), tolerance=1e-13)


@pytest.mark.cells("jax")
def test_counts_and_the_rest_of_a_mean_cross_jit_vmap_and_scan(backend):
    import jax

    x = np.random.default_rng(0).standard_normal((2, 6, 64, 3)) + 1e6
    parts = [[moments(backend, each) for each in row] for row in x]
    stacked = jax.tree.map(
        lambda *leaves: jax.numpy.stack(leaves), *[jax.tree.map(jax.numpy.asarray, part) for part in parts[0]]
    )
    start = anynorm.RunningStats.init(3, like=backend.array(0.0, "float32"), momentum=None)
    start = jax.tree.map(jax.numpy.asarray, start)
    scanned, _ = jax.lax.scan(lambda running, part: (running.update(part), None), start, stacked)
    merged = jax.jit(lambda first, others: first.merge(*others))(parts[0][0], parts[0][1:])
    for found in (scanned, merged):
        np.testing.assert_allclose(both(backend, found), x[0].mean(axis=(0, 1)), rtol=1e-13)
        np.testing.assert_allclose(backend.numpy(found.var), x[0].var(axis=(0, 1)), rtol=1e-5)
    pairs = jax.vmap(lambda one, other: one.merge(other))(stacked, jax.tree.map(lambda leaf: leaf[::-1], stacked))
    np.testing.assert_allclose(both(backend, pairs)[0], x[0][[0, -1]].mean(axis=(0, 1)), rtol=1e-13)
    nan = float("nan")
    some = anynorm.Moments(backend.array([1.0, 2.0]), backend.array([0.0, 1.0]), counts(backend, [3, 5], whole=True))
    none = anynorm.Moments(backend.array([nan, 4.0]), backend.array([nan, 1.0]), counts(backend, [0, 5], whole=True))
    for one, other in ((some, none), (none, some)):
        found = jax.jit(lambda one, other: one.merge(other))(one, other)
        backend.check(found.mean, [1.0, 3.0])
        backend.check(found.var, [0.0, 2.0])


@pytest.mark.untracked
@pytest.mark.cells("numpy", "torch")
def test_a_float32_state_is_exact_over_very_many_batches(backend):
    rng, n = np.random.default_rng(5), 4000
    x = rng.standard_normal((n, 8, 2)) + 1e4
    x[n // 2 :] += 1  # half of it would not count, if rounding took it
    running = anynorm.RunningStats.init(2, like=backend.array(0.0, "float32"), momentum=None)
    for each in x:
        running = running.update(moments(backend, each))
    np.testing.assert_allclose(both(backend, running), x.mean(axis=(0, 1)), rtol=0, atol=1e-7)
    np.testing.assert_allclose(backend.numpy(running.var), x.var(axis=(0, 1)), rtol=5e-6)


@pytest.mark.cells("numpy", "strict", "torch")
def test_merges_do_not_round_to_one_side(backend):
    mean, var = (backend.array(each, "float32") for each in (np.zeros(3), np.array([0.7, 1.1, 1e6])))
    merged = part = anynorm.Moments(mean, var, 3)
    for _ in range(300 if backend.library == "strict" else 2000):
        merged = merged.merge(part)
    np.testing.assert_array_equal(backend.numpy(merged.var), backend.numpy(var))


@pytest.mark.cells("numpy", "strict", "torch")
def test_a_variance_that_overflowed_stays_infinite(backend):
    mean, var = (backend.array(each, "float32") for each in (np.zeros(3), np.array([1.0, np.inf, np.inf])))
    other = backend.array([1.0, 1.0, np.inf], "float32")
    large, small = anynorm.Moments(mean, var, 30), anynorm.Moments(mean, other, 3)
    for merged in (large.merge(small), small.merge(large), large.merge(large)):
        np.testing.assert_array_equal(backend.numpy(merged.var), backend.numpy(var))


def test_a_count_that_fits_no_group_is_refused(backend):
    three = backend.array(np.ones(3))
    for count, error, message in (
        (
            backend.array(np.ones(2)),
            ValueError,
            r"count must be a number or have the shape of mean, \(3,\), got \(2,\)",
        ),
        ([1, 2, 3], TypeError, "count must be a real number, got list"),
        (three > 0, TypeError, "count must have a real floating dtype, got "),
    ):
        with pytest.raises(error, match=f"^{message}"):
            anynorm.Moments(three, three, count)
    if backend.library != "numpy":
        with pytest.raises(TypeError, match="^mean and count must come from one array library"):
            anynorm.Moments(three, three, np.ones(3))
    if backend.library in ("numpy", "strict"):
        with pytest.raises(ValueError, match="^count must be at least 0 everywhere"):
            anynorm.Moments(three, three, backend.array([1, -1, 0]))
    value = anynorm.Moments(three, three, backend.array(np.ones(3)))
    assert "count=" in repr(value)
    assert dataclasses.replace(value).count is value.count


def test_moments_over_batches_of_any_sizes_are_those_of_the_whole(backend):
    x = np.random.default_rng(1).standard_normal((40, 3, 2)) + 5
    for sizes in ((40,), (1, 39), (7, 0, 13, 20), (0, 0), tuple([1] * 9), (7, 1, 13, 1, 7)):
        ends = np.cumsum((0, *sizes))
        batches = [x[start:stop] for start, stop in itertools.pairwise(ends)]
        if backend.library == "dask":  # it takes no chunk of size 0
            batches = [batch for batch in batches if batch.size] or [x[:1]]
        found = anynorm.Moments.over((backend.array(each) for each in batches), axis=(0, 2))
        whole = np.concatenate(batches)
        assert found.count == whole.size // 3
        backend.check(found.mean, whole.mean(axis=(0, 2)) if whole.size else np.zeros(3))
        backend.check(found.var, whole.var(axis=(0, 2)) if whole.size else np.zeros(3))


@pytest.mark.cells("numpy")
def test_moments_over_takes_one_batch_at_a_time_of_files_and_generators(tmp_path):
    x = np.random.default_rng(2).standard_normal((64, 5)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    found = anynorm.Moments.over(np.array_split(mapped, 7), axis=0)
    np.testing.assert_allclose(found.mean, x.mean(axis=0), rtol=1e-5)
    alive = []

    def batches():
        for batch in np.split(x, 8):
            alive.append(batch)
            yield batch
            alive.pop()

    assert anynorm.Moments.over(batches(), axis=0).count == 64
    assert not alive


@pytest.mark.cells("numpy")
def test_moments_over_says_what_is_no_iterable_of_batches():
    with pytest.raises(ValueError, match=r"^batches must hold at least one array, got none$"):
        anynorm.Moments.over(iter(()), axis=0)
    with pytest.raises(TypeError, match=r"^batches must be an iterable of arrays, got int$"):
        anynorm.Moments.over(3, axis=0)
    with pytest.raises(TypeError, match=r"^x must be an array, got list$"):
        anynorm.Moments.over([[1.0]], axis=0)
    with pytest.raises(
        ValueError, match=r"^batches must have the shape of the statistics they join, \(3,\), got \(2,\)$"
    ):
        anynorm.Moments.over([np.ones((4, 3)), np.ones((4, 2))], axis=0)


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("rich", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_is_shown_on_a_terminal_where_rich_is_there(rich, terminal, monkeypatch, capsys):
    shown = io.StringIO()
    if rich:
        pytest.importorskip("rich", reason="it draws the bar")
        monkeypatch.setenv("TERM", "xterm")
        shown.isatty = lambda: terminal
    else:
        for name in [name for name in sys.modules if name.partition(".")[0] == "rich"] + ["rich"]:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "stderr", shown)
    found = anynorm.Moments.over((np.full((2, 1), float(n)) for n in range(3)), axis=0, progress=True)
    assert (found.count, found.mean[0]) == (6, 1.0)
    assert ("Moments" in shown.getvalue()) is (rich and terminal)
    assert capsys.readouterr().out == ""


def test_parts_of_an_array_with_an_offset_merge_to_the_moments_of_the_whole(backend):
    x = np.random.default_rng(5).standard_normal((600, 3)).astype(np.float32) + np.float32(1e6)
    merged = anynorm.Moments.over([backend.array(part, "float32") for part in np.split(x, [7, 100, 450])], axis=0)
    exact = x.astype(np.float64)
    assert np.max(np.abs(both(backend, merged) - exact.mean(axis=0))) < 1e-5
    assert np.max(np.abs(backend.numpy(merged.var) / exact.var(axis=0) - 1)) < 1e-5


def exactly(backend, *values):
    """Moments of one channel of these means, variances and counts, and their exact values."""
    made = [anynorm.Moments(*(backend.array([v], "float32") for v in (mean, var)), n) for mean, var, n in values]
    return made, [tuple(map(Fraction, (float(np.float32(mean)), float(np.float32(var)), n))) for mean, var, n in values]


half = st.floats(-6e4, 6e4, width=16), st.floats(0, 1e4, width=16), st.integers(0, 2**60) | st.floats(1e-3, 1e18)


@given(parts=st.lists(st.tuples(*half), min_size=2, max_size=3), per_channel=st.booleans())
def test_counts_of_any_size_merge_to_the_exact_sums_in_any_order(backend, parts, per_channel):
    if per_channel:  # in the dtype of the mean
        parts = [(mean, var, float(np.float32(n))) for mean, var, n in parts]
    made, exact = exactly(backend, *parts)
    if per_channel:
        made = [
            anynorm.Moments(m.mean, m.var, counts(backend, [n], whole=False))
            for m, (*_, n) in zip(made, parts, strict=True)
        ]
    n = sum(count for *_, count in exact)
    if not n:
        return
    mean = sum(count * each for each, _, count in exact) / n
    var = sum(count * (spread + (each - mean) ** 2) for each, spread, count in exact) / n
    reach = float(max(abs(each - mean) for each, _, count in exact if count))
    for first, *others in itertools.permutations(made):
        merged = first.merge(*others)
        np.testing.assert_allclose(both(backend, merged), [float(mean)], rtol=1e-12, atol=3e-6 * reach + 1e-44)
        np.testing.assert_allclose(backend.numpy(merged.var), [float(var)], rtol=1e-5, atol=1e-37)


def test_a_part_of_almost_no_share_keeps_its_part_of_the_variance(backend):
    for n in (10**8, 10**12, 10**18):
        (small, large), _ = exactly(backend, (1e6, 0.0, 1), (0.0, 0.0, n))
        for merged in (small.merge(large), large.merge(small)):
            np.testing.assert_allclose(backend.numpy(merged.var), [1e12 / n], rtol=1e-5)


@given(
    parts=st.lists(
        arrays(np.float32, st.tuples(st.integers(0, 6), st.just(3)), elements=numbers), min_size=1, max_size=5
    ),
    offset=st.sampled_from([0.0, 1e3, -1e6]),
    data=st.data(),
)
def test_weighted_parts_merge_in_any_order_to_the_moments_of_the_whole(backend, parts, offset, data):
    weight = st.just(0.0) | st.floats(0.125, 100, width=16)
    weights = [data.draw(arrays(np.float32, part.shape, elements=weight)) for part in parts]
    parts = [part + np.float32(offset) for part in parts]
    own = replace(backend, tracked=False)
    if backend.library == "dask":  # it takes no chunk of size 0
        weights = [w for w, part in zip(weights, parts, strict=True) if part.size] or [np.ones((1, 3), np.float32)]
        parts = [part for part in parts if part.size] or [np.ones((1, 3), np.float32)]
    x, w = np.concatenate(parts).astype(np.longdouble), np.concatenate(weights).astype(np.longdouble)
    made = [
        anynorm.moments(own.array(part, "float32"), axis=0, weights=own.array(weight, "float32"))
        for part, weight in zip(parts, weights, strict=True)
    ]
    first, *others = data.draw(st.permutations(made))
    merged = first.merge(*others)
    np.testing.assert_allclose(own.numpy(merged.count), w.sum(axis=0).astype(float), rtol=1e-6)
    for i in range(3):
        if not w[:, i].any():
            continue
        mean = np.average(x[:, i], weights=w[:, i])
        var = np.average((x[:, i] - mean) ** 2, weights=w[:, i])
        reach = float(np.abs(x[w[:, i] > 0, i] - mean).max())
        np.testing.assert_allclose(both(own, merged)[i], float(mean), rtol=1e-13, atol=5e-6 * reach + 1e-37)
        np.testing.assert_allclose(own.numpy(merged.var)[i], float(var), rtol=1e-5, atol=2e-5 * reach**2 + 1e-30)


@given(seed=st.integers(0, 2**32 - 1), data=st.data(), correction=st.sampled_from([0, 1]))
def test_states_that_saw_batches_of_unequal_numbers_pool_to_the_whole(backend, seed, data, correction):
    rng, seen, workers = np.random.default_rng(seed), [], []
    for _ in range(data.draw(st.integers(1, 4))):
        worker = anynorm.RunningStats.init(2, like=backend.array(0.0, "float32"), momentum=None, correction=correction)
        for n in data.draw(st.lists(st.integers(2, 9), max_size=4)):
            seen.append((rng.standard_normal((n, 2)) + 1e6).astype(np.float32))
            worker = worker.update(anynorm.moments(replace(backend, tracked=False).array(seen[-1], "float32"), axis=0))
        workers.append(worker)
    first, *others = data.draw(st.permutations(workers))
    for other in others:
        first = first.merge(other)
    whole = np.concatenate([np.empty((0, 2)), *seen])
    assert first.count == len(whole)
    expected = (whole.mean(axis=0), whole.var(axis=0, ddof=correction)) if len(whole) else (np.zeros(2), np.ones(2))
    np.testing.assert_allclose(both(backend, first), expected[0], rtol=1e-13, atol=3e-5)
    np.testing.assert_allclose(backend.numpy(first.var), expected[1], rtol=1e-4)


def largest(dtype):
    return float(np.finfo(dtype).max)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numbers_near_the_largest_of_the_dtype_merge_as_in_one_pass(backend, dtype):
    if dtype == "float64" and not backend.float64:
        return
    top, plain = largest(dtype), replace(backend, tracked=False)
    for numbers in ([0.6, -0.6], [0.9] * 9 + [-0.9], [-1.0, 1.0], [1.0] * 3, [1.0, -1.0, 1e-30, -0.3], [-1.0] * 3):
        x = np.asarray(numbers).astype(dtype) * np.asarray(top, dtype)
        mean = float(sum(map(Fraction, x.tolist())) / len(x))
        parts = [plain.array(x[i : i + 1], dtype) for i in range(len(x))]
        each = [anynorm.moments(part, axis=0) for part in parts]
        weighted = [anynorm.moments(part, axis=0, weights=plain.array(True, "bool")) for part in parts]
        start = anynorm.RunningStats.init(1, like=parts[0], momentum=None)
        running = start
        for part in parts:
            running = running.update(anynorm.moments(plain.xp.reshape(part, (1, 1)), axis=0))
        states = [anynorm.RunningStats(one.mean, one.var, 1, momentum=None) for one in each]
        joined = states[0]
        for state in states[1:]:
            joined = joined.merge(state)
        for found in (
            each[0].merge(*each[1:]),
            each[-1].merge(*each[-2::-1]),
            weighted[0].merge(*weighted[1:]),
            anynorm.Moments.over(parts, axis=0),
            running,
            joined,
            anynorm.moments(plain.array(x, dtype), axis=0),
        ):
            np.testing.assert_allclose(plain.numpy(found.mean) / top, mean / top, rtol=3e-7, atol=1e-7)
            assert np.all(plain.numpy(found.var) == (0 if np.ptp(np.asarray(numbers)) == 0 else np.inf))
        old = anynorm.RunningStats(each[0].mean, each[0].var, 1, momentum=0.75).update(each[1])
        rule = float(Fraction(3, 4) * Fraction(float(x[0])) + Fraction(1, 4) * Fraction(float(x[1])))
        np.testing.assert_allclose(plain.numpy(old.mean) / top, rule / top, rtol=3e-7, atol=1e-7)


anywhere = st.floats(-largest("float32"), largest("float32"), width=32, allow_subnormal=False)


@pytest.mark.cells("numpy", "strict", "torch")
@given(parts=st.lists(st.tuples(anywhere, st.integers(1, 2**40)), min_size=2, max_size=5))
def test_means_of_any_size_merge_to_the_exact_mean_in_any_order(backend, parts):
    made, exact = exactly(backend, *((mean, 0.0, n) for mean, n in parts))
    n = sum(count for *_, count in exact)
    mean = sum(count * each for each, _, count in exact) / n
    reach = float(max(abs(each) for each, *_ in exact))
    for order in (made, made[::-1]):
        merged = order[0].merge(*order[1:])
        np.testing.assert_allclose(both(backend, merged), [float(mean)], rtol=1e-6, atol=1e-12 * reach + 1e-44)


def test_what_is_not_finite_stays_in_its_own_channel(backend):
    inf, nan, top = np.inf, np.nan, largest("float32")
    one, other = np.array([inf, 1, nan, 3, -inf, top]), np.array([1, inf, 2, 5, -1, -top])
    zeros = backend.array(np.zeros(6), "float32")
    parts = [anynorm.Moments(backend.array(mean, "float32"), zeros, 3) for mean in (one, other)]
    with np.errstate(all="ignore"):
        expected = one / 2 + other / 2
    for first, second in (parts, parts[::-1]):
        np.testing.assert_array_equal(backend.numpy(first.merge(second).mean), expected)
        start = anynorm.RunningStats(first.mean, zeros, 3, momentum=0.5)
        np.testing.assert_array_equal(backend.numpy(start.update(second).mean), expected)


def counted(backend, state):
    """The count to all the digits that are kept of it."""
    if not hasattr(state.count, "shape"):
        return state.count
    rest = 0 if state._count_rest is None else backend.numpy(state._count_rest)
    return backend.numpy(state.count) + rest  # in float64


def test_counts_of_each_channel_are_exact_beyond_the_digits_of_float32(backend):
    own = replace(backend, tracked=False)
    many = 2**24
    x, one = own.array(np.ones((1, 2)), "float32"), own.array(np.ones((1, 1)), "float32")
    row = anynorm.moments(x, axis=0, weights=one)
    for count in (many, *(counts(own, [many, many], whole) for whole in (False, True))):
        merged = anynorm.Moments(x[0, :], x[0, :], count)
        states = [anynorm.RunningStats(x[0, :], x[0, :], count, momentum=momentum) for momentum in (None, 0.9)]
        for _ in range(5):
            merged = merged.merge(row)
            states = [state.update(row) for state in states]
        for found in (merged, *states, states[0].merge(states[0])):
            times = 2 if found not in (merged, *states) else 1
            np.testing.assert_array_equal(counted(own, found), [times * (many + 5)] * 2)
        twice = merged.merge(merged)
        for _ in range(4):
            twice = twice.merge(twice)
        np.testing.assert_array_equal(counted(own, twice), [32 * (many + 5)] * 2)
