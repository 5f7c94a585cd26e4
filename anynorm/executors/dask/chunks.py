"""How a call on a chunked, lazy array is run: chunk by chunk, each by an executor of the chunk's own library.

Groups that lie within a chunk make one block-parallel graph. Where they are spread over chunks, their statistics are
taken of each chunk and merged, and then applied to chunks that are made a second time: those of the first would all
have to wait for the last of them.
"""

import math
import sys
from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any, NamedTuple

from anynorm import calls, kernels
from anynorm.arrays import compute_dtype, counts, in_chunks, library_of, same_shape
from anynorm.calls import Call, Norm, Plan, Wanted, layouts, views
from anynorm.calls.results import Gradients, Normalized
from anynorm.executors import eager
from anynorm.executors.dask.graph import STATISTICS, again
from anynorm.kernels import Array, Scale, Standardized, Stats, Sums, merging, weighting
from anynorm.kernels.merging import PartStats
from anynorm.kernels.weighting import GradientSums, WeightedSums, Weights
from anynorm.settings import options


class Job(NamedTuple):
    """What a task is told of a call; small and plain, as it travels to other processes."""

    axes: tuple[int, ...]
    eps: float
    centred: bool
    sums: bool
    """Whether the norm of a group is a sum, not a mean."""
    last: bool
    """Whether gamma is one number for each group, which then comes last in a gradient."""


def takes(call: Call) -> bool:
    """Whether a call is run so; that of one of several replicas is not."""
    return call.plan.library.chunked and call.all_reduce is None


def forward(call: Call) -> Normalized:
    """The result of a call."""
    job = _job(call)
    if call.stats is not None:
        y, stats = _blocks(_with_given, job, call, *call.stats), call.stats
    elif _within_chunks(call):
        whole = _blocks(_whole, job, call)
        y, stats = _picked(whole, "y", call.x.dtype), _stats(call, whole)
    else:
        merged = _merged(call, job)
        y = _blocks(_with_merged, job, _again(call, merged, weights=False), merged)
        stats = _stats(call, merged)
    return Normalized(from_view(call.plan, y, call.x.dtype, call.chunks), stats)


def from_view(plan: Plan, value: Array, dtype: Any, chunks: tuple[tuple[Any, ...], ...]) -> Array:
    """`eager.from_view`, in the chunks that x came in where some of them are empty."""
    value = views.from_view(plan, value, dtype)
    return in_chunks(value, chunks) if any(0 in own for own in chunks) else value


def statistics(call: Call) -> Stats:
    """The statistics of a call alone."""
    return _stats(call, _merged(call, _job(call)))


def count(call: Call) -> Array:
    """The number of values in each group, or the sum of their weights, beside the view."""
    given, library = call.weights, call.plan.library
    dtype = library.xp.int64 if given is None else counts.dtype_of(library, given.each, given.each.dtype)
    return _picked(_merged(call, _job(call)), "number", dtype)


def length(call: Call) -> Array:
    """`eager.length`."""
    merged = _merged(call, _job(call))
    inds, meta = tuple(range(merged.ndim)), merged._meta.astype(call.plan.dtype)
    return _dask().blockwise(_length, inds, merged, inds, meta=meta, token="anynorm-length")


def backward(call: Call, dy: Array, wanted: Wanted) -> Gradients:
    """The gradients of sum(y * dy), where dy stands beside the view."""
    job = _job(call)
    if call.stats is not None or _within_chunks(call):
        pulled = _blocks(partial(_pulled, wanted), job, call, dy, *(call.stats or ()))
        dx = _picked(pulled, "dx", wanted.dtype)
    else:
        merged = _merged(call, job)
        call = _again(call, merged)
        if merged.name not in dy.dask.layers:  # else it waits for them as it is
            dy = again(dy, merged)
        pulled = _blocks(partial(_gradient_sums, wanted), job, call, dy, merged)
        part_stats = _picked(pulled, "part_stats", call.plan.dtype, job.axes)
        sums_of_g = _joined(part_stats, job.axes, partial(_merge_gradient_sums, job))
        call = _again(call, sums_of_g)
        dx = _blocks(partial(_input_gradient, wanted.dtype), job, call, again(dy, sums_of_g), merged, sums_of_g)
    parameters = [
        None
        if shape is None
        else _summed(_picked(pulled, name, call.plan.dtype, layouts.ones(shape)), layouts.ones(shape))
        for name, shape in zip(("dgamma", "dbeta"), wanted.parameters, strict=False)
    ]
    return dx, *parameters


