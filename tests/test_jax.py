"""JAX: its transformations, its pytrees, its devices and its automatic differentiation as an oracle."""

import subprocess
import sys

import inner
import numpy as np
import pytest
from oracles import exact, standardized

import anynorm

pytestmark = pytest.mark.cells("jax")


def test_vmap_and_second_derivatives_agree_with_loops(backend):
    import jax

    x = backend.array(np.random.default_rng(1).standard_normal((3, 4, 6, 5)))
    for axis in (0, 1, 3):
        mapped = jax.vmap(anynorm.batch_norm, in_axes=axis, out_axes=axis)(x)
        looped = np.stack([anynorm.batch_norm(each) for each in np.moveaxis(np.asarray(x), axis, 0)], axis=axis)
        backend.check(mapped, looped)

    def cubed(x):
        return (anynorm.layer_norm(x) ** 3).sum()

    small = x[0, 0, :2, :3]
    hessian = jax.hessian(cubed)(small)
    step = 1e-5
    for index in np.ndindex(2, 3):
        moved = [jax.grad(cubed)(small.at[index].add(sign * step)) for sign in (1, -1)]
        np.testing.assert_allclose(hessian[(..., *index)], (moved[0] - moved[1]) / (2 * step), atol=1e-4)


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("correction", [0, 1])
def test_a_training_loop_under_scan_is_the_loop(backend, momentum, correction):
    import jax

    x = backend.array(np.random.default_rng(2).standard_normal((5, 4, 3)))
    start = anynorm.RunningStats.init(3, like=x, momentum=momentum, correction=correction)

    def step(running, x):
        y, batch = anynorm.batch_norm(x, return_moments=True)
        return running.update(batch), y

    traces = []
    jitted = jax.jit(lambda running, x: traces.append(1) or step(running, x))
    scanned, _ = jax.lax.scan(step, jax.tree.map(jax.numpy.asarray, start), x)
    looped = stepped = start
    for each in x:
        looped, _ = step(looped, each)
        stepped, _ = jitted(stepped, each)
    for running in (scanned, stepped):
        assert isinstance(running, anynorm.RunningStats)
        assert (running.momentum, running.correction) == (momentum, correction)
        backend.check(running.mean, backend.numpy(looped.mean))
        backend.check(running.var, backend.numpy(looped.var))
        assert int(running.count) == looped.count == 20
    assert len(traces) <= 2, "a count must not be static"


@pytest.mark.parametrize("shape", [(2, 4, 0), (2, 0, 4), (0, 4, 2)], ids=str)
@pytest.mark.parametrize(
    ("norm", "options"),
    [(anynorm.layer_norm, {}), (anynorm.batch_norm, {}), (anynorm.group_norm, {"groups": 2})],
    ids=lambda each: getattr(each, "__name__", ""),
)
def test_an_empty_axis_goes_through_jit(backend, norm, options, shape):
    import jax

    x, gamma = backend.array(np.zeros(shape)), backend.array(np.ones((1,) * len(shape)))
    weights = backend.array(np.ones((*shape[:-1], 1)), "bool")

    def ours(x, gamma, weights):
        (y, moments), pullback = anynorm.vjp(norm, x, gamma, weights=weights, return_moments=True, **options)
        return y, moments.mean, pullback(x)

    y, mean, (dx, dgamma) = jax.jit(ours)(x, gamma, weights)
    assert y.shape == dx.shape == shape
    assert not np.any(np.asarray(mean))
    assert not np.any(np.asarray(dgamma))
    _, pullback = jax.vjp(lambda x, gamma: norm(x, gamma, weights=weights, **options), x, gamma)
    assert [each.shape for each in pullback(x)] == [shape, gamma.shape]
    assert not np.any(np.asarray(pullback(x)[1]))


def test_an_empty_batch_under_jit_changes_nothing(backend):
    import jax

    x = backend.array(np.ones((4, 3)))
    for momentum in (0.9, None):
        running = anynorm.RunningStats.init(3, like=x, momentum=momentum).update(anynorm.moments(x, axis=0))
        after = jax.jit(lambda running, batch: running.update(batch))(running, anynorm.moments(x[:0], axis=0))
        backend.check(after.mean, backend.numpy(running.mean))
        backend.check(after.var, backend.numpy(running.var))


