"""Large arrays take little memory beside their results."""

import os
import subprocess
import sys

import numpy as np
import pytest
from oracles import measured, peak, standardized

import anynorm


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@measured
def test_a_large_array_needs_little_more_than_its_result(dtype):
    x = np.ones((8, 64, 128, 128), dtype=dtype)
    for norm, options in (
        (anynorm.layer_norm, {"axis": (2, 3)}),
        (anynorm.batch_norm, {}),
        (anynorm.group_norm, {"groups": 32}),
        (anynorm.rms_norm, {}),
    ):
        assert peak(lambda norm=norm, options=options: norm(x, **options)) < x.nbytes + 8 * 2**20


@pytest.mark.cells("numpy")
@pytest.mark.parametrize(("dtype", "mean", "offset"), [("float16", 3, 3), ("float32", 3, 0)])
@measured
def test_a_large_gradient_needs_little_more_than_itself(dtype, mean, offset):
    rng = np.random.default_rng(3)
    for shape, norm, options, n in (
        ((4096, 1024), anynorm.layer_norm, {}, 1024),
        ((128, 32768), anynorm.layer_norm, {}, 32768),
        ((4, 64, 128, 128), anynorm.batch_norm, {}, 64),
        ((4, 64, 128, 128), anynorm.group_norm, {"groups": 32}, 64),
        ((4, 128, 128, 64), anynorm.batch_norm, {"channel_axis": -1}, 64),
        ((4, 128, 128, 64), anynorm.group_norm, {"channel_axis": -1, "groups": 32}, 64),
        ((256, 1024, 4, 4), anynorm.batch_norm, {}, 1024),
    ):
        x, dy = (rng.standard_normal(shape, dtype=np.float32).astype(dtype) for _ in range(2))
        gamma = rng.standard_normal(n).astype(dtype)
        x += np.asarray(offset, dtype)
        dy += np.asarray(mean, dtype)
        _, pullback = anynorm.vjp(norm, x, gamma, gamma, **options)
        forward = peak(lambda norm=norm, given=(x, gamma, gamma), options=options: anynorm.vjp(norm, *given, **options))
        backward = peak(lambda pullback=pullback, dy=dy: pullback(dy))
        assert max(forward, backward) < x.nbytes + 2 * gamma.nbytes + 8 * 2**20, norm


LAYOUTS = [
    (anynorm.layer_norm, (2**14, 256), {}),
    (anynorm.layer_norm, (2**19, 8), {}),
    (anynorm.layer_norm, (5, 900_000), {}),
    (anynorm.layer_norm, (1024, 4096), {"axis": 0}),
    (anynorm.layer_norm, (8, 4, 256, 512), {"axis": (1, 2, 3)}),
    (anynorm.normalize, (4, 1024, 1024), {"axis": None}),
    (anynorm.batch_norm, (8, 32, 128, 128), {}),
    (anynorm.batch_norm, (4, 128, 128, 64), {"channel_axis": -1}),
    (anynorm.instance_norm, (4, 128, 128, 64), {"channel_axis": -1}),
    (anynorm.group_norm, (4, 128, 128, 64), {"channel_axis": -1, "groups": 32}),
    (anynorm.group_norm, (3, 28, 28, 2048), {"channel_axis": -1, "groups": 128}),
    (anynorm.batch_norm, (16, 16384, 4, 4), {}),
    (anynorm.rms_norm, (2**14, 256), {}),
]


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("index", range(len(LAYOUTS)))
@measured
def test_a_call_takes_eight_megabytes_beside_its_output(index):
    norm, shape, options = LAYOUTS[index]
    x = np.ones(shape, ["float32", "float16"][index % 2])
    x[..., ::2] = 2
    peaks = peak(lambda: norm(x, **options)) - x.nbytes, peak(lambda: norm(x, out=x, **options))
    assert max(peaks) < 8e6, peaks


@pytest.mark.cells("numpy")
@measured
def test_a_gamma_for_each_of_many_groups_takes_no_more_memory():
    x, gamma = np.ones((2**22, 8), np.float32), np.full((2**22, 1), -2, np.float32)
    assert peak(lambda: anynorm.layer_norm(x, gamma, out=x)) < 8e6
    assert peak(lambda: anynorm.weight_norm(x, gamma[:, 0], out=x)) < 8e6


