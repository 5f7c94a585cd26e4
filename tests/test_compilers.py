"""A compiler's results are those of the plain schedules: the same numbers, in the caller's own kind of array."""

import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from oracles import CASES, derived, standardized, standardized_gradient

import anynorm
from anynorm import compilers, engines, forms, pullbacks

pytestmark = [
    pytest.mark.cells("torch-cpu", "jax"),  # arrays of NumPy are compiled for the processor
    # torch's own code, as its compiler loads it
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]


@pytest.fixture
def compiler(backend):
    """The cell's library as the compiler, in force."""
    if backend.tracked:
        pytest.skip(reason="arrays of NumPy are compiled once")
    with anynorm.options(compiler=backend.library):
        yield backend.library


def float32(shape, offset=0.0, scale=1.0):
    return (np.random.default_rng(0).standard_normal(shape) * scale + offset).astype(np.float32)


def versions(backend):
    """How much has been compiled."""
    graphs = 0
    if backend.library == "torch":
        graphs = backend.xp._dynamo.utils.counters["stats"]["unique_graphs"]
    return len(compilers._functions), graphs


# compiling one takes PyTorch some ten seconds
CHOSEN = {
    "torch": [2, 14, 18],
    "jax": range(len(CASES)),
}


@pytest.mark.parametrize("index", range(len(CASES)), ids=map(str, CASES))
def test_values_and_gradients_are_those_of_the_formula(compiler, index):
    if index not in CHOSEN[compiler]:
        pytest.skip(reason="another case has the same loops")
    case, rng = CASES[index], np.random.default_rng(0)
    x, dy = rng.standard_normal(case.shape) + 1, rng.standard_normal(case.shape)
    params = [rng.standard_normal(case.parameter_shape) for _ in range(case.parameters)]
    arguments = [x, *params, None][:3]
    y, pullback = anynorm.vjp(case.norm, x, *params, **case.options)
    found = [y, *pullback(dy)]
    for ours, each in zip(found, derived(case, arguments, dy), strict=True):
        assert type(ours) is np.ndarray
        assert ours.dtype == np.float64
        assert ours.flags.writeable
        np.testing.assert_allclose(ours, each, rtol=1e-8, atol=1e-8)


def test_an_array_comes_back_as_what_it_was(compiler, backend):
    import ml_dtypes

    x = np.random.default_rng(1).standard_normal((6, 32))
    expected = standardized(x, 1).astype(np.float64)
    for dtype, tolerance in ((np.float16, 4e-3), (ml_dtypes.bfloat16, 3e-2), (np.float32, 1e-5)):
        y, moments = anynorm.layer_norm(x.astype(dtype), return_moments=True)
        assert type(y) is type(moments.mean) is np.ndarray
        assert (y.dtype, moments.mean.dtype) == (dtype, np.float32)
        np.testing.assert_allclose(y.astype(np.float64), expected, atol=tolerance)
    y, moments = anynorm.layer_norm(backend.array(x, "float32"), return_moments=True)
    backend.check(y, expected, dtype="float32", tolerance=1e-5)
    backend.check(moments.mean, x.mean(axis=1), dtype="float32", tolerance=1e-6)


@pytest.fixture(params=["narrow", "wide"])
def sums(request, monkeypatch, backend):
    """The dtype of the sums: as arrays of the processor have them, or float64, which those on a GPU have."""
    if request.param == "wide":
        if backend.library != "torch":
            pytest.skip(reason="JAX has no float64 unless told")
        monkeypatch.setattr(compilers, "safe", lambda *call: True)
        monkeypatch.setattr(compilers, "wide", lambda call, name, x: call.spread is None)
        monkeypatch.setattr(pullbacks, "seen", lambda plan, rest, var: rest)
    return request.param