def _again(call: Call, after: Array, *, weights: bool = True) -> Call:
    """The call on x, and on `weights`, that are made a second time."""
    given = call.weights
    if given is not None:
        given = given._replace(each=again(given.each, after)) if weights else None
    return call._replace(x=again(call.x, after), weights=given)


def _within_chunks(call: Call) -> bool:
    """Whether no group is spread over chunks."""
    return all(call.x.numblocks[axis] == 1 for axis in call.plan.view.axes)


def _job(call: Call) -> Job:
    plan, axes = call.plan, call.plan.view.axes
    return Job(
        axes,
        plan.eps,
        plan.centred,
        not plan.centred and plan.groups.divisor == 1,
        kernels.one_per_group(call.gamma, axes),
    )


def _blocks(work: Callable[..., Any], job: Job, call: Call, *others: Array | None) -> Array:
    """The work on each chunk of x, together with those of the parameters and of the others that go with it."""
    x = call.x
    inds = tuple(range(x.ndim))
    pairs: list[Any] = []
    for each in (x, call.gamma, call.beta, None if call.weights is None else call.weights.each, *others):
        pairs += (None, None) if each is None else (_beside(x, each), inds)
    return _dask().blockwise(partial(work, job), inds, *pairs, align_arrays=False, meta=x._meta, token="anynorm")


def _beside(x: Array, array: Array) -> Array:
    """An array that broadcasts to x, in chunks that do so too."""
    chunks = tuple(
        own if n == 1 or len(own) == len(theirs) == 1 else theirs
        for n, own, theirs in zip(array.shape, array.chunks, x.chunks, strict=True)
    )
    if all(n == n for sizes in chunks for n in sizes):
        return array if chunks == array.chunks else array.rechunk(chunks)
    if not all(map(same_shape, array.chunks, chunks)):
        raise ValueError(
            f"arrays must be divided as x is where its sizes are not known, in chunks {x.chunks}, "
            f"got {array.chunks}: call compute_chunk_sizes() on each first"
        )
    return array


def _stats(call: Call, found: Array) -> Stats:
    """The statistics that each of these chunks holds."""
    plan = call.plan
    parts = {
        name: _picked(found, name, plan.dtype, plan.view.axes) if plan.centred or name == "var" else None
        for name in Stats._fields
    }
    return Stats(**parts)


def _picked(found: Array, name: str, dtype: Any, axes: tuple[int, ...] = ()) -> Array:
    """One of the things that each chunk holds, of length 1 along `axes`."""
    inds = tuple(range(found.ndim))
    ones, meta = dict.fromkeys(axes, 1), found._meta.astype(dtype)
    return _dask().blockwise(_pick, inds, found, inds, of=name, adjust_chunks=ones, meta=meta, token=f"anynorm-{name}")


def _merged(call: Call, job: Job) -> Array:
    """The statistics of all groups, of length 1 along the axes that they are taken over."""
    x = call.x
    da, inds, ones = _dask(), tuple(range(x.ndim)), dict.fromkeys(job.axes, 1)
    pairs = [x, inds] if call.weights is None else [x, inds, _beside(x, call.weights.each), inds]
    options = {"adjust_chunks": ones, "align_arrays": False, "meta": x._meta, "token": "anynorm-part"}
    parts = da.blockwise(partial(_survey, job), inds, *pairs, **options)
    joint = _joined(parts, job.axes, partial(_merge, job))
    return da.blockwise(partial(_settle, job), inds, joint, inds, meta=x._meta, token=STATISTICS)


def _joined(parts: Array, axes: tuple[int, ...], join: Callable[..., Any], name: str = STATISTICS) -> Array:
    """What the chunks of a group hold, joined in a tree."""
    meta = parts._meta
    options = {"keepdims": True, "concatenate": False, "dtype": meta.dtype, "meta": meta, "name": name}
    return _dask().reduction(parts, _itself, join, axis=axes, **options)


def _summed(parts: Array, axes: tuple[int, ...]) -> Array:
    return _joined(parts, axes, _sum, "anynorm-sum") if axes else parts


