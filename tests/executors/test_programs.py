"""Loops that numba compiles: which calls are run so, what they are compiled for, and that they can be relied upon."""

import ctypes
import multiprocessing
import os
import subprocess
import sys
import threading

import inner
import ml_dtypes
import numpy as np
import pytest
from oracles import standardized, standardized_gradient

import anynorm

pytestmark = pytest.mark.cells("fast-cpu")


def normal(shape, dtype="float32", seed=0, mean=0.0, std=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * std + mean).astype(dtype)


@pytest.fixture
def ran(monkeypatch):
    """What programs were run for."""
    return inner.count_programs(monkeypatch)


def test_size_alone_decides_what_computes(ran):
    small, large = normal((16, 1024)), normal((256, 1024))
    with anynorm.options(engine="auto"):
        anynorm.layer_norm(small)
        assert not ran
        anynorm.layer_norm(large)
        assert ran == ["forward"]
    with anynorm.options(engine="arrays"):
        anynorm.layer_norm(large)
        assert ran == ["forward"]
    with anynorm.options(engine="numba"):
        anynorm.layer_norm(small[:1, :3])
        assert ran == ["forward", "forward"]


def test_an_engine_has_one_of_three_names():
    for name in ("torch", "", 3):
        with pytest.raises(ValueError, match=r"^engine must be one of 'auto', 'numba', 'arrays', got "):
            anynorm.options(engine=name)


def in_a_process(code, **env):
    others = {"ANYNORM_ENGINE"} | ({"NUMBA_CACHE_DIR"} if "XDG_CACHE_HOME" in env else set())
    environment = {name: value for name, value in os.environ.items() if name not in others} | env
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


LARGE = "import numpy as np, anynorm; x = np.ones((512, 1024), np.float32); y = anynorm.layer_norm(x); "


def test_numba_that_cannot_be_imported_is_as_none(tmp_path):
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs NumPy 2.3 or less')")
    run = in_a_process(LARGE + "print(abs(y).max())", PYTHONPATH=f"{tmp_path}:{os.getcwd()}")
    assert run.stdout == "0.0\n", run.stderr
    run = in_a_process(LARGE, PYTHONPATH=f"{tmp_path}:{os.getcwd()}", ANYNORM_ENGINE="numba")
    last = run.stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: engine='numba' needs numba, which cannot be imported: Numba needs NumPy 2.3 or less: "
        "pip install numba"
    )


def test_what_was_compiled_is_kept_from_one_process_to_the_next(tmp_path):
    for folder in ({"NUMBA_CACHE_DIR": str(tmp_path / "numba")}, {"XDG_CACHE_HOME": str(tmp_path / "home")}):
        for _ in range(2):
            run = in_a_process(LARGE + "print(abs(y).max())", **folder)
            assert run.stdout == "0.0\n", run.stderr
        (made,) = (tmp_path / next(iter(folder.values())).rpartition("/")[2]).glob("**/forward_*.py")
        kept = list(made.parent.rglob("*.nbc")) or list(made.parent.parent.rglob("*.nbc"))
        assert len(kept) == 1
    made.write_bytes(b"\xff\xfe")
    run = in_a_process(LARGE + "print(abs(y).max())", **folder)
    assert run.stdout == "0.0\n", run.stderr


