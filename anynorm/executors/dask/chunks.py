"""How a call on an array of Dask is run: chunk by chunk, each by an executor of the chunk's own library.

Groups that lie within a chunk make one block-parallel graph. Where they are spread over chunks, their statistics are
taken of each chunk and merged, and then applied to chunks that are made a second time: those of the first would all
have to wait for the last of them.
"""

from collections.abc import Callable
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any

from anynorm.arrays import counts
from anynorm.arrays.checks import name_of, same_shape
from anynorm.arrays.dask import in_chunks
from anynorm.calls import Call, Norm, Plan, Wanted, layouts
from anynorm.calls.call import Gradients, Normalized
from anynorm.executors.dask import tasks
from anynorm.executors.dask.graph import STATISTICS, again, map_chunks, reduce_chunks
from anynorm.executors.dask.tasks import Job
from anynorm.kernels import NO_STATS, Array, Stats


def forward(call: Call) -> Normalized:
    """The result of a call."""
    if call.stats is not None or _within_chunks(call):
        normalized = _map(tasks.normalize, call, *(call.stats or ()))
        y = map_chunks(attrgetter("y"), normalized, dtype=call.plan.result)
        stats = call.stats or _stats(call, normalized)
    else:
        merged = _merged(call)
        y = _map(tasks.normalize_by, _again(call._replace(weights=None), merged), merged)
        stats = _stats(call, merged)
    return Normalized(from_view(call.plan, y, call.plan.result, call.chunks), stats)


def from_view(plan: Plan, value: Array, dtype: Any, chunks: tuple[tuple[Any, ...], ...]) -> Array:
    """An array of the view as the caller has x, in the chunks that x came in where some of them are empty."""
    value = plan.from_view(value, dtype)
    return in_chunks(value, chunks) if any(0 in sizes for sizes in chunks) else value


def statistics(call: Call) -> Stats:
    """The statistics of a call alone."""
    return _stats(call, _merged(call))


def count(call: Call) -> Array:
    """The number of values in each group, or the sum of their weights, beside the view."""
    weights, library = call.weights, call.plan.library
    dtype = library.xp.int64 if weights is None else counts.dtype_of(library, weights.each, weights.each.dtype)
    return map_chunks(attrgetter("count"), _merged(call), dtype=dtype)


def length(call: Call) -> Array:
    """The norm of each group of a call of `layouts.DIRECTION`, beside the view."""
    return map_chunks(attrgetter("length"), _merged(call), dtype=call.plan.dtype)


def backward(call: Call, dy: Array, wanted: Wanted) -> Gradients:
    """The gradients of sum(y * dy), where dy stands beside the view."""
    axes, dtype = call.plan.view.axes, call.plan.dtype
    if call.stats is not None or _within_chunks(call):
        found = _map(partial(tasks.gradients, wanted), call, dy, *(call.stats or ()))
        dx = map_chunks(itemgetter(0), found, dtype=wanted.dtype)
    else:
        merged, last = _merged(call), None
        call = _again(call, merged)
        if call.gamma_last:
            last, call = call.gamma, call._replace(gamma=None)
        if merged.name not in dy.dask.layers:  # else it waits for them as it is
            dy = again(dy, merged)
        found = _map(partial(tasks.gradient_sums, wanted), call, dy, merged)
        sums = reduce_chunks(tasks.combine_gradient_sums, found, axes, of=itemgetter(0), dtype=dtype, name=STATISTICS)
        dx = _map(tasks.input_gradient, _again(call, sums), again(dy, sums), merged, sums, last)
    parameters = (
        None if shape is None else reduce_chunks(tasks.add, found, layouts.ones(shape), of=itemgetter(i), dtype=dtype)
        for i, shape in enumerate(wanted.parameters, start=1)
    )
    return dx, *parameters


def _within_chunks(call: Call) -> bool:
    """Whether no group is spread over chunks."""
    return all(call.x.numblocks[axis] == 1 for axis in call.plan.view.axes)


def _merged(call: Call) -> Array:
    """The `tasks.ChunkStats` of all chunks of each group."""
    axes = call.plan.view.axes
    parts = _map(tasks.chunk_stats, call._replace(gamma=None, beta=None), axes=axes)
    return reduce_chunks(tasks.combine_stats, parts, axes, name=STATISTICS)


def _stats(call: Call, found: Array) -> Stats:
    """The `stats` of what is found of each chunk."""
    dtype, axes, names = call.plan.dtype, call.plan.view.axes, Stats._fields if call.plan.centred else ("var",)
    found = {name: map_chunks(attrgetter(f"stats.{name}"), found, dtype=dtype, axes=axes) for name in names}
    return NO_STATS._replace(**found)


def _again(call: Call, after: Array) -> Call:
    """The call on x and weights that are made a second time."""
    weights = call.weights
    if weights is not None:
        weights = weights._replace(each=again(weights.each, after))
    return call._replace(x=again(call.x, after), weights=weights)


def _map(task: Callable[..., Any], call: Call, *others: Array | None, axes: tuple[int, ...] = ()) -> Array:
    """The task on each chunk of x, with those of gamma, beta, weights and of the others that go with it."""
    weights = None if call.weights is None else call.weights.each
    beside = (None if each is None else _beside(call.x, each) for each in (call.gamma, call.beta, weights, *others))
    plan = call.plan
    divisor = 1 if plan.groups.divisor == 1 and not plan.centred else None
    norm = Norm(layouts.chunk, ("axes",), plan.centred, divisor, plan.divides, plan.inverse)
    job = Job(plan.view.axes, plan.eps, norm, name_of(plan.dtype))
    return map_chunks(partial(tasks.run, task, job), call.x, *beside, axes=axes)


def _beside(x: Array, array: Array) -> Array:
    """An array that broadcasts to x, in chunks that do so too."""
    chunks = tuple(
        sizes if n == 1 or len(sizes) == len(of_x) == 1 else of_x
        for n, sizes, of_x in zip(array.shape, array.chunks, x.chunks, strict=True)
    )
    if all(n == n for sizes in chunks for n in sizes):
        return array.rechunk(chunks)
    if not all(map(same_shape, array.chunks, chunks)):
        raise ValueError(
            f"arrays must be divided as x is where its sizes are not known, in chunks {x.chunks}, "
            f"got {array.chunks}: call compute_chunk_sizes() on each first"
        )
    return array