def _dask() -> Any:
    return sys.modules["dask.array"]


class Whole(NamedTuple):
    """A chunk that holds whole groups, normalized."""

    y: Array
    mean: Array | None
    rest: Array | None
    var: Array


class Part(NamedTuple):
    """Some of the values of each group."""

    bottom: Array
    """The smallest of them."""
    top: Array
    stats: Stats
    """Their statistics, times the power of two that their scale takes out."""
    number: Any
    """How many there are in each group; or the sum of their weights, divided by the unit of these."""
    unit: Array | None = None
    total: Any = None
    """The sum of the weights itself."""

    def scale(self, job: Job) -> Scale:
        """The power of two that makes these values safe to square, and what goes with it."""
        xp, bottom, top = library_of("top", self.top).xp, self.bottom, self.top
        if self.unit is not None:
            bottom, top = weighting.found(xp, bottom, top, self.number > 0)
        return kernels.scale_of(xp, bottom, top, eps=job.eps, centred=job.centred)

    @property
    def vacant(self) -> bool:
        """Whether there are no values."""
        return self.unit is None and self.number == 0


class Merged(NamedTuple):
    """The statistics of groups, of all their values."""

    mean: Array | None
    rest: Array | None
    var: Array
    number: Array
    unit: Array
    """The power of two that is taken out of the values, before they are normalized."""
    scaled: Stats
    """The statistics of what that leaves; the variance with eps added."""
    rstd: Array
    """1 / sqrt(var + eps)."""
    weights: Weights | None
    """But for each of them."""


class Pulled(NamedTuple):
    """The gradients of a chunk; in a group of many, the part that its values have in the group's sums."""

    dx: Array | None
    dgamma: Array | None
    dbeta: Array | None
    part_stats: PartStats | GradientSums | None = None


def _pick(found: Any, *, of: str) -> Array:
    return getattr(found, of)


def _sum(parts: Any, axis: Any, keepdims: bool) -> Array:  # noqa: ARG001
    found = list(_flattened(parts))
    with library_of("x", found[0]).quiet():
        return sum(found[1:], start=found[0])


def _itself(part: Part, axis: Any, keepdims: bool) -> Part:  # noqa: ARG001
    return part


def _with_given(job: Job, x: Array, gamma: Array | None, beta: Array | None, _: None, *given: Array | None) -> Array:
    return _applied(job, x, gamma, beta, Stats(*given))


def _whole(job: Job, x: Array, gamma: Array | None, beta: Array | None, given: Array | None) -> Whole:
    call = _eager(job, x, gamma, beta, given)
    with options(threads=1):  # Dask has threads of its own
        y, stats = eager.forward(call)
    return Whole(y, *_beside_chunk(job, x, stats))


def _with_merged(job: Job, x: Array, gamma: Array | None, beta: Array | None, _: None, merged: Merged) -> Array:
    library, dtype = library_of("x", x), x.dtype
    with library.quiet():
        x = _scaled(library.xp, x, merged.unit)
        x = x if merged.weights is None else _present(library.xp, x, merged.weights)
    y = _applied(job._replace(eps=0.0), x, gamma, beta, merged.scaled)
    return y if y.dtype == dtype else library.xp.astype(y, dtype)


def _survey(job: Job, x: Array, given: Array | None = None) -> Part:
    """The statistics of a chunk."""
    library = library_of("x", x)
    xp, dtype = library.xp, compute_dtype(library, "x", x)
    number = _number(job, x)
    if number == 0:
        nothing = xp.zeros(_kept(job, x), dtype=dtype, device=library.device(x))
        stats = Stats(nothing, nothing, nothing) if job.centred else Stats(None, None, nothing)
        count = None
        if given is not None:
            count = xp.astype(nothing, counts.dtype_of(library, nothing, given.dtype))
        return Part(nothing, nothing, stats, 0, None, count)
    with library.quiet():
        call = _eager(job._replace(eps=1.0), x, None, None, given)
        part = _extremes(job, x, given, call)
        scaled = call.plan.to_view(_scaled(xp, x, part.scale(job).unit))
        with options(threads=1):
            call = call._replace(x=scaled)
            stats = eager.statistics(call)
        return _exact(job, part._replace(stats=_beside_chunk(job, x, stats)))


