"""Peak memory of norms of 4 GiB of float32: `python docs/measure_memory.py`, some minutes, on Linux.

Each runs in a process of its own. Of a Dask array it reads the most that the process has held from /proc/self/status;
of a memory-mapped file it watches, every few milliseconds, what the process holds without the pages of files, which
the system takes back when it likes. The files, of 8 GiB, are in a temporary folder, which TMPDIR names.
"""

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dask
import dask.array as da
import numpy as np

import anynorm

GIB = 4
CHUNK = (2**16, 256)
"""64 MiB of float32."""
IMAGES = (GIB * 1024, 64, 64, 64)
ROWS = (GIB * 2**18, 1024)


def main() -> None:
    """One line for each job, or the peak of one."""
    if len(sys.argv) > 1:
        job, folder = sys.argv[1:]
        if job in JOBS:
            dask.config.set(scheduler="threads", num_workers=2)
            JOBS[job](source())
            print(f"{held('VmHWM'):.2f} GB")
        else:
            with watched() as seen:
                FILES[job](Path(folder))
            print(f"{1e3 * max(seen):.0f} MB")
        return
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        for job in (*JOBS, *FILES):
            command = [sys.executable, __file__, job, folder]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
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


def write(folder: Path) -> None:
    """The file x, and as large a one for the results."""
    with (folder / "x").open("wb") as file:
        for i in range(GIB * 16):
            np.random.default_rng(i).standard_normal(CHUNK, dtype=np.float32).tofile(file)
    with (folder / "y").open("wb") as file:
        file.truncate(GIB * 2**30)


def mapped(norm: Callable, shape: tuple[int, ...], mode: str = "r", same: bool = False, **options) -> Callable:
    """A job: x is read from its file, in this mode, and the result written to the other, or to the same."""

    def job(folder: Path) -> None:
        x = np.memmap(folder / "x", np.float32, mode, shape=shape)
        out = np.memmap(folder / ("x" if same else "y"), np.float32, "r+", shape=shape)
        channels = shape[-1] if norm is anynorm.layer_norm else shape[options.get("channel_axis", 1)]
        gamma, beta = np.ones((2, channels), np.float32)
        y, moments = norm(x, gamma, beta, out=x if same else out, return_moments=True, **options)
        check(y, moments)

    return job


def check(y: np.ndarray, moments: anynorm.Moments) -> None:
    """That it was done, and not far from right."""
    assert np.all(np.abs(moments.mean) < 1)
    assert np.all(np.abs(moments.var - 1) < 1)
    assert all(np.any(y[i]) for i in (0, len(y) // 2, -1))


def over(folder: Path) -> None:
    """The moments of one part of the file after another."""
    x = np.memmap(folder / "x", np.float32, "r", shape=(GIB * 2**20, 256))
    parts = (x[start : start + CHUNK[0]] for start in range(0, len(x), CHUNK[0]))
    found = anynorm.Moments.over(parts, axis=0, progress=True)
    sums = [np.zeros(256), np.zeros(256)]
    for start in range(0, len(x), 2**11):
        part = x[start : start + 2**11].astype(np.float64)
        sums[0] += part.sum(axis=0)
        sums[1] += (part * part).sum(axis=0)
    mean, square = sums[0] / len(x), sums[1] / len(x)
    np.testing.assert_allclose(found.mean, mean, atol=1e-8)
    np.testing.assert_allclose(found.var, square - mean**2, rtol=1e-6)
    assert found.count == len(x)


FILES = {
    "batch_norm of a file": mapped(anynorm.batch_norm, IMAGES),
    "batch_norm of a file, channels last": mapped(anynorm.batch_norm, IMAGES, channel_axis=-1),
    "layer_norm of a file": mapped(anynorm.layer_norm, ROWS),
    'layer_norm of a file, mode "c"': mapped(anynorm.layer_norm, ROWS, "c"),
    "group_norm of a file": mapped(anynorm.group_norm, IMAGES, groups=32),
    "Moments.over parts of a file": over,
    "batch_norm of a file, in place": mapped(anynorm.batch_norm, IMAGES, "r+", same=True),
}


@contextmanager
def watched() -> Iterator[list[float]]:
    """What the process holds in pages that are no file's, in GB, again and again while this lasts."""
    seen, done = [held("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            seen.append(held("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield seen
    done.set()
    watcher.join()


def held(what: str) -> float:
    """A line of /proc/self/status, in GB."""
    with open("/proc/self/status") as status:
        return next(float(line.split()[1]) for line in status if line.startswith(what)) / 1e6


if __name__ == "__main__":
    main()
