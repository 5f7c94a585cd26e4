"""Peak memory of norms of a Dask array of 4 GiB: `python docs/measure_memory.py`, some minutes, on Linux.

Each runs in a process of its own, which reads its peak from /proc/self/status.
"""

import subprocess
import sys

import dask
import dask.array as da
import numpy as np

import anynorm

GIB = 4
CHUNK = (2**16, 256)
"""64 MiB of float32."""


def main() -> None:
    """One line for each job, or the peak of one."""
    if len(sys.argv) > 1:
        dask.config.set(scheduler="threads", num_workers=2)
        JOBS[sys.argv[1]](source())
        print(f"{peak():.2f} GB")
        return
    for job in JOBS:
        done = subprocess.run([sys.executable, __file__, job], capture_output=True, text=True, check=True)
        print(f"{job}: {done.stdout.strip()}", flush=True)


def source() -> da.Array:
    """Numbers that are made chunk by chunk, the same each time."""
    chunks = ((CHUNK[0],) * (GIB * 16), (CHUNK[1],))
    return da.map_blocks(made, chunks=chunks, dtype=np.float32, meta=np.empty((0, 0), np.float32))


def made(block_info: dict) -> np.ndarray:
    """One chunk."""
    place = block_info[None]
    return np.random.default_rng(place["chunk-location"]).standard_normal(place["chunk-shape"], dtype=np.float32)


def batch(x: da.Array) -> None:
    """A training step of batch norm, forward."""
    y, moments = anynorm.batch_norm(x, return_moments=True)
    dask.compute(y.sum(), moments.mean, moments.var)


def layer(x: da.Array) -> None:
    """Layer norm over an axis that is not divided."""
    y, moments = anynorm.layer_norm(x, return_moments=True)
    dask.compute(y.sum(), moments.mean.sum())


def gradients(x: da.Array) -> None:
    """Batch norm forward and backward."""
    ones = da.ones(CHUNK[1], dtype=np.float32)
    y, pullback = anynorm.vjp(anynorm.batch_norm, x, ones, ones)
    dx, dgamma, dbeta = pullback(y * y)
    dask.compute(y.sum(), dx.sum(), dgamma, dbeta)


JOBS = {"batch_norm": batch, "layer_norm": layer, "vjp": gradients}


def peak() -> float:
    """The most memory that this process has held, in GB."""
    with open("/proc/self/status") as status:
        return next(float(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e6


if __name__ == "__main__":
    main()