def test_states_are_pytrees(backend):
    import jax

    x = backend.array(np.ones((2, 3)))
    moments, running = anynorm.moments(x, axis=0), anynorm.RunningStats.init(3, like=x, momentum=None)
    weight = anynorm.WeightNorm.from_weight(x, axis=(0, 1))
    for state, leaves in ((moments, 4), (running, 4), (weight, 2)):
        assert len(jax.tree.leaves(state)) == leaves
        copy = jax.tree.map(lambda leaf: leaf, state)
        assert type(copy) is type(state)
        assert repr(copy) == repr(state)
        assert "ShapeDtypeStruct" in repr(jax.eval_shape(lambda state: state, state))
    doubled = jax.jit(lambda state: state.weight)(weight)
    backend.check(doubled, np.ones((2, 3)))
    assert jax.jit(lambda: anynorm.moments(x, axis=0))().mean.shape == (3,)


def test_a_pullback_crosses_a_jit(backend):
    import jax

    x = backend.array(np.random.default_rng(5).standard_normal((4, 6)))
    for norm, options in ((anynorm.layer_norm, {}), (anynorm.group_norm, {"groups": 3})):
        y, pullback = jax.jit(lambda x, g: anynorm.vjp(norm, x, g, **options))(x, x[0])  # noqa: B023
        expected = anynorm.vjp(norm, x, x[0], **options)[1](y)
        for found, each in zip(jax.jit(lambda p, dy: p(dy))(pullback, y), expected, strict=True):
            backend.check(found, backend.numpy(each))


