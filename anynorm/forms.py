"""The classes of shapes that are compiled once, and how groups are added up there."""

import math
from collections.abc import Hashable
from functools import lru_cache
from typing import NamedTuple

from anynorm import kernels, layouts
from anynorm.engines import Compiler
from anynorm.kernels import Arithmetic, Array, Namespace

FEW = 32
"""So many values of a group tell its mean well enough for a pivot."""
LANES = 16
"""So many numbers are computed at a time."""
WIDE = 512
"""Rows of so many numbers are added fewer at a time, as they lie far apart."""
RUN = 4096
"""The longest run that inductor adds without a stack of partial sums."""
MEDIUM = 2**23
"""Of no more numbers wide rows are added 8 at a time, for sums over the groups: it is faster, and takes more memory."""
MANY = 48
"""So many rows are added in parts, of which there are two at least: a compiler makes a version of its own of one."""
LARGE = 2**15
"""From so many numbers on a compiler is to make use of threads; it decides once."""


class Split(NamedTuple):
    """An axis, whatever its length, in parts of one length."""

    length: int
    even: bool
    """Whether nothing is left over."""

    def parts(self, n: int) -> int:
        """How many parts n numbers have; more than one is left over, of which compilers make a version of its own."""
        return n // self.length - (0 if self.even else 1)


class Form(NamedTuple):
    """A class of shapes."""

    view: layouts.View
    splits: tuple[Split, ...]
    """How the first axis is divided, its parts again, and so on, before the sum of what is left of it is taken."""
    sample: tuple[slice, ...]
    """Where along each axis of a group some of its values are found."""
    large: bool
    """Whether a compiler is to make use of threads."""
    kind: Hashable
    """The class, said in full."""

    @property
    def axes(self) -> tuple[int, ...]:
        """Those that share a mean."""
        return self.view.axes

    @property
    def rows(self) -> tuple[int, ...]:
        """The axes, if groups are rows in memory that other arrays divide further: their sums share one loop then."""
        return self.axes if self.trailing and 1 < len(self.axes) < len(self.view.shape) else ()

    @property
    def apart(self) -> bool:
        """Whether the sums over groups and what is done with these are loops of their own."""
        return bool(self.axes) and (not self.trailing or bool(self.rows))

    @property
    def short(self) -> int:
        """The length of a last axis that is too short to be a loop of its own, and is one of several of a group."""
        n, last = self.view.shape[-1], len(self.view.shape) - 1
        return n if n < LANES and last in self.axes and len(self.axes) > 1 and not self.trailing else 0

    @property
    def trailing(self) -> bool:
        """Whether a group is all that lies side by side."""
        last = len(self.view.shape)
        return self.axes == tuple(range(last - len(self.axes), last))

    def of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What becomes of a shape beside the plan's view."""
        return shape if len(shape) == len(self.view.shape) else self.view.of(shape)


@lru_cache(maxsize=1024)
def joined(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    beside: tuple[tuple[int, ...], ...],
    wanted: tuple[tuple[int, ...], ...] = (),
) -> Form:
    """The form of arrays of a shape, averaged over these axes, beside arrays of other shapes, and of sums `wanted`."""
    view = layouts.joined(shape, axes, [*beside, *wanted])
    summed = 0 in view.axes or any(view.of(each)[0] == 1 for each in wanted)
    wide, size = view.shape[-1] >= WIDE, math.prod(view.shape)
    first = 8 if wide and 0 not in view.axes and size <= MEDIUM else None
    splits = _splits(view.shape[0], wide=wide, first=first) if summed else ()
    large = size >= LARGE
    sample = _sample(view, large)
    kind = (view.axes, view.shape[1:], splits, *map(str, sample), large)
    return Form(view, splits, sample, large, kind)


def _splits(n: int, *, wide: bool, first: int | None = None) -> tuple[Split, ...]:
    """Those of n rows, the `first` of this length, which leave fewer than `MANY` to be added one after another.

    Of few rows, and of sums of rows, some are always left over, so that one version is enough.
    """
    splits: list[Split] = []
    while n >= MANY:
        length = first or (16 if wide or n <= 16 * kernels.LEADING else 256)
        splits.append(Split(length, not splits and n > kernels.LEADING and n % length == 0))
        n, first = splits[-1].parts(n), None
    return tuple(splits)