def test_numbers_are_exact_at_every_offset_and_magnitude(compiler, sums):
    for offset, scale, eps, bound in (
        (0, 1, 1e-5, 3e-6),
        (1e4, 1, 1e-5, 6e-6),
        (1e6, 1, 1e-5, 6e-5),
        (0, 1e30, 1e-5, 6e-6),
        (0, 1e37, 0, 6e-6),
        (-2e38, 1e37, 0, 6e-6),
        (0, 1e-36, 0, 6e-6),
    ):
        x = float32((64, 1000), offset, scale)
        y, pullback = anynorm.vjp(anynorm.layer_norm, x, eps=eps)
        np.testing.assert_allclose(y, standardized(x, 1, eps).astype(np.float64), atol=bound)
        if not offset:
            dy = float32((64, 1000))
            expected = standardized_gradient(x, dy, 1, eps).astype(np.float64) * scale
            np.testing.assert_allclose(pullback(dy)[0].astype(np.float64) * scale, expected, atol=2e-5)


def test_sums_over_many_rows_are_exact(compiler, sums):
    for rows in (65536, 65531):
        x = float32((rows, 8), 1e4)
        y, moments = anynorm.batch_norm(x, return_moments=True)
        np.testing.assert_allclose(y, standardized(x, 0).astype(np.float64), atol=6e-6)
        np.testing.assert_allclose(moments.mean, x.mean(axis=0, dtype=np.float64), rtol=2.0**-24 * 1.01)
        np.testing.assert_allclose(moments.var, x.var(axis=0, dtype=np.float64), rtol=2e-6)
    for shape in ((4095, 600), (4095, 257), (1000003, 3)):  # numbers that grow: rounding errors do not cancel
        x = (np.arange(math.prod(shape)).reshape(shape) / math.prod(shape)).astype(np.float32)
        y, pullback = anynorm.vjp(anynorm.batch_norm, x, None, np.zeros(shape[1], np.float32))
        np.testing.assert_allclose(y, standardized(x, 0).astype(np.float64), rtol=0, atol=2e-6)
        np.testing.assert_allclose(pullback(x)[-1], x.sum(axis=0, dtype=np.float64), rtol=1.5e-6)


def test_constants_subnormals_and_nan_are_what_they_are_elsewhere(compiler, sums):
    for value, eps in ((0.0, 0), (0.1, 0), (7.7e5, 0), (2.2e30, 0), (1e-40, 0), (3e38, 1e-40), (1.0, 1e-300)):
        np.testing.assert_array_equal(anynorm.layer_norm(np.full((3, 30), value, np.float32), eps=eps), 0)
    x = float32((3, 30), scale=1e-40)
    np.testing.assert_allclose(anynorm.layer_norm(x, eps=0), standardized(x, 1, 0).astype(np.float64), atol=1e-4)
    x = float32((4, 30))
    x[2, 7] = np.nan
    y = anynorm.layer_norm(x)
    np.testing.assert_allclose(y[[0, 1, 3]], standardized(x[[0, 1, 3]], 1).astype(np.float64), atol=3e-6)
    assert np.isnan(y[2]).all()
    assert anynorm.layer_norm(np.ones((0, 30), np.float32)).shape == (0, 30)


@pytest.mark.cells("torch")
def test_a_batch_of_another_size_compiles_nothing_anew(compiler, backend):
    gamma = np.ones(32, np.float32)

    def run(n):
        for norm, x, options in (
            (anynorm.layer_norm, float32((n, 32)), {}),
            (anynorm.batch_norm, float32((n, 32, 3)), {}),
            (anynorm.batch_norm, float32((n, 3, 32)), {"channel_axis": -1}),
        ):
            y, pullback = anynorm.vjp(norm, x, gamma, **options)
            plain, (dx, dgamma) = _plain(norm, x, gamma, options)
            np.testing.assert_allclose(y, plain, atol=6e-6)
            dy = np.asfortranarray(x) if n % 2 else x  # nor does another order in memory
            for ours, each in zip(pullback(dy), (dx, dgamma), strict=True):
                np.testing.assert_allclose(ours, each, rtol=2e-6, atol=2e-5)

    run(2)
    before = versions(backend)
    for n in (3, 4, 7, 14, 15):
        run(n)
    assert versions(backend) == before
    for n in (80, 400, 401):
        anynorm.vjp(anynorm.layer_norm, float32((n, 32)), gamma)
    assert versions(backend) == before
    for n in (48, 400, 401):  # sums of so many rows are divided, and there is a rest or none
        run(n)
    before = versions(backend)
    for n in (80, 255, 384, 385, 752, 783):
        run(n)
    assert versions(backend) == before