def _extremes(job: Job, x: Array, given: Array | None, call: Call) -> Part:
    """A chunk, but for its statistics."""
    xp, dtype, groups = call.plan.library.xp, call.plan.dtype, Sums(job.axes, 1.0, None)
    if given is None or call.weights is None:
        bottom, top = (xp.astype(end, dtype, copy=False) for end in kernels.extremes(xp, x, groups=groups))
        return Part(bottom, top, Stats(None, None, top), _number(job, x))
    found, shape = calls.weighed(call).weights, call.plan.stats.shape
    assert found is not None
    # a unit of 1 would drown those of the chunks that have weights
    unit = xp.astype(found.sums > 0, dtype) if found.unit is None else found.unit
    sums, unit = (xp.reshape(xp.broadcast_to(each, shape), _kept(job, x)) for each in (found.sums, unit))
    beside = Weights(xp.astype(given, dtype, copy=False), sums)
    bottom, top = weighting.extremes(xp, xp.astype(x, dtype, copy=False), beside, groups=groups)
    count, _ = calls.counted(call)
    return Part(bottom, top, Stats(None, None, top), sums, unit, xp.reshape(count, _kept(job, x)))


def _merge(job: Job, parts: Any, axis: Any, keepdims: bool) -> Part:  # noqa: ARG001
    """Chan's merging, of as many parts as there are, each brought to the scale of all of them."""
    rstd_at_zero: list[Part] = list(_flattened(parts))
    rstd_at_zero = [part for part in rstd_at_zero if not part.vacant] or rstd_at_zero[:1]
    if len(rstd_at_zero) == 1:
        return rstd_at_zero[0]
    library = library_of("top", rstd_at_zero[0].top)
    xp = library.xp
    with library.quiet():
        bottom = reduce(xp.minimum, [part.bottom for part in rstd_at_zero])
        top = reduce(xp.maximum, [part.top for part in rstd_at_zero])
        numbers, most = [part.number for part in rstd_at_zero], None
        if rstd_at_zero[0].unit is not None:
            most = reduce(xp.maximum, [part.unit for part in rstd_at_zero])
            numbers = [part.number * (part.unit / weighting.positive(xp, most)) for part in rstd_at_zero]
        number = sum(numbers)
        count = None if rstd_at_zero[0].total is None else sum(part.total for part in rstd_at_zero)
        joint = Part(bottom, top, rstd_at_zero[0].stats, number, most, count)
        unit = joint.scale(job).unit
        part_stats = []
        for part, own in zip(rstd_at_zero, numbers, strict=True):
            ratio = unit / part.scale(job).unit
            mean, rest, var = part.stats
            if job.centred:
                mean, rest = mean * ratio, rest * ratio
            part_stats.append(PartStats(Stats(mean, rest, var * ratio * ratio), 1.0 if job.sums else own))
        merged = merging.merge_parts(xp, part_stats, 1.0 if job.sums else math.nan)
        return _exact(job, joint._replace(stats=merged.stats))


def _settle(job: Job, part: Part) -> Merged:
    """What is done with the merged statistics."""
    library = library_of("top", part.top)
    xp = library.xp
    with library.quiet():
        scale = part.scale(job)
        scaled = part.stats._replace(var=part.stats.var + scale.eps)
        given = None if part.unit is None else Weights(None, part.number, part.unit)
        number = part.total
        if number is None:
            number = xp.full(part.top.shape, part.number, dtype=xp.int64, device=library.device(part.top))
        rstd = scale.undo_rstd(xp, kernels.inverse_root(xp, scaled.var, rstd_at_zero=scale.rstd_at_zero))
        return Merged(*scale.undo_stats(part.stats), number, scale.unit, scaled, rstd, given)


def _length(merged: Merged) -> Array:
    library = library_of("var", merged.var)
    with library.quiet():
        return library.xp.sqrt(merged.scaled.var) / merged.unit


