"""What a task does with chunks, which are arrays of any library.

The chunks of a group may differ in size by any power of two. So the statistics of each are those of its numbers times a
power of two, and its smallest and largest number go with them: they say what that power is, and what it is of several.
"""

import math
from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

from anynorm import calls, kernels
from anynorm.arrays.library import Library
from anynorm.arrays.recognize import library_of
from anynorm.calls import Call, Norm, Wanted
from anynorm.calls.blocks import Block
from anynorm.calls.call import Gradients, Normalized
from anynorm.executors import eager
from anynorm.kernels import NO_STATS, Array, GradientSums, Namespace, Scale, Standardized, Stats, Sums, weighting
from anynorm.kernels.merging import PartStats, merge_parts
from anynorm.kernels.weighting import WeightedSums, Weights
from anynorm.settings import options


class Job(NamedTuple):
    """What a task gets of a call; small, as it travels to other processes."""

    axes: tuple[int, ...]
    eps: float
    norm: Norm
    """Of `layouts.chunk`; its divisor is 1 where the norm of a group is a sum."""
    dtype: str
    """That of the statistics."""


class Chunk(NamedTuple):
    """A chunk of x and those of gamma, beta and the weights that go with it."""

    job: Job
    x: Array
    gamma: Array | None
    beta: Array | None
    weights: Array | None

    @property
    def library(self) -> Library:
        """The library of the chunk."""
        return library_of("x", self.x)

    @property
    def block(self) -> Block:
        """All of it."""
        return tuple(slice(0, n) for n in self.x.shape)

    def call(self, *given: Array | None, moments: bool = False) -> Call:
        """The call on it; by statistics beside x, if they are given; or for its statistics alone."""
        axes, eps, norm, dtype = self.job
        how: dict[str, Any] = {"eps": eps, "weights": self.weights, "dtype": dtype if moments else None}
        call = calls.prepare(norm._replace(moments=moments), (axes,), self.x, self.gamma, self.beta, **how)
        return call._replace(stats=_reshaped(Stats(*given), call.plan.stats.shape)) if given else call


class ChunkStats(NamedTuple):
    """The statistics of the numbers of each group that are in a chunk, or in several."""

    job: Job
    low: Array
    """The smallest number that has a weight."""
    high: Array
    scaled: Stats
    """The statistics of the numbers times the unit of their `scale`."""
    weight: Array
    """The sum of the weights divided by `weight_unit`; without weights the number of numbers."""
    weight_unit: Array
    count: Array
    """The same sum or number, exact."""

    @property
    def scale(self) -> Scale:
        """The power of two that makes the numbers safe to square, and what goes with it."""
        xp = library_of("x", self.high).xp
        low, high = weighting.found(xp, self.low, self.high, self.weight > 0)
        return kernels.scale_of(xp, low, high, eps=self.job.eps, centred=self.job.norm.centred)

    @property
    def stats(self) -> Stats:
        """The statistics of the numbers themselves."""
        with library_of("x", self.high).quiet():
            return self.scale.undo_stats(self.scaled)

    @property
    def length(self) -> Array:
        """The norm of each group of a call of `layouts.DIRECTION`."""
        library = library_of("x", self.high)
        with library.quiet():
            return library.xp.sqrt(self.scaled.var) / self.scale.unit


def run(task: Callable[..., Any], job: Job, x: Array, *others: Array | None) -> Any:
    """A task on a chunk: of x, gamma, beta and weights, and of what else the task takes."""
    chunk = Chunk(job, x, *others[:3])
    with options(threads=1), chunk.library.quiet():  # Dask has threads of its own
        return task(chunk, *others[3:])


def normalize(chunk: Chunk, *given: Array | None) -> Normalized:
    """A chunk of whole groups, or by statistics that are given, normalized; and its statistics."""
    call = chunk.call(*given)
    y, stats = eager.forward(call)
    return Normalized(y, _reshaped(stats, call.plan.layout.keepdims_shape))


def normalize_by(chunk: Chunk, of: ChunkStats) -> Array:
    """A chunk by the statistics of all chunks of its groups; 0, and then beta, in a group without weight."""
    library, scale = chunk.library, of.scale
    if not chunk.job.norm.divides:  # and squares nothing
        x = _with_weight(library.xp, chunk.x, of)
        return normalize(chunk._replace(x=x, weights=None), *of.stats).y
    x = _with_weight(library.xp, _times(library.xp, chunk.x, scale.unit), of)
    stats = of.scaled._replace(var=of.scaled.var + scale.eps)
    y = normalize(chunk._replace(job=chunk.job._replace(eps=0.0), x=x, weights=None), *stats).y
    return library.astype(y, chunk.x.dtype)


