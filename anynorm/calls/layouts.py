"""Which axes share a mean and a variance: all that tells one norm from another (Figure 1 of Wu & He, 2018)."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from anynorm.arrays.checks import check_axes, check_int, same_shape


class Layout(NamedTuple):
    """How an array of shape `shape` is divided into groups."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    """The axes, of the view, whose elements share a mean and a variance."""
    parameter_axes: tuple[int, ...]
    """The axes, of the array, that a short gamma or beta runs along."""
    channel: int | None = None
    """The axis that the view splits in two, (groups, channels of a group)."""
    groups: int = 1

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """The shape of a short gamma or beta."""
        return tuple(self.shape[axis] for axis in self.parameter_axes)

    @property
    def kept_shape(self) -> tuple[int, ...]:
        """The shape of the statistics: one for each group."""
        return tuple(n for axis, n in enumerate(self.view(self.shape)) if axis not in self.axes)

    @property
    def keepdims_shape(self) -> tuple[int, ...]:
        """The shape of the statistics beside the view."""
        return tuple(1 if axis in self.axes else n for axis, n in enumerate(self.view(self.shape)))

    @property
    def group_size(self) -> int:
        """The number of elements in a group."""
        view = self.view(self.shape)
        return math.prod([view[axis] for axis in self.axes])

    def view(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`shape`, the array's own or one that broadcasts to it, with the channels split into their groups."""
        if self.channel is None:
            return shape
        n = shape[self.channel]
        split = (1, 1) if n == 1 != self.shape[self.channel] else (self.groups, n // self.groups)
        return (*shape[: self.channel], *split, *shape[self.channel + 1 :])

    def whole(self, view: tuple[int, ...]) -> tuple[int, ...]:
        """The shape whose `view` that is, for an array of x's size."""
        c = self.channel
        return view if c is None else (*view[:c], self.shape[c], *view[c + 2 :])

    def full(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The view of a parameter of shape `shape`, or None if it does not fit."""
        rank = len(self.shape)
        if same_shape(shape, self.parameter_shape):
            sizes = dict(zip(self.parameter_axes, shape, strict=True))
            return self.view(tuple(sizes.get(axis, 1) for axis in range(rank)))
        return self.broadcast(shape) if len(shape) == rank else None

    def order(self, order: tuple[int, ...]) -> tuple[int, ...]:
        """An order of the array's axes as one of the view's."""
        if self.channel is None:
            return order
        c = self.channel
        return tuple(each for axis in order for each in ((c, c + 1) if axis == c else (axis + (axis > c),)))

    def broadcast(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The view of an array of shape `shape`, or None if it does not broadcast to the whole."""
        missing = len(self.shape) - len(shape)
        shape = (1,) * missing + shape
        if missing < 0 or not all(
            n == 1 or same_shape((n,), (whole,)) for n, whole in zip(shape, self.shape, strict=True)
        ):
            return None
        return self.view(shape)


SHORT = 32
"""Groups in runs of fewer numbers are interleaved."""
ROWS = 16
"""Beside so many rows, what there is for each group is small."""


class View(NamedTuple):
    """The shape in which an array is computed, once axes that are treated alike have become one."""

    runs: tuple[tuple[int, ...], ...]
    """The axes that became each of the new ones."""
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    """Those of the new axes whose elements share a mean and a variance."""
    merged: bool = False
    order: tuple[int, ...] = ()
    """All axes as they come in the runs; none where that is their own order."""

    @property
    def interleaved(self) -> bool:
        """Whether groups lie in memory in short runs, and many of them, among those of others.

        So they do in group norm with channels last, and in batch norm of few places.
        """
        axes, shape, last = self.axes, self.shape, len(self.shape) - 1
        if len(axes) < 2 or axes[-1] != last or axes[-2] == last - 1 or not shape[last] < SHORT:
            return False
        return math.prod([shape[axis] for axis in axes[:-1]]) >= ROWS

    def of(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What becomes of a shape that broadcasts to the array's."""
        return tuple(math.prod([shape[axis] for axis in run]) for run in self.runs)


def merge_axes(
    shape: tuple[int, ...], axes: tuple[int, ...], others: list[tuple[int, ...]], order: tuple[int, ...] = ()
) -> View:
    """Neighbouring axes made one, where the array is averaged over both or neither, and so for each of the others.

    The shapes of the `others` broadcast to the array's. An axis of length 1 goes with any neighbour. Neighbours are
    those in the `order` that is given.
    """
    runs: list[list[int]] = []
    before = None
    for axis in order or range(len(shape)):
        n = shape[axis]
        kind = (axis in axes, *(other[axis] == 1 for other in others))
        if runs and (n == 1 or before is None or kind == before):
            runs[-1].append(axis)
        else:
            runs.append([axis])
        before = before if n == 1 else kind
    whole = View(tuple(map(tuple, runs)), (), (), merged=True, order=order)
    reduced = [any(axis in axes and shape[axis] != 1 for axis in run) for run in runs]
    return whole._replace(shape=whole.of(shape), axes=tuple(i for i, yes in enumerate(reduced) if yes))


def ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of length 1."""
    return tuple(axis for axis, n in enumerate(shape) if n == 1)


def in_order(shape: tuple[int, ...], order: tuple[int, ...]) -> bool:
    """Whether the axes, but for those of length 1, come in their own order."""
    longer = [axis for axis in order if shape[axis] != 1]
    return longer == sorted(longer)


def over(shape: tuple[int, ...], axis: Any) -> Layout:
    """One group for each index along the other axes: layer and RMS normalization."""
    axes = check_axes("axis", axis, shape)
    return Layout(shape, axes, axes)


def chunk(shape: tuple[int, ...], axes: tuple[int, ...]) -> Layout:
    """`over`, for axes that are checked already and may be none: of a part of an array."""
    return Layout(shape, axes, axes)


def batch(shape: tuple[int, ...], channel_axis: Any) -> Layout:
    """One group for each channel."""
    if len(shape) == 1:
        rule = "write x[None, ...] and channel_axis=1 for one sample"
        raise ValueError(f"x must have at least two axes, got shape {shape}: {rule}")
    channel = _channel(shape, channel_axis)
    return Layout(shape, _others(len(shape), (channel,)), (channel,))


def instance(shape: tuple[int, ...], channel_axis: Any) -> Layout:
    """One group for each sample and channel."""
    channel = _channel(shape, channel_axis)
    return Layout(shape, _others(len(shape), (*_sample(channel), channel)), (channel,))


def group(shape: tuple[int, ...], groups: Any, channel_axis: Any) -> Layout:
    """One group for each sample and run of neighbouring channels."""
    channel = _channel(shape, channel_axis)
    groups = check_int("groups", groups)
    if groups < 1 or shape[channel] % groups > 0:  # of a size that is not known that is NaN
        raise ValueError(f"groups must divide the {shape[channel]} channels of x, got {groups}")
    return Layout(shape, _others(len(shape) + 1, (*_sample(channel), channel)), (channel,), channel, groups)


def weight(shape: tuple[int, ...], axis: Any) -> Layout:
    """One group for each index along `axis`; None is one group in all."""
    kept = () if axis is None else check_axes("axis", axis, shape)
    return Layout(shape, tuple(each for each in range(len(shape)) if each not in kept), kept)


def _channel(shape: tuple[int, ...], channel_axis: Any) -> int:
    channel = check_int("channel_axis", channel_axis)
    if channel == 1 == len(shape):  # as it is where nobody gave it
        raise ValueError(f"x must have at least two axes, the channels on axis 1, got shape {shape}")
    return check_axes("channel_axis", channel, shape)[0]


def _sample(channel: int) -> tuple[int, ...]:
    """Axis 0 is the batch; channels in its place say that there is none."""
    return (0,) if channel else ()


def _others(rank: int, kept: tuple[int, ...]) -> tuple[int, ...]:
    axes = tuple(axis for axis in range(rank) if axis not in kept)
    if not axes:
        raise ValueError(f"x must have more than the {len(kept)} axes that keep statistics of their own, got {rank}")
    return axes


class Norm(NamedTuple):
    """What tells one norm from another: which axes share a mean, whether it is taken away, and what divides a sum."""

    layout: Callable[..., Layout]
    """From the shape of x and the values of the `options`."""
    options: tuple[str, ...]
    centred: bool = True
    divisor: int | None = None
    """None is the number of elements in a group."""
    divides: bool = True
    """Whether it is more than a mean that is taken away."""
    inverse: bool = False
    """Whether it is the way back, from what is normalized; by moments that are given."""
    names: tuple[str, str] = ("x", "gamma")
    """What the first two arrays are called in errors."""
    gamma_required: bool = False
    moments: bool = False
    """Whether the statistics are all that is asked for."""


NORMALIZE = LAYER = Norm(over, ("axis",))
MOMENTS = NORMALIZE._replace(moments=True)
CENTER = Norm(over, ("axis",), divides=False)
DENORMALIZE = Norm(over, ("axis",), inverse=True, names=("y", "gamma"))
BATCH = Norm(batch, ("channel_axis",))
INSTANCE = Norm(instance, ("channel_axis",))
GROUP = Norm(group, ("groups", "channel_axis"))
RMS = Norm(over, ("axis",), centred=False)
WEIGHT = Norm(weight, ("axis",), centred=False, divisor=1, names=("v", "g"), gamma_required=True)
DIRECTION = WEIGHT._replace(names=("w", "g"), gamma_required=False)
"""A weight brought to length 1."""