@pytest.mark.cells("torch")
def test_threads_share_many_rows_though_few_were_compiled_first(compiler, backend):
    from torch._inductor.utils import fresh_cache, run_and_get_code

    threads = backend.xp.get_num_threads()
    backend.xp.set_num_threads(2)
    try:
        with fresh_cache():
            codes = [run_and_get_code(anynorm.layer_norm, float32((n, 48)))[1] for n in (2, 2000)]
    finally:
        backend.xp.set_num_threads(threads)
    assert [["omp for" in code for code in found] for found in codes] == [[False], [True]]


@pytest.mark.cells("torch")
def test_a_shape_that_comes_again_needs_no_checks_of_the_compiler(compiler, backend, monkeypatch):
    gamma, beta = float32(32, offset=1), float32(32)
    checked, whole = [], engines._Graphs.__init__

    def counted(graphs, *given, **options):
        whole(graphs, *given, **options)
        compiled = graphs.compiled
        graphs.compiled = lambda *arrays: checked.append(1) or compiled(*arrays)

    monkeypatch.setattr(engines._Graphs, "__init__", counted)
    monkeypatch.setattr(compilers, "_functions", {})
    results = []
    for n in (5, 6, 5, 6, 5):
        x = float32((n, 32), offset=n)
        results.append([each.copy() for each in (anynorm.layer_norm(x, gamma, beta, out=x), x)])
        np.testing.assert_allclose(x, standardized(float32((n, 32), offset=n), 1) * gamma + beta, atol=1e-5)
    assert len(checked) == 2
    np.testing.assert_array_equal(results[0], results[4])
    same = anynorm.layer_norm(float32((5, 32), offset=5), beta, beta)  # one array twice
    np.testing.assert_allclose(same, standardized(float32((5, 32)), 1) * beta + beta, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 10, 17])