def test_an_array_of_a_jax_dtype_is_no_array_of_jax(backend):
    import jax

    code = (
        "import jax, numpy as np, anynorm\n"
        "try: anynorm.layer_norm(np.zeros((2, 3), dtype=jax.dtypes.float0))\n"
        "except TypeError as error: print(error)\n"
        "print(type(anynorm.layer_norm(np.ones((2, 3)))).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == "ndarray"
    assert done.stdout.startswith("x must have a real floating dtype, got ")
    for name in ("float8_e4m3fn", "float4_e2m1fn"):
        with pytest.raises(TypeError, match=r"^x must have a real floating dtype, got "):
            anynorm.layer_norm(jax.numpy.ones((2, 4), dtype=getattr(jax.numpy, name)))


@pytest.mark.parametrize("first", ["jax", "anynorm"])
def test_pytrees_are_registered_whichever_is_imported_first(first):
    second = {"jax": "anynorm", "anynorm": "jax"}[first]
    code = (
        f"import {first}, {second}, jax.numpy as jnp\n"
        "state = anynorm.RunningStats.init(3, like=jnp.ones(3))\n"
        "print(len(jax.tree.leaves(state)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "6"  # mean, variance and count, and what rounding took from each


@pytest.mark.parametrize("eps", [0, 1e-5])
def test_every_power_of_ten_is_exact_under_jit(backend, eps):
    import jax

    with np.errstate(under="ignore"):
        x = np.stack(
            [10.0**k + 10.0 ** (k - 6) * np.random.default_rng(0).standard_normal(500) for k in range(-36, 38)]
        )
        x = x.astype(np.float32).astype(np.float64)
    y = jax.jit(lambda x: anynorm.layer_norm(x, eps=eps))(backend.array(x, "float32"))
    assert np.abs(np.asarray(y) - standardized(x, 1, eps)).max() <= 6e-6


def test_without_float64_results_are_float32(backend):
    import jax

    with jax.enable_x64(False):
        x = jax.numpy.asarray(np.random.default_rng(3).standard_normal((4, 6)))
        y, batch = anynorm.batch_norm(x, return_moments=True)
        assert y.dtype == batch.mean.dtype == np.float32
        running = jax.jit(lambda running, batch: running.update(batch))(anynorm.RunningStats.init(6, like=x), batch)
        np.testing.assert_allclose(running.mean, 0.1 * np.asarray(x).mean(axis=0), rtol=1e-5, atol=1e-6)


def test_arrays_spread_over_devices_stay_spread(backend):
    import jax

    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    x = jax.device_put(np.random.default_rng(4).standard_normal((4, 6)), spread)
    y = anynorm.layer_norm(x, jax.numpy.ones(6))
    assert y.sharding.device_set == set(jax.devices())
    assert anynorm.RunningStats.init(6, like=x).mean.shape == (6,)


def test_a_large_array_is_counted(backend):
    import jax

    shape = jax.ShapeDtypeStruct((70000, 70000), np.float32)
    assert jax.eval_shape(lambda x: anynorm.layer_norm(x, axis=None), shape).shape == (70000, 70000)


@pytest.mark.parametrize("scale", [1e15, 1e-15])
def test_a_variance_under_jit_takes_its_power_of_two_back_in_two_steps(backend, scale):
    x = (np.random.default_rng(9).standard_normal((3, 400)) * scale).astype(np.float32)
    import jax

    var = jax.jit(lambda x: anynorm.layer_norm(x, eps=0, return_moments=True)[1].var)(backend.array(x, "float32"))
    np.testing.assert_allclose(np.asarray(var), x.var(axis=1, dtype=np.float64), rtol=2e-6)


def test_vmap_grad_and_second_derivatives_take_weights(backend):
    import jax

    rng = np.random.default_rng(10)
    xs, weights = backend.array(rng.standard_normal((3, 4, 5, 2))), backend.array(rng.random((3, 4, 1, 2))) > 0.3

    def function(x, weights):
        return anynorm.batch_norm(x, weights=weights)

    def cubed(x, weights):
        return (function(x, weights) ** 3).sum()

    for mapped, single in ((function, function), (jax.grad(cubed), jax.grad(cubed))):
        found, single = jax.jit(jax.vmap(mapped))(xs, weights), jax.jit(single)
        np.testing.assert_allclose(found, np.stack(list(map(single, xs, weights))), rtol=1e-9, atol=1e-9)
        found = jax.vmap(mapped, (None, 0))(xs[0], weights)
        np.testing.assert_allclose(found, np.stack([single(xs[0], each) for each in weights]), rtol=1e-9, atol=1e-9)
    x, along = xs[0], backend.array(rng.standard_normal((4, 5, 2)))
    _, second = jax.jvp(lambda x: jax.grad(cubed)(x, weights[0]), (x,), (along,))
    moved = [single(x + step * along, weights[0]) for step in (1e-6, -1e-6)]
    np.testing.assert_allclose(second, (moved[0] - moved[1]) / 2e-6, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("momentum", [0.9, None])
def test_without_float64_a_count_is_a_pair_that_crosses_transforms(backend, momentum):
    import jax

    def counted(state):
        return np.asarray(state.count, np.float64) + np.asarray(state._count_rest, np.float64)

    with jax.enable_x64(False):
        x = jax.numpy.ones((30, 1, 1))
        for count in (2**24, jax.numpy.asarray([2.0**24])):
            start = anynorm.RunningStats(x[0, 0], x[0, 0], count, momentum=momentum)
            step = jax.jit(lambda state, x: state.update(anynorm.moments(x, axis=0)))
            stepped = start
            for each in x:
                stepped = step(stepped, each)
            scanned, _ = jax.lax.scan(
                lambda state, x, step=step: (step(state, x), None), jax.tree.map(jax.numpy.asarray, start), x
            )
            for found in (stepped, scanned):
                assert np.all(counted(found) == 2**24 + 30)
                assert np.all(found.to(np.zeros(1)).count == 2**24 + 30)
        many = jax.numpy.ones((2, 1, 2**10))
        mask = jax.numpy.full((2, 1, 2**10), 2**15 + 1)
        found = jax.jit(jax.vmap(lambda x, weights: anynorm.moments(x, axis=1, weights=weights)))(many, mask)
        np.testing.assert_array_equal(counted(found), np.full((2, 1), 2.0**25 + 2**10))
        copied = jax.tree.map(lambda leaf: leaf, anynorm.RunningStats(x[0, 0], x[0, 0], 2**40 + 1))
        assert copied.count == 2**40 + 1


def test_arrays_that_nobody_traces_are_computed_by_one_compiled_function(backend, monkeypatch):
    import jax

    made = inner.compiled_of_jax(monkeypatch)
    for n in (3, 3, 4):
        x = backend.array(np.arange(2.0 * n).reshape(n, 2) ** 2)
        backend.check(anynorm.layer_norm(x), standardized(np.asarray(x), 1))
    assert len(made) == 2, "one for each shape"
    y, pullback = anynorm.vjp(anynorm.layer_norm, x)
    pullback(y)
    assert len(made) == 3, "and one for the gradient"
    assert [each._cache_size() for each in made.values()] == [1, 1, 1], "compiled once each"
    jax.jit(lambda x: anynorm.layer_norm(x))(x)
    assert len(made) == 3, "none where JAX traces already"


@pytest.mark.parametrize("way", ["jit", "vmap", "shard_map"])
def test_no_branch_of_a_norm_spoils_the_other(backend, way):
    import jax

    rng = np.random.default_rng(11)
    with np.errstate(under="ignore"):
        x = rng.standard_normal((6, 40)) * np.array([1.0, 1e30, 1e-30, 0.0, 1e35, 1e-36])[:, None]
        x = x.astype(np.float32)
    dy = (rng.standard_normal(x.shape) + 1e3).astype(np.float32)
    expected = exact(anynorm.layer_norm, x, dy, eps=0)
    size = np.abs(expected.dx).max(axis=1, keepdims=True)

    def norm(x):
        return anynorm.layer_norm(x, eps=0)

    mesh, rows = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("b",)), jax.sharding.PartitionSpec("b")
    turn = {
        "jit": lambda function: function,
        "vmap": jax.vmap,
        "shard_map": lambda function: jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows),
    }[way]
    y, pullback = jax.vjp(jax.jit(turn(norm)), x)
    np.testing.assert_allclose(np.asarray(y), expected.y, atol=3e-6)
    dx, other = np.asarray(pullback(dy)[0]), np.arange(6) != 3  # without eps that of a constant is what one calls it
    assert np.all(np.isfinite(dx))
    np.testing.assert_allclose(dx[other] / size[other], expected.dx[other] / size[other], atol=3e-6)


def test_a_direction_of_large_mean_keeps_its_digits(backend):
    import jax

    rng = np.random.default_rng(12)
    x, along = rng.standard_normal((2, 5, 300)).astype(np.float32)
    along += 1e6
    wide, direction = x.astype(np.float64), along.astype(np.float64)
    _, found = jax.jit(lambda x, along: jax.jvp(anynorm.layer_norm, (x,), (along,)))(x, along)
    step = 1e-6
    moved = [standardized(wide + sign * step * (direction - 1e6), 1, 1e-5) for sign in (1, -1)]
    np.testing.assert_allclose(found, (moved[0] - moved[1]) / (2 * step), atol=1e-5)


def test_a_third_derivative_is_that_of_the_formula(backend):
    import jax

    def cubed(t):
        return (anynorm.rms_norm(jax.numpy.stack([t, 2.0 * t * t, 3.0]), eps=0.5) ** 3).sum()

    def formula(t):
        x = jax.numpy.stack([t, 2.0 * t * t, 3.0])
        return ((x / jax.numpy.sqrt((x * x).mean() + 0.5)) ** 3).sum()

    thrice = [jax.grad(jax.grad(jax.grad(function)))(0.7) for function in (cubed, formula)]
    np.testing.assert_allclose(*thrice, rtol=1e-9)


def test_a_state_that_was_updated_in_a_compiled_step_knows_its_updates_in_a_checkpoint(backend):
    import jax

    mean, var = jax.numpy.arange(3.0), jax.numpy.arange(1.0, 4.0)
    running = anynorm.RunningStats.init(3, like=mean, debias=True)
    step = jax.jit(anynorm.RunningStats.update)
    running = step(step(running, anynorm.Moments(mean, var, 5)), anynorm.Moments(var, mean, 5))
    written = anynorm.to_checkpoint(anynorm.NormParams(mean, var, running), "bn", dialect="haiku")
    assert int(written["state"]["bn/~/mean_ema"]["counter"]) == 2


def test_an_array_of_numpy_is_read_at_once(backend):
    import jax

    dy = np.ones((2, 2**22), np.float32)  # JAX reads so many numbers only when it needs them
    moments = anynorm.Moments(jax.numpy.zeros(2), jax.numpy.ones(2), 1)
    _, pullback = anynorm.vjp(anynorm.center, jax.numpy.zeros_like(dy), axis=1, moments=moments)
    (dx,) = pullback(dy)
    dy[:] = 7
    assert float(dx.sum()) == dy.size


@pytest.mark.parametrize("wide", [True, False])
def test_arrays_of_numpy_beside_one_of_jax_are_taken(backend, wide):
    import jax

    rng = np.random.default_rng(13)
    with jax.enable_x64(wide):
        values, dy = rng.standard_normal((2, 4, 6))
        gamma, beta, mask = rng.standard_normal(6), rng.standard_normal(6), rng.random((4, 6)) > 0.3
        x, given = jax.numpy.asarray(values), {"weights": mask}
        own = [jax.numpy.asarray(each) for each in (gamma, beta)]
        expected, pull = anynorm.vjp(anynorm.batch_norm, x, *own, weights=jax.numpy.asarray(mask))
        y, pullback = anynorm.vjp(anynorm.batch_norm, x, gamma, beta, **given)
        jitted = jax.jit(lambda x: anynorm.batch_norm(x, gamma, beta, **given))(x)
        for found in (y, anynorm.batch_norm(x, gamma, beta, **given), jitted):
            assert found.dtype == x.dtype
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
        gamma[:], mask[:] = np.nan, False  # whose numbers were read
        for found, other in zip(pullback(dy), pull(jax.numpy.asarray(dy)), strict=True):
            assert (type(found), found.dtype) == (type(x), x.dtype)
            np.testing.assert_allclose(found, other, rtol=1e-5, atol=1e-6)
        moments = anynorm.Moments(np.full(6, 1e6 + 0.01), np.ones(6), 4)
        far = jax.numpy.asarray(values + 1e6)
        found = anynorm.batch_norm(far, moments=moments)
        np.testing.assert_allclose(found, (np.asarray(far, np.float64) - 1e6 - 0.01) / np.sqrt(1 + 1e-5), atol=1e-6)
        assert anynorm.batch_norm(far, moments=moments, return_moments=True)[1] is moments
        assert anynorm.weight_norm(x, np.ones(4)).dtype == x.dtype
        assert float(anynorm.moments(x, axis=None, weights=np.full((4, 6), 2**40)).count) == 24 * 2.0**40
    for bad, dtype in ((np.ones(6, int), "int64"), (np.ones(6, object), "object"), (np.ones(6, complex), "complex128")):
        with pytest.raises(TypeError, match=f"^gamma must have a real floating dtype, got {dtype}: write "):
            anynorm.layer_norm(x, bad)
    with pytest.raises(ValueError, match="^weights must be finite and at least 0 everywhere"):
        anynorm.layer_norm(x, weights=np.full((4, 6), -1.0))
    with pytest.raises(ValueError, match=r"^dy must have the shape of y, \(4, 6\), got \(6,\)"):
        pullback(np.ones(6))


def test_a_replica_of_one_sample_is_normalized_as_it_is_told(backend):
    import jax

    x = backend.array(np.random.default_rng(14).standard_normal((5, 3)))

    def all_reduce(sums):
        return jax.lax.psum(sums, "replica")

    def replica(x):
        return anynorm.batch_norm(x[None, ...], all_reduce=all_reduce)[0]

    found = jax.vmap(replica, axis_name="replica")(x)
    backend.check(found, backend.numpy(anynorm.batch_norm(x)))
    with pytest.raises(
        ValueError, match=r"^x must have at least two axes, .* write x\[None, \.\.\.\] and channel_axis=1"
    ):
        jax.vmap(lambda x: anynorm.batch_norm(x, all_reduce=all_reduce), axis_name="replica")(x)


def test_a_transformation_that_nobody_compiles_traces_a_norm_once(backend, monkeypatch):
    import jax

    x, shapes = backend.array(np.random.default_rng(15).standard_normal((3, 7))), inner.derived_in_jax(monkeypatch)
    for transformed in (jax.grad(lambda x: (anynorm.layer_norm(x) ** 2).sum()), jax.vmap(anynorm.rms_norm)):
        transformed(x)
        before = len(shapes)
        transformed(x + 1)
        assert 2 <= before == len(shapes)
