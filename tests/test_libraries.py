"""Libraries that anynorm knows little or nothing of: states, transformations, and what is refused."""

import pickle
from functools import partial

import numpy as np
import pytest
from oracles import exact

import anynorm

pytestmark = pytest.mark.cells("mlx", "ndonnx", "others-cpu")
FUNCTIONS = [
    (anynorm.layer_norm, {}),
    (anynorm.batch_norm, {}),
    (anynorm.group_norm, {"groups": 2}),
    (anynorm.rms_norm, {}),
]


def test_statistics_are_merged_updated_and_used(backend):
    x, weights = np.random.default_rng(0).standard_normal((12, 4)) + 5, np.random.default_rng(1).random((12, 4))
    for given in (None, weights) if backend.library not in ("ndonnx", "cubed") else (None,):  # too slow
        parts = [
            anynorm.moments(
                backend.array(x[rows]), axis=0, weights=None if given is None else backend.array(given[rows])
            )
            for rows in (slice(3), slice(3, 12))
        ]
        whole, both = exact(anynorm.batch_norm, x, x, weights=given), parts[0].merge(parts[1])
        backend.check(both.mean, whole.mean)
        backend.check(both.var, whole.var)
    whole = exact(anynorm.batch_norm, x, x)
    running = anynorm.RunningStats.init(4, like=backend.array(x), momentum=0.5)
    running = running.update(anynorm.batch_norm(backend.array(x), return_moments=True)[1])
    kept = whole.mean / 2, whole.var / 2 + 0.5
    y, pullback = anynorm.vjp(anynorm.batch_norm, backend.array(x), moments=running)
    expected = exact(anynorm.batch_norm, x, x, moments=kept)
    backend.check(y, expected.y)
    backend.check(pullback(backend.array(x))[0], expected.dx)
    weight = anynorm.WeightNorm.from_weight(backend.array(x))
    backend.check(weight.weight, x)


def test_numbers_of_any_size_are_normalized(backend):
    rng = np.random.default_rng(0)
    for size in (1e30, 1e-30):
        x = (rng.standard_normal((3, 5)) * size).astype(np.float32)
        y = anynorm.layer_norm(backend.array(x, "float32"), eps=0.0)
        backend.check(y, exact(anynorm.layer_norm, x, x, eps=0.0).y, dtype="float32", tolerance=2e-6)


def test_integers_a_way_back_a_fold_and_a_checkpoint(backend):
    numbers = np.random.default_rng(2).integers(0, 255, (7, 4))
    found = anynorm.Moments.over([backend.array(part, "uint8") for part in (numbers[:2], numbers[2:])], axis=0)
    backend.check(found.mean, numbers.mean(axis=0), dtype="float32", tolerance=1e-6)
    backend.check(found.std(correction=1), numbers.std(axis=0, ddof=1), dtype="float32", tolerance=1e-6)
    x = backend.array(numbers)
    y, moments = anynorm.normalize(x, axis=0, return_moments=True)
    backend.check(anynorm.denormalize(y, axis=0, moments=moments), numbers)
    centred, pullback = anynorm.vjp(anynorm.center, x, axis=0)
    backend.check(centred, numbers - numbers.mean(axis=0))
    backend.check(pullback(x)[0], numbers - numbers.mean(axis=0))
    if backend.library == "cubed":  # too slow
        return
    eye = backend.array(np.eye(4))
    folded, shift = anynorm.fold(eye, None, None, None, moments=moments)
    backend.check(x @ folded + shift, backend.numpy(y), tolerance=1e-9)
    running = anynorm.RunningStats.init(4, like=x, debias=True).update(moments)
    backend.check(running.mean, numbers.mean(axis=0))
    written = anynorm.to_checkpoint(anynorm.NormParams(moments.mean, moments.var, running), "bn", dialect="haiku")
    again = anynorm.from_checkpoint(written, dialect="haiku").running
    backend.check(again.update(moments).var, numbers.var(axis=0))


def test_a_state_is_saved_and_moved(backend, tmp_path):
    if backend.library == "sparse":
        pytest.skip(reason="by itself sparse makes no dense array")
    running = anynorm.RunningStats.init(3, like=backend.array(np.zeros(1)))
    running = running.update(anynorm.moments(backend.array(np.arange(6.0).reshape(2, 3)), axis=0))
    running.save(tmp_path / "state.npz")
    for found in (anynorm.RunningStats.load(tmp_path / "state.npz", like=running.mean), running.to(running.mean)):
        backend.check(found.mean, backend.numpy(running.mean))
    np.testing.assert_array_equal(running.to(np.zeros(1)).var, backend.numpy(running.var))