def _pulled(
    wanted: Wanted,
    job: Job,
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    weights: Array | None,
    dy: Array,
    *given: Array | None,
) -> Pulled:
    """The gradients of a chunk that holds whole groups, or whose statistics are given."""
    library, shapes = library_of("x", x), _narrowed(wanted, x)
    # says, by its shape alone, which axes may be computed as one
    beta = None if shapes[1] is None else library.xp.ones(shapes[1], dtype=dy.dtype, device=library.device(x))
    call = _eager(job, x, gamma, beta, weights)._replace(beta=None)
    plan = call.plan
    if given:
        call = _with_spread(call, Stats(*given))
    with options(threads=1), library.quiet():
        of = call.stats or eager.statistics(call)
        viewed = tuple(None if shape is None else plan.view.of(shape) for shape in shapes)
        dy = views.to_view(plan, dy, dtype=plan.dtype)
        dx, *found = eager.backward(call, dy, Wanted(wanted.dtype, viewed), of)
        found = [
            None if shape is None else library.xp.reshape(each, shape)
            for each, shape in zip(found, shapes, strict=True)
        ]
        dgamma, dbeta = (*found, None, None)[:2]
        return Pulled(views.from_view(plan, dx, wanted.dtype), dgamma, dbeta)


def _gradient_sums(
    wanted: Wanted,
    job: Job,
    x: Array,
    gamma: Array | None,
    beta: None,  # noqa: ARG001
    given: Array | None,
    dy: Array,
    merged: Merged,
) -> Pulled:
    """What a chunk has to say of the gradients of its groups."""
    library, dy, xhat, own = _standardized(job, x, given, dy, merged)
    xp, number = library.xp, _number(job, x)
    groups = Sums(job.axes, 1.0 if job.sums else float(max(number, 1)), library.block)
    with library.quiet():
        g = dy if job.last else kernels.cotangent(xp, dy, gamma, kernels.power_of_two(xp, merged.rstd))
        found: PartStats | GradientSums
        if own is None:
            level = groups.mean(xp, xhat) if job.centred else None
            sums_of_g = kernels.gradient_sums(xp, g, xhat, groups=groups, centred=job.centred)[1]
            found = PartStats(sums_of_g, float(number), level)
        else:
            g, part = _present(xp, g, own), _weighted(job, own, x)
            found = weighting.gradient_sums_of_part(xp, g, xhat, groups=part, centred=job.centred)
        parameters = [
            None if shape is None else kernels.parameter_gradient(xp, dy, factor, shape, block=library.block)
            for shape, factor in zip(_narrowed(wanted, x), (xhat, None), strict=True)
        ]
    return Pulled(None, parameters[0], parameters[1], found)


def _merge_gradient_sums(job: Job, parts: Any, axis: Any, keepdims: bool) -> PartStats | GradientSums:  # noqa: ARG001
    found: list[Any] = list(_flattened(parts))
    if isinstance(found[0], GradientSums):
        library = library_of("dy", found[0].product)
        with library.quiet():
            return weighting.merge_gradient_sums(library.xp, found)
    found = [part_stats for part_stats in found if part_stats.number] or found[:1]
    first: PartStats = found[0]
    if len(found) == 1:
        return first
    library, number = library_of("dy", first.stats.var), sum(part_stats.number for part_stats in found)
    with library.quiet():
        if not job.sums:
            return merging.merge_parts(library.xp, found, number)
        return merging.merge_parts(library.xp, [each._replace(number=1.0) for each in found], 1.0)


def _input_gradient(
    dtype: Any,
    job: Job,
    x: Array,
    gamma: Array | None,
    beta: None,  # noqa: ARG001
    given: Array | None,
    dy: Array,
    merged: Merged,
    sums_of_g: PartStats | GradientSums,
) -> Array:
    """The gradient of a chunk of x."""
    library, dy, xhat, own = _standardized(job, x, given, dy, merged)
    xp, of = library.xp, Standardized(xhat, merged.rstd, merged.scaled)
    with library.quiet():
        last, gamma = (gamma, None) if job.last else (None, gamma)
        power = None if gamma is None else kernels.power_of_two(xp, merged.rstd)
        g = kernels.cotangent(xp, dy, gamma, power)
        if isinstance(sums_of_g, GradientSums):
            assert own is not None
            dx = weighting.input_gradient_of_part(xp, _present(xp, g, own), sums_of_g, of, own.each, last, power)
        else:
            dx = kernels.input_gradient_by_sums(
                xp, kernels.subtract_mean(g, sums_of_g.stats), sums_of_g.stats, of, last, power
            )
        return xp.astype(dx, dtype, copy=False)


