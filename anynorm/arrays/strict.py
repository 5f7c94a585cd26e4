"""What is known of array-api-strict: its arrays are NumPy's, on devices that are none."""

from typing import Any

import numpy as np

from anynorm.arrays.library import Library
from anynorm.kernels import Array


class StrictLibrary(Library, name="array_api_strict"):
    """array-api-strict."""

    in_memory = True
    blas_sums = True

    def to_numpy(self, x: Array) -> Any:
        return np.asarray(x.to_device(self.xp.Device("CPU_DEVICE")))

    def contiguous(self, x: Array) -> bool:
        return True

    def assign(self, place: Array, values: Array) -> None:
        place[...] = self.xp.astype(values, place.dtype, copy=False)  # it casts nothing by itself
