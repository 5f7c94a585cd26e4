"""
Named dimensions: xarray
========================

For users of xarray. ``apply_ufunc`` runs anynorm on DataArrays and Datasets: you name the dimension to normalize over,
and coordinates and attributes are kept.

The data are quarterly figures of the economy of the USA from 1959 to 2009 (they come with statsmodels).
"""

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import xarray as xr
from statsmodels.datasets import macrodata

import anynorm

table = macrodata.load_pandas().data
time = table.year + (table.quarter - 1) / 4
names = ("unemp", "infl", "tbilrate")
series = {name: ("time", table[name]) for name in names}
economy = xr.Dataset(series, coords={"time": time})

# %%
# A function with a named dimension
# ---------------------------------
# ``apply_ufunc`` moves the named dimension to the end. So the axis is always -1. Of a Dataset it takes one variable
# after another. ``x.notnull()`` makes missing values count for nothing: they stay NaN.


def normalized(x: Any, counts: Any) -> Any:
    """What is done with arrays."""
    return anynorm.normalize(x, axis=-1, eps=0, weights=counts)


def zscore(x: Any, dim: str) -> Any:
    """Mean 0 and variance 1 along a dimension of a DataArray or Dataset."""
    return xr.apply_ufunc(
        normalized,
        x,
        x.notnull(),
        input_core_dims=[[dim], [dim]],
        output_core_dims=[[dim]],
        dask="allowed",
        keep_attrs=True,
    )


missing = (economy.time >= 1975) & (economy.time < 1976)
gaps = economy.where(~missing)
z = zscore(gaps, "time")
print(z)

# %%
# xarray's own operations give the same.

expected = (gaps - gaps.mean("time")) / gaps.std("time")
xr.testing.assert_allclose(z, expected, rtol=1e-12)
print("largest difference:", f"{float(abs(z - expected).to_dataarray().max()):.0e}")

# %%
# Dask
# ----
# The same function takes chunks, also along the dimension itself: it computes nothing before ``compute``, and the
# statistics of the chunks are merged.

lazy = zscore(gaps.chunk(time=50), "time")
xr.testing.assert_allclose(lazy.compute(), expected, rtol=1e-12)

# %%
# The statistics of another period, and back
# ------------------------------------------
# Here the years before 1990 are the standard for all years. ``to_dataarray`` makes one array of the variables, and the
# moments have one mean and one variance for each. Give the moments as an option, also for the way back.

array = economy.to_dataarray()  # (variable, time)
before = anynorm.moments(array.sel(time=slice(None, 1989.75)).data, axis=-1)


def with_moments(function: Callable[..., Any], x: Any) -> Any:
    """A function along time, with the moments from before 1990."""
    return xr.apply_ufunc(
        function,
        x,
        kwargs={"axis": -1, "eps": 0, "moments": before},
        input_core_dims=[["time"]],
        output_core_dims=[["time"]],
    )


scores = with_moments(anynorm.normalize, array)
back = with_moments(anynorm.denormalize, scores)
xr.testing.assert_allclose(back, array)

figure, axes = plt.subplots(figsize=(8, 3), layout="constrained")
scores.plot.line(x="time", ax=axes)
axes.axhline(0, color="0.8", zorder=0)
axes.set(xlabel="year", ylabel="z-score, by 1959 to 1989")
plt.show()
