"""Everything that must know one array library from another: array-api-compat is imported nowhere else.

`Library` says what a library does its own way; the rest of the package asks it, and never for its name.
"""

from anynorm.arrays.checks import (
    as_ints,
    check_axes,
    check_bool,
    check_count,
    check_device,
    check_int,
    check_known_sizes,
    check_out,
    check_real,
    check_variance,
    check_weights,
    check_weights_dtype,
    same_shape,
)
from anynorm.arrays.convert import FILED, Bits, from_bits, moved, split_bits, to_bits
from anynorm.arrays.memory import (
    adds,
    assign,
    cast,
    empty,
    extent,
    full_chunks,
    in_chunks,
    in_rows,
    memory_order,
    zeros,
)
from anynorm.arrays.pytree import flush_pytrees, pytree
from anynorm.arrays.recognize import (
    compute_dtype,
    known_library,
    library_beside,
    library_of,
    name_of,
    one_library,
)

__all__ = [
    "FILED",
    "Bits",
    "adds",
    "as_ints",
    "assign",
    "cast",
    "check_axes",
    "check_bool",
    "check_count",
    "check_device",
    "check_int",
    "check_known_sizes",
    "check_out",
    "check_real",
    "check_variance",
    "check_weights",
    "check_weights_dtype",
    "compute_dtype",
    "empty",
    "extent",
    "flush_pytrees",
    "from_bits",
    "full_chunks",
    "in_chunks",
    "in_rows",
    "known_library",
    "library_beside",
    "library_of",
    "memory_order",
    "moved",
    "name_of",
    "one_library",
    "pytree",
    "same_shape",
    "split_bits",
    "to_bits",
    "zeros",
]
