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


def test_states_are_frozen_compared_by_identity_and_shown_without_their_numbers(backend):
    x = backend.array(np.ones((2, 3)), "float32")
    library = {"strict": "array_api_strict"}.get(backend.library, backend.library)
    moments, running = anynorm.moments(x, axis=0), anynorm.RunningStats.init(3, like=x, momentum=None)
    weight = anynorm.WeightNorm.from_weight(x)
    assert repr(moments) == f"Moments({library} float32 (3,), count=2)"
    assert repr(running) == f"RunningStats({library} float32 (3,), count=0, momentum=None, correction=0)"
    assert repr(weight) == f"WeightNorm(v={library} float32 (2, 3), g={library} float32 (2,), axis=0)"
    for state, field in ((moments, "mean"), (running, "count"), (weight, "g")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(state, field, None)
        twin = dataclasses.replace(state)
        assert state == state
        assert state != twin
        assert len({state, twin}) == 2


def test_a_state_keeps_its_dtype_whatever_the_batches_have(backend):
    x = np.random.default_rng(4).standard_normal((5, 3))
    for momentum in (0.9, None):
        start = anynorm.RunningStats.init(3, like=backend.array(1.0, "float32"), momentum=momentum)
        running = start.update(anynorm.moments(backend.array(x), axis=0))
        weight = 1 if momentum is None else 0.1
        backend.check(running.mean, weight * x.mean(axis=0), dtype="float32", tolerance=1e-6)
        assert running.var.dtype == start.var.dtype


@pytest.mark.cells("numpy", "torch", "cupy")
def test_a_float64_state_is_exact_over_very_many_float32_batches(backend):
    running, rng, sums = (
        anynorm.RunningStats.init(1, like=backend.array(1.0), momentum=None),
        np.random.default_rng(5),
        [],
    )
    for step in range(3000):
        batch = (rng.standard_normal((8, 1)) + 1e4 + (step >= 1500)).astype(np.float32)
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