def test_what_is_not_real_and_floating_is_told_how_to_cast(backend):
    with pytest.raises(TypeError, match=r"^x must have a real floating dtype, got .*int32: write .*float32"):
        anynorm.layer_norm(backend.array(np.ones((2, 3)), "int32"))


def test_an_array_that_cannot_be_written_to_is_no_out(backend):
    x = backend.array(np.ones((2, 3)))
    if backend.library in ("plain", "sparse", "cubed"):
        with pytest.raises(ValueError, match=f"^out must be writeable, got an array of {backend.library} that is not$"):
            anynorm.layer_norm(x, out=x)


@pytest.mark.cells("others-cpu")
def test_a_library_that_lacks_a_function_is_told_its_name(backend):
    import plain

    if backend.library != "plain":
        return

    class Namespace:
        __name__ = "lacking"

        def __getattr__(self, name):
            if name in ("isfinite", "concat"):
                raise AttributeError(name)
            return getattr(plain, name)

    class Lacking(plain.Array):
        def __array_namespace__(self, /, *, api_version=None):
            return Namespace()

    with pytest.raises(
        TypeError, match=r"^x must come from a library .* got one of lacking, which lacks concat, isfinite$"
    ):
        anynorm.layer_norm(Lacking(np.ones((2, 3))))


@pytest.mark.cells("others-cpu")
def test_the_library_of_a_plan_is_pickled_by_name(backend):
    y, pullback = anynorm.vjp(anynorm.layer_norm, backend.array(np.asarray([[1.0, 2.0, 4.0]])))
    if backend.library == "cubed":
        return  # whose arrays are functions that are not pickled
    again = pickle.loads(pickle.dumps(pullback))
    backend.check(again(y)[0], backend.numpy(pullback(y)[0]))


def test_the_command_line_lists_the_library(backend):
    pytest.importorskip("rich", reason="it draws the table")
    from anynorm import info

    if backend.library in info.LIBRARIES:
        (_, device, dtypes) = info._rows(backend.library)[0]
        assert device == "cpu"
        assert "float32" in dtypes


@pytest.mark.cells("others-cpu")
@pytest.mark.parametrize(("norm", "options"), FUNCTIONS)
def test_autograd_differentiates_the_norms(norm, options):
    import autograd

    rng = np.random.default_rng(0)
    (x, dy), (gamma, beta) = rng.standard_normal((2, 5, 6)), rng.standard_normal((2, 6))
    pull, y = autograd.make_vjp(lambda given: norm(*given, **options))((x, gamma, beta))
    for one, other in zip((y, *pull(dy)), exact(norm, x, dy, gamma, beta, **options), strict=False):
        np.testing.assert_allclose(one, other.astype(float), atol=1e-12)


@pytest.mark.cells("mlx")
@pytest.mark.parametrize(("norm", "options", "weighted"), [(*FUNCTIONS[0], False), (*FUNCTIONS[2], True)])
def test_mlx_differentiates_compiles_and_maps(norm, options, weighted):
    import mlx.core as mx

    rng = np.random.default_rng(0)
    (x, dy), (gamma, beta) = rng.standard_normal((2, 5, 6)).astype("f4"), rng.standard_normal((2, 6)).astype("f4")
    weights = rng.random((5, 6)) > 0.3 if weighted else None
    arrays = [mx.array(each) for each in (x, gamma, beta, dy)]
    run = partial(norm, **options, weights=mx.array(weights) if weighted else None)
    expected = exact(norm, x, dy, gamma, beta, weights=weights, **options)
    gradients = mx.grad(lambda x, gamma, beta, dy: (run(x, gamma, beta) * dy).sum(), argnums=(0, 1, 2))

    def both(x, gamma, beta, dy):
        y, pullback = anynorm.vjp(norm, x, gamma, beta, **run.keywords)
        return y, *pullback(dy)

    for found in (both(*arrays), mx.compile(both)(*arrays), (None, *gradients(*arrays))):
        for one, other in zip(found, expected, strict=False):
            if one is not None:
                np.testing.assert_allclose(np.array(one), other.astype(float), atol=5e-6)
    if norm is not anynorm.batch_norm:  # the others take each sample by itself
        run = partial(run, channel_axis=0) if norm is anynorm.group_norm else run
        one_by_one = partial(run, weights=None)
        given = (
            [lambda x, w: run(x, *arrays[1:3], weights=w), arrays[0], mx.array(weights)]
            if weighted
            else [lambda x: one_by_one(x, *arrays[1:3]), arrays[0]]
        )
        np.testing.assert_allclose(np.array(mx.vmap(given[0])(*given[1:])), expected.y.astype(float), atol=5e-6)
