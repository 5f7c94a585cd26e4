"""Sums and means over groups: which numbers share a mean, and in which order they are added."""

import math
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

from anynorm.kernels.ops import PURE, Array, Namespace, Ops


class Reduction(Protocol):
    """How the mean of each group is taken: that of x is sum(w * x) / W, where W = sum(w), and w is 1 or a weight.

    x is centred by its mean. The gradient of that, for a gradient g of the result, is g - w * sum(g) / W, where g is
    added up over all numbers, also those without weight: hence the totals.
    """

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of a group."""

    @property
    def each(self) -> Array | None:
        """w; None for 1."""

    @property
    def weight(self) -> Any:
        """W, as a Python number or beside x."""

    def mean(self, xp: Namespace, x: Array) -> Array:
        """Of x, beside x."""

    def mean_product(self, xp: Namespace, x: Array, other: Array, *, ops: Ops = PURE) -> Array:
        """Of x * other."""

    def total(self, xp: Namespace, x: Array) -> Array:
        """sum(x)."""

    def total_product(self, xp: Namespace, x: Array, other: Array, *, ops: Ops = PURE) -> Array:
        """sum(x * other)."""

    def anchor(self, xp: Namespace, g: Array) -> Array | None:
        """A number for each group that w times of it is near g, if g is nearly all mean; None for 0."""


class WideReduction(Reduction, Protocol):
    """The same, of numbers in a wide dtype, which are added up about a pivot."""

    def pivot(self, xp: Namespace, x: Array) -> Array:
        """A number near those of each group, beside x; where these are equal, that number."""


class Sums(NamedTuple):
    """The elements that share one mean and one variance: all those along `axes`."""

    axes: tuple[int, ...]
    divisor: float
    """What a sum is divided by: the number of elements, or 1 if there are none; 1 for weight normalization, whose norm
    is a plain sum. NaN where it is not a number: means are then the library's own, and so is what is called a sum, of
    the weight 1."""
    block: float | None
    """The longest run of elements added in one go, or None where the array library adds any along one axis exactly;
    infinite where it adds all, as sizes are not numbers."""
    ones: Array | None = None
    """A run of ones, where the library adds fastest by multiplying with them: `LEADING` of them at least."""
    number: Array | None = None
    """The divisor as an array, where the library divides faster by one."""
    interleaved: bool = False
    """Whether a group lies in memory in short runs among those of others: rows of all are then added first."""
    repeated: bool = False
    """Whether the mean of such a group is as long as a run, as it then goes with many of them at once."""

    def by(self, divisor: float) -> "Sums":
        """These, with another divisor."""
        return self if divisor == self.divisor else self._replace(divisor=divisor, number=None)

    def first(self, x: Array) -> Array:
        """The first number of each group, beside x."""
        index: list[Any] = [slice(None)] * len(x.shape)
        for axis in self.axes:
            index[axis] = slice(0, 1)
        return x[tuple(index)]

    def pivot(self, xp: Namespace, x: Array) -> Array:  # noqa: ARG002
        """The first."""
        return self.first(x)

    @property
    def each(self) -> None:
        """All have the weight 1."""
        return None

    @property
    def weight(self) -> float:
        """The divisor."""
        return self.divisor if self.divisor == self.divisor else 1.0

    def mean(self, xp: Namespace, x: Array) -> Array:
        """The mean of each group, beside x."""
        if self.divisor != self.divisor:
            return xp.mean(x, axis=self.axes, keepdims=True)
        if self.ones is None and self.block not in (None, math.inf) and self.number is None and not self.interleaved:
            n = math.prod([x.shape[axis] for axis in self.axes])
            if n == self.divisor <= self.block and self.axes:
                return xp.mean(x, axis=self.axes, keepdims=True)
        return self._shared(self.total(xp, x))

    def mean_product(self, xp: Namespace, x: Array, other: Array, *, ops: Ops = PURE) -> Array:
        """The mean of x * other."""
        if self.divisor != self.divisor:
            return self.mean(xp, ops.multiply(x, other))
        return self._shared(self.total_product(xp, x, other, ops=ops))

    def total(self, xp: Namespace, x: Array) -> Array:
        """The sum of each group, beside x."""
        if self.divisor != self.divisor:
            return self.mean(xp, x)
        if self.interleaved:
            rows = total(xp, x, axes=self.axes[:-1], block=self.block)
            sums = xp.sum(rows, axis=-1, keepdims=True)
            return sums + xp.zeros_like(rows) if self.repeated else sums
        if self.ones is not None and self.axes == (x.ndim - 1,) and x.shape[-1] <= self.ones.shape[0]:
            return xp.vecdot(x, self.ones[: x.shape[-1]])[..., None]
        return total(xp, x, axes=self.axes, block=self.block, ones=self.ones)

    def total_product(self, xp: Namespace, x: Array, other: Array, *, ops: Ops = PURE) -> Array:
        """The sum of x * other."""
        if self.ones is None or self.axes[-1:] != (x.ndim - 1,) or self.interleaved:
            return self.total(xp, ops.multiply(x, other))
        products = _dot(xp, x, other)
        return products if len(self.axes) == 1 else total(xp, products, axes=self.axes[:-1], block=self.block)

    def anchor(self, xp: Namespace, g: Array) -> Array:
        """The mean."""
        return self.mean(xp, g)

    def _shared(self, sums: Array) -> Array:
        """Sums, divided; where there is nothing to add they are the array itself."""
        if self.divisor == 1 and self.axes:
            return sums
        return sums / (self.divisor if self.number is None else self.number)


class WideSums(Sums):
    """The same of numbers whose dtype has digits to spare, also beside a large mean."""

    __slots__ = ()

    def anchor(self, xp: Namespace, g: Array) -> None:
        """None."""


def total(xp: Namespace, x: Array, *, axes: tuple[int, ...], block: float | None, ones: Array | None = None) -> Array:
    """The sum over `axes`, which stay with length 1; at most `block` numbers are added in one go.

    Some libraries add one number after another, and the rounding error grows with their number: NumPy over any axis
    but the last in memory, PyTorch over the second of two. In blocks it grows with the block. A product with `ones`
    adds at the speed of BLAS.
    """
    if not axes:
        return x
    if ones is not None:
        last = axes[-1]
        x = _total_along(xp, x, last, _longest(tuple(x.shape), last), ones)
        return x if len(axes) == 1 else total(xp, x, axes=axes[:-1], block=block)
    if (
        block == math.inf
        or (block is None and len(axes) == 1)
        or math.prod([x.shape[axis] for axis in axes]) <= LEADING
    ):
        return xp.sum(x, axis=axes, keepdims=True)
    for axis in axes if block is None and x.shape[axes[-1]] < SHORT else reversed(axes):
        x = _total_along(xp, x, axis, block)
    return x


RUN = 2**11
"""The longest run that BLAS adds in one go along the last axis; it adds in many lanes."""
LEADING = 256
"""The longest run that is added along any axis but the last, where BLAS adds one number after another."""
LOCKED = 500
"""NumPy lets other threads run only while it makes more products of runs than that."""
WORTH = 2**16
"""So many numbers are worth that other threads run."""
SHORT = 128
"""Rows shorter than this are added to each other before their own numbers are, where a library adds by single axes."""


@lru_cache(maxsize=256)
def _longest(shape: tuple[int, ...], axis: int) -> int:
    """The length of the runs that BLAS adds along an axis."""
    n, rows = shape[axis], math.prod(shape[:axis])
    if axis < len(shape) - 1:
        return even_run(n, 1, LEADING)
    return even_run(n, 1 if rows > LOCKED or rows * n < WORTH else LOCKED // rows + 1, RUN)


def even_run(n: int, pieces: int, most: int) -> int:
    """The length, at most that, of so many equal runs of n numbers, or of a few more; `most` if there are none such."""
    pieces = max(pieces, -(-n // most))
    return next((n // k for k in range(pieces, min(4 * pieces, n // 16) + 1) if n % k == 0), most)


def _total_along(xp: Namespace, x: Array, axis: int, block: Any, ones: Array | None = None) -> Array:
    n = x.shape[axis]
    if block is None or n <= block:
        return _run(xp, x, axis, ones)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    whole = n - n % block
    head = xp.reshape(x[cut(axis, 0, whole)], (*before, n // block, block, *after))
    sums = xp.squeeze(_run(xp, head, axis + 1, ones), axis=axis + 1)
    if whole < n:
        tail = _run(xp, x[cut(axis, whole, n)], axis, ones)
        sums = xp.concat([sums, tail], axis=axis)
    return _total_along(xp, sums, axis, block, ones if axis == x.ndim - 1 else None)


def _run(xp: Namespace, x: Array, axis: int, ones: Array | None) -> Array:
    """The sum along one axis, which stays with length 1."""
    if ones is None or axis < x.ndim - 2:
        return xp.sum(x, axis=axis, keepdims=True)
    if ones.shape[0] != x.shape[axis]:
        ones = ones[: x.shape[axis]]
    return xp.vecdot(x, ones)[..., None] if axis == x.ndim - 1 else xp.matmul(ones[None, :], x)


def _dot(xp: Namespace, x: Array, other: Array) -> Array:
    """The sum of x * other over the last axis, in runs that BLAS adds."""
    n, run = x.shape[-1], _longest(tuple(x.shape), x.ndim - 1)
    if n <= run:
        return xp.vecdot(x, other)[..., None]
    whole = n - n % run
    runs = (xp.reshape(each[..., :whole], (*each.shape[:-1], n // run, run)) for each in (x, other))
    sums = xp.vecdot(*runs)
    if whole < n:
        sums = xp.concat([sums, xp.vecdot(x[..., whole:], other[..., whole:])[..., None]], axis=-1)
    return total(xp, sums, axes=(x.ndim - 1,), block=LEADING)


def cut(axis: int, start: int, stop: int) -> tuple[Any, ...]:
    """The index of part of an axis."""
    return (slice(None),) * axis + (slice(start, stop), ...)