def test_a_folder_that_cannot_be_written_to_is_done_without(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    run = in_a_process(LARGE + "print(abs(y).max())", NUMBA_CACHE_DIR=str(blocked))
    assert run.stdout == "0.0\n", run.stderr


def test_the_first_call_of_a_process_may_come_at_its_exit():
    code = f"import anynorm, atexit; atexit.register(lambda: exec({LARGE + 'print(abs(y).max())'!r}))"
    run = in_a_process(code)
    assert (run.returncode, run.stdout, run.stderr) == (0, "0.0\n", "")


def test_a_kind_is_compiled_once_and_never_for_a_size(monkeypatch):
    made = inner.forget_programs(monkeypatch)
    gamma, started = np.ones(48, np.float32), threading.Barrier(4)

    def run(n):
        started.wait()
        for norm, shape, options in (
            (anynorm.layer_norm, (n, 48), {}),
            (anynorm.batch_norm, (n, 48, 5), {}),
            (anynorm.batch_norm, (n, 5, 48), {"channel_axis": -1}),
            (anynorm.group_norm, (n, 48, 5), {"groups": 6}),
        ):
            y, pullback = anynorm.vjp(norm, normal(shape), gamma, gamma, **options)
            assert all(np.isfinite(each).all() for each in (y, *pullback(y)))

    for sizes in ((7, 8, 9, 11), (21, 33, 40, 63)):
        threads = [threading.Thread(target=run, args=(n,)) for n in sizes]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert len(made) == 8


def test_twenty_kinds_do_for_all_norms(monkeypatch):
    made = inner.forget_programs(monkeypatch)
    inner.compile_by(monkeypatch, lambda make, *_: lambda *_: 0)  # which are not run
    first, last = (6, 8, 17, 13), (6, 17, 13, 8)
    given = anynorm.Moments(np.zeros(8, np.float32), np.ones(8, np.float32), 5)
    for norm, shape, parameters, options in (
        (anynorm.layer_norm, (33, 70), 2, {}),
        (anynorm.rms_norm, (33, 70), 1, {}),
        (anynorm.weight_norm, (33, 70), 1, {}),
        (anynorm.batch_norm, (60, 8), 2, {}),
        (anynorm.batch_norm, first, 2, {}),
        (anynorm.batch_norm, last, 2, {"channel_axis": -1}),
        (anynorm.batch_norm, first, 2, {"moments": given}),
        (anynorm.batch_norm, last, 2, {"channel_axis": -1, "moments": given}),
        (anynorm.group_norm, first, 2, {"groups": 4}),
        (anynorm.group_norm, last, 2, {"groups": 4, "channel_axis": -1}),
        (anynorm.instance_norm, first, 2, {}),
        (anynorm.instance_norm, last, 2, {"channel_axis": -1}),
    ):
        channels = {anynorm.weight_norm: 33}.get(norm, shape[options.get("channel_axis", 1)])
        x, gamma = normal(shape), np.ones(channels, np.float32)
        norm(x, *[gamma] * parameters, **options)
        y, pullback = anynorm.vjp(norm, x, *[gamma] * parameters, **options)
        pullback(x)
    for axis in (0, 1):
        anynorm.moments(normal((33, 70)), axis=axis)
    assert len(made) == 20


def test_the_text_is_that_of_the_kernels(monkeypatch):
    texts = []
    inner.forget_programs(monkeypatch)
    inner.compile_by(monkeypatch, lambda make, name, text, *of: texts.append(text) or make(name, text, *of))
    anynorm.layer_norm(normal((3, 40)), np.ones(40, np.float32), np.ones(40, np.float32))
    (text,) = texts
    lines = [line.strip() for line in text.splitlines()]
    assert lines.count("for j in range(n3):") == 2, "one loop for the sums, one for the result"
    assert sum("= plus(" in line for line in lines) == 2, "terms of sums alone may be added in any order"
    assert sum(line.startswith("store_float32(") for line in lines) == 1, "no result is read again"
    assert not [line for line in lines if "load_float64" in line]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    ("norm", "shape", "axes", "options"),
    [
        (anynorm.layer_norm, (600, 700), (1,), {}),
        (anynorm.layer_norm, (4, 9000), (1,), {}),
        (anynorm.batch_norm, (30, 5, 4000), (0, 2), {}),
        (anynorm.batch_norm, (3000, 5, 31), (0, 1), {"channel_axis": -1}),
        (anynorm.group_norm, (3, 4, 2, 7000), (2, 3), {"groups": 4}),
        (anynorm.group_norm, (3, 7000, 4, 5), (1, 3), {"groups": 4, "channel_axis": -1}),
    ],
    ids=["rows", "long rows", "channels", "channels last", "groups", "interleaved groups"],
)
def test_large_arrays_are_exact_at_an_offset_and_the_same_for_any_number_of_threads(norm, shape, axes, options, dtype):
    kind = getattr(ml_dtypes, dtype, dtype)
    x = normal(shape, "float64", mean={"float16": 3, "bfloat16": 3, "float32": 1e5}.get(dtype, 1e4)).astype(kind)
    dy, last = normal(shape, kind, 1), shape[-1] if options.get("channel_axis", -1) == -1 else None
    whole = (shape[0], shape[1] * shape[2], shape[3]) if len(shape) == 4 and last is None else shape
    whole = (*shape[:2], shape[2] * shape[3]) if len(shape) == 4 and last is not None else whole
    results = []
    for threads in (1, 3):
        with anynorm.options(threads=threads):
            y, pullback = anynorm.vjp(norm, x.reshape(whole), **options)
            results.append([y, *pullback(dy.reshape(whole))])
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)
    wide = x.astype(np.longdouble)
    step = {"float16": 2e-3, "bfloat16": 2e-2, "float32": 4e-7, "float64": 1e-13}[dtype]
    expected = standardized(wide, axes), standardized_gradient(wide, dy.astype(np.longdouble), axes)
    for ours, each in zip(results[0], expected, strict=True):
        largest = float(abs(each).max())
        np.testing.assert_allclose(ours.astype(float).reshape(shape), each.astype(float), rtol=0, atol=step * largest)


