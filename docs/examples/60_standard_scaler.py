"""
From StandardScaler to anynorm
==============================

For users of scikit-learn's ``StandardScaler``. You get the same numbers from three functions, which also take arrays of
PyTorch, JAX, CuPy and Dask, any axes, and a mask for each number.

The data are 30 measures of 569 tumours, which come with scikit-learn. Their standard deviations go from 0.003 to 570.
"""

from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler

import anynorm

data, _ = load_breast_cancer(return_X_y=True)
train, test = data[:400], data[400:]
scaler = StandardScaler().fit(train)

# %%
# The same in three lines
# -----------------------
# These are ``fit``, ``transform`` and ``inverse_transform``. The moments take the place of the fitted scaler. Say
# ``eps=0`` both times: by default 1e-5 is added to the variance, as in neural networks.

moments = anynorm.moments(train, axis=0)
scaled = anynorm.normalize(test, axis=0, eps=0, moments=moments)
back = anynorm.denormalize(scaled, axis=0, eps=0, moments=moments)

# %%
# Batch by batch
# --------------
# ``partial_fit`` in a loop is ``Moments.over``. Where the batches come one at a time, merge: the moments are an
# ordinary value, and a merge gives a new one.

batches = np.array_split(train, 7)
over = anynorm.Moments.over(batches, axis=0)

merged = anynorm.moments(batches[0], axis=0)
for batch in batches[1:]:
    merged = merged.merge(anynorm.moments(batch, axis=0))

# %%
# Weights and missing values
# --------------------------
# ``sample_weight`` is ``weights``, in a shape that broadcasts to the data. scikit-learn leaves NaN out; here
# ``weights`` says so.

sample_weight = np.arange(400.0)
weighted = anynorm.moments(train, axis=0, weights=sample_weight[:, None])

gaps = np.where(np.random.default_rng(0).random(train.shape) < 0.1, np.nan, train)
seen = anynorm.moments(gaps, axis=0, weights=np.isfinite(gaps))

# %%
# Check
# -----
# Each line of the table compares with what scikit-learn gives.

at_once = anynorm.normalize(train, axis=0, eps=0)
only_mean = anynorm.center(train, axis=0)
without_std = StandardScaler(with_std=False).fit(train)
by_weight = StandardScaler().fit(train, sample_weight=sample_weight)
by_seen = StandardScaler().fit(gaps)
by_batch = StandardScaler()
for batch in batches:
    by_batch.partial_fit(batch)

rows: list[tuple[str, str, Any, Any]] = [
    ("mean_", "moments.mean", scaler.mean_, moments.mean),
    ("var_", "moments.var", scaler.var_, moments.var),
    ("scale_", "moments.std()", scaler.scale_, moments.std()),
    ("n_samples_seen_", "moments.count", scaler.n_samples_seen_, moments.count),
    ("transform", "normalize(moments=)", scaler.transform(test), scaled),
    ("inverse_transform", "denormalize(moments=)", scaler.inverse_transform(scaled), back),
    ("fit_transform", "normalize", scaler.transform(train), at_once),
    ("with_std=False", "center", without_std.transform(train), only_mean),
    ("partial_fit", "Moments.over(batches)", by_batch.var_, over.var),
    ("partial_fit", "merge", by_batch.var_, merged.var),
    ("sample_weight", "weights", by_weight.var_, weighted.var),
    ("NaN is left out", "weights=isfinite", by_seen.var_, seen.var),
]
print("scikit-learn            anynorm                   relative difference")
for theirs, ours, expected, got in rows:
    difference = np.max(np.abs(got - expected) / np.max(np.abs(expected), axis=0))
    print(f"{theirs:23} {ours:25} {difference:.0e}")
    assert difference < 1e-12
