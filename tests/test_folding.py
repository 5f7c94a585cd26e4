"""`fold` and `fold_next` beside the layers themselves, and weight norm's start from data beside its equations."""

import dataclasses
import re

import numpy as np
import pytest
from oracles import only_if

import anynorm


def numbers(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def known(backend, mean, var, dtype=None):
    return anynorm.RunningStats(backend.array(mean, dtype), backend.array(var, dtype), 7)


# the formula, one number after another, on every library


@pytest.mark.parametrize(
    ("shape", "options", "channel"),
    [
        ((6, 3, 2), {}, lambda o, i: o),
        ((6, 3, 2), {"groups": 3}, lambda o, i: o),
        ((2, 3, 6), {"axis": -1, "groups": 2}, lambda _, o, c: c),
        ((4, 3, 2), {"axis": 1, "groups": 2}, lambda i, o: i // 2 * 3 + o),
        ((3, 4, 2), {"axis": 0, "groups": 2}, lambda o, i: i // 2 * 3 + o),
        ((2, 3, 4), {"axis": 1, "in_axis": 2, "groups": 4}, lambda _, o, i: i * 3 + o),
    ],
    ids=["OIK", "groups", "KIO", "transposed, IOK", "transposed, OIK", "transposed, KOI"],
)
def test_each_weight_is_scaled_by_its_output(backend, shape, options, channel):
    only_if(options.get("groups", 1) in (1, 3, 4), backend)
    c = 1 + max(channel(*at[:3]) if channel.__code__.co_argcount == 3 else channel(*at[:2]) for at in np.ndindex(shape))
    w, b, gamma, beta, mean, var = numbers(0, shape, c, c, c, c, c)
    var = var**2
    scale = gamma / np.sqrt(var + 1e-3)
    expected = w.copy()
    for at in np.ndindex(shape):
        expected[at] = w[at] * scale[channel(*at[: channel.__code__.co_argcount])]
    arrays = [backend.array(each) for each in (w, b, gamma, beta)]
    folded, shift = anynorm.fold(*arrays, moments=known(backend, mean, var), eps=1e-3, **options)
    backend.check(folded, expected)
    backend.check(shift, (b - mean) * scale + beta)
    folded, shift = anynorm.fold(arrays[0], None, None, None, moments=known(backend, mean, var), eps=1e-3, **options)
    backend.check(shift, -mean / np.sqrt(var + 1e-3))
    for array, values in zip(arrays, (w, b, gamma, beta), strict=True):
        backend.check(array, values)


@pytest.mark.parametrize(
    ("shape", "options", "outputs", "inputs"),
    [
        ((6, 3, 2), {}, lambda o, i: o, lambda o, i: i),
        ((6, 3, 2), {"groups": 2}, lambda o, i: o, lambda o, i: o // 3 * 3 + i),
        ((6, 1, 2), {"groups": 6}, lambda o, i: o, lambda o, i: o),
        ((3, 6, 2), {"axis": 0, "out_axis": 1, "groups": 2}, lambda i, o: o, lambda i, o: o // 3 * 3 + i),
        ((4, 3, 2), {"axis": 0, "out_axis": 1, "groups": 2}, lambda i, o: i // 2 * 3 + o, lambda i, o: i),
        ((3, 4, 2), {"axis": 1, "out_axis": 0, "groups": 2}, lambda o, i: i // 2 * 3 + o, lambda o, i: i),
    ],
    ids=["OIK", "groups", "depthwise", "IOK", "transposed, IOK", "transposed, OIK"],
)
def test_each_weight_is_scaled_by_its_input_and_the_bias_takes_the_shift(backend, shape, options, outputs, inputs):
    only_if(options.get("groups", 1) != 1, backend)
    places = list(np.ndindex(shape))
    c, n = (1 + max(of(*at[:2]) for at in places) for of in (inputs, outputs))
    w, b, gamma, beta, mean, var = numbers(1, shape, n, c, c, c, c)
    var = var**2
    moments, arrays = known(backend, mean, var), [backend.array(each) for each in (w, b, gamma, beta)]
    rstd = 1 / np.sqrt(var + 1e-5)
    for scale, shift, given in (
        (gamma, beta, {}),
        (gamma * rstd, beta - mean * gamma * rstd, {"moments": moments}),
    ):
        scaled, bias = w.copy(), b.copy()
        for at in places:
            scaled[at] = w[at] * scale[inputs(*at[:2])]
            bias[outputs(*at[:2])] += w[at] * shift[inputs(*at[:2])]
        found = anynorm.fold_next(*arrays, **given, **options)
        backend.check(found[0], scaled)
        backend.check(found[1], bias)
        backend.check(anynorm.fold_next(arrays[0], None, *arrays[2:], **given, **options)[1], bias - b)
    assert anynorm.fold_next(arrays[0], None, arrays[2], None, **options)[1] is None
    assert anynorm.fold_next(*arrays[:3], None, **options)[1] is arrays[1]
    assert anynorm.fold_next(arrays[0], None, None, None, **options) == (arrays[0], None)


@pytest.mark.cells("numpy", "strict", "torch", "dask")
def test_numbers_are_rounded_once(backend):
    """Twice would show: a scale in float32 is off by half a unit in its last place in every other number."""
    w, b, gamma, beta, mean, var = (each.astype(np.float32) for each in numbers(2, (64, 5), 64, 64, 64, 64, 64))
    var = np.abs(var)
    arrays = [backend.array(each, "float32") for each in (w, b, gamma, beta)]
    folded, shift = anynorm.fold(*arrays, moments=known(backend, mean, var, "float32"))
    scale = gamma / np.sqrt(var.astype(np.float64) + 1e-5)
    tolerance = 0 if backend.float64 else 4e-7
    backend.check(folded, (w * scale[:, None]).astype(np.float32), dtype="float32", tolerance=tolerance)
    expected = ((b.astype(np.float64) - mean) * scale + beta).astype(np.float32)
    backend.check(shift, expected, dtype="float32", tolerance=4 * tolerance)
    after, bias = anynorm.fold_next(arrays[0], None, arrays[1][:5], arrays[2][:5])
    backend.check(after, w * b[:5], dtype="float32", tolerance=tolerance)
    backend.check(bias, (w.astype(np.float64) @ gamma[:5]).astype(np.float32), dtype="float32", tolerance=tolerance * 4)


@pytest.mark.cells("numpy", "torch", "jax")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_2_byte_weights_keep_their_dtype(backend, dtype):
    w, gamma, mean, var = numbers(3, (4, 3), 4, 4, 4)
    w, gamma = (backend.numpy(backend.array(each, dtype)) for each in (w, gamma))
    scale = gamma / np.sqrt(var**2 + 1e-5)
    moments = known(backend, mean, var**2)
    folded, shift = anynorm.fold(backend.array(w, dtype), None, backend.array(gamma, dtype), None, moments=moments)
    backend.check(folded, w * scale[:, None], dtype=dtype, tolerance=1e-2)
    backend.check(shift, -mean * scale, dtype=dtype, tolerance=1e-2)
    b = backend.array(np.zeros(4), "float32")
    _, shift = anynorm.fold(backend.array(w, dtype), b, None, None, moments=moments)
    backend.check(shift, -mean / np.sqrt(var**2 + 1e-5), dtype="float32", tolerance=1e-5)


def outputs_near_a_million(backend):
    """Float32 numbers: a backend that records nothing, their moments on it, and they in float64."""
    plain = dataclasses.replace(backend, tracked=False)
    t = (numbers(4, (1001, 3))[0] + 1e6).astype(np.float32)
    return plain, anynorm.moments(plain.array(t, "float32"), axis=0), t.astype(np.float64)


@pytest.mark.cells("numpy", "strict")
def test_all_the_digits_of_a_mean_are_used_beside_a_bias_that_is_near_it(backend):
    """Outputs near 1e6, computed in float64 or, where there is none, float32, in which a mean is off by 0.03."""
    plain, moments, wide = outputs_near_a_million(backend)
    eye, b = plain.array(np.eye(3), "float32"), plain.array(np.full(3, 1e6), "float32")
    _, shift = anynorm.fold(eye, b, None, None, moments=moments, eps=0)
    plain.check(shift, (1e6 - wide.mean(axis=0)) / wide.std(axis=0), dtype="float32", tolerance=1e-6)


@pytest.mark.cells("numpy", "torch")
def test_all_the_digits_of_a_mean_are_used(backend):
    """Outputs near 1e6: a mean in float32 is off by 0.03, which the bias would be too."""
    plain, moments, wide = outputs_near_a_million(backend)
    eye = plain.array(np.eye(3), "float64")
    _, shift = anynorm.fold(eye, None, None, None, moments=moments, eps=0)
    plain.check(shift, -wide.mean(axis=0) / np.sqrt(plain.numpy(moments.var)), tolerance=1e-12)
    _, shift = anynorm.fold_next(eye, None, None, None, moments=moments, eps=0)
    plain.check(shift, -wide.mean(axis=0) / np.sqrt(plain.numpy(moments.var)), tolerance=1e-12)


def test_a_channel_without_spread_is_what_the_norm_makes_of_it(backend):
    w, b, mean = numbers(5, (3, 4), 3, 3)
    moments = known(backend, mean, np.array([0.0, 1.0, 4.0]))
    (x,) = numbers(6, (5, 4))
    folded, shift = anynorm.fold(backend.array(w), backend.array(b), None, None, moments=moments, eps=0)
    expected = anynorm.batch_norm(backend.array(x @ w.T + b), moments=moments, eps=0)
    backend.check(folded @ backend.array(x.T) + shift[:, None], backend.numpy(expected).T)
    backend.check(shift[0], (b - mean)[0])


@pytest.mark.cells("numpy", "strict", "torch", "dask")
def test_there_may_be_nothing(backend):
    moments = known(backend, np.zeros(0), np.zeros(0))
    folded, shift = anynorm.fold(backend.array(np.zeros((0, 3))), None, None, None, moments=moments)
    assert (tuple(folded.shape), tuple(shift.shape)) == ((0, 3), (0,))
    folded, shift = anynorm.fold_next(backend.array(np.zeros((2, 0))), None, None, None, moments=moments)
    backend.check(shift, np.zeros(2))


@pytest.mark.cells("numpy")
def test_arrays_may_be_read_only_and_in_any_order():
    w, gamma, mean, var = numbers(7, (4, 6), 8, 8, 8)
    w, gamma = np.asfortranarray(w)[:, ::-1], gamma[::2]
    w.flags.writeable = False
    moments = anynorm.Moments(mean[::2], var[::2] ** 2, 3)
    folded, _ = anynorm.fold(w, None, gamma, None, moments=moments)
    np.testing.assert_allclose(folded, w * (gamma / np.sqrt(moments.var + 1e-5))[:, None], rtol=1e-14)


@pytest.mark.cells("numpy", "torch")
def test_what_does_not_fit_is_refused_by_name(backend):
    def array(*shape):
        return backend.array(np.ones(shape))

    def refused(message, function, *args, error=ValueError, **options):
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            function(*args, **options)

    w, moments = array(6, 3, 2), known(backend, np.ones(6), np.ones(6))
    fold, following = anynorm.fold, anynorm.fold_next
    message = "gamma must have shape (6,), one for each of the outputs of w along axis 0, got (3,)"
    refused(message, fold, w, None, array(3), None, moments=moments)
    refused("beta must have shape (6,), got (1,)", fold, w, None, array(6), array(1), moments=moments)
    refused("b must have shape (6,), got (3,)", fold, w, array(3), None, None, moments=moments)
    message = "moments must have shape (3,), one for each of the outputs of w along axis 1, got (6,)"
    refused(message, fold, w, None, None, None, moments=moments, axis=1)
    message = "moments must have shape (3,) or (12,), one for each of the outputs of w along axis 1, got (6,)"
    refused(message, fold, w, None, None, None, moments=moments, axis=1, groups=4)
    message = "gamma must have shape (3,), one for each of the inputs of w along axis 1, got (6,)"
    refused(message, following, w, None, array(6), None)
    refused("moments must have shape (3,), got (6,)", following, w, None, array(3), None, moments=moments)
    refused("b must have shape (6,), got (3,)", following, w, array(3), array(3), None)
    refused("b must have shape (9,), got (3,)", following, w, array(3), array(6), None, axis=0, out_axis=1, groups=3)
    refused("groups must divide axis 0 of w, of shape (6, 3, 2), got 4", fold, w, None, array(6), None,
            moments=moments, groups=4)  # fmt: skip
    refused("groups must be at least 1, got 0", fold, w, None, None, None, moments=moments, groups=0)
    refused("out_axis must be another axis than axis, 1, got -2", following, w, None, array(3), None, out_axis=-2)
    refused("axis must be in [-3, 3) for shape (6, 3, 2), got 3", fold, w, None, None, None, moments=moments, axis=3)
    refused("axis must be an int, got None", fold, w, None, None, None, moments=moments, axis=None, error=TypeError)
    refused("eps must be finite and at least 0, got -1", fold, w, None, None, None, moments=moments, eps=-1)
    refused("gamma must have shape (6,), got (6, 1)", fold, w, None, array(6, 1), None, moments=moments)
    message = "moments must be Moments or RunningStats, got "
    refused(f"{message}int", fold, w, None, None, None, moments=1, error=TypeError)
    refused(f"{message}NoneType", fold, w, None, array(6), None, moments=None, error=TypeError)
    refused("b must be an array, got int", fold, w, 0, None, None, moments=moments, error=TypeError)
    message = "fold has no argument epsilon: it is eps here"
    refused(message, fold, w, None, None, None, moments=moments, epsilon=1, error=TypeError)
    if backend.library == "torch":
        message = "w and b must come from one array library, got torch and numpy"
        refused(message, fold, w, np.ones(6), None, None, moments=moments, error=TypeError)


# PyTorch's own layers


def torch_only(test):
    return pytest.mark.cells("torch")(pytest.mark.untracked(test))


def layer(torch, kind, dims, groups, seed):
    """A convolution or a linear layer as a function of x, w and b, with a weight for it, and an input."""
    functional, n = torch.nn.functional, dims
    if kind == "linear":
        w, b, x = numbers(seed, (8, 12), 8, (5, 12))
        return functional.linear, w, b, x
    w = (8, 12 // groups, *(3,) * n) if kind == "conv" else (12, 8 // groups, *(3,) * n)
    w, b, x = numbers(seed, w, 8, (2, 12, *(5, 4, 6)[:n]))
    of = getattr(functional, f"conv{n}d" if kind == "conv" else f"conv_transpose{n}d")
    return lambda x, w, b, **options: of(x, w, b, groups=groups, **options), w, b, x


LAYERS = [("linear", 1, 1)]
LAYERS += [(kind, dims, groups) for kind in ("conv", "transposed") for dims in (1, 2, 3) for groups in (1, 2, 4)]


def statistics_of(torch, backend, c, seed):
    gamma, beta, mean, var = map(backend.array, numbers(seed, c, c, c, c))
    moments = anynorm.Moments(mean, var**2, 9)

    def norm(x):
        return torch.nn.functional.batch_norm(x, mean, var**2, gamma, beta, eps=1e-3)

    return gamma, beta, moments, norm


def close(actual, expected):
    np.testing.assert_allclose(actual.detach().numpy(), expected.detach().numpy(), rtol=1e-12, atol=1e-12)


@torch_only
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("kind", "dims", "groups"), LAYERS)
def test_a_layer_and_its_batch_norm_are_one_layer(backend, kind, dims, groups, channels_last):
    torch = backend.xp
    run, w, b, x = layer(torch, kind, dims, groups, 10)
    gamma, beta, moments, norm = statistics_of(torch, backend, 8, 11)
    w, b, x = map(backend.array, (w, b, x))
    axis = 1 if kind == "transposed" else 0
    options = {"axis": axis, "groups": groups}
    order = (*range(2, w.ndim), 1, 0)  # HWIO, or HWOI
    given, back = (w.permute(order), tuple(np.argsort(order))) if channels_last else (w, tuple(range(w.ndim)))
    if channels_last:
        options |= {
            "axis": axis - w.ndim if axis == 2 else order.index(axis) - w.ndim,
            "in_axis": order.index(1 - axis),
        }
    folded, shift = anynorm.fold(given, b, gamma, beta, moments=moments, eps=1e-3, **options)
    close(run(x, folded.permute(back), shift), norm(run(x, w, b)))
    folded, shift = anynorm.fold(given, None, gamma, beta, moments=moments, eps=1e-3, **options)
    close(run(x, folded.permute(back), shift), norm(run(x, w, None)))


@torch_only
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("kind", "dims", "groups"), LAYERS)
def test_a_norm_and_the_layer_after_it_are_one_layer(backend, kind, dims, groups, channels_last):
    torch = backend.xp
    run, w, b, x = layer(torch, kind, dims, groups, 12)
    gamma, beta, moments, norm = statistics_of(torch, backend, 12, 13)
    w, b, x = map(backend.array, (w, b, x))
    axis = 0 if kind == "transposed" else 1
    order = (*range(2, w.ndim), 1, 0)
    given, back = (w.permute(order), tuple(np.argsort(order))) if channels_last else (w, tuple(range(w.ndim)))
    axes = (order.index(axis), order.index(1 - axis)) if channels_last else (axis, 1 - axis)
    options = {"axis": axes[0], "out_axis": axes[1], "groups": groups}
    # the border of a transposed convolution is left out, where not every weight meets a number
    inside = (slice(None), slice(None), *(slice(2, -2),) * dims) if kind == "transposed" else ...
    for bias in (b, None):
        folded, shift = anynorm.fold_next(given, bias, gamma, beta, moments=moments, eps=1e-3, **options)
        close(run(x, folded.permute(back), shift)[inside], run(norm(x), w, bias)[inside])
    folded, shift = anynorm.fold_next(given, b, gamma, None, **options)
    scaled = x * gamma.reshape(-1, *(1,) * (x.ndim - 2))
    close(run(scaled, w, b), run(x, folded.permute(back), shift))


@torch_only
def test_a_norm_before_zeros_folds_if_the_padding_is_what_it_takes_to_zero(backend):
    torch = backend.xp
    run, w, b, x = layer(torch, "conv", 2, 2, 14)
    gamma, beta, moments, norm = statistics_of(torch, backend, 12, 15)
    w, b, x = map(backend.array, (w, b, x))
    expected = run(norm(x), w, b, padding=1)
    folded, shift = anynorm.fold_next(w, b, gamma, beta, moments=moments, eps=1e-3, groups=2)
    scale = gamma / torch.sqrt(moments.var + 1e-3)
    padded = (moments.mean - beta / scale).reshape(1, -1, 1, 1).expand(2, -1, 7, 6).clone()  # -t / s
    padded[:, :, 1:-1, 1:-1] = x
    close(run(padded, folded, shift), expected)
    wrong = run(x, folded, shift, padding=1)
    close(wrong[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1])
    assert not torch.allclose(wrong, expected)


@torch_only
def test_it_is_torchs_own_fusion_where_there_are_no_groups(backend):
    torch = backend.xp
    _, w, b, _ = layer(torch, "conv", 2, 1, 16)
    gamma, beta, moments, _ = statistics_of(torch, backend, 8, 17)
    w, b = map(backend.array, (w, b))
    with torch.no_grad():
        expected = torch.nn.utils.fusion.fuse_conv_bn_weights(w, b, moments.mean, moments.var, 1e-3, gamma, beta)
    for found, theirs in zip(anynorm.fold(w, b, gamma, beta, moments=moments, eps=1e-3), expected, strict=True):
        close(found, theirs)


@torch_only
def test_gradients_flow_through(backend):
    torch = backend.xp
    w, b, gamma, beta = (torch.tensor(each, requires_grad=True) for each in numbers(18, (4, 3, 2), 6, 6, 6))
    (last,) = (torch.tensor(each, requires_grad=True) for each in numbers(19, (4,)))
    moments = anynorm.Moments(torch.ones(6), torch.tensor([0.0, 1, 2, 3, 4, 5]), 5)

    def into(*a):
        return anynorm.fold(*a, moments=moments, eps=0, axis=1, groups=2)

    torch.autograd.gradcheck(into, (w, b, gamma, beta))
    torch.autograd.gradcheck(lambda *a: anynorm.fold_next(*a, groups=2), (w, last, gamma, beta))
    compiled = torch.compile(into, backend="eager", fullgraph=True)
    for found, expected in zip(compiled(w, b, gamma, beta), into(w, b, gamma, beta), strict=True):
        close(found, expected)


@pytest.mark.cells("jax")
def test_it_is_traced_and_differentiated(backend):
    import jax

    w, b, gamma, beta, mean, var = map(backend.array, numbers(20, (4, 3), 4, 4, 4, 4, 4))
    moments = anynorm.Moments(mean, var**2, 5)
    scale = backend.numpy(gamma) / np.sqrt(backend.numpy(moments.var) + 1e-5)
    folded, _ = jax.jit(lambda *a: anynorm.fold(*a, moments=moments))(w, b, gamma, beta)
    backend.check(folded, backend.numpy(w) * scale[:, None])
    slope = jax.grad(lambda w: anynorm.fold(w, b, gamma, beta, moments=moments)[0].sum())(w)
    backend.check(slope, np.broadcast_to(scale[:, None], (4, 3)))


# weight norm's start from data


def test_a_fitted_layer_has_the_paper_s_g_and_b(backend):
    plain = dataclasses.replace(backend, tracked=False)
    x, v = numbers(21, (50, 4), (3, 4))
    t = x @ v.T / np.sqrt((v**2).sum(axis=1))
    state, b = anynorm.WeightNorm.fitted(plain.array(v), anynorm.moments(plain.array(t), axis=0))
    plain.check(state.g, 1 / t.std(axis=0))
    plain.check(b, -t.mean(axis=0) / t.std(axis=0))
    plain.check(state.v, v)
    assert state.axis == 0
    dead = anynorm.moments(plain.array(np.ones((5, 3))), axis=0)
    state, b = anynorm.WeightNorm.fitted(plain.array(v), dead)
    plain.check(state.g, np.ones(3))
    plain.check(b, -np.ones(3))
    with pytest.raises(ValueError, match=r"^moments must have shape \(4,\), one for each index of v along axis 1, got"):
        anynorm.WeightNorm.fitted(plain.array(v), dead, axis=1)
    with pytest.raises(TypeError, match="^moments must be Moments, got float"):
        anynorm.WeightNorm.fitted(plain.array(v), 1.0)


@pytest.mark.cells("numpy", "torch")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_three_fitted_layers_have_unit_activations(backend, dtype):
    plain = dataclasses.replace(backend, tracked=False)
    x, *directions = numbers(22, (200, 6), (5, 6), (7, 5), (3, 7))
    x = plain.array(x * 9 + 4, dtype)
    for v in directions:
        v = plain.array(v * 0.05, dtype)
        ones = plain.array(np.ones(v.shape[0]), dtype)
        state, b = anynorm.WeightNorm.fitted(v, anynorm.moments(x @ anynorm.weight_norm(v, ones).T, axis=0))
        t = x @ state.weight.T + b
        found = plain.numpy(t)
        np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-6)
        np.testing.assert_allclose(found.std(axis=0), 1, rtol=1e-6)
        assert t.dtype == v.dtype
        x = plain.xp.where(t > 0, t, t * 0)