def test_gradients_are_exact_beside_any_gamma_and_a_dy_that_is_nearly_all_mean():
    x, dy = normal((64, 512), std=1e5), normal((64, 512), seed=1, mean=1e4)
    for size in (1e-30, 1e-14, 1.0, 1e30):
        gamma = (normal((512,), "float64", 2) * size).astype(np.float32)
        _, pullback = anynorm.vjp(anynorm.layer_norm, x, gamma, np.zeros_like(gamma))
        dx, dgamma, dbeta = (each.astype(np.longdouble) for each in pullback(dy))
        wide = [each.astype(np.longdouble) for each in (x, dy, gamma)]
        expected = standardized_gradient(wide[0], wide[1] * wide[2], 1)
        assert abs(dx - expected).max() <= 2e-7 * abs(expected).max()
        assert abs(dgamma - (wide[1] * standardized(wide[0], 1)).sum(0)).max() <= 2e-7 * abs(dgamma).max()
        assert abs(dbeta - wide[1].sum(0)).max() <= 2e-7 * abs(dbeta).max()


@pytest.mark.parametrize("layout", ["rows", "channels", "channels last"])
def test_large_arrays_are_exact_by_given_moments_of_any_size(layout):
    shape, axis = (
        {"rows": (512, 1024), "channels": (16, 8, 4096), "channels last": (65536, 8)}[layout],
        layout != "rows",
    )
    kept = tuple(1 if (each == 1) != axis else n for each, n in enumerate(shape))
    for mean, std, size in (
        (1e6, 1, 1),
        (0, 1e-18, 1e30),
        (0, 1e18, 1e-30),
        (1e-20, 1e-18, 1e-15),
        (-3e30, 1e18, 1e20),
    ):
        x = normal(shape, std=std, mean=mean)
        gamma, beta = (normal(kept if axis else (1, 1024), seed=i) * np.float32(size) for i in (1, 2))
        moments = anynorm.Moments(*(np.full(kept, each, np.float32) for each in (mean, std * std)), 3)
        wide = [each.astype(np.longdouble) for each in (x, gamma, beta, moments.mean, moments.var)]
        scaled = (wide[0] - wide[3]) / np.sqrt(wide[4] + np.longdouble(1e-30)) * wide[1]
        expected = (scaled + wide[2]).astype(float)
        given = anynorm.Moments(np.squeeze(moments.mean), np.squeeze(moments.var), 3)
        axes = tuple(i for i, n in enumerate(kept) if n == 1)
        y = anynorm.normalize(x, gamma, beta, axis=axes, moments=given, eps=1e-30)
        bound = 3e-7 * (np.abs(scaled) + np.abs(wide[2])).astype(float)
        assert np.all(np.abs(y - expected) <= bound)
        assert anynorm.normalize(x, gamma, beta, axis=axes, moments=given, eps=1e-30, out=x) is x
        np.testing.assert_array_equal(x, y)