@pytest.mark.parametrize(
    ("norm", "shape", "options"),
    [
        (anynorm.layer_norm, (103, 40), {}),
        (anynorm.rms_norm, (103, 40), {}),
        (anynorm.group_norm, (103, 4, 5), {"groups": 2}),
        (anynorm.group_norm, (103, 5, 4), {"groups": 2, "channel_axis": -1}),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
@pytest.mark.cells("torch")
def test_a_large_gradient_is_that_of_its_parts(compiler, monkeypatch, norm, shape, options, rows):
    x, dy = float32(shape, offset=2), float32(shape)[::-1].copy()
    gamma = np.linspace(1, 2, shape[options.get("channel_axis", 1)], dtype=np.float32)
    _, pullback = anynorm.vjp(norm, x, gamma, **options)
    taken = []
    for size in (compilers.PART, rows * x[0].size):
        monkeypatch.setattr(compilers, "PART", size)
        monkeypatch.setattr(compilers, "_run", lambda *given, run=compilers._run: taken.append(1) or run(*given))
        found = pullback(dy)
        monkeypatch.undo()
    assert len(taken) == 1 + -(-103 // rows)
    with anynorm.options(compiler="none"):
        expected = anynorm.vjp(norm, x, gamma, **options)[1](dy)
    for ours, each in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, each, rtol=2e-6, atol=2e-5)


def _plain(norm, x, gamma, options):
    with anynorm.options(compiler="none"):
        y, pullback = anynorm.vjp(norm, x, gamma, **options)
        return y, pullback(x)


def test_any_order_in_memory_comes_in_and_is_left_alone(compiler, tmp_path):
    x = float32((2, 3, 32))
    expected, pullback = anynorm.vjp(anynorm.layer_norm, x)
    (gradient,) = pullback(expected)
    frozen, mapped = x.copy(), np.memmap(tmp_path / "x", dtype=np.float32, mode="w+", shape=x.shape)
    frozen.flags.writeable = False
    mapped[...] = x
    mapped.flush()
    mapped = np.memmap(tmp_path / "x", dtype=np.float32, mode="r", shape=x.shape)
    others = [np.asfortranarray(x), x.swapaxes(1, 2).copy().swapaxes(1, 2), np.repeat(x, 2, axis=2)[..., ::2]]
    others += [x[::-1].copy()[::-1], x[..., ::-1].copy()[..., ::-1]]
    for each in (frozen, mapped, *others, x.astype(">f4")):
        out = np.empty_like(each)
        y, pullback = anynorm.vjp(anynorm.layer_norm, each)
        (dx,) = pullback(y)
        for found in (y, anynorm.layer_norm(each, out=out)):
            np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_allclose(dx, gradient, atol=1e-6)
        np.testing.assert_array_equal(each, x)


def test_a_result_is_the_callers_alone(compiler):
    x = float32((6, 32))
    given, ((y, moments), pullback) = x.copy(), anynorm.vjp(anynorm.layer_norm, x, return_moments=True)
    kept, (dx,) = y.copy(), pullback(x)
    anynorm.layer_norm(2 * x)
    np.testing.assert_array_equal(y, kept)
    for each in (y, moments.mean, moments.var):
        each[...] = 0
    np.testing.assert_array_equal(x, given)
    np.testing.assert_array_equal(pullback(x)[0], dx)


@pytest.mark.parametrize("name", ["torch", "jax", "cupy"])
def test_a_missing_compiler_is_one_sentence(monkeypatch, name, backend):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(engines, "_compilers", {})
    monkeypatch.setattr(engines, "import_module", absent)
    sentence = rf"^compiler='{name}' needs \w+, which is not installed: pip install 'anynorm\[{name}\]'$"
    with anynorm.options(compiler=name), pytest.raises(ImportError, match=sentence):
        anynorm.layer_norm(float32((6, 32)))


FORKED = """
import os, numpy as np, torch, anynorm
x = np.random.default_rng(0).standard_normal((256, 8192)).astype(np.float32)
torch.set_num_threads(2)
with anynorm.options(compiler="torch"):
    want = anynorm.layer_norm(x)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if np.allclose(anynorm.layer_norm(x), want, atol=1e-6) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.cells("torch-cpu")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_one_thread_of_pytorch_is_safe_after_a_fork(tmp_path):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}  # so that the child has to compile
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], check=True, timeout=300, env=environment)


@pytest.mark.cells("torch-cpu")
def test_a_missing_compiler_of_c_is_one_sentence_too(tmp_path):
    program = """
import os, numpy as np, anynorm
os.environ["PATH"] = ""
with anynorm.options(compiler="torch"):
    try:
        anynorm.layer_norm(np.ones((33, 77), np.float32))
    except RuntimeError as error:
        print(error)
"""
    environment = os.environ | {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    sentence = "compiler='torch' needs a C++ compiler, and finds none: install one, such as g++, or name it in CXX"
    assert done.stdout.strip() == sentence, done.stderr


def test_two_threads_may_compile_one_call_at_once(compiler, backend):
    x, found = float32((6, 48)), []

    def call():
        with anynorm.options(compiler=compiler):
            found.append(anynorm.rms_norm(x))

    threads = [threading.Thread(target=call) for _ in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    np.testing.assert_array_equal(*found)
    with anynorm.options(compiler="none"):
        np.testing.assert_allclose(found[0], anynorm.rms_norm(x), atol=1e-6)


def test_out_is_written_to_wherever_it_lies(compiler, backend):
    x = float32((6, 32))
    expected, same = anynorm.layer_norm(x), x.copy()
    for given, out in ((x, np.empty_like(x)), (x, np.empty((6, 64), np.float32)[:, ::2]), (same, same)):
        y, pullback = anynorm.vjp(anynorm.layer_norm, given, out=out)
        assert y is out
        np.testing.assert_allclose(out, expected, atol=1e-6)
        np.testing.assert_allclose(pullback(x)[0], anynorm.vjp(anynorm.layer_norm, x)[1](x)[0], atol=1e-6)
    if compiler == "torch":
        y = backend.xp.empty(6, 32)
        anynorm.layer_norm(backend.xp.from_numpy(x), out=y)
        np.testing.assert_allclose(y.numpy(), expected, atol=1e-6)


def test_a_pullback_outlives_the_option(compiler, monkeypatch):
    x, calls = float32((6, 32)), []
    with anynorm.options(compiler=compiler):
        pullback = anynorm.vjp(anynorm.layer_norm, x)[1]
    gradients = compilers.gradients
    monkeypatch.setattr(compilers, "gradients", lambda *given: calls.append(given) or gradients(*given))
    with anynorm.options(compiler="none"):
        pullback(x)
        anynorm.vjp(anynorm.layer_norm, x)[1](x)
    assert len(calls) == 1


@pytest.mark.parametrize("change", [lambda x: x, lambda x: x.astype(">f4"), np.asfortranarray, lambda x: x[::-1]])
def test_a_pullback_keeps_x_and_sees_that_it_was_written_to(compiler, change):
    x, dy = float32((6, 32), 1.0), float32((6, 32), 0.5)
    with anynorm.options(compiler="none"):
        expected = anynorm.vjp(anynorm.layer_norm, x)[1](dy)[0]
    given = change(x.copy())
    y, pullback = anynorm.vjp(anynorm.layer_norm, given)
    y[...] = 7
    for _ in range(2):
        np.testing.assert_allclose(pullback(change(dy))[0], change(expected), atol=2e-6)
    given[...] = 7
    if given.dtype.isnative:
        with pytest.raises(ValueError, match="^x must be to the pullback what it was to vjp, got"):
            pullback(change(dy))
    else:  # not compiled, and small: xhat is kept
        np.testing.assert_allclose(pullback(change(dy))[0], change(expected), atol=2e-6)


@pytest.mark.cells("torch-cpu")
def test_the_mean_of_dy_costs_the_gradient_of_gamma_no_digits(compiler):
    for offset in (0, 100):
        x, dy = float32((4096, 40), offset), float32((40, 4096), 3).T
        y, pullback = anynorm.vjp(anynorm.batch_norm, x, np.ones(40, np.float32))
        xhat = standardized(x, 0)
        np.testing.assert_allclose(pullback(dy)[1], (dy * xhat).sum(axis=0).astype(np.float64), rtol=0, atol=1e-4)
        assert np.abs(y.mean(axis=0, dtype=np.float64)).max() < 8e-8


def test_groups_of_long_rows_are_added_in_parts(compiler):
    x, dy = float32((3, 8, 2113), 5.0), float32((3, 8, 2113), 0.2)  # 2 * 2113 numbers a group: two equal parts
    gamma, beta = float32(8), float32(8, 1.0)
    wide = [each.astype(np.float64) for each in (x, gamma, beta)]
    with anynorm.options(compiler="none"):
        y, pullback = anynorm.vjp(anynorm.group_norm, *wide, groups=4)
        expected = [y, *pullback(dy.astype(np.float64))]
    y, pullback = anynorm.vjp(anynorm.group_norm, x, gamma, beta, groups=4)
    for found, each in zip((y, *pullback(dy)), expected, strict=True):
        np.testing.assert_allclose(found, each, rtol=0, atol=4e-6 * max(1, np.max(np.abs(each))))


def test_moments_keep_what_rounding_takes_from_the_mean(compiler):
    x = float32((6, 32), 1e4)
    moments = anynorm.layer_norm(x, return_moments=True)[1]
    total = moments.merge(moments)
    exact = x.mean(axis=1, dtype=np.float64)
    np.testing.assert_allclose(moments.mean.astype(np.float64) + moments._rest, exact, rtol=1e-10)
    np.testing.assert_allclose(total.var, x.var(axis=1, dtype=np.float64), rtol=2e-6)
    y = anynorm.normalize(x, axis=1, moments=moments)
    np.testing.assert_allclose(y, standardized(x, 1).astype(np.float64), rtol=2e-6, atol=2e-6)


@pytest.mark.cells("torch")
def test_autograd_differentiates_what_was_compiled(backend, monkeypatch):
    torch, x, calls = backend.xp, float32((6, 32)), []
    compiled = compilers.gradients
    monkeypatch.setattr(compilers, "gradients", lambda *given: calls.append(given) or compiled(*given))
    if not backend.tracked:
        pytest.skip(reason="nothing is recorded")
    gradients = []
    for name in ("torch", "none"):
        leaves = [torch.tensor(each, requires_grad=True) for each in (x, np.linspace(1, 2, 32, dtype=np.float32))]
        with anynorm.options(compiler=name):
            y = anynorm.layer_norm(*leaves)
        gradients.append(torch.autograd.grad(y.pow(3).sum(), leaves))
    for ours, each in zip(*gradients, strict=True):
        assert torch.allclose(ours, each, rtol=1e-4, atol=1e-4)
    assert len(calls) == 1


def test_a_call_that_is_traced_already_is_left_to_its_compiler(compiler, backend):
    x = float32((6, 32))
    before = len(compilers._functions)
    if compiler == "torch":
        torch = backend.xp
        whole = torch.compile(anynorm.layer_norm, fullgraph=True, backend="eager")
        mapped = torch.func.vmap(anynorm.layer_norm)
        x = torch.from_numpy(x)
    else:
        import jax

        whole, mapped = jax.jit(anynorm.layer_norm), jax.vmap(anynorm.layer_norm)
        x = jax.numpy.asarray(x)
    expected = standardized(np.asarray(x), 1).astype(np.float64)
    for function in (whole, mapped):
        np.testing.assert_allclose(np.asarray(function(x)), expected, atol=3e-6)
    assert len(compilers._functions) == before


@pytest.mark.cells("jax")
def test_double_precision_needs_no_setting_of_jax(compiler):
    import jax

    x = np.random.default_rng(2).standard_normal((6, 32))
    with jax.enable_x64(False):
        y = anynorm.layer_norm(x)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, standardized(x, 1).astype(np.float64), atol=1e-12)


def test_a_pivot_that_tells_nothing_is_seen_through(compiler):
    plain, odd = float32((64, 2**14)), float32((64, 2**14), offset=1e3)
    odd[:, :: 2**14 // forms.FEW] = 0
    for x, dy in ((odd, plain), (plain, odd)):
        y, pullback = anynorm.vjp(anynorm.layer_norm, x)
        found = [y, *pullback(dy)]
        with anynorm.options(compiler="none"):
            y, pullback = anynorm.vjp(anynorm.layer_norm, x.astype(np.float64))
            exact = [y, *pullback(dy.astype(np.float64))]
        for ours, each in zip(found, exact, strict=True):
            np.testing.assert_allclose(ours, each, rtol=0, atol=2e-6 * np.max(np.abs(each)))


def test_a_result_in_place_of_its_argument_is_right_where_the_compiled_one_is_not(compiler):
    for size in (1e30, 1e-30):
        x = float32((64, 256), scale=size)
        expected = anynorm.layer_norm(x.copy(), eps=0)
        assert anynorm.layer_norm(x, eps=0, out=x) is x
        np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-6)
        assert np.max(np.abs(expected)) > 1