def chunk_stats(chunk: Chunk) -> ChunkStats:
    """The statistics of one chunk."""
    call = chunk._replace(job=chunk.job._replace(eps=1.0)).call(moments=True)
    plan, library = call.plan, call.plan.library
    xp, groups, n = library.xp, Sums(plan.view.axes, 1.0, None), plan.layout.group_size
    one = xp.ones(plan.stats.shape, dtype=plan.dtype, device=library.device(call.x))
    x, weights = call.x, calls.weighed(call).weights
    if weights is None:
        low, high = kernels.extremes(xp, x, groups=groups) if n else (one * math.inf, one * -math.inf)
        weight, unit, count = one * n, one, xp.astype(one, xp.int64) * n
    else:
        low, high = weighting.extremes(xp, xp.astype(x, plan.dtype, copy=False), weights, groups=groups)
        # a unit of 1 would drown those of the chunks that have weights
        unit = xp.astype(weights.sums > 0, plan.dtype) if weights.unit is None else weights.unit
        weight, unit, count = one * weights.sums, one * unit, calls.counted(call)[0]
    low, high = (one * xp.astype(each, plan.dtype, copy=False) for each in (low, high))
    part = ChunkStats(chunk.job, low, high, NO_STATS, weight, unit, count)
    call = call._replace(x=_times(xp, x, part.scale.unit))
    _, *found = part._replace(scaled=eager.statistics(call))
    return ChunkStats(chunk.job, *(_reshaped(each, plan.layout.keepdims_shape) for each in found))


def combine_stats(parts: list[ChunkStats]) -> ChunkStats:
    """The statistics of several chunks together, each brought to the power of two of all of them."""
    job, library = parts[0].job, library_of("x", parts[0].high)
    xp = library.xp
    with library.quiet():
        low, high = reduce(xp.minimum, [part.low for part in parts]), reduce(xp.maximum, [part.high for part in parts])
        weight_unit = reduce(xp.maximum, [part.weight_unit for part in parts])
        divisor = weighting.positive(xp, weight_unit)
        weights = [part.weight * (part.weight_unit / divisor) for part in parts]
        count = sum(part.count for part in parts)
        whole = ChunkStats(job, low, high, NO_STATS, sum(weights), weight_unit, count)
        scale, found = whole.scale, []
        for part, weight in zip(parts, weights, strict=True):
            own = part.scale
            stats = own._replace(unit=own.unit / scale.unit).undo_stats(part.scaled)
            found.append(PartStats(stats, job.norm.divisor or weight))
        mean, rest, var = merge_parts(xp, found, job.norm.divisor or math.nan).stats
        if job.norm.centred:  # where all numbers are one and the same, that is their mean to the last bit
            constant, value = scale.constant
            mean = xp.where(constant, value, mean)
            rest, var = (xp.where(constant, xp.zeros_like(each), each) for each in (rest, var))
        return whole._replace(scaled=Stats(mean, rest, var))


def gradients(wanted: Wanted, chunk: Chunk, dy: Array, *given: Array | None) -> Gradients:
    """The gradients of a chunk of whole groups, or by statistics that are given."""
    xp, shapes = chunk.library.xp, wanted.within(chunk.block)
    inverse = chunk.job.norm.inverse
    if (
        shapes[1:] and shapes[1] is not None and not inverse
    ):  # says, by its shape alone, which axes may be computed as one
        chunk = chunk._replace(beta=xp.ones(shapes[1], dtype=dy.dtype, device=chunk.library.device(dy)))
    call = chunk.call(*given)
    call = call if inverse else call._replace(beta=None)
    plan, dtype = call.plan, chunk.x.dtype
    wanted = Wanted(dtype, tuple(None if shape is None else plan.view.of(shape) for shape in shapes))
    stats = call.stats or eager.statistics(call)
    dx, *parameters = eager.backward(call, plan.to_view(dy, plan.dtype), wanted, stats)
    parameters = [None if d is None else xp.reshape(d, shape) for d, shape in zip(parameters, shapes, strict=True)]
    return plan.from_view(dx, dtype), *parameters


