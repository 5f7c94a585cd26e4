"""
Standardize a file larger than memory
=====================================

For people whose array is in a file and does not fit into memory. You get a second file in which every column has mean
0 and variance 1, made in some tens of megabytes of memory, with a progress bar.

This page uses a file of 64 MB, so that it is built quickly. At its end you see what it prints for a file of 1 GB.
"""

import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import dask.array as da
import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray

import anynorm

MEGABYTES = 64
COLUMNS = 64
rows = MEGABYTES * 2**20 // (4 * COLUMNS)
folder = tempfile.TemporaryDirectory()


def path(name: str) -> Path:
    """Where a file is."""
    return Path(folder.name) / f"{name}.npy"


def new_file(name: str) -> NDArray[np.float32]:
    """A file of float32 for as many numbers as the data have."""
    shape = (rows, COLUMNS)
    return np.lib.format.open_memmap(path(name), mode="w+", dtype=np.float32, shape=shape)


rng = np.random.default_rng(0)
offset = 10 * np.arange(COLUMNS, dtype=np.float32)
for part in np.array_split(new_file("data"), 16):  # each part is a view of the file
    part[:] = rng.standard_normal(part.shape, dtype=np.float32) + offset

# %%
# One line
# --------
# A memory-mapped file is a NumPy array. ``out=`` says where the result goes. The file is read and written piece by
# piece. ``tracemalloc`` measures how much memory Python and NumPy hold. It does not count the pages of the two files,
# which the system takes back when it needs them.

tracemalloc.start()
data = np.load(path("data"), mmap_mode="r")
anynorm.normalize(data, axis=0, out=new_file("one line"))

peaks = {"the array": data.nbytes, "one line": tracemalloc.get_traced_memory()[1]}

# %%
# With a progress bar
# -------------------
# ``Moments.over`` takes one batch at a time. Batches may also come from many files, or from a generator. The bar is
# shown in a terminal, if rich is installed. Keep the moments: new data are normalized with them too.

tracemalloc.reset_peak()
moments = anynorm.Moments.over(np.array_split(data, 16), axis=0, progress=True)
anynorm.normalize(data, axis=0, moments=moments, out=new_file("batches"))

peaks["batches"] = tracemalloc.get_traced_memory()[1]
print(moments.count, "rows")

# %%
# With Dask
# ---------
# A Dask array is normalized in the same way. Nothing is computed before ``store``, which writes chunk by chunk. Put
# ``with dask.diagnostics.ProgressBar():`` around it for a progress bar. Each chunk is here a part of the file. Do not
# use ``da.from_array`` for a memory-mapped file: it first copies all of it into memory.


def read(block_info: Any) -> NDArray[np.float32]:
    """One chunk: the rows that Dask asks for."""
    (start, stop), _ = block_info[None]["array-location"]
    chunk: NDArray[np.float32] = np.load(path("data"), mmap_mode="r")[start:stop]
    return chunk


tracemalloc.reset_peak()
chunks = ((2**14,) * (rows // 2**14), (COLUMNS,))  # each of 4 MB
x = da.map_blocks(read, chunks=chunks, dtype=data.dtype, meta=data[:0])
y = anynorm.normalize(x, axis=0)
da.store(y, new_file("dask"))

peaks["dask"] = tracemalloc.get_traced_memory()[1]
tracemalloc.stop()

# %%
# Check
# -----
# NumPy computes some columns in float64. The largest value here is about 5.

for name in ("one line", "batches", "dask"):
    result, error = np.load(path(name), mmap_mode="r"), 0.0
    for column in range(0, COLUMNS, 21):
        exact = data[:, column].astype(np.float64)
        exact = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
        error = max(error, abs(result[:, column] - exact).max())
    print(f"{name:9} {peaks[name] / 2**20:5.1f} MB at most, largest error {error:.0e}")
    assert error < 1e-5

# %%
# With ``MEGABYTES = 1024`` and two cores:
#
# .. code-block:: none
#
#    one line    5.9 MB at most, largest error 6e-07
#    batches     7.8 MB at most, largest error 7e-07
#    dask       24.9 MB at most, largest error 7e-07
#
# If numba is installed, add 25 MB to each: the first call loads it.

figure, axes = plt.subplots(figsize=(7, 2.2), layout="constrained")
colors = ["0.7", "tab:blue", "tab:blue", "tab:blue"]
bars = axes.barh(list(peaks), [peak / 2**20 for peak in peaks.values()], color=colors)
axes.bar_label(bars, fmt="%.1f", padding=3)
axes.set(xlabel="peak memory in MB", xlim=(0, 1.15 * MEGABYTES))
axes.invert_yaxis()
plt.show()
