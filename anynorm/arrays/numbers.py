"""Python numbers as arrays need them."""

from typing import Any

import numpy as np

from anynorm.arrays.numpy import quiet


def python_number(value: Any) -> Any:
    """A real scalar of NumPy, which another library would not take or which has a say in dtypes, as a Python number."""
    return int(value) if isinstance(value, np.integer) else float(value) if isinstance(value, np.floating) else value


def split_number(number: float) -> tuple[float, float]:
    """A Python number as one of float32 and what that takes from it."""
    with quiet():
        high = float(np.float32(float(number)))
    return high, float(number - type(number)(high)) if high < float("inf") else 0.0
