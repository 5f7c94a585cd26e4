"""`Moments`, `RunningStats` and `WeightNorm`: the summary's rule, exact pooling, and what a value is."""

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest

import anynorm


def batches(*sizes, offset=0.0):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((n, 3, 2)) * (i + 1) + offset + i for i, n in enumerate(sizes)]


def run(backend, running, numbers):
    for each in numbers:
        running = running.update(anynorm.moments(backend.array(each), axis=(0, 2)))
    return running


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("momentum", [0.9, 0.3, 0.0, 1.0])
def test_update_is_the_rule_of_the_summary(backend, momentum, correction):
    mean, var, numbers = np.zeros(3), np.ones(3), batches(4, 7, 2)
    for each in numbers:
        mean = momentum * mean + (1 - momentum) * each.mean(axis=(0, 2))
        var = momentum * var + (1 - momentum) * each.var(axis=(0, 2), ddof=correction)
    start = anynorm.RunningStats.init(3, like=backend.array(numbers[0]), momentum=momentum, correction=correction)
    running = run(backend, start, numbers)
    backend.check(running.mean, mean)
    backend.check(running.var, var)
    assert (running.count, running.momentum, running.correction) == (26, momentum, correction)
    backend.check(start.mean, np.zeros(3))
    backend.check(start.var, np.ones(3))
    assert start.count == 0


@pytest.mark.parametrize("correction", [0, 1])
def test_without_momentum_it_holds_the_exact_statistics_of_all_it_saw(backend, correction):
    numbers = batches(2, 100, 1, 7)
    start = anynorm.RunningStats.init(3, like=backend.array(1.0), momentum=None, correction=correction)
    running, whole = run(backend, start, numbers), np.concatenate(numbers)
    backend.check(running.mean, whole.mean(axis=(0, 2)))
    backend.check(running.var, whole.var(axis=(0, 2), ddof=correction))
    assert running.count == 220
    left, right = run(backend, start, numbers[:1]), run(backend, start, numbers[1:])
    for merged in (left.merge(right), right.merge(left), running.merge(start), start.merge(running)):
        backend.check(merged.mean, whole.mean(axis=(0, 2)))
        backend.check(merged.var, whole.var(axis=(0, 2), ddof=correction))
        assert merged.count == 220


def test_unequal_batches_are_not_averaged_as_if_they_were_equal(backend):
    numbers = [np.zeros((2, 1)), np.full((100, 1), 10.0)]  # PyTorch's momentum=None gives mean 5
    running = anynorm.RunningStats.init(1, like=backend.array(1.0), momentum=None)
    for each in numbers:
        running = running.update(anynorm.moments(backend.array(each), axis=0))
    backend.check(running.mean, [1000 / 102])


def test_workers_that_saw_other_data_are_pooled_with_the_spread_between_them(backend):
    left, right = np.array([-5.0, -6.0, -4.0]), np.array([5.0, 4.0, 6.0, 5.0])
    merged = anynorm.moments(backend.array(left), axis=0).merge(anynorm.moments(backend.array(right), axis=0))
    whole = np.concatenate([left, right])
    backend.check(merged.mean, whole.mean())
    backend.check(merged.var, whole.var())
    alone = anynorm.moments(backend.array(left), axis=0)
    assert alone.merge() is alone


@pytest.mark.cells("torch")
@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_running_statistics_are_those_of_torch(backend, momentum):
    torch = backend.xp
    theirs = torch.nn.BatchNorm1d(3, momentum=momentum).double().to(backend.device)
    ours = anynorm.RunningStats.init(3, like=backend.array(1.0), momentum=1 - momentum, correction=1)
    for each in map(backend.array, batches(4, 7, 2, offset=3)):
        expected = theirs(each)
        y, batch = anynorm.batch_norm(each, return_moments=True)
        ours = ours.update(batch)
        backend.check(y, backend.numpy(expected))
    backend.check(ours.mean, backend.numpy(theirs.running_mean))
    backend.check(ours.var, backend.numpy(theirs.running_var))
    theirs.eval()
    x = backend.array(batches(5)[0])
    backend.check(anynorm.batch_norm(x, moments=ours), backend.numpy(theirs(x)))