def test_what_cannot_be_read_where_it_lies_is_right_all_the_same():
    x = normal((40, 64))
    expected = standardized(x, 1).astype(float)
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    readonly = x.copy()
    readonly.flags.writeable = False
    for each in (x.astype(">f4"), unaligned, readonly, x[::-1].copy()[::-1], np.asfortranarray(x), x.astype("g")):
        np.testing.assert_allclose(anynorm.layer_norm(each).astype(float), expected, atol=1e-6)
        y, pullback = anynorm.vjp(anynorm.layer_norm, each, np.ones(64, each.dtype))
        np.testing.assert_allclose(
            pullback(each)[0].astype(float), standardized_gradient(x, x, 1).astype(float), atol=2e-6
        )


def test_what_lies_alike_but_is_read_in_another_way_is_no_known_call():
    torch = pytest.importorskip("torch")
    x, dy = normal((3, 8)), normal((3, 8), seed=1)
    _, pullback = anynorm.vjp(anynorm.layer_norm, x)
    np.testing.assert_allclose(pullback(dy.astype(">f4"))[0], pullback(dy)[0], atol=1e-6)
    x, dy = map(torch.from_numpy, (x, dy))
    whole, negative = (torch.complex(torch.zeros(3, 8), sign * x) for sign in (1, -1))
    plain, other = whole.imag, negative.conj().imag
    assert torch.equal(plain, other)
    assert plain.is_neg() < other.is_neg()
    torch.testing.assert_close(anynorm.layer_norm(plain), anynorm.layer_norm(other))
    _, pullback = anynorm.vjp(anynorm.layer_norm, x)
    pullback(dy)
    assert not pullback(torch._efficientzerotensor((3, 8)))[0].any()


@pytest.mark.parametrize("size", [1e28, 1e-28])
def test_a_gradient_is_exact_where_array_operations_computed_the_result(size):
    x, dy, place = normal((4, 64), std=size), normal((4, 64), seed=1), np.empty((4, 64), ">f4")
    for out in (None, place):
        y, pullback = anynorm.vjp(anynorm.layer_norm, x, out=out, eps=0)
        expected = standardized_gradient(x, dy, 1, 0)
        np.testing.assert_allclose(y.astype(float), standardized(x, 1, 0).astype(float), atol=2e-6)
        found = pullback(dy)[0].astype("g") / abs(expected).max()
        np.testing.assert_allclose(found.astype(float), (expected / abs(expected).max()).astype(float), atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_group_that_has_a_nan_is_nan(dtype):
    for bad in (np.nan, np.inf):
        x = normal((2, 6), dtype)
        x[0, 1] = bad
        for norm, more in (
            (anynorm.rms_norm, ()),
            (anynorm.layer_norm, ()),
            (anynorm.weight_norm, (np.ones(2, dtype),)),
        ):
            y = norm(x, *more)
            with anynorm.options(engine="arrays"):
                expected = norm(x, *more)
            np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
            assert np.isnan(y[0, 1])
            assert np.all(np.isfinite(y[1]))


def test_integers_and_other_dtypes_are_read_and_written_where_they_lie(ran):
    gamma, dy = normal(96, seed=1), normal((40, 96), seed=2)
    with anynorm.options(engine="numba"):
        for own, into, room in (
            ("int16", "float32", 2e-6),
            ("uint64", "float64", 1e-11),
            ("float32", "float64", 1e-11),
        ):
            x = normal((40, 96), own, std=50.0, mean=1000.0)
            xhat, ran[:] = standardized(x, 1).astype(float), []
            y, pullback = anynorm.vjp(anynorm.layer_norm, x, gamma, out=np.zeros(x.shape, into))
            dx, dgamma = pullback(dy)
            found = anynorm.moments(x, axis=1, dtype="float64")
            assert (ran.count("forward"), ran.count("backward"), ran[-1]) == (1, 1, "statistics")
            np.testing.assert_allclose(y, xhat * gamma, rtol=room, atol=room)
            np.testing.assert_allclose(dgamma, (dy * xhat).sum(0), rtol=1e-5, atol=1e-5)
            assert dx is None if x.dtype.kind in "biu" else dx.dtype == x.dtype
            np.testing.assert_allclose(found.mean, x.astype(float).mean(1), rtol=1e-15)
            np.testing.assert_allclose(found.var, x.astype(float).var(1), rtol=1e-14)
        same = np.arange(40 * 96, dtype=np.int32).reshape(40, 96)  # a result may lie where its integers do
        expected = standardized(same, 1).astype(float)
        np.testing.assert_allclose(anynorm.layer_norm(same, out=same.view(np.float32)), expected, atol=1e-5)


def test_other_libraries_are_told_apart():
    xp = pytest.importorskip("array_api_strict", reason="a library that programs cannot read")
    with pytest.raises(
        ValueError, match=r"^engine='numba' takes arrays of NumPy, PyTorch on a processor and Dask, got "
    ):
        anynorm.layer_norm(xp.ones((2, 3)))


def test_a_result_may_lie_where_x_does_and_beside_what_is_read():
    for norm, shape, options in (
        (anynorm.layer_norm, (32, 48), {}),
        (anynorm.batch_norm, (8, 64, 64), {}),
        (anynorm.batch_norm, (900, 300), {"channel_axis": -1}),
    ):
        x = normal(shape, mean=3)
        channels = shape[-1] if norm is anynorm.layer_norm or options else shape[1]
        for gamma in (np.ones(channels, np.float32), None):
            expected = norm(x, gamma, **options)
            place = x.copy()
            assert norm(place, gamma, out=place, **options) is place
            np.testing.assert_array_equal(place, expected)
    square = normal((64, 64))
    expected = anynorm.layer_norm(square, square[3].copy())
    np.testing.assert_array_equal(anynorm.layer_norm(square.copy(), square[3], out=square), expected)


def test_a_fork_after_a_call_with_threads_can_call_again():
    x = normal((4096, 256))
    with anynorm.options(threads=2):
        expected = anynorm.layer_norm(x)
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=lambda: queue.put(float(abs(anynorm.layer_norm(x) - expected).max())))
        child.start()
        child.join(60)
    assert child.exitcode == 0
    assert queue.get() == 0