def _sample(view: layouts.View, large: bool) -> tuple[slice, ...]:
    """Where along each axis of a group `FEW` of its values are found, or a few more."""
    found, left = [], FEW
    for axis in reversed(view.axes):
        n = view.shape[axis]
        if axis == 0:  # it may have any length, of which the start is sure
            start, step = 0, 1
        elif axis == len(view.shape) - 1:  # side by side in memory
            start, step = max(0, n - left) // 2, 1
        else:
            start, step = 0, max(1, n // left)
        found.append(slice(start, start + left * step, step) if left < n and (axis or large) else slice(None))
        left = max(1, left // n)
    return tuple(found[::-1])


class Sums:
    """`Groups` for a form: its sums are exact, and in an order that compilers make good loops of; it keeps them."""

    def __init__(self, form: Form, compiler: Compiler, x: Array, *, counted: bool) -> None:
        self.form, self.compiler, self.axes = form, compiler, form.axes
        self.well = compiler.sums_well(x)
        self.divisor = float(math.prod([x.shape[axis] for axis in form.axes])) if counted else 1.0
        self.sums: list[Array] = []

    def mean(self, xp: Namespace, x: Array) -> Array:
        """The mean of each group, beside x."""
        total = self.total(xp, x, self.axes)
        self.sums.append(total)
        return self.kept(xp, total / self.divisor)

    def mean_product(self, xp: Namespace, x: Array, other: Array, *, ops: Arithmetic = kernels.PURE) -> Array:
        """Of x * other."""
        return self.mean(xp, ops.multiply(x, other))

    def pivot(self, xp: Namespace, x: Array) -> Array:
        """The mean of some of the values of each group."""
        some = [slice(None)] * len(x.shape)
        for axis, part in zip(self.axes, self.form.sample, strict=True):
            some[axis] = part
        values = x[tuple(some)]
        self.sums.append(xp.sum(values, axis=self.axes, keepdims=True))
        return self.kept(xp, self.sums[-1] / math.prod([values.shape[axis] for axis in self.axes]))

    def kept(self, xp: Namespace, value: Array) -> Array:
        """A value for each group that is used in another loop than it comes from, where it would be computed again.

        In one loop they go without: what is stored would part it in two, and to read the numbers again costs more.
        """
        apart = not self.form.trailing if self.well else self.form.apart
        return self.compiler.stored(self._beside(xp, value)) if apart else value

    def given(self, xp: Namespace, value: Array | None) -> Array | None:
        """A value for each group that is there already."""
        beside = value is not None and self.form.short and not self.well
        return self.compiler.stored(self._beside(xp, value)) if beside else value

    def own(self, value: Array) -> Array:
        """A value for each group as it was before it was kept."""
        return value[..., :1] if self.form.short and not self.well else value

    def _beside(self, xp: Namespace, value: Array) -> Array:
        """Beside each number of a last axis that is short: all that lies side by side is one row with it."""
        short = not self.well and value.shape[-1] < self.form.short
        return xp.concat([value] * self.form.short, axis=-1) if short else value

    def total(self, xp: Namespace, x: Array, axes: tuple[int, ...]) -> Array:
        """The sum over these axes, the innermost first."""
        if not axes or self.well:
            return xp.sum(x, axis=axes, keepdims=True) if axes else x
        last = len(self.form.view.shape) - 1
        if axes == self.form.rows:
            kept = x.shape[: axes[0]]
            rows = xp.reshape(x, (*kept, math.prod([x.shape[axis] for axis in axes])))
            return xp.reshape(self._along(xp, rows), (*kept, *(1 for _ in axes)))
        order = list(reversed(axes))
        if self.form.short and order[0] == last:  # for the others all that lies side by side is one row
            order.append(order.pop(0))
        for axis in order:
            if axis == last:
                x = self._along(xp, x)
            elif axis == 0:
                x = self._leading(xp, x, self.form.splits)
            else:
                block = kernels.even_run(x.shape[axis], 1, 16 if x.shape[-1] >= WIDE else 256)
                x = kernels.total(xp, x, axes=(axis,), block=block)
        return x

    def _along(self, xp: Namespace, x: Array) -> Array:
        """Over the last axis; in equal parts where a longer run is added at a third of the speed."""
        n = x.shape[-1]
        parts = -(-n // RUN)
        if parts > 1 and self.form.apart and n % parts == 0:
            x = xp.sum(xp.reshape(x, (*x.shape[:-1], parts, n // parts)), axis=-1)
        return xp.sum(x, axis=-1, keepdims=True)

    def _leading(self, xp: Namespace, x: Array, splits: tuple[Split, ...]) -> Array:
        """Over the first axis: in parts, the sums of these likewise, and what is left over."""
        if not splits:
            return xp.sum(x, axis=0, keepdims=True)
        split, further = splits[0], splits[1:]
        n = split.parts(x.shape[0])
        stop = n * split.length
        parts = xp.reshape(x if split.even else x[:stop], (n, split.length, *x.shape[1:]))
        whole = self._leading(xp, xp.sum(parts, axis=1), further)
        return whole if split.even else whole + xp.sum(x[stop:], axis=0, keepdims=True)
