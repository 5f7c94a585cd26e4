"""Dask: arrays larger than memory, and on more than one process."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from oracles import standardized, standardized_gradient

import anynorm

pytestmark = pytest.mark.cells("dask")

PEAK = """
import dask, dask.array as da, numpy as np
import anynorm

def made(block_info=None):
    place = block_info[None]
    return np.random.default_rng(place["chunk-location"]).random(place["chunk-shape"], dtype=np.float32)

def peak():
    with open("/proc/self/status") as status:
        return next(float(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**10

x = da.map_blocks(made, chunks=((2**13,) * 32, (256,)), dtype=np.float32, meta=np.empty((0, 0), "f4"))
dask.config.set(scheduler="threads", num_workers=2)
before = peak()
{job}
print((peak() - before) / 8)
"""
"""256 MiB in 32 chunks; what is printed is in chunks."""

JOBS = {
    "batch": ("y, m = anynorm.batch_norm(x, return_moments=True); dask.compute(y.sum(), (y * y).mean(), m.mean)", 12),
    "batch, of a slice": ("y = anynorm.batch_norm(x[::2]); dask.compute(y.sum(), (y * y).mean())", 12),
    "two in a row": ("dask.compute(anynorm.batch_norm(anynorm.batch_norm(x) * 2).sum())", 12),
    "layer": ("y, m = anynorm.layer_norm(x, return_moments=True); dask.compute(y.sum(), m.mean)", 12),
    "layer, over chunks": ("dask.compute(anynorm.layer_norm(x, axis=None).sum())", 12),
    "gradients": (
        "y, pullback = anynorm.vjp(anynorm.batch_norm, x, da.ones(256), da.ones(256)); "
        "dask.compute(y.sum(), *(each.sum() for each in pullback(y * y)))",
        24,
    ),
    "batch, of a mask": (
        "y, m = anynorm.batch_norm(da.where(x > 0.5, x, np.nan), weights=x > 0.5, return_moments=True); "
        "dask.compute(da.nansum(y), m.mean, m.count)",
        16,
    ),
    "layer, with weights": ("dask.compute(anynorm.layer_norm(x, weights=x + 1).sum())", 16),
    "gradients, with weights": (
        "y, pullback = anynorm.vjp(anynorm.batch_norm, x, da.ones(256), da.ones(256), weights=x > 0.5); "
        "dask.compute(y.sum(), *(each.sum() for each in pullback(y * y)))",
        36,
    ),
}


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak is read from Linux")
@pytest.mark.parametrize("job", JOBS)
def test_the_source_is_not_held(job):
    text, most = JOBS[job]
    code = PEAK.format(job=text)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < most


def made(block_info=None):
    """Numbers far from 0, and slowly."""
    place = block_info[None]
    time.sleep(0.1)
    return np.random.default_rng(place["chunk-location"]).standard_normal(place["chunk-shape"], dtype=np.float32) + 1e4


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_is_killed_costs_nothing_but_time():
    import dask.array as da
    from dask.distributed import Client, LocalCluster

    x = da.map_blocks(made, chunks=((500,) * 12, (8,)), dtype=np.float32, meta=np.empty((0, 0), "f4"))
    dy = da.map_blocks(made, chunks=x.chunks, dtype=np.float32, meta=np.empty((0, 0), "f4"))[:, ::-1]
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        # data that is on the workers, and what the cluster shuffles itself, cannot be made again by other names
        small = np.random.default_rng(0).standard_normal((64, 6))
        for lazy in (da.from_array(small, chunks=(16, 3)).persist(), da.from_array(small, (64, 1)).rechunk((2, 6))):
            np.testing.assert_allclose(anynorm.batch_norm(lazy).compute(), anynorm.batch_norm(small), atol=1e-12)
        workers = client.run(os.getpid)
        assert len(set(workers.values())) == 2
        y, moments = anynorm.batch_norm(x, return_moments=True)
        (dx,) = anynorm.vjp(anynorm.batch_norm, x)[1](dy)
        futures = client.compute([y, moments.mean, moments.var, dx])
        victim = next(iter(workers))
        while not len(client.has_what()[victim]):  # it holds results, so that they are lost
            time.sleep(0.05)
        time.sleep(1)
        assert not futures[0].done()
        os.kill(workers[victim], signal.SIGKILL)
        y, mean, var, dx = client.gather(futures)
        assert set(client.run(os.getpid).values()) != set(workers.values())
    x, dy = x.compute(), dy.compute()
    np.testing.assert_allclose(y, standardized(x, 0).astype(np.float64), rtol=0, atol=1e-5)
    np.testing.assert_allclose(mean, x.mean(axis=0, dtype=np.float64), rtol=1e-7)
    np.testing.assert_allclose(var, x.var(axis=0, dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(dx, standardized_gradient(x, dy, 0).astype(np.float64), rtol=0, atol=1e-5)
