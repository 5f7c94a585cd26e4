"""Laws, for arrays that hypothesis finds."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

import anynorm

numbers = st.floats(-100, 100, width=32)


@st.composite
def samples(draw, least_rank=2, most_rank=4):
    """An array (N, C, *spatial) in float64."""
    rank = draw(st.integers(least_rank, most_rank))
    shape = draw(array_shapes(min_dims=rank, max_dims=rank, min_side=1, max_side=5))
    return draw(arrays(np.float64, shape, elements=numbers))


def close(backend, left, right, scale=1.0):
    left, right = (each if isinstance(each, np.ndarray | float) else backend.numpy(each) for each in (left, right))
    tolerance = max(1e-9, backend.tolerance) * scale
    np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance)


@given(x=samples())
def test_group_norm_with_one_group_is_layer_norm_over_channels_and_space(backend, x):
    x = backend.array(x)
    axes = tuple(range(1, x.ndim))
    close(backend, anynorm.group_norm(x, groups=1), anynorm.layer_norm(x, axis=axes))


@given(x=samples(least_rank=3))
def test_group_norm_with_a_group_for_each_channel_is_instance_norm(backend, x):
    x = backend.array(x)
    close(backend, anynorm.group_norm(x, groups=x.shape[1]), anynorm.instance_norm(x))


@given(x=samples(least_rank=3))
def test_batch_norm_of_one_sample_is_instance_norm(backend, x):
    x = backend.array(x[:1])
    close(backend, anynorm.batch_norm(x), anynorm.instance_norm(x))


@given(x=samples(), gamma=numbers)
def test_a_channel_axis_is_a_transposition(backend, x, gamma):
    moved = np.moveaxis(x, 1, -1)
    gamma = backend.array(np.full(x.shape[1], gamma))
    y = anynorm.batch_norm(backend.array(x), gamma)
    last = anynorm.batch_norm(backend.array(moved), gamma, channel_axis=-1)
    close(backend, np.moveaxis(backend.numpy(y), 1, -1), last, 100)


@given(x=samples(), shift=numbers, scale=st.floats(0.1, 10))
def test_a_norm_does_not_see_shift_and_scale(backend, x, shift, scale):
    eps = 1e-3
    y = anynorm.batch_norm(backend.array(x), eps=eps)
    other = anynorm.batch_norm(backend.array(x * scale + shift), eps=eps * scale**2)
    close(backend, y, other, 1e5)


@given(x=samples())
def test_rms_norm_of_centred_rows_is_layer_norm(backend, x):
    centred = x - x.mean(axis=-1, keepdims=True)
    close(backend, anynorm.rms_norm(backend.array(centred)), anynorm.layer_norm(backend.array(x)), 1e4)


@given(x=samples(), scale=st.floats(0.01, 100))
def test_weight_norm_does_not_see_the_length_of_v(backend, x, scale):
    x = np.where(np.abs(x) < 1e-2, 0, x)
    g = backend.array(np.arange(x.shape[0]) + 1.0)
    close(backend, anynorm.weight_norm(backend.array(x), g), anynorm.weight_norm(backend.array(x * scale), g), 10)


@given(parts=st.lists(arrays(np.float64, st.integers(0, 9), elements=numbers), min_size=3, max_size=3))
def test_merge_is_associative_order_free_and_as_exact_as_one_pass(backend, parts):
    a, b, c = (anynorm.moments(backend.array(part), axis=0) for part in parts)
    whole = np.concatenate(parts)
    expected = (whole.mean(), whole.var(), whole.size) if whole.size else (0.0, 0.0, 0)
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a, b), b.merge(c, a)):
        close(backend, merged.mean, expected[0], 100)
        close(backend, merged.var, expected[1], 1e4)
        assert merged.count == expected[2]


@given(x=samples(least_rank=3, most_rank=3), data=st.data(), factor=st.floats(-5, 5))
def test_a_pullback_is_linear(backend, x, data, factor):
    first, second = (data.draw(arrays(np.float64, x.shape, elements=st.floats(-5, 5))) for _ in range(2))
    gamma = backend.array(np.linspace(0.5, 2, x.shape[1]))
    for norm in (anynorm.batch_norm, anynorm.instance_norm):
        _, pullback = anynorm.vjp(norm, backend.array(x), gamma, gamma, eps=1.0)
        joint = pullback(backend.array(first + factor * second))
        for both, one, two in zip(joint, pullback(backend.array(first)), pullback(backend.array(second)), strict=True):
            close(backend, both, backend.numpy(one) + factor * backend.numpy(two), 1e4)


@given(x=samples(), data=st.data())
def test_the_gradient_of_a_norm_sums_to_zero_over_each_group(backend, x, data):
    dy = data.draw(arrays(np.float64, x.shape, elements=st.floats(-5, 5)))
    (dx,) = anynorm.vjp(anynorm.layer_norm, backend.array(x), eps=1.0)[1](backend.array(dy))
    close(backend, backend.numpy(dx).sum(axis=-1), np.zeros(x.shape[:-1]), 100)