def _standardized(
    job: Job, x: Array, given: Array | None, dy: Array, merged: Merged
) -> tuple[Any, Array, Array, Weights | None]:
    """The library of a chunk, dy, xhat and the weights; both 0 where x weighs nothing and xhat is not finite."""
    library = library_of("x", x)
    xp, dtype = library.xp, compute_dtype(library, "x", x)
    xhat = _with_merged(job, xp.astype(x, dtype, copy=False), None, None, None, merged)
    if given is None or merged.weights is None:
        return library, dy, xhat, None
    with library.quiet():
        own = calls.ready(library, merged.weights._replace(each=given), dtype)
        if bool(xp.all(xp.isfinite(xhat))):
            return library, dy, xhat, own
        bare = Standardized(weighting.without_padding(xp, xhat, own), merged.rstd, merged.scaled)
        of = weighting.with_padding(xp, xhat, bare, own)
        return library, xp.where(of.padding != 0, xp.zeros_like(dy), dy), of.xhat, own


def _weighted(job: Job, own: Weights, x: Array) -> WeightedSums:
    """The part of each group that a chunk holds."""
    library = library_of("x", x)
    groups = Sums(job.axes, 1.0, library.block)
    return WeightedSums(groups, own._replace(sums=weighting.summed(library.xp, own.each, x.shape, groups=groups)))


def _present(xp: Any, x: Array, given: Weights) -> Array:
    """x with 0 in a group without weight."""
    some = given.sums > 0
    return x if bool(xp.all(some)) else xp.where(some, x, xp.zeros_like(x))


def _narrowed(wanted: Wanted, x: Array) -> list[tuple[int, ...] | None]:
    """The shapes of gamma and beta beside a chunk."""
    shapes = [
        None if shape is None else tuple(1 if whole == 1 else n for whole, n in zip(shape, x.shape, strict=True))
        for shape in wanted.parameters
    ]
    return [*shapes, None, None][:2]


def _flattened(parts: Any) -> Iterator[Any]:
    if isinstance(parts, list):
        for each in parts:
            yield from _flattened(each)
    else:
        yield parts


def _exact(job: Job, part: Part) -> Part:
    """Where all values are one and the same, that is their mean to the last bit."""
    if not job.centred:
        return part
    xp, (mean, rest, var) = library_of("top", part.top).xp, part.stats
    constant, value = part.scale(job).constant
    nothing = xp.zeros_like(var)
    return part._replace(
        stats=Stats(
            xp.where(constant, value, mean), xp.where(constant, nothing, rest), xp.where(constant, nothing, var)
        )
    )


def _scaled(xp: Any, x: Array, unit: Array) -> Array:
    """x * unit, in the dtype of the computation where that is not x."""
    return x * unit if bool(xp.any(unit != 1)) else x


def _applied(job: Job, x: Array, gamma: Array | None, beta: Array | None, stats: Stats) -> Array:
    with options(threads=1):
        return eager.forward(_with_spread(_eager(job, x, gamma, beta), stats)).y


def _with_spread(call: Call, stats: Stats) -> Call:
    """The call by statistics that are known."""
    shape, xp = call.plan.stats.shape, call.plan.library.xp
    return call._replace(stats=Stats(*(None if each is None else xp.reshape(each, shape) for each in stats)))


def _eager(job: Job, x: Array, gamma: Array | None, beta: Array | None, given: Array | None = None) -> Call:
    """The call on a chunk."""
    divisor = 1 if job.sums else None
    norm = Norm(layouts.chunk, ("axes",), job.centred, divisor)
    return calls.prepare(norm, (job.axes,), x, gamma, beta, eps=job.eps, weights=given)


def _beside_chunk(job: Job, x: Array, stats: Stats) -> Stats:
    """Statistics of the view in which a chunk was computed, beside the chunk itself."""
    xp, shape = library_of("x", x).xp, _kept(job, x)
    return Stats(*(None if each is None else xp.reshape(each, shape) for each in stats))


def _number(job: Job, x: Array) -> int:
    """How many values of each group are in a chunk."""
    return math.prod([x.shape[axis] for axis in job.axes])


def _kept(job: Job, x: Array) -> tuple[int, ...]:
    return tuple(1 if axis in job.axes else n for axis, n in enumerate(x.shape))
