"""What a call comes to."""

from typing import NamedTuple

from anynorm.kernels import Array, Stats

Gradients = tuple[Array | None, ...]
"""With respect to x, gamma and beta, beside the view; None where it is not wanted."""


class Normalized(NamedTuple):
    """A call's result, as the caller's x was, and its statistics beside the view."""

    y: Array
    stats: Stats
    """Empty where they are not to be kept: of short groups they are nearly as large as the array."""