def gradient_sums(wanted: Wanted, chunk: Chunk, dy: Array, of: ChunkStats) -> tuple[Any, ...]:
    """What a chunk adds to the sums of its groups, and the gradients of gamma and beta."""
    xp, groups = chunk.library.xp, Sums(chunk.job.axes, 1.0, chunk.library.block)
    dy, g, xhat, _, each, _ = _cotangent(chunk, dy, of)
    own = WeightedSums(groups, Weights(each, weighting.summed(xp, each, g.shape, groups=groups)))
    parameters = kernels.parameter_gradients(xp, dy, xhat, wanted.within(chunk.block), block=groups.block)
    _, sums = kernels.gradient_sums(xp, g, xhat, groups=own, centred=chunk.job.norm.centred, part=True)
    return sums, *parameters


def combine_gradient_sums(parts: list[GradientSums]) -> GradientSums:
    """The sums of several chunks together."""
    library = library_of("dy", parts[0].weight)
    with library.quiet():
        return kernels.merge_gradient_sums(library.xp, parts)


def input_gradient(chunk: Chunk, dy: Array, of: ChunkStats, sums: GradientSums, last: Array | None) -> Array:
    """The gradient of a chunk of x by the sums of all chunks of its groups; a gamma that is `last` is one a group."""
    xp = chunk.library.xp
    _, g, xhat, rstd, each, power = _cotangent(chunk, dy, of)
    if chunk.job.norm.divisor:
        sums = sums._replace(weight=xp.ones_like(sums.weight))
    dx = kernels.input_gradient_of_part(xp, g, sums, Standardized(xhat, rstd, of.scaled), each, last, power)
    return xp.astype(dx, chunk.x.dtype, copy=False)


def add(parts: list[Array]) -> Array:
    """The gradient of a parameter, of several chunks together."""
    with library_of("dy", parts[0]).quiet():
        return sum(parts[1:], start=parts[0])


def _cotangent(chunk: Chunk, dy: Array, of: ChunkStats) -> tuple[Array, Array, Any, Any, Array, Array | None]:
    """dy; g, the gradient of xhat, times a power of two; xhat; rstd; the weights; and the power, if there is one.

    Where x weighs nothing and xhat is not finite, it is 0, and so is dy; g is so in a group without weight. Where
    nothing is divided by rstd there is none, and no xhat.
    """
    library, scale, dtype, divides = chunk.library, of.scale, of.high.dtype, chunk.job.norm.divides
    xp, x = library.xp, library.xp.astype(chunk.x, dtype, copy=False)
    xhat = None
    if divides or chunk.weights is not None:
        xhat = normalize_by(chunk._replace(x=x, gamma=None, beta=None), of)
    if chunk.weights is None:
        each = xp.ones((1,) * x.ndim, dtype=dtype, device=library.device(x))
    else:
        each = calls.ready(library, Weights(chunk.weights, of.weight, of.weight_unit), dtype).each
        lost = (each == 0) & ~xp.isfinite(xhat)
        if bool(xp.any(lost)):
            xhat, dy = (xp.where(lost, xp.zeros_like(values), values) for values in (xhat, dy))
    if not divides:
        return dy, _with_weight(xp, dy, of), None, None, each, None
    rstd = kernels.inverse_root(xp, of.scaled.var + scale.eps, rstd_at_zero=scale.rstd_at_zero)
    rstd = scale.undo_rstd(xp, rstd)
    power = None if chunk.gamma is None else kernels.power_of_two(xp, rstd)
    g = _with_weight(xp, kernels.cotangent(xp, dy, chunk.gamma, power), of)
    return dy, g, xhat, rstd, each, power


def _with_weight(xp: Namespace, x: Array, of: ChunkStats) -> Array:
    """x with 0 in a group without weight."""
    some = of.weight > 0
    return x if bool(xp.all(some)) else xp.where(some, x, xp.zeros_like(x))


def _times(xp: Namespace, x: Array, unit: Array) -> Array:
    """x * unit, in the dtype of the computation where that is not x."""
    return x * unit if bool(xp.any(unit != 1)) else x


def _reshaped(found: Any, shape: tuple[int, ...]) -> Any:
    """An array, or each of `Stats`, in another shape."""
    if isinstance(found, tuple):
        return type(found)(*(_reshaped(each, shape) for each in found))
    return None if found is None else library_of("x", found).xp.reshape(found, shape)
