"""Merging and pooling: in any order, channel by channel, as exact as one pass over everything."""

import dataclasses
import io
import itertools
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import anynorm
from anynorm.arrays import library_of

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
    xp = library_of("count", found).xp
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

    x = np.random.default_rng(0).standard_normal((2, 50, 8, 3)) + 1e6
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


@pytest.mark.cells("numpy", "torch")
def test_a_float32_state_is_exact_over_very_many_batches(backend):
    rng, n = np.random.default_rng(5), 10_000
    x = rng.standard_normal((n, 8, 2)) + 1e4
    x[n // 2 :] += 1  # half of it would not count, if rounding took it
    running = anynorm.RunningStats.init(2, like=backend.array(0.0, "float32"), momentum=None)
    for each in x:
        running = running.update(moments(backend, each))
    np.testing.assert_allclose(both(backend, running), x.mean(axis=(0, 1)), rtol=0, atol=1e-7)
    np.testing.assert_allclose(backend.numpy(running.var), x.var(axis=(0, 1)), rtol=2e-5)


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
    assert "1." not in repr(value)
    assert dataclasses.replace(value).count is value.count


def test_moments_over_batches_of_any_sizes_are_those_of_the_whole(backend):
    x = np.random.default_rng(1).standard_normal((40, 3, 2)) + 5
    for sizes in ((40,), (1, 39), (7, 0, 13, 20), (0, 0), tuple([1] * 9), (3, 4, 5, 6, 7)):
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
        ValueError, match=r"^others must have the shape of the statistics they join, \(3,\), got \(2,\)$"
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