def test_many_threads_at_once_get_the_same_bits():
    x, dy = normal((2048, 256)), normal((2048, 256), seed=1)
    gamma = normal((256,), seed=2)

    def run():
        y, pullback = anynorm.vjp(anynorm.layer_norm, x, gamma, gamma)
        return [y, *pullback(dy)]

    expected, found = run(), []
    threads = [threading.Thread(target=lambda: found.append(run())) for _ in range(6)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == 6
    for results in found:
        for ours, each in zip(results, expected, strict=True):
            np.testing.assert_array_equal(ours, each)


def test_an_array_at_an_odd_address_is_left_to_array_operations(ran):
    x = normal((3, 40))
    unaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape)
    np.testing.assert_allclose(anynorm.layer_norm(unaligned), anynorm.layer_norm(x), atol=1e-6)
    assert ran == [None, "forward"]


def test_the_address_is_where_numpy_says_that_it_is():
    library = inner.library_of("x", np.zeros(1))
    for x in (np.zeros(3), np.zeros((4, 5), np.float32)[1:, 2], np.arange(6.0).reshape(2, 3).T[::-1]):
        assert ctypes.c_size_t.from_address(library.address(x) + library.offset).value == x.ctypes.data


def test_sums_of_very_many_rows_keep_their_digits():
    """Few distinct numbers far from 0: rounding errors of the same kind, which one sum after another adds up."""
    x = (np.random.default_rng(0).standard_normal((64, 32, 32, 16)) + 1e4).astype(np.float32)
    wide = x.astype(np.longdouble)
    var = ((wide - wide.mean(axis=(0, 1, 2))) ** 2).mean(axis=(0, 1, 2))
    whole = anynorm.moments(x, axis=(0, 1, 2), dtype="float64")
    over = anynorm.Moments.over(np.array_split(x, 7), axis=(0, 1, 2), dtype="float64")
    assert np.max(abs(whole.var - var) / var) < 2e-14
    assert np.max(abs(over.var - var) / var) < 3e-15
