"""Everything that must know one array library from another: array-api-compat is imported nowhere else.

`Library` says what a library does its own way; the rest of the package asks it, and never for its name.
"""

from anynorm.arrays import cupy, dask, jax, mlx, ndonnx, numpy, strict, torch  # noqa: F401 - so that they are known
