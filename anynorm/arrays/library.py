"""What the rest of the house knows of an array library, whichever it is."""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from anynorm.kernels import PURE, Array, Namespace, Ops

BLOCK = 256
"""The longest run that a library is trusted to add in one go, if it is not known to do better."""
WRITTEN_OUT = 2**18
"""So many numbers at most are written out along the rows of an array, to be read by one operation."""


class Programs(NamedTuple):
    """How a library runs programs of ours on a GPU."""

    launch: Callable[[str, tuple[int, int], int, list[Array], tuple[int, int, float], bool], None]
    """Run the text of one: over a grid of blocks, of so many threads, with arrays and with the number and the length of
    the groups, long or not, and what a sum is divided by."""
    aligned: Callable[[Array], bool]
    """Whether an array starts at a multiple of 16 bytes."""
    on: Callable[[Array], AbstractContextManager[Any]]
    """Where programs run on the device of an array, and memory is that device's."""


class Library(NamedTuple):
    """What the rest of the house needs to know of an array library."""

    name: str
    xp: Namespace
    readable: Callable[[Array], bool]
    """Whether a number can be read out of the array now, at no cost: it is neither traced, nor lazy, nor on a GPU."""
    constant: Callable[[Array], Array]
    """The array as a constant, to which no gradient flows."""
    most: Callable[[Array], float]
    """The largest number of a readable array."""
    least: Callable[[Array], float]
    block: int | None
    """The longest run of numbers that this library is trusted to add in one go; None where it blocks its own sums."""
    plain_block: int | None
    """The same, of arrays that are `plain`: what a compiler would make of a sum is no matter there."""
    device: Callable[[Array], Any]
    """The device, or None where there is but one or the library itself is the better judge."""
    quiet: Callable[[], AbstractContextManager[Any]]
    """Silences the library's warnings of overflow and invalid values, which the results show."""
    kind: Callable[[Array], Any] | None = None
    """All in which its arrays may differ beside their type, dtype and shape: device and oddity; None for nothing."""
    oddity: Callable[[Array], str] | None = None
    """What keeps an array of this library from being a plain one: "" for a plain one."""
    subnormal: Callable[[Array, float], Array] | None = None
    """The subnormal numbers of an array times a power of two, and 0 elsewhere, if the library flushes them to 0."""
    traced: Callable[[], bool] = lambda: False
    """Whether a compiler follows what happens now, to whom a shape may be more than numbers."""
    contiguous: Callable[[Array], bool] = lambda x: False
    """Whether neighbouring axes of the array are one in memory too."""
    strides: Callable[[Array], tuple[int, ...]] = lambda x: (0,) * x.ndim
    """How far apart in memory neighbours along each axis lie, in a unit of its own; 0 where it cannot be told."""
    straight: Callable[[Array], bool] = lambda x: True
    """Whether numbers follow each other along the last axis as the library adds them best; they do in any copy."""
    threaded: bool = False
    """Whether several of its own threads share an operation on an array that is not on a GPU."""
    products: bool = False
    """Whether it adds fastest by multiplying with ones."""
    norm: Callable[[Array], Array] | None = None
    """The norm along the last axis, where it adds squares fastest as those of the norms of short runs."""
    version: Callable[[Array], int | None] = lambda x: None
    """How often the array has been written to, where the library counts that."""
    writeable: Callable[[Array], bool] = lambda x: False
    """Whether the array may be written to."""
    present: Callable[..., bool] = lambda *arrays: True
    """Whether the numbers of these arrays are there, neither traced nor lazy, and nothing records what they become."""
    plain: Callable[..., bool] = lambda *arrays: False
    """Whether a result of these arrays may be written part by part: they are present, and not on a GPU."""
    records: Callable[[list[Array]], bool] | None = None
    """Whether autograd, and nothing else, records what becomes of these arrays; None where there is none."""
    overlap: Callable[[Array, Array], bool] = lambda x, out: True
    """Whether two arrays may have memory in common."""
    same: Callable[[Array, Array], bool] = lambda x, out: False
    """Whether two arrays of one shape are one in memory."""
    number: Callable[[float, Any, Array], Array | None] = lambda value, dtype, like: None
    """A number as an array without axes, to be kept, where it computes faster with that: beside `plain` arrays."""
    arithmetic: Ops = PURE
    """Arithmetic whose results are new."""
    into: Callable[[Array], Ops] = lambda place: PURE
    """Arithmetic whose results are all written to one place."""
    casts: bool = True
    """Whether assignment to a part of an array casts what is assigned."""
    chunked: bool = False
    """Whether its arrays are lazy and in chunks, which are arrays of another library."""
    busy: Callable[[], AbstractContextManager[Any]] = nullcontext
    """As `quiet`, where block after block is worked on."""
    summing: Callable[[Callable[[Array], Any]], Callable[[Array], Any]] = lambda all_reduce: all_reduce
    """The function that sums over replicas, with its derivative: the same of the cotangents."""
    shared: Callable[[Array, Callable[[Array], Any]], Any] = lambda x, all_reduce: x
    """The array as one that all replicas have, to which the cotangents of all of them flow, where autograd records."""
    programs: Programs | None = None
    """How it runs programs, if it does."""
    address: Callable[[Array], int] | None = None
    """Where the numbers of an array begin in the memory of the processor, if programs may read it there; or, if there
    is an `offset`, an address so many bytes before that one is written."""
    offset: int = 0
    aligned: Callable[[Array], bool] = lambda x: False
    """Whether they begin at a multiple of their size."""
    in_place: Callable[[Array], bool] = lambda x: False
    """Whether such programs can read the numbers where they lie: aligned, and in the byte order of the processor."""
    host: Callable[[Array], Any] = np.asarray
    """The array in NumPy, where bfloat16 may be any dtype of two bytes."""
    new: Callable[[tuple[int, ...], Any], Array] | None = None
    """New memory of a shape and a dtype in that of the processor, where the library has a faster or a better way to it
    than its own `empty`."""
    nothing: Callable[[tuple[int, ...], Any], Array] | None = None
    """The same, of zeros."""
    float64: Callable[[Array], bool] = lambda x: True
    """Whether there may be arrays of float64 beside an array."""
    lazily: Callable[[Callable[..., tuple[Array, ...]], tuple[Array, ...]], tuple[Array, ...]] | None = None
    """How arrays that are not computed yet go through a function of a namespace and of arrays."""

    jit: Callable[[Hashable, Callable[..., Any], tuple[Any, ...]], Any] | None = None
    """The results of a function of arrays, which the key tells from others: compiled as one, where the library would
    else compile each operation."""

    def compiled(self, key: Hashable, function: Callable[..., Any], *arrays: Any) -> Any:
        """`function(*arrays)`, by `jit` if there is one."""
        return function(*arrays) if self.jit is None else self.jit(key, function, arrays)

    def quietly(self, function: Callable[..., tuple[Array, ...]], *arrays: Array) -> tuple[Array, ...]:
        """`function(xp, *arrays)`, element by element, without warnings: also where it is computed later."""
        if self.lazily is not None:
            return self.lazily(function, arrays)
        with self.quiet():
            return function(self.xp, *arrays)

    def astype(self, x: Array, dtype: Any) -> Array:
        """The array in another dtype, without warnings."""
        return x if x.dtype == dtype else self.quietly(partial(_cast, dtype), x)[0]


def _cast(dtype: Any, xp: Namespace, x: Array) -> tuple[Array]:
    return (xp.astype(x, dtype),)