def test_a_state_of_2_byte_floats_is_kept_in_float32(backend):
    for dtype in backend.narrow:
        x = backend.array(batches(4)[0], dtype)
        running = anynorm.RunningStats.init(3, like=x).update(anynorm.moments(x, axis=(0, 2)))
        backend.check(running.mean, 0.1 * backend.numpy(x).mean(axis=(0, 2)), dtype="float32", tolerance=1e-6)
        y = anynorm.batch_norm(x, moments=running)
        assert y.dtype == x.dtype


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 2), None])
def test_weight_norm_starts_from_a_weight_and_gives_it_back(backend, axis):
    w = np.random.default_rng(1).standard_normal((4, 3, 2)) * 5
    state = anynorm.WeightNorm.from_weight(backend.array(w), axis=axis)
    kept = () if axis is None else tuple(each % 3 for each in np.atleast_1d(axis))
    others = tuple(each for each in range(3) if each not in kept)
    backend.check(state.g, np.sqrt((w**2).sum(axis=others)))
    backend.check(state.v, w)
    backend.check(state.weight, w)
    doubled = anynorm.WeightNorm(state.v, state.g * 2, axis=axis)
    backend.check(doubled.weight, 2 * w)


def test_weight_norm_starts_from_weights_of_every_magnitude(backend):
    for scale in (1e30, 1.0, 1e-30):
        w = np.array([[3.0, 4.0], [5.0, 12.0]]) * scale
        state = anynorm.WeightNorm.from_weight(backend.array(w, "float32"))
        np.testing.assert_allclose(backend.numpy(state.g), np.array([5.0, 13.0]) * scale, rtol=1e-6)
        np.testing.assert_allclose(backend.numpy(state.weight), w, rtol=1e-6)


def test_a_weight_to_start_from_is_called_w_where_it_is_wrong(backend):
    with pytest.raises(TypeError, match=r"^w must have a real floating dtype, got .*int32"):
        anynorm.WeightNorm.from_weight(backend.xp.ones((2, 2), dtype=backend.xp.int32))


def test_the_standard_deviation_of_running_statistics_is_the_root_of_their_variance(backend):
    var = np.asarray([0.0, 4.0, 1e-12, 1e12])
    running = anynorm.RunningStats(backend.array(var), backend.array(var), 7, correction=1)
    backend.check(running.std(), np.sqrt(var))


