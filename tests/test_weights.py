"""Weights and masks: sums of the definition, one number at a time; repetition; padding; and what must not be."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import anynorm

QUICK = pytest.mark.cells("numpy", "strict", "torch", "cupy")


def constant(backend, numbers, dtype=None):
    """An array without a gradient: masks and integers have none."""
    return untracked(backend).array(numbers, dtype)


def untracked(backend):
    """The backend without a gradient."""
    return replace(backend, tracked=False)


def test_moments_are_weighted_and_the_count_is_the_sum_of_the_weights(backend):
    rng = np.random.default_rng(1)
    x, weights = rng.standard_normal((4, 3, 5)), rng.integers(0, 3, (4, 1, 5))
    found = anynorm.moments(backend.array(x), axis=(0, 2), weights=constant(backend, weights, "int32"))
    every = np.broadcast_to(weights, x.shape)
    mean = np.average(x, axis=(0, 2), weights=every)
    backend.check(found.mean, mean)
    backend.check(found.var, np.average((x - mean[:, None]) ** 2, axis=(0, 2), weights=every))
    backend.check(found.count, every.sum(axis=(0, 2)).astype(float))
    _, batch = anynorm.batch_norm(backend.array(x), weights=constant(backend, weights, "int32"), return_moments=True)
    backend.check(batch.count, every.sum(axis=(0, 2)).astype(float))
    _, each = anynorm.group_norm(
        backend.array(x), weights=constant(backend, weights, "int32"), groups=3, return_moments=True
    )
    backend.check(each.count, every.sum(axis=2).astype(float))


@pytest.mark.cells("jax", "torch")
@pytest.mark.parametrize("eps", [0, 1e-24, 1e-26, 1e-36])
def test_recorded_gradients_of_equal_numbers_are_those_of_the_formula_beside_others(backend, eps):
    if backend.library == "jax":
        from jax import grad
    else:
        from torch.func import grad
    x, dy = (backend.array(each, "float32") for each in ([[1.0, 1.0, 3.0, 4.0]], [[1.0, 2.0, 3.0, 5.0]]))
    mask = constant(backend, np.asarray([True, True, False, False]), "bool")
    found = grad(lambda x: (anynorm.layer_norm(x, eps=eps, weights=mask) * dy).sum())(x)
    expected = np.asarray([[1 - 5.5, 2 - 5.5, 3, 5]])
    np.testing.assert_allclose(backend.numpy(found) * (eps or 1) ** 0.5, expected, rtol=1e-6)


@pytest.mark.cells("jax")
def test_integers_are_weights_where_nothing_is_promoted(backend):
    import jax

    x, weights = backend.array(np.arange(8.0).reshape(4, 2)), backend.xp.asarray([[1], [0], [2], [1]])
    expected = anynorm.vjp(anynorm.batch_norm, x, weights=backend.array(weights))[1](x)[0]
    with jax.numpy_dtype_promotion("strict"):
        backend.check(anynorm.vjp(anynorm.batch_norm, x, weights=weights)[1](x)[0], backend.numpy(expected))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_weight_too_large_for_the_dtype_is_named(dtype):
    with pytest.raises(ValueError, match=r"^weights must have their largest in the range of float32, got 1e\+300$"):
        anynorm.layer_norm(np.ones((2, 3), dtype), weights=np.full(3, 1e300))


def test_weights_whose_sum_is_no_float_count_as_inf(backend):
    """No float32, that is: in float64 it is one."""
    x, weights = backend.array(np.full((4, 2), 3.0), "float32"), np.full((4, 1), 3e38, np.float32)
    found = anynorm.moments(x, axis=0, weights=constant(backend, weights, "float32"))
    exact = 4 * float(np.float32(3e38)) if backend.float64 else np.inf
    assert np.all(backend.numpy(found.count) == exact)
    backend.check(found.mean, np.full(2, 3.0), dtype="float32")


@pytest.mark.parametrize("momentum", [0.9, None])
def test_a_channel_without_weight_leaves_the_running_statistics_alone(backend, momentum):
    x = np.random.default_rng(4).standard_normal((6, 3))
    x[:, 1] = np.nan
    mask = np.asarray([True, False, True])
    running = anynorm.RunningStats(
        backend.array([1.0, 2.0, 3.0]), backend.array([4.0, 5.0, 6.0]), 7, momentum=momentum, correction=1
    )
    y, batch = anynorm.batch_norm(backend.array(x), weights=constant(backend, mask, "bool"), return_moments=True)
    assert np.all(backend.numpy(y)[:, 1] == 0)
    backend.check(batch.count, [6.0, 0.0, 6.0])
    updated = running.update(batch)
    mean, var = backend.numpy(updated.mean), backend.numpy(updated.var)
    assert mean[1] == 2
    np.testing.assert_allclose(var[1], 5, rtol=1e-6)
    kept = anynorm.moments(backend.array(x[:, [0, 2]]), axis=0)
    other = anynorm.RunningStats(
        backend.array([1.0, 3.0]), backend.array([4.0, 6.0]), 7, momentum=momentum, correction=1
    ).update(kept)
    np.testing.assert_allclose(mean[[0, 2]], backend.numpy(other.mean), rtol=1e-5)
    np.testing.assert_allclose(var[[0, 2]], backend.numpy(other.var), rtol=1e-5)
    np.testing.assert_array_equal(backend.numpy(updated.count), [13, 7, 13])
    nothing = running.update(anynorm.moments(backend.array(x), axis=0, weights=constant(backend, False, "bool")))
    np.testing.assert_allclose(backend.numpy(nothing.mean), [1, 2, 3], rtol=1e-6)
    np.testing.assert_allclose(backend.numpy(nothing.var), [4, 5, 6], rtol=1e-6)


def test_weights_make_no_difference_to_moments_that_are_given(backend):
    x = backend.array(np.random.default_rng(6).standard_normal((4, 3)))
    batch = anynorm.moments(x, axis=0)
    weights = constant(backend, [[True], [False], [True], [True]], "bool")
    y, used = anynorm.batch_norm(x, moments=batch, weights=weights, return_moments=True)
    backend.check(y, backend.numpy(anynorm.batch_norm(x, moments=batch)), tolerance=0)
    assert used is batch


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "float16", "float32", "bfloat16"])
def test_the_dtype_of_weights_is_theirs_alone(backend, dtype):
    if dtype in ("bfloat16", "float16") and dtype not in backend.narrow:
        pytest.skip(reason=f"{backend.library} has no {dtype}")
    rng = np.random.default_rng(7)
    weights = rng.integers(0, 2, (4, 1)).astype(float)
    weights[0] = 1
    x = rng.standard_normal((4, 3))
    mean = np.average(x, axis=0, weights=weights[:, 0])
    var = np.average((x - mean) ** 2, axis=0, weights=weights[:, 0])
    for name in ("float32", *(["float16"] if "float16" in backend.narrow else [])):
        array = backend.array(x, name)
        given = constant(backend, weights, dtype)
        y, batch = anynorm.batch_norm(array, weights=given, return_moments=True)
        backend.check(y, (x - mean) / np.sqrt(var + 1e-5), dtype=name, tolerance=1e-2 if name == "float16" else 1e-5)
        backend.check(batch.count, np.full(3, weights.sum()), dtype=backend.widest)


@pytest.mark.cells("numpy", "strict", "torch")
def test_equal_numbers_become_beta_whatever_rounding_leaves_of_their_mean(backend):
    rng = np.random.default_rng(0)
    value, weights = rng.standard_normal(20) * 10.0 ** rng.integers(0, 6, 20), rng.random((4, 1, 300))
    x, beta = np.broadcast_to(value[:, None], (4, 20, 300)), rng.standard_normal(20)
    with anynorm.options(block_bytes=8192):  # a group is in one block
        y = anynorm.instance_norm(
            *(backend.array(x, "float32"), None, backend.array(beta, "float32")),
            weights=constant(backend, weights, "float32"),
            eps=1e-12,
        )
    expected = np.broadcast_to(beta.astype(np.float32)[:, None], x.shape)
    np.testing.assert_array_equal(backend.numpy(y), expected)


def test_a_weight_that_is_negative_or_not_finite_is_an_error(backend):
    x = backend.array(np.ones((2, 3)))
    for bad in (-1.0, np.nan, np.inf):
        weights = constant(backend, [1.0, bad, 1.0])
        if backend.library == "dask":
            anynorm.layer_norm(x, weights=weights)  # lazy
            continue
        with pytest.raises(ValueError, match="weights must be finite and at least 0 everywhere"):
            anynorm.layer_norm(x, weights=weights)
        with pytest.raises(ValueError, match="weights must be finite"):
            anynorm.vjp(anynorm.rms_norm, x, weights=weights)
        with pytest.raises(ValueError, match="weights must be finite"):
            anynorm.moments(x, axis=0, weights=weights)


def test_weights_that_do_not_fit_are_an_error(backend):
    x = backend.array(np.ones((2, 3)))
    for shape in ((2,), (3, 3), (1, 2, 3), (2, 3, 1), (0,)):
        with pytest.raises(ValueError, match=r"weights must broadcast to the shape of x, \(2, 3\), got"):
            anynorm.layer_norm(x, weights=constant(backend, np.ones(shape), "bool"))
    for wrong in ([True, False, True], 1.0, "mask"):
        with pytest.raises(TypeError, match="weights must be an array"):
            anynorm.layer_norm(x, weights=wrong)
    if backend.library not in ("numpy", "jax"):  # which takes NumPy's
        with pytest.raises(TypeError, match="x and weights must come from one array library"):
            anynorm.layer_norm(x, weights=np.ones(3))
    if backend.library != "strict":  # some of its devices have no complex numbers
        with pytest.raises(TypeError, match="weights must have a bool, integer or real floating dtype, got"):
            anynorm.layer_norm(x, weights=constant(backend, np.ones(3), "complex64"))


def test_the_result_goes_where_out_says(backend):
    if backend.library not in ("numpy", "strict", "torch", "cupy") or backend.tracked:
        pytest.skip(reason="cannot be written to")
    x, weights = np.random.default_rng(10).standard_normal((4, 3)), np.asarray([[1.0], [0.0], [2.0], [1.0]])
    expected = anynorm.batch_norm(backend.array(x), weights=constant(backend, weights))
    array = backend.array(x)
    assert anynorm.batch_norm(array, weights=constant(backend, weights), out=array) is array
    backend.check(array, backend.numpy(expected), tolerance=0)


def test_the_page_about_masks_does_as_it_says(backend):
    text = (Path(__file__).parents[1] / "docs" / "masks.md").read_text()
    section = re.search(r"^### Padded sequences$(.*?)^## ", text, re.MULTILINE | re.DOTALL)[1]
    rng = np.random.default_rng(16)
    x, dy, lengths = rng.standard_normal((3, 2, 4)), rng.standard_normal((3, 2, 4)), np.asarray([4, 1, 2])
    own = untracked(backend)
    where = {} if backend.library == "dask" else {"device": backend.device}
    arange = backend.xp.arange(4, **where) if backend.library not in ("numpy", "cupy") else backend.xp.arange(4)
    xp = SimpleNamespace(arange=lambda n: arange, where=backend.xp.where, zeros_like=backend.xp.zeros_like)
    names = {
        "anynorm": anynorm,
        "xp": xp,
        "x": own.array(x),
        "z": own.array(x.swapaxes(1, 2)),
        "dy": own.array(dy),
        "lengths": own.array(lengths, "int32"),
    }
    names |= {"gamma": own.array([1.0, 2.0]), "beta": own.array([0.0, 1.0])}
    names["running"] = anynorm.RunningStats.init(2, like=names["x"], momentum=0)
    for each in re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
        exec(each, names)
    real = np.concatenate([x[i, :, :n] for i, n in enumerate(lengths)], axis=1)
    own.check(names["running"].mean, real.mean(axis=1))
    own.check(names["running"].var, real.var(axis=1))
    own.check(names["whole"], own.numpy(names["y"]).swapaxes(1, 2))
    y = own.numpy(names["whole"])
    for i, n in enumerate(lengths):
        numbers = x[i, :, :n].T
        expected = (numbers - numbers.mean()) / np.sqrt(numbers.var() + 1e-5) * [1.0, 2.0] + [0.0, 1.0]
        np.testing.assert_allclose(y[i, :n], expected, rtol=1e-4, atol=1e-4)
    _, pullback = anynorm.vjp(anynorm.group_norm, own.array(x[2:, :, :2]), names["gamma"], names["beta"], groups=1)
    alone = own.numpy(pullback(own.array(dy[2:, :, :2]))[0])
    np.testing.assert_allclose(own.numpy(names["dx"])[2:, :, :2], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.cells("numpy", "torch", "strict")
@pytest.mark.parametrize("eps", [0, 1e-5])
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_numbers_of_any_size_in_groups_that_are_split(backend, size, eps):
    block_bytes = 512
    rng = np.random.default_rng(17)
    x, dy, mask = rng.standard_normal((40, 3, 5)), rng.standard_normal((40, 3, 5)), rng.random((40, 1, 5)) > 0.4
    mask[3:9] = False  # parts without weight
    x[:, 1] *= size
    x[:, 2] = size  # a constant
    given = np.where(mask, x, np.nan).astype(np.float32)
    wide, every = given.astype(np.float64), np.broadcast_to(mask, x.shape)
    with anynorm.options(block_bytes=block_bytes):
        y, pullback = anynorm.vjp(
            anynorm.batch_norm, backend.array(given, "float32"), weights=constant(backend, mask, "bool"), eps=eps
        )
        (dx,) = map(backend.numpy, pullback(backend.array(np.where(mask, dy, 0), "float32")))
    y = backend.numpy(y)
    for channel in (0, 1):
        numbers = wide[:, channel][every[:, channel]]
        expected = (numbers - numbers.mean()) / np.sqrt(numbers.var() + eps)
        np.testing.assert_allclose(y[:, channel][every[:, channel]], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(y[:, 2][every[:, 2]], 0)
    assert np.isfinite(dx).all()


@pytest.mark.cells("numpy")
def test_the_pullback_keeps_weights_of_its_own():
    rng = np.random.default_rng(18)
    for shape in ((3, 4), (300, 400)):
        x, weights = rng.standard_normal(shape), rng.random(shape)
        expected = anynorm.vjp(anynorm.layer_norm, x, weights=weights)[1](x)[0]
        given = weights.copy()
        _, pullback = anynorm.vjp(anynorm.layer_norm, x, weights=given, out=given)
        np.testing.assert_allclose(pullback(x)[0], expected)
        again = weights.copy()
        np.testing.assert_allclose(
            anynorm.layer_norm(x, weights=again, out=again), anynorm.layer_norm(x, weights=weights)
        )


@pytest.mark.cells("numpy")
def test_float32_is_exact_where_groups_are_large():
    rng = np.random.default_rng(12)
    x, mask = rng.standard_normal((16, 64, 128, 128), dtype=np.float32), rng.random((16, 1, 128, 128)) > 0.5
    x += 1e3
    y, moments = anynorm.batch_norm(x, weights=mask, return_moments=True)
    every = np.broadcast_to(mask[:, 0], (16, 128, 128))
    wide = x[:, 5].astype(np.float64)
    d = wide - wide[every].mean()
    np.testing.assert_allclose(y[:, 5], d / np.sqrt((d[every] ** 2).mean() + 1e-5), rtol=0, atol=5e-6)
    np.testing.assert_allclose(moments.var[5], (d[every] ** 2).mean(), rtol=2e-6)
    np.testing.assert_array_equal(moments.count, np.full(64, mask.sum()))


def composed(xp, x, gamma, beta, weights, axes, eps=1e-5):
    """The definition, for automatic differentiation."""
    total = (weights + 0 * x).sum(axes, keepdims=True)
    mean = (weights * x).sum(axes, keepdims=True) / total
    var = (weights * (x - mean) ** 2).sum(axes, keepdims=True) / total
    return (x - mean) / xp.sqrt(var + eps) * gamma + beta


@pytest.mark.cells("torch")
def test_autograd_differentiates_the_definition(backend):
    import torch

    rng = np.random.default_rng(12)
    x, gamma, beta, dy = (
        torch.tensor(rng.standard_normal(shape), device=backend.device, requires_grad=True)
        for shape in ((4, 3, 5), (1, 3, 1), (1, 3, 1), (4, 3, 5))
    )
    weights = torch.tensor(rng.random((4, 1, 5)), device=backend.device, requires_grad=True)
    weights.data[0, 0, :3] = 0

    def norm(x, gamma, beta):
        return anynorm.batch_norm(x, gamma, beta, weights=weights)

    found = torch.autograd.grad(norm(x, gamma, beta), (x, gamma, beta), dy)
    expected = torch.autograd.grad(composed(torch, x, gamma, beta, weights.detach(), (0, 2)), (x, gamma, beta), dy)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(norm, (x, gamma, beta))
    assert torch.autograd.gradgradcheck(norm, (x, gamma, beta))
    loss = norm(x, gamma, beta)
    assert torch.autograd.grad((loss**2).sum(), weights, allow_unused=True) == (None,)
    mapped = torch.func.vmap(lambda x: anynorm.instance_norm(x, channel_axis=0, weights=weights[0].detach()))(x)
    torch.testing.assert_close(mapped, anynorm.instance_norm(x, weights=weights[:1].detach()))


@pytest.mark.cells("torch")
@pytest.mark.parametrize("padding", [np.nan, np.inf, 1e30])
def test_padding_does_not_reach_the_gradients_of_autograd(backend, padding):
    import torch

    rng = np.random.default_rng(13)
    x, mask = rng.standard_normal((4, 3, 5)), np.arange(5) < np.asarray([[[5]], [[2]], [[0]], [[3]]])
    x = torch.tensor(np.where(mask, x, padding), device=backend.device, requires_grad=True)
    gamma = torch.ones(3, dtype=torch.float64, device=backend.device, requires_grad=True)
    mask = torch.tensor(mask, device=backend.device)
    clean = torch.where(mask, x.detach(), 0).requires_grad_()
    grads = []
    for each in (x, clean):
        y = anynorm.batch_norm(each, gamma, weights=mask)
        grads.append(torch.autograd.grad(torch.where(mask, y, 0).square().sum(), (each, gamma), create_graph=True))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)
    second = torch.autograd.grad(grads[0][0].square().sum(), x)[0]
    assert bool(torch.isfinite(second).all())


@pytest.mark.cells("jax")
def test_jax_differentiates_the_definition_and_padding_does_not_reach_it(backend):
    import jax
    import jax.numpy as jnp

    rng = np.random.default_rng(14)
    x, dy, gamma, beta = (rng.standard_normal(shape) for shape in ((4, 3, 5), (4, 3, 5), (1, 3, 1), (1, 3, 1)))
    weights = rng.random((4, 1, 5)) * (rng.random((4, 1, 5)) > 0.3)
    dy = np.where(weights > 0, dy, 0)

    def norm(x, gamma, beta, weights):
        return anynorm.batch_norm(x, gamma, beta, weights=weights)

    def formula(x, gamma, beta):
        return composed(jnp, x, gamma, beta, weights, (0, 2))

    _, pull = jax.vjp(formula, *map(backend.array, (x, gamma, beta)))
    expected = pull(backend.array(dy))
    for padding in (np.nan, np.inf, 1e30, 0.0):
        padded = backend.array(np.where(weights > 0, x, padding))

        @jax.jit
        def gradients(padded, gamma, beta, weights, dy):
            _, pull = jax.vjp(norm, padded, gamma, beta, weights)
            y, pullback = anynorm.vjp(anynorm.batch_norm, padded, gamma, beta, weights=weights)
            return pull(dy), jax.tree.map(lambda leaf: leaf * 1, pullback)

        (*found, of_weights), pullback = gradients(padded, *map(backend.array, (gamma, beta, weights, dy)))
        assert not np.any(backend.numpy(of_weights))
        for one, own, other in zip(found, pullback(backend.array(dy)), expected, strict=True):
            backend.check(one, backend.numpy(other), tolerance=1e-10)
            backend.check(own, backend.numpy(other), tolerance=1e-10)
    bad = jax.jit(norm)(*map(backend.array, (x, gamma, beta, -weights)))
    assert bad.shape == x.shape  # traced numbers are not looked at


@pytest.mark.cells("jax")
@pytest.mark.parametrize("momentum", [0.9, None])
def test_running_statistics_pass_over_an_empty_channel_under_jit(backend, momentum):
    import jax

    x = np.random.default_rng(15).standard_normal((6, 3))
    x[:, 1] = np.nan
    running = anynorm.RunningStats(
        *map(backend.array, ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])), backend.array(np.full(3, 7.0)), momentum=momentum
    )

    @jax.jit
    def step(running, x, mask):
        return running.update(anynorm.batch_norm(x, weights=mask, return_moments=True)[1])

    updated = step(running, backend.array(x), backend.array([True, False, True], "bool"))
    assert (float(updated.mean[1]), float(updated.var[1]), float(updated.count[1])) == (2.0, 5.0, 7.0)
    assert np.all(np.isfinite(backend.numpy(updated.mean)))


@pytest.mark.cells("numpy", "torch")
@pytest.mark.parametrize("scale", [1e39, 1e300, 1e-46, 1e-300])
def test_weights_beyond_the_dtype_of_the_computation_are_refused(backend, scale):
    x, weights = backend.array(np.ones((2, 3)), "float32"), constant(backend, np.array([0.0, 1.0, 2.0]) * scale)
    message = f"^weights must have their largest in the range of float32, got {2 * scale:g}$".replace("+", r"\+")
    with pytest.raises(ValueError, match=message):
        anynorm.layer_norm(x, weights=weights)
    x = backend.array(np.ones((2, 3)), "float64")
    assert not np.any(backend.numpy(anynorm.layer_norm(x, weights=weights)))


def counted(backend, moments):
    """The count to all the digits that are kept of it."""
    rest = 0 if moments._count_rest is None else backend.numpy(moments._count_rest)
    return backend.numpy(moments.count) + rest  # in float64


@pytest.mark.cells("numpy", "strict", "torch", "jax", "dask")
@pytest.mark.parametrize("kind", ["one", "mask", "rows", "integers", "fractions"])
def test_the_sum_of_weights_is_exact_beyond_the_digits_of_float32(backend, kind):
    own = untracked(backend)
    n = 2**24 + 3
    if backend.library == "strict":
        n = 2**12 + 3
    shape, times = (1, n), 1
    weights = {
        "one": lambda: np.ones((1, 1), bool),
        "mask": lambda: np.arange(n)[None] != 5,
        "rows": lambda: np.ones((1, n), np.float32),
        "integers": lambda: np.full((1, 1), 123_457, np.int32),
        "fractions": lambda: np.full((1, 1), 0.1, np.float32),
    }[kind]()
    if weights.size == 1:
        times = n
    exact = float(weights.astype(np.float64).sum()) * times
    if backend.library == "dask":
        import dask.array

        x, given = dask.array.ones(shape, dtype="f4", chunks=(1, 2**22)), dask.array.from_array(weights, (1, 2**22))
    else:
        x, given = own.array(np.ones(shape), "float32"), own.array(weights, str(weights.dtype))
    found = anynorm.moments(x, axis=1, weights=given)
    tolerance = 0 if backend.float64 and kind != "fractions" else 1e-14
    np.testing.assert_allclose(counted(own, found), [exact], rtol=tolerance)
    assert found.count.dtype == own.dtype(own.widest)


def test_weights_of_each_group_are_counted_beside_others(backend):
    own, rng = untracked(backend), np.random.default_rng(12)
    x, weights = rng.standard_normal((3, 4, 5)), rng.integers(2**20, 2**21, (3, 1, 5))
    for norm, options, axes in (
        (anynorm.batch_norm, {}, (0, 2)),
        (anynorm.instance_norm, {}, (2,)),
        (anynorm.group_norm, {"groups": 1}, (1, 2)),
        (anynorm.normalize, {"axis": 1}, (1,)),
    ):
        y, found = norm(own.array(x, "float32"), weights=own.array(weights, "int32"), return_moments=True, **options)
        exact = np.broadcast_to(weights, x.shape).sum(axis=axes).astype(float)
        exact = exact[:, None] if norm is anynorm.group_norm else exact
        np.testing.assert_array_equal(counted(own, found), exact)


@QUICK
def test_blocks_count_exactly(backend):
    own = untracked(backend)
    x, weights = np.ones((64, 3, 40)), np.random.default_rng(13).integers(2**20, 2**23, (64, 3, 40))
    with anynorm.options(block_bytes=2048):
        found = anynorm.moments(own.array(x, "float32"), axis=(0, 2), weights=own.array(weights, "int32"))
    np.testing.assert_array_equal(counted(own, found), weights.sum(axis=(0, 2)).astype(float))


def test_a_group_without_weight_gives_beta_whatever_stands_in_it_and_given_moments_are_arithmetic(backend):
    own, rng = untracked(backend), np.random.default_rng(14)
    x, beta = rng.standard_normal((3, 4)), rng.standard_normal(4)
    x[1] = [5.0, np.nan, -np.inf, 2.0]
    weights = own.array(np.asarray([[1.0], [0.0], [1.0]]))
    array, eps = own.array(x), 0.25
    y, used = anynorm.normalize(array, None, own.array(beta), axis=1, weights=weights, eps=eps, return_moments=True)
    np.testing.assert_allclose(own.numpy(y)[1], beta, rtol=1e-6)
    moments = anynorm.moments(array, axis=1, weights=weights)
    plain = np.where(np.arange(3)[:, None] == 1, 0, x)
    for found in (used, moments):
        own.check(found.mean, plain.mean(axis=1))
        own.check(found.var, plain.var(axis=1))
        np.testing.assert_array_equal(own.numpy(found.count), [4, 0, 4])
        y = own.numpy(anynorm.normalize(array, None, own.array(beta), axis=1, moments=found, weights=weights, eps=eps))
        np.testing.assert_allclose(y[1], x[1] / np.sqrt(eps) + beta, rtol=1e-6)


@QUICK
def test_a_large_group_without_weight_gives_beta_whatever_stands_in_it(backend):
    own, rng = untracked(backend), np.random.default_rng(15)
    x, beta = rng.standard_normal((8, 4, 600)).astype(np.float32), np.arange(4.0)
    x[:, 1] = np.inf
    x[3, 1, 5], x[4, 1, 7] = np.nan, 1e30
    weights = own.array(np.asarray([1, 0, 1, 1])[None, :, None], "int32")
    for block in (2**13, 2**22):
        with anynorm.options(block_bytes=block):
            y, pullback = anynorm.vjp(
                anynorm.batch_norm, own.array(x, "float32"), None, own.array(beta, "float32"), weights=weights
            )
            np.testing.assert_array_equal(own.numpy(y)[:, 1], 1.0)
            assert np.all(own.numpy(pullback(own.array(np.ones_like(x), "float32"))[0])[:, 1] == 0)
