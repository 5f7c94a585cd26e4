"""Batch norm over replicas is batch norm of the joined batch: in threads, in processes of torch.distributed, in JAX."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import BrokenBarrierError

import numpy as np
import pytest
from replicas import Replicas

import anynorm

HERE = Path(__file__).parent
THREADS = pytest.mark.cells("numpy", "strict", "torch")
SHARDS = [(3, 2), (4, 0, 2), (1, 1, 5), (0, 0, 3), (6,)]


def shards(array, sizes):
    """The parts of an array that the replicas hold."""
    return np.split(array, np.cumsum(sizes)[:-1])


def untracked(backend):
    return replace(backend, tracked=False)


def synchronized(backend, sizes, x, dy, gamma, beta, weights=None, dtype=None, **options):
    """What all replicas find, joined: y, the gradients, the moments; what they share must be the same everywhere."""
    replicas = Replicas(len(sizes))
    parts = [shards(each, sizes) for each in (x, dy)]
    masks = [None] * len(sizes) if weights is None else shards(weights, sizes)

    def work(rank, all_reduce):
        mine = [backend.array(each[rank], dtype) for each in parts]
        mask = None if weights is None else untracked(backend).array(masks[rank], str(masks[rank].dtype))
        (y, moments), pullback = anynorm.vjp(
            anynorm.batch_norm, mine[0], *(backend.array(each, dtype) for each in (gamma, beta)),
            weights=mask, all_reduce=all_reduce, return_moments=True, **options,
        )  # fmt: skip
        found = [*pullback(mine[1]), moments.mean, moments.var, moments.count]
        return backend.numpy(y), *map(backend.numpy, found)

    every = replicas.run(work)
    assert len({tuple(calls) for calls in replicas.calls}) == 1, "equally often, with arrays of equal shape"
    y, dx, *shared = zip(*every, strict=True)
    for each in shared:
        for other in each[1:]:
            np.testing.assert_array_equal(each[0], other)
    return np.concatenate(y), np.concatenate(dx), *(each[0] for each in shared)


def whole(backend, x, dy, gamma, beta, weights=None, dtype=None, **options):
    """The same, of the joined batch."""
    mask = None if weights is None else untracked(backend).array(weights, str(weights.dtype))
    (y, moments), pullback = anynorm.vjp(
        anynorm.batch_norm, *(backend.array(each, dtype) for each in (x, gamma, beta)),
        weights=mask, return_moments=True, **options,
    )  # fmt: skip
    found = [*pullback(backend.array(dy, dtype)), moments.mean, moments.var]
    count = backend.numpy(moments.count) if weights is not None else np.full(x.shape[1], float(moments.count))
    return backend.numpy(y), *map(backend.numpy, found), count


def compare(one, other, tolerance):
    for found, expected in zip(one, other, strict=True):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def batch(n, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((n, 3, 4), (n, 3, 4), (3,), (3,))]


@THREADS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", SHARDS, ids=str)
def test_replicas_find_what_one_process_finds(backend, sizes, masked):
    x, dy, gamma, beta = batch(sum(sizes))
    weights = None
    if masked:
        weights = np.random.default_rng(1).random((sum(sizes), 1, 4)) > 0.4
        weights[-1] = True
        x, dy = np.where(weights, x, np.nan), np.where(weights, dy, 0)
    found = synchronized(backend, sizes, x, dy, gamma, beta, weights)
    compare(found, whole(backend, x, dy, gamma, beta, weights), max(backend.tolerance, 1e-10) * 10)


@THREADS
def test_weights_of_channels_and_a_channel_without_any(backend):
    x, dy, gamma, beta = batch(5)
    weights = np.random.default_rng(2).random((5, 3, 1))
    weights[:2, 0] = 0  # nothing on the first replica
    weights[:, 1] = 0  # nothing anywhere
    found = synchronized(backend, (2, 3), x, dy, gamma, beta, weights.astype(np.float32))
    expected = whole(backend, x, dy, gamma, beta, weights.astype(np.float32))
    compare(found, expected, max(backend.tolerance, 1e-10) * 10)
    np.testing.assert_allclose(found[0][:, 1], beta[1], rtol=1e-6)
    assert np.all(found[1][:, 1] == 0)


@THREADS
@pytest.mark.parametrize("shape", [(4, 3, 0), (0, 3, 4), (4, 0, 2)], ids=str)
@pytest.mark.parametrize("masked", [None, "fully", "by sample"])
def test_replicas_may_all_have_an_empty_axis(backend, shape, masked):
    x, gamma = np.zeros(shape), np.ones(shape[1])
    weights = None if masked is None else np.ones(shape if masked == "fully" else (shape[0], 1, 1), dtype=bool)
    sizes = (shape[0] // 2,) * 2
    y, dx, dgamma, dbeta, mean, var, count = synchronized(backend, sizes, x, x, gamma, gamma, weights)
    assert y.shape == dx.shape == shape
    for each in (dgamma, dbeta, mean, var):
        np.testing.assert_array_equal(each, np.zeros(shape[1]))
    np.testing.assert_array_equal(count, np.full(shape[1], shape[0] * shape[2]))


@THREADS
@pytest.mark.parametrize("value", [0.1, 1e6 / 3, 1e30, 1e-36])
def test_equal_numbers_on_all_replicas_give_beta(backend, value):
    _, dy, gamma, beta = batch(7)
    x = np.full((7, 3, 4), value, dtype=np.float32)
    for eps in (0, 1e-5):
        y, dx, *_ = synchronized(backend, (4, 0, 3), x, dy, gamma, beta, dtype="float32", eps=eps)
        np.testing.assert_array_equal(y, np.broadcast_to(beta.astype(np.float32)[:, None], y.shape))
        assert np.all(np.isfinite(dx))
    x[4:] *= 1 + 2.0**-20  # each replica has a number of its own
    y, *_ = synchronized(backend, (4, 0, 3), x, dy, np.ones(3), np.zeros(3), dtype="float32", eps=0)
    expected = np.where(np.arange(7) < 4, -np.sqrt(3 / 4), np.sqrt(4 / 3))
    np.testing.assert_allclose(y, np.broadcast_to(expected[:, None, None], y.shape), rtol=1e-3)


@THREADS
def test_a_parameter_for_each_sample_has_a_gradient_for_each_sample(backend):
    x, dy, _, beta = batch(5)
    gamma = np.random.default_rng(4).standard_normal((5, 3, 1))
    _, expected = whole(backend, x, dy, gamma, beta)[1:3]
    parts = [shards(each, (2, 3)) for each in (x, dy, gamma)]

    def work(rank, all_reduce):
        mine, dmine, own = (backend.array(each[rank]) for each in parts)
        _, pullback = anynorm.vjp(anynorm.batch_norm, mine, own, backend.array(beta), all_reduce=all_reduce)
        return backend.numpy(pullback(dmine)[1])

    found = np.concatenate(Replicas(2).run(work))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@THREADS
def test_moments_that_are_given_are_not_summed_and_gradients_are(backend):
    x, dy, gamma, beta = batch(5)
    given = anynorm.moments(untracked(backend).array(x), axis=(0, 2))
    arrays = [backend.array(each) for each in (gamma, beta)]
    expected = anynorm.vjp(anynorm.batch_norm, backend.array(x), *arrays, moments=given)[1](backend.array(dy))
    parts = [shards(each, (2, 3)) for each in (x, dy)]
    replicas = Replicas(2)

    def work(rank, all_reduce):
        mine, dmine = (backend.array(each[rank]) for each in parts)
        _, pullback = anynorm.vjp(anynorm.batch_norm, mine, *arrays, moments=given, all_reduce=all_reduce)
        return [backend.numpy(each) for each in pullback(dmine)]

    for _, *found in replicas.run(work):
        compare(found, [backend.numpy(each) for each in expected[1:]], 1e-4)
    assert replicas.calls == [[(6,)]] * 2


@pytest.mark.untracked
@THREADS
@pytest.mark.parametrize(("weight", "dtype"), [(None, None), (True, "bool"), (1_000_003, "int32"), (0.1, "float32")])
def test_replicas_count_exactly_beyond_the_digits_of_float32(backend, weight, dtype):
    few = dtype == "int32" or (backend.library == "strict" and weight != 0.1)
    own, n = untracked(backend), 2**10 + 5 if few else 2**23 + 5

    def work(_, all_reduce):
        x = own.array(np.ones((n, 1)), "float32")
        weights = None if weight is None else own.array(np.full((1, 1), weight), dtype)
        return anynorm.batch_norm(x, weights=weights, all_reduce=all_reduce, return_moments=True)[1]

    exact = 3 * n * (float(np.float32(0.1)) if weight == 0.1 else weight or 1)
    for found in Replicas(3).run(work):
        rest = 0 if found._count_rest is None else own.numpy(found._count_rest)
        # a pair has 48 digits
        tolerance = 0 if weight in (None, True) or (own.float64 and weight != 0.1) else 1e-13
        np.testing.assert_allclose(own.numpy(found.count) + rest, [exact], rtol=tolerance)


@pytest.mark.cells("torch")
def test_a_call_and_its_gradient_ask_as_many_sums_as_is_written(backend):
    """Also of a replica without numbers of its own, and by autograd: whatever runs them, all ask equally often."""
    x, dy, *parameters = batch(5)
    for own in (slice(0, 5), slice(5, 5)):
        arrays = [replace(backend, tracked=True).array(each) for each in (x[own], *parameters)]
        asked: list[tuple[int, ...]] = []
        y = anynorm.batch_norm(*arrays, all_reduce=lambda each, asked=asked: asked.append(tuple(each.shape)))
        assert len(asked) == 4
        backend.xp.autograd.grad(y, arrays, untracked(backend).array(dy[own]))
        assert len(asked) == 8


@pytest.mark.cells("torch")
def test_autograd_takes_nothing_of_padding_over_replicas(backend):
    x, dy, *parameters = batch(5)
    x[1, :, 2] = x[3, 1] = np.nan
    mask = untracked(backend).array(np.isfinite(x), "bool")
    found = []
    for all_reduce in (None, lambda each: None):
        arrays = [replace(backend, tracked=True).array(each) for each in (x, *parameters)]
        y = anynorm.batch_norm(*arrays, weights=mask, all_reduce=all_reduce)
        found.append(backend.xp.autograd.grad(y, arrays, untracked(backend).array(dy)))
    for one, other in zip(*found, strict=True):
        assert backend.xp.isfinite(one).all()
        np.testing.assert_allclose(backend.numpy(other), backend.numpy(one), rtol=1e-12, atol=1e-12)


@pytest.mark.cells("numpy", "torch")
def test_a_sum_may_be_made_in_place(backend):
    x = batch(4)[0]

    def in_place(array):
        array *= 2  # the other replica has the same numbers

    y, moments = anynorm.batch_norm(backend.array(x), all_reduce=in_place, return_moments=True)
    np.testing.assert_allclose(backend.numpy(y), backend.numpy(anynorm.batch_norm(backend.array(x))), rtol=1e-9)
    np.testing.assert_array_equal(backend.numpy(moments.count), [32.0] * 3)


@pytest.mark.cells("numpy")
def test_what_is_not_a_sum_is_an_error():
    x = batch(4)[0]
    with pytest.raises(TypeError, match="all_reduce must be a function of an array, got str"):
        anynorm.batch_norm(x, all_reduce="gloo")
    for wrong, got in (
        (lambda a: 3, "int"),
        (lambda a: (a, a), "tuple"),
        (lambda a: a[:1], r"\(1,\) float64"),
        (lambda a: a.astype(np.float32), r"\(\d+,\) float32"),
    ):
        message = rf"^all_reduce must return an array as it is given, \(\d+,\) float64, got {got}$"
        with pytest.raises(TypeError, match=message):
            anynorm.batch_norm(x, all_reduce=wrong)


@pytest.mark.cells("numpy")
def test_an_error_of_the_function_is_the_error_of_the_call():
    class Lost(Exception):
        pass

    def work(rank, all_reduce):
        if rank == 1:
            raise Lost
        return anynorm.batch_norm(batch(2)[0], all_reduce=all_reduce)

    with pytest.raises((Lost, BrokenBarrierError)):
        Replicas(2).run(work)


def run(script, *arguments, **environment):
    """A Python process that is under way."""
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def outputs(processes, timeout):
    """Exit code and output of each; all are gone afterwards."""
    try:
        return [(process.communicate(timeout=timeout)[0], process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.untracked
@pytest.mark.cells("torch-cpu")
@pytest.mark.parametrize("sizes", [(4, 0, 2)], ids=str)
def test_processes_of_torch_distributed_find_what_one_process_finds(backend, sizes, tmp_path):
    workers = [
        run("torch_replica.py", rank, json.dumps(sizes), tmp_path / "store", "compare") for rank in range(len(sizes))
    ]
    for output, code in outputs(workers, timeout=120):
        assert code == 0, output


@pytest.mark.untracked
@pytest.mark.cells("torch-cpu")
def test_a_process_that_dies_is_an_error_of_the_engine(backend, tmp_path):
    workers = [run("torch_replica.py", rank, "[2, 2]", tmp_path / "store", "die") for rank in range(2)]
    (output, code), (_, died) = outputs(workers, timeout=120)
    assert died == 9
    assert code == 0, output
    assert "RuntimeError" in output or "DistBackendError" in output


@pytest.mark.cells("jax")
def test_devices_of_jax_find_what_one_finds(backend):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    ((output, code),) = outputs([run("jax_replicas.py", **flags)], timeout=300)
    assert code == 0, output


@pytest.mark.cells("numpy")
@pytest.mark.parametrize("sizes", [(3, 2), (4, 0, 2)], ids=str)
def test_processes_of_mpi_find_what_one_process_finds(sizes):
    pytest.importorskip("mpi4py", reason="mpi4py is not installed: `nox -s mpi` installs it")
    mpiexec = shutil.which("mpiexec", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert mpiexec, "mpi4py is there, and no mpiexec"
    command = [mpiexec, "-n", str(len(sizes)), sys.executable, str(HERE / "mpi_replica.py"), json.dumps(sizes)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done") == len(sizes)  # mpiexec mixes their lines