@pytest.mark.cells("numpy")
@measured
def test_more_threads_than_processors_take_no_more_memory():
    x = np.ones((16, 64, 128, 128), np.float32)
    x[..., ::2] = 2
    _, pullback = anynorm.vjp(anynorm.batch_norm, x)
    with anynorm.options(threads=32):
        peaks = peak(lambda: pullback(x)) - x.nbytes, peak(lambda: anynorm.batch_norm(x, out=x))
    assert max(peaks) < 8e6, peaks


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize(
    "view",
    [lambda x: x[..., ::-1], lambda x: x.transpose(3, 2, 1, 0), lambda x: x.transpose(0, 3, 1, 2)],
    ids=["reversed", "fortran", "channels last"],
)
@measured
def test_numbers_in_another_order_take_no_more_memory(out, view):
    x = view(np.ones((16, 64, 128, 128), np.float32))
    found = peak(lambda: anynorm.batch_norm(x, out=x)) if out else peak(lambda: anynorm.batch_norm(x)) - x.nbytes
    assert found < 8e6, found


ORDERS = {
    "fortran": np.asfortranarray,
    "the first axes exchanged": lambda x: np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1),
}


@pytest.mark.cells("numpy")
@pytest.mark.parametrize(
    ("norm", "shape", "options", "order", "dtype", "other"),
    [
        (anynorm.layer_norm, (8, 8, 256, 512), {"axis": (2, 3)}, "fortran", "float32", "float32"),
        (anynorm.batch_norm, (8, 64, 128, 128), {}, "the first axes exchanged", "float16", "float64"),
        (anynorm.batch_norm, (8, 64, 128, 128), {}, "fortran", "float32", "float32"),
        (anynorm.group_norm, (8, 64, 128, 128), {"groups": 32}, "the first axes exchanged", "float32", "float32"),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
@measured
def test_a_cotangent_in_another_order_is_copied_once_at_most(norm, shape, options, dtype, other, order):
    x = np.random.default_rng(7).standard_normal(shape, dtype=np.float32).astype(dtype)
    for ordered, dy in ((x, ORDERS[order](x.astype(other))), (ORDERS[order](x), x.astype(other))):
        _, pullback = anynorm.vjp(norm, ordered, **options)
        found = peak(lambda pullback=pullback, dy=dy: pullback(dy)) - x.nbytes
        assert found < dy.nbytes + 8e6, found


@pytest.mark.cells("numpy")
@pytest.mark.parametrize(
    ("norm", "shape", "options"),
    [
        (anynorm.normalize, (2**21, 8), {"axis": -1}),
        (anynorm.normalize, (2**20, 32), {"axis": -1}),
        (anynorm.batch_norm, (16, 64, 128, 128), {}),
    ],
)
@measured
def test_a_call_by_moments_that_are_given_takes_little_memory_too(norm, shape, options):
    x = np.ones(shape, np.float32)
    x[..., ::2] = 2
    moments = norm(x, return_moments=True, **options)[1]
    found = peak(lambda: norm(x, moments=moments, out=x, **options))
    assert found < 8e6, found


@pytest.mark.cells("numpy")
@measured
def test_weight_norm_and_moments_take_little_memory_too():
    x = np.ones((4096, 4096), np.float32)
    peaks = [peak(lambda: anynorm.weight_norm(x, np.ones(4096), out=x))]
    peaks += [peak(lambda axis=axis: anynorm.moments(x, axis=axis)) for axis in (0, 1, None)]
    assert max(peaks) < 8e6, peaks


MAPPED = """
import sys, numpy as np, anynorm
norm, shape, options, same, dtype = {job}
x = np.memmap(sys.argv[1], dtype, "r+", shape=shape)
out = x if same else np.memmap(sys.argv[2], np.float32, "w+", shape=shape)
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous:"))
import threading
seen, done = [], threading.Event()
def watch():
    while not done.wait(0.002):
        seen.append(anonymous())
before = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
getattr(anynorm, norm)(x, out=out, **options)
done.set()
watcher.join()
print(max(seen), max(seen) - before)
"""


def run_mapped(folder, *job):
    """What a call on mapped files takes at its peak, in KB: in all, and more than before."""
    command = [sys.executable, "-c", MAPPED.format(job=repr(job)), str(folder / "x"), str(folder / "y")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return [int(each) for each in done.stdout.split()]


@pytest.mark.cells("numpy")
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="only Linux tells")
@pytest.mark.parametrize(
    ("norm", "shape", "options", "same"),
    [("layer_norm", (2**15, 1024), {}, False), ("batch_norm", (2, 256, 256, 256), {"channel_axis": -1}, True)],
)
def test_a_file_larger_than_memory_is_normalized_in_place(tmp_path, norm, shape, options, same):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=shape)
    x[...] = np.random.default_rng(0).standard_normal(shape[-1], dtype=np.float32) + 3
    x[: shape[0] // 2] += 1
    first = x[:1].copy()
    x.flush()
    axes = (0, 1, 2) if options else (1,)
    assert run_mapped(tmp_path, norm, shape, options, same, "float32")[0] < 120e3
    y = np.memmap(tmp_path / ("x" if same else "y"), np.float32, "r", shape=shape)
    want = standardized(np.concatenate([first, first - 1]) if options else first, axes)[:1]
    np.testing.assert_allclose(y[:1], want, atol=1e-4)


@pytest.mark.cells("numpy")
@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="only Linux tells")
@pytest.mark.parametrize(
    ("norm", "shape", "options", "axes"),
    [("layer_norm", (2**14, 2048), {}, 1), ("batch_norm", (2**17, 256), {}, 0)],
)
def test_a_file_of_int16_becomes_one_of_float32_in_sixty_megabytes(tmp_path, norm, shape, options, axes):
    x = np.memmap(tmp_path / "x", np.int16, "w+", shape=shape)
    x[...] = np.arange(shape[1]) * 20
    x[: shape[0] // 2] += 7
    x.flush()
    assert run_mapped(tmp_path, norm, shape, options, False, "int16")[1] < 60e3
    y = np.memmap(tmp_path / "y", np.float32, "r", shape=shape)
    want = standardized(x[:1] if axes else x[shape[0] // 2 - 1 : shape[0] // 2 + 1, :9], axes)
    np.testing.assert_allclose(y[:1] if axes else y[:1, :9], want[:1], atol=1e-4)


@pytest.mark.cells("numpy")
@measured
def test_integers_take_little_memory_too():
    x = np.ones((2048, 4096), np.uint8)
    x[::2] = 3
    out = np.zeros(x.shape, np.float32)
    peaks = [peak(lambda axis=axis: anynorm.moments(x, axis=axis)) for axis in (0, 1, None)]
    peaks += [peak(lambda axis=axis: anynorm.normalize(x, axis=axis, out=out)) for axis in (0, 1, None)]
    peaks += [peak(lambda: anynorm.vjp(anynorm.layer_norm, x, np.ones(4096), out=out)[1](out))]
    assert max(peaks) < 8e6, peaks


WEIGHTED = [
    (anynorm.layer_norm, (2**14, 256), {}, [(2**14, 256), (2**14, 1), (256,)]),
    (anynorm.normalize, (4, 1024, 1024), {"axis": None}, [(4, 1024, 1024), (1024, 1)]),
    (anynorm.layer_norm, (1024, 4096), {"axis": 0}, [(1024, 4096)]),
    (anynorm.batch_norm, (4, 64, 128, 128), {}, [(4, 64, 128, 128), (4, 1, 128, 128)]),
    (anynorm.batch_norm, (4, 128, 128, 64), {"channel_axis": -1}, [(4, 128, 128, 64), (4, 128, 128, 1)]),
    (anynorm.group_norm, (4, 128, 128, 64), {"channel_axis": -1, "groups": 32}, [(4, 128, 128, 64)]),
    (anynorm.rms_norm, (2**14, 256), {}, [(2**14, 256)]),
]


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("index", range(len(WEIGHTED)))
@measured
def test_a_call_with_weights_takes_eight_megabytes_beside_its_output(index):
    (norm, shape, options, narrow), rng = WEIGHTED[index], np.random.default_rng(12)
    kind = ["mask", "reals", "padding"][index % 3]
    x = rng.standard_normal(shape, dtype=np.float32)
    for each in narrow if kind == "mask" else narrow[:1]:
        weights = rng.random(each, dtype=np.float32) if kind == "reals" else rng.random(each) > 0.5
        given = np.where(weights, x, np.float32(np.nan)) if kind == "padding" else x
        assert peak(lambda given=given, weights=weights: norm(given, weights=weights, **options)) < x.nbytes + 8e6
        _, pullback = anynorm.vjp(norm, given, weights=weights, **options)
        assert peak(lambda pullback=pullback: pullback(x)) < x.nbytes + 8e6
        assert peak(lambda given=given, weights=weights: norm(given, weights=weights, out=given, **options)) < 8e6