def test_states_are_frozen_compared_by_identity_and_shown_with_their_numbers(backend):
    x = backend.array(np.ones((2, 3)), "float32")
    library = {"strict": "array_api_strict"}.get(backend.library, backend.library)
    moments, running = anynorm.moments(x, axis=0), anynorm.RunningStats.init(3, like=x, momentum=None)
    weight = anynorm.WeightNorm.from_weight(x)
    numbers = [f", mean=[{each}]" for each in ("1. 1. 1.", "0. 0. 0.")]
    numbers = [f"{mean}, std=[{std}]" for mean, std in zip(numbers, ("0. 0. 0.", "1. 1. 1."), strict=True)]
    v, g = " [[1. 1. 1.] [1. 1. 1.]]", " [1.7321 1.7321]"
    if backend.library == "dask":  # whose numbers are not there yet
        numbers, v, g = ["", ""], "", ""
    assert repr(moments) == f"Moments({library} float32 (3,){numbers[0]}, count=2)"
    assert repr(running) == f"RunningStats({library} float32 (3,){numbers[1]}, count=0, momentum=None, correction=0)"
    assert repr(weight) == f"WeightNorm(v={library} float32 (2, 3){v}, g={library} float32 (2,){g}, axis=0)"
    for state, field in ((moments, "mean"), (running, "count"), (weight, "g")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(state, field, None)
        twin = dataclasses.replace(state)
        assert state == state
        assert state != twin
        assert len({state, twin}) == 2


@pytest.mark.cells("numpy", "torch", "jax")
def test_states_of_many_numbers_are_shown_as_numpy_abbreviates(backend):
    plain = dataclasses.replace(backend, tracked=False)
    mean, count = plain.array(np.arange(64.0), "bfloat16"), plain.array(np.arange(64.0))
    shown = repr(anynorm.Moments(mean, plain.array(np.array([0.0, 1, 2, *[61, 62, 63] * 21])[:64], "float32"), count))
    assert shown.startswith(
        f"Moments({plain.library} bfloat16 (64,), mean=[ 0. 1. 2. ... 61. 62. 63.], std=[0. 1. 1.4142 ... "
    )
    assert shown.endswith("count=[ 0. 1. 2. ... 61. 62. 63.])")
    for shape in ((2000,), (12, 12)):
        zeros = plain.array(np.zeros(shape))
        assert repr(anynorm.Moments(zeros, zeros, 1)) == f"Moments({plain.library} float64 {shape}, count=1)"


def test_a_state_keeps_its_dtype_whatever_the_batches_have(backend):
    x = np.random.default_rng(4).standard_normal((5, 3))
    for momentum in (0.9, None):
        start = anynorm.RunningStats.init(3, like=backend.array(1.0, "float32"), momentum=momentum)
        running = start.update(anynorm.moments(backend.array(x), axis=0))
        weight = 1 if momentum is None else 0.1
        backend.check(running.mean, weight * x.mean(axis=0), dtype="float32", tolerance=1e-6)
        assert running.var.dtype == start.var.dtype


@pytest.mark.untracked
@pytest.mark.cells("numpy", "torch", "cupy")
def test_a_float64_state_is_exact_over_very_many_float32_batches(backend):
    running, rng, sums = (
        anynorm.RunningStats.init(1, like=backend.array(1.0), momentum=None),
        np.random.default_rng(5),
        [],
    )
    for step in range(1000):
        batch = (rng.standard_normal((8, 1)) + 1e4 + (step >= 500)).astype(np.float32)
        sums.append(batch.astype(np.float64))
        running = running.update(anynorm.moments(backend.array(batch), axis=0))
    whole = np.concatenate(sums)
    np.testing.assert_allclose(backend.numpy(running.mean), whole.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(backend.numpy(running.var), whole.var(axis=0), rtol=1e-9)


def test_parts_that_are_empty_or_far_apart_merge(backend):
    far = anynorm.Moments(backend.array([1e30], "float32"), backend.array([np.inf], "float32"), 0)
    near = anynorm.Moments(backend.array([1.0], "float32"), backend.array([2.0], "float32"), 3)
    for merged in (far.merge(near), near.merge(far)):
        backend.check(merged.mean, [1.0], dtype="float32", tolerance=0)
        backend.check(merged.var, [2.0], dtype="float32", tolerance=0)
    if backend.float64:
        large = anynorm.Moments(backend.array([1e300]), backend.array([1.0]), 1)
        narrow = near.merge(anynorm.Moments(backend.array([1.0]), backend.array([2.0]), 3))
        backend.check(narrow.mean, [1.0], dtype="float32")
        assert backend.numpy(near.merge(large).mean) == np.inf


@pytest.mark.cells("numpy", "torch", "cupy")
def test_a_state_has_arrays_of_its_own(backend):
    x = np.random.default_rng(7).standard_normal((5, 3))
    first, nothing = anynorm.moments(backend.array(x), axis=0), anynorm.moments(backend.array(x[:0]), axis=0)
    running = anynorm.RunningStats.init(3, like=backend.array(x), momentum=None)
    made = [running.update(first), nothing.merge(first), first.merge(nothing)]
    for each in (first.mean, first.var):
        each[...] = math.nan
    for state in made:
        backend.check(state.mean, x.mean(axis=0))
        backend.check(state.var, x.var(axis=0))


@pytest.mark.cells("numpy", "strict", "torch", "jax")
def test_states_and_pullbacks_are_copied_and_states_pickled(backend):
    x = backend.array(np.random.default_rng(6).standard_normal((4, 3)))
    if getattr(x, "requires_grad", False):
        x = x.detach()
    moments = anynorm.moments(x, axis=0)
    for state in (moments, anynorm.RunningStats.init(3, like=x), anynorm.WeightNorm.from_weight(x)):
        assert repr(copy.deepcopy(state)) == repr(state)
        if backend.library != "strict":  # its devices cannot be pickled
            assert repr(pickle.loads(pickle.dumps(state))) == repr(state)
    _, pullback = anynorm.vjp(anynorm.layer_norm, x)
    assert repr(pullback).startswith("Pullback(")


@pytest.mark.untracked
@pytest.mark.parametrize("correction", [0, 1])
def test_a_state_with_momentum_follows_the_rule_over_many_updates(backend, correction):
    """Weights that do not add up to 1 leave float32 0.11 off in the mean after 4,000 of these; PyTorch too."""
    slow, momentum = backend.library != "numpy", 0.999  # each update is compiled, or a graph
    rng, steps = np.random.default_rng(8), 60 if slow else 4000
    x = (rng.standard_normal((steps, 8, 2)) + 1e4).astype(np.float32)
    mean, var = x[0].mean(axis=0, dtype=np.float64), np.ones(2)
    running = anynorm.RunningStats(
        backend.array(mean, "float32"), backend.array(var, "float32"), 8, momentum=momentum, correction=correction
    )
    mean = backend.numpy(running.mean)
    bessel = 8 / 7 if correction else 1.0
    for batch in x:
        wide = batch.astype(np.float64)
        part = [(wide.mean(axis=0)), wide.var(axis=0)]
        # with all their digits, so that what is seen is the update's
        moments = anynorm.Moments._with_rest(
            *(backend.array(each, "float32") for each in (part[0], part[0] - part[0].astype(np.float32), part[1])), 8
        )
        mean = momentum * mean + (1 - momentum) * part[0]
        var = momentum * var + (1 - momentum) * bessel * part[1]
        running = running.update(moments)
    np.testing.assert_allclose(backend.numpy(running.mean), mean, rtol=0, atol=6e-4)  # a unit in the last place is 1e-3
    np.testing.assert_allclose(backend.numpy(running.mean) + backend.numpy(running._rest), mean, rtol=0, atol=2e-7)
    np.testing.assert_allclose(backend.numpy(running.var) + backend.numpy(running._var_rest), var, rtol=2e-7)


@pytest.mark.cells("numpy", "torch")
def test_steps_that_are_lost_beside_a_mean_and_a_variance_add_up(backend):
    zeros, ones = backend.array([0.0], "float32"), backend.array([1.0], "float32")
    running = anynorm.RunningStats(ones, ones, 1, momentum=1 - 2.0**-26)
    batch = anynorm.Moments(zeros, zeros, 1)
    for _ in range(1000):
        running = running.update(batch)
    for found, rest in ((running.mean, running._rest), (running.var, running._var_rest)):
        np.testing.assert_allclose(
            1 - (backend.numpy(found) + backend.numpy(rest)), 1 - (1 - 2.0**-26) ** 1000, rtol=1e-5
        )


SCALARS = [np.float16, np.float32, np.float64, np.longdouble]


@pytest.mark.parametrize("scalar", SCALARS, ids=lambda scalar: scalar.__name__)
def test_a_scalar_of_numpy_is_the_python_number_that_it_is(backend, scalar, tmp_path):
    given = scalar(0.3)
    momentum, eps, plain = float(given), float(scalar(1e-3)), dataclasses.replace(backend, tracked=False)
    x = plain.array(np.random.default_rng(9).standard_normal((6, 4)), "float32")
    batch, like = anynorm.moments(x, axis=np.int64(0)), plain.array(0.0, "float32")
    found = anynorm.RunningStats.init(np.int32(4), like=like, momentum=given, correction=np.uint8(1)).update(batch)
    other = anynorm.RunningStats.init(4, like=like, momentum=momentum, correction=1).update(batch)
    assert repr(found) == repr(other)
    assert (type(found.momentum), type(found.correction)) == (float, int)
    for name in ("mean", "var"):
        plain.check(getattr(found, name), plain.numpy(getattr(other, name)), dtype="float32", tolerance=0)
    if plain.library != "strict":
        for state in (found, other):
            state.save(tmp_path / f"{state is found}.npz")
        assert (tmp_path / "True.npz").read_bytes()[-64:] == (tmp_path / "False.npz").read_bytes()[-64:]  # the checksum
    for norm, options, numbers in (
        (anynorm.layer_norm, {"axis": 1}, {"axis": np.int8(1)}),
        (anynorm.layer_norm, {"axis": (0, 1)}, {"axis": (np.int64(0), np.uint16(1))}),
        (anynorm.group_norm, {"groups": 2, "channel_axis": -1}, {"groups": np.int64(2), "channel_axis": np.int16(-1)}),
        (anynorm.batch_norm, {"channel_axis": 1}, {"channel_axis": np.asarray(1)}),
    ):
        y = norm(x, eps=scalar(1e-3), **numbers)
        plain.check(y, plain.numpy(norm(x, eps=eps, **options)), dtype="float32", tolerance=0)
    for axis, python in ((np.int64(1), 1), ((np.int64(1), np.asarray(0)), (1, 0))):
        g = np.ones((6, 4) if isinstance(python, tuple) else 4)
        state = anynorm.WeightNorm(x, plain.array(g, "float32"), axis=axis)
        assert state.axis == python
        assert "np." not in repr(state)
    with anynorm.options(threads=np.int64(1), block_bytes=np.uint32(64)):
        plain.check(anynorm.layer_norm(x), plain.numpy(anynorm.layer_norm(x)), dtype="float32", tolerance=1e-5)


def test_an_array_is_no_real_number_even_without_axes(backend):
    x, third = backend.array(np.ones((2, 3)), "float32"), backend.array(0.25, "float32")
    for number in (third, np.asarray(0.25)):
        for wrong in (
            lambda number=number: anynorm.RunningStats.init(3, like=x, momentum=number),
            lambda number=number: anynorm.RunningStats.init(3, like=x, correction=number),
            lambda number=number: anynorm.layer_norm(x, eps=number),
        ):
            with pytest.raises(TypeError, match=r"^(momentum|correction|eps) must be a real number, got "):
                wrong()


@pytest.mark.cells("numpy", "torch", "jax", "strict")
def test_copies_have_all_the_digits(backend):
    x = np.random.default_rng(10).standard_normal((9, 3)) + 1e6
    plain = dataclasses.replace(backend, tracked=False)
    batch = anynorm.moments(plain.array(x, "float32"), axis=0, weights=plain.array(True, "bool"))
    running = anynorm.RunningStats.init(3, like=plain.array(0.0, "float32"), momentum=0.75)
    for state in (batch, running.update(batch)):
        copies = [copy.copy(state), copy.deepcopy(state)]
        if plain.library != "strict":  # its devices cannot be pickled
            copies.append(pickle.loads(pickle.dumps(state)))
        for each in copies:
            for field in dataclasses.fields(state):
                found, expected = getattr(each, field.name), getattr(state, field.name)
                if hasattr(expected, "shape"):
                    np.testing.assert_array_equal(plain.numpy(found), plain.numpy(expected))
                else:
                    assert found == expected


def averaged(values, momentum):
    """Haiku's ExponentialMovingAverage with zero_debias: what was averaged, divided by 1 - decay**counter."""
    hidden = np.zeros_like(values[0])
    for value in values:
        hidden = hidden * momentum + value * (1 - momentum)
    return hidden / (1 - momentum ** len(values))


@pytest.mark.parametrize("momentum", [0.9, 0.0, 0.999])
def test_debiased_statistics_are_those_of_haiku(backend, momentum):
    numbers = batches(4, 7, 2, offset=5)
    running = anynorm.RunningStats.init(3, like=backend.array(1.0), momentum=momentum, correction=1, debias=True)
    backend.check(running.mean, np.zeros(3))
    backend.check(running.var, np.ones(3))
    for n in range(1, len(numbers) + 1):
        running = run(backend, running, numbers[n - 1 : n])
        backend.check(running.mean, averaged([each.mean(axis=(0, 2)) for each in numbers[:n]], momentum))
        backend.check(running.var, averaged([each.var(axis=(0, 2), ddof=1) for each in numbers[:n]], momentum))
    assert (running.count, running.debias) == (26, True)
    assert repr(running).endswith(f"count=26, momentum={momentum}, correction=1, debias=True)")
    with pytest.raises(ValueError, match=rf"^momentum must be None in both to merge, got {momentum} and {momentum}$"):
        running.merge(running)


def test_the_first_batch_takes_the_place_of_the_start(backend):
    batch = anynorm.moments(backend.array(batches(5, offset=1e4)[0]), axis=(0, 2))
    for momentum in (0.9, 0.999999):
        start = anynorm.RunningStats.init((3,), like=backend.array(1.0), momentum=momentum, debias=True)
        first = start.update(batch)
        for name in ("mean", "var", "_rest"):
            np.testing.assert_array_equal(backend.numpy(getattr(first, name)), backend.numpy(getattr(batch, name)))
    stays = anynorm.RunningStats.init(3, like=backend.array(1.0), momentum=1, debias=True).update(batch)
    backend.check(stays.mean, np.zeros(3), tolerance=0)
    backend.check(stays.var, np.ones(3), tolerance=0)


def test_each_channel_is_divided_by_the_weight_that_it_has_seen(backend):
    plain, momentum = dataclasses.replace(backend, tracked=False), 0.75
    numbers = batches(4, 7, 2, 3, offset=5)
    masks = [np.array([i % 2 == 0, i > 1, i == 9])[:, None] for i in range(4)]
    running = anynorm.RunningStats.init(3, like=plain.array(1.0), momentum=momentum, debias=True)
    for i, (each, mask) in enumerate(zip(numbers, masks, strict=True)):
        weights = plain.array(mask, "bool") if i else None  # the first has one count for all
        running = running.update(anynorm.moments(plain.array(each), axis=(0, 2), weights=weights))
    for channel in range(3):
        seen = [each[:, channel] for i, each in enumerate(numbers) if masks[i][channel, 0] or i == 0]
        found = plain.numpy(running.mean)[channel], plain.numpy(running.var)[channel]
        expected = [averaged([of(each) for each in seen], momentum) for of in (np.mean, np.var)]
        np.testing.assert_allclose(found, expected, rtol=plain.tolerance)


def test_a_state_of_a_mean_and_a_variance_has_seen_all(backend):
    numbers, mean, var = batches(4, 7), np.arange(3.0), np.arange(3.0) + 1
    states = [anynorm.RunningStats(backend.array(mean), backend.array(var), debias=each) for each in (False, True)]
    plain, debiased = (run(backend, state, numbers) for state in states)
    for name in ("mean", "var"):
        backend.check(getattr(debiased, name), backend.numpy(getattr(plain, name)), tolerance=0)
    exact = anynorm.RunningStats.init(3, like=backend.array(1.0), momentum=None, debias=True)
    both = run(backend, exact, numbers).merge(run(backend, exact, numbers[:1]))  # it forgets nothing, and has no bias
    backend.check(both.mean, np.concatenate([*numbers, numbers[0]]).mean(axis=(0, 2)))


@pytest.mark.cells("numpy", "torch")
def test_a_debiased_float32_state_is_exact_over_many_updates(backend):
    momentum, rng = 0.999, np.random.default_rng(11)
    x = (rng.standard_normal((500, 8, 2)) + 1e4).astype(np.float32)
    running = anynorm.RunningStats.init(2, like=backend.array(1.0, "float32"), momentum=momentum, debias=True)
    for batch in x:
        running = running.update(anynorm.moments(backend.array(batch, "float32"), axis=0))
    expected = averaged(list(x.astype(np.float64).mean(axis=1)), momentum)
    np.testing.assert_allclose(backend.numpy(running.mean) + backend.numpy(running._rest), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        backend.numpy(running.var), averaged(list(x.astype(np.float64).var(axis=1)), momentum), rtol=1e-5
    )


@pytest.mark.cells("jax")
def test_a_debiased_state_crosses_jit_and_scan(backend):
    import jax

    numbers = np.stack(batches(4, 4, 4, offset=5))
    start = anynorm.RunningStats.init(3, like=backend.array(1.0), debias=True)

    def step(running, x):
        return running.update(anynorm.moments(x, axis=(0, 2))), None

    found, _ = jax.lax.scan(step, start, backend.array(numbers))
    for each in (found, jax.jit(lambda state: state)(found)):
        backend.check(each.mean, averaged([each.mean(axis=(0, 2)) for each in numbers], 0.9))
    following = step(found, backend.array(numbers[0]))[0]
    backend.check(following.mean, averaged([each.mean(axis=(0, 2)) for each in (*numbers, numbers[0])], 0.9))


def test_statistics_may_have_any_shape(backend):
    x = np.random.default_rng(12).standard_normal((5, 2, 3))
    running = anynorm.RunningStats.init((2, 3), like=backend.array(x), momentum=0.5)
    running = running.update(anynorm.moments(backend.array(x), axis=0))
    backend.check(running.mean, 0.5 * x.mean(axis=0))
    backend.check(anynorm.RunningStats.init((), like=backend.array(x)).var, np.asarray(1.0))
