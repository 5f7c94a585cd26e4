"""The one choice: which executor runs a call. Programs, or blocks, or the kernels on whole arrays."""

import math
from typing import Any

from anynorm.calls import Call, Gradients, Normalized, Wanted
from anynorm.calls.conditions import sums_had_room
from anynorm.executors import blocks, programs, whole
from anynorm.kernels import Array, Standardized, Stats

EXECUTORS: tuple[Any, ...] = (programs, blocks)
"""Those that may decline, in the order in which they are asked; the kernels on whole arrays take what is left."""


def forward(call: Call, *, keep: bool = True) -> Normalized:
    """The result of a call, and its statistics if they are to be kept."""
    for executor in EXECUTORS:
        if executor.supports(call):
            done: Normalized | None = executor.forward(call, keep=keep)
            if done is not None:
                return done
    return whole.forward(call)


def statistics(call: Call) -> Stats:
    """The statistics of a call alone."""
    for executor in EXECUTORS:
        if executor.supports(call):
            found: Stats | None = executor.statistics(call)
            if found is not None:
                return found
    return whole.statistics(call)


def linearize(call: Call) -> tuple[Normalized, Array | None, Standardized | Stats]:
    """The result of a call, and what a gradient needs of it: x and its statistics, or what x was standardized to."""
    library, x = call.plan.library, None
    for executor in EXECUTORS:
        if executor.supports(call):
            if x is None:
                x = library.constant(call.x)
                if call.out is not None and library.overlap(call.x, call.out):
                    x = library.xp.asarray(x, copy=True)
            done: Normalized | None = executor.forward(call, keep=True)
            if done is not None:
                return done, x, done.stats
    if x is None and not (call.plan.divides or call.weights is not None):  # no gradient looks at it
        x = library.constant(call.x)
    if x is not None:
        done = whole.forward(call)
        return done, x, done.stats
    y, of = whole.standardized(call)
    if call.beta is None and (call.gamma is None or call.plan.inverse):
        with library.quiet():
            of = of._replace(xhat=of.xhat * 1.0)  # y is the caller's, and on the way back x
    if call.out is not None:
        call.out[...] = y
        y = call.out
    return Normalized(y, of.stats), None, of


def backward(call: Call, dy: Array, wanted: Wanted, of: Standardized | Stats | None) -> Gradients:
    """The gradients of sum(y * dy), where dy stands beside the view; over all replicas, where there are any.

    `of` is the call's statistics, or what x was standardized to; without it all that is done is recorded, if anything
    records.
    """
    found: Gradients | None = None
    if isinstance(of, Stats) and programs.supports(call, dy):
        found = programs.backward(call, dy, wanted, of)
    if found is None:
        found = _by_arrays(call, dy, wanted, of)
    if call.plan.inverse:
        return _of_way_back(call, *found)
    if call.all_reduce is None:
        return found
    assert call.join is not None
    dx, *parameters = found
    shared = [i for i, each in enumerate(parameters) if each is not None and call.plan.short[i]]
    sums = call.join(*(parameters[i] for i in shared)) if shared else []
    for i, each in zip(shared, sums, strict=True):
        parameters[i] = each
    return dx, *parameters


def _of_way_back(call: Call, dx: Array | None, *sums: Array | None) -> Gradients:
    """The gradients of a call on the way back, from the sums of dx * (y - beta) and of dx."""
    found = [None if each is None else -each for each in sums]
    if found and found[0] is not None:
        found[0] = found[0] / call.gamma
    return dx, *found


def _by_arrays(call: Call, dy: Array, wanted: Wanted, of: Standardized | Stats | None) -> Gradients:
    """By array operations; again by a smaller dy, where a sum overflowed."""
    dx, *parameters = _of_arrays(call, dy, wanted, of)
    if dx is not None and call.all_reduce is None and _overflowed(call, dy, dx):
        xp, step = call.plan.library.xp, call.plan.limits.further
        smaller = Wanted(call.plan.dtype, tuple(None for _ in parameters))
        again: Any = _of_arrays(call, call.plan.library.cast(dy, call.plan.dtype) * (1 / step), smaller, of)[0]
        dx = xp.where(xp.isfinite(dx), dx, xp.astype(again * step, dx.dtype, copy=False))
    return dx, *parameters


def _of_arrays(call: Call, dy: Array, wanted: Wanted, of: Standardized | Stats | None) -> Gradients:
    if isinstance(of, Stats):
        found = blocks.backward(call, dy, wanted, of) if blocks.supports(call, dy) else None
        if found is not None:
            return found
        of = whole.standardize_by(call, of)
    return whole.backward(call, dy, wanted, of)


def _overflowed(call: Call, dy: Array, dx: Array) -> bool:
    """Whether a sum over a group overflowed, where that can be read."""
    plan, arrays = call.plan, [each for each in (call.x, call.gamma) if each is not None]
    if (
        call.stats is not None
        or math.prod(plan.view.shape) == 0
        or not plan.library.writable_in_blocks(dy, dx, *arrays)
    ):
        return False
    return not sums_had_room(plan, dx)
