"""
Z-scores of a climate series with missing months
================================================

For people with measured data that have a season and gaps. You get a z-score for each month, computed from the years
that were measured, and a way back to degrees that fills the gaps.

The data are sea surface temperatures off Peru, where El Niño is seen, for 61 years (they come with statsmodels). The
series has no gaps, so we hide one month in eight. That lets us check what we fill in.
"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import scipy.stats
from statsmodels.datasets import elnino

import anynorm

truth = elnino.load_pandas().data.drop(columns="YEAR").to_numpy()  # (years, months)
rng = np.random.default_rng(0)
sst = np.where(rng.random(truth.shape) < 1 / 8, np.nan, truth)
print(sst.shape, "with", np.isnan(sst).sum(), "months missing")

# %%
# There: one mean and one spread for each month
# ---------------------------------------------
# ``axis=0`` says that the years share a mean and a variance. ``weights`` is a mask: what is False does not count, so it
# may be NaN. ``eps=0`` gives the plain z-score, with nothing added to the variance.

measured = np.isfinite(sst)
z, seen = anynorm.normalize(sst, axis=0, eps=0, weights=measured, return_moments=True)

for name, values in {"years": seen.count, "mean": seen.mean, "std": seen.std()}.items():
    print(f"{name:6}", *(f"{value:4.1f}" for value in values))

# %%
# SciPy gives the same z-scores. A missing month is NaN in both.

expected: Any = scipy.stats.zscore(sst, axis=0, nan_policy="omit")
np.testing.assert_allclose(z, expected, atol=1e-12)
print("largest difference from SciPy:", f"{np.nanmax(abs(z - expected)):.0e}")

# %%
# And back: fill the gaps
# -----------------------
# Z-scores have no season, so a gap can be filled from the months next to it. ``denormalize`` with the same moments and
# the same ``eps`` then gives degrees again. The months that were measured come back as they were.

months = np.arange(z.size)
filled = np.interp(months, months[measured.ravel()], z[measured]).reshape(z.shape)
degrees = anynorm.denormalize(filled, axis=0, eps=0, moments=seen)

np.testing.assert_allclose(degrees[measured], sst[measured])
simple = np.broadcast_to(seen.mean, sst.shape)
for name, guess in {"the mean of the month": simple, "z-scores": degrees}.items():
    error = np.sqrt(np.mean((guess - truth)[~measured] ** 2))
    print(f"gaps filled by {name}: off by {error:.2f} degrees (root mean square)")

# %%
# The large red areas are the El Niño events of 1972, 1982 and 1997. In degrees the season hides them.

time = 1950 + months / 12
figure, (above, below) = plt.subplots(2, 1, figsize=(9, 5), sharex=True)
above.plot(time, degrees.ravel(), color="0.6", linewidth=1)
above.plot(time[~measured.ravel()], degrees[~measured], "k.", label="filled")
above.set_ylabel("degrees Celsius")
above.legend(loc="upper left")
below.fill_between(time, filled.ravel(), where=filled.ravel() > 0, color="tab:red")
below.fill_between(time, filled.ravel(), where=filled.ravel() < 0, color="tab:blue")
below.set(xlabel="year", ylabel="z-score")
plt.show()
