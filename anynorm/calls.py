"""One call of a norm: its arguments, all of them checked before anything is computed, and ready for the kernels."""

import math
import operator
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple

from anynorm import counts, kernels, layouts, replicas
from anynorm.arrays import (
    cast,
    check_device,
    check_out,
    check_real,
    check_weights,
    check_weights_dtype,
    compute_dtype,
    empty,
    full_chunks,
    known_library,
    library_of,
    memory_order,
    one_library,
    zeros,
)
from anynorm.blocks import Block, blocks, both, within
from anynorm.kernels import Array, Groups, Limits, Namespace, Spread
from anynorm.layouts import Layout, View, same_shape
from anynorm.library import Library
from anynorm.replicas import Join, joining
from anynorm.settings import current
from anynorm.statistics import Statistics, spread_of
from anynorm.weights import Weighted, Weights, positive


class Plan(NamedTuple):
    """All of a call but its arrays: what their types, shapes and dtypes and the options determine."""

    library: Library
    layout: Layout
    view: View
    """The shape in which it is computed."""
    groups: Groups
    eps: float
    addend: Array | float
    """eps as it is added to a variance: as an array, where the library adds one faster."""
    centred: bool
    dtype: Any
    """The dtype that it is computed in, which all arrays but x have; the result has that of x."""
    limits: Limits
    tiny: bool
    """Whether eps is so small that squares that underflow would be missed."""
    nbytes: float
    """The size of x in that dtype; NaN where Dask does not know it."""
    affine: int
    """How many numbers rstd * gamma + beta has."""
    folds: bool
    """Whether gamma and beta vary so little that these are few beside x."""
    gamma: "Fit | None"
    beta: "Fit | None"
    spread: "Fit"
    """Of the statistics."""
    given: bool
    """Whether they are given."""
    weights: "Fit | None"
    short: tuple[bool, bool]
    """Whether gamma and beta have one number for each channel, and no more axes than that takes."""

    @property
    def room(self) -> int:
        """How many numbers of the computation `block_bytes` are."""
        bits: int = self.library.xp.finfo(self.dtype).bits
        return current().block_bytes * 8 // bits

    def enter(self, x: Array) -> Array:
        """An array of the caller's shape in the view."""
        xp, order, shape = self.library.xp, self.view.order, self.layout.shape
        if self.library.chunked:
            x = full_chunks(x)
        if order:
            x = xp.permute_dims(xp.reshape(x, self.layout.view(shape)), order)
        elif self.view.shape == shape:  # not that of x, where sizes that are not known are none
            return x
        return xp.reshape(x, self.view.shape)

    def leave(self, x: Array) -> Array:
        """An array of the view in the caller's shape."""
        xp, order, shape = self.library.xp, self.view.order, self.layout.shape
        if order:
            whole = self.layout.view(shape)
            x = xp.reshape(x, tuple(whole[axis] for axis in order))
            x = xp.permute_dims(x, tuple(order.index(axis) for axis in range(len(order))))
        elif self.view.shape == shape:
            return x
        return xp.reshape(x, shape)


class Fit(NamedTuple):
    """How an argument goes beside x in the view."""

    shape: tuple[int, ...]
    axes: tuple[Any, ...] | None
    """The index that gives the argument this shape, where new axes are all it needs: it is faster than a reshape."""


class Call(NamedTuple):
    """What a schedule runs: the arrays in the view of the plan; a `spread` where moments were given."""

    plan: Plan
    x: Array
    gamma: Array | None
    beta: Array | None
    spread: Spread | None
    out: Array | None
    """Where the caller wants the result, as it came."""
    weights: Weights | None = None
    all_reduce: Callable[[Array], Any] | None = None
    chunks: Any = None
    """Those of Dask that x came in, and its result goes out in."""

    @property
    def join(self) -> Join | None:
        """Sums arrays over all replicas, where there are any."""
        return None if self.all_reduce is None else joining(self.plan.library.xp, self.all_reduce)

    @property
    def weighted(self) -> Weighted | None:
        """The elements that share a mean, where they have weights or are spread over replicas."""
        if self.weights is None:
            return None
        given = weighed(self).weights
        assert given is not None
        weights = ready(self.plan.library, given, self.plan.dtype)
        return Weighted(self.plan.groups.by(1.0), weights, self.join)


class Wanted(NamedTuple):
    """Which gradients of a call there are to be."""

    dtype: Any
    """That of x and of its gradient, or None if that is not wanted."""
    parameters: tuple[tuple[int, ...] | None, ...]
    """The shapes, beside the view, of gamma and beta, or None."""

    def within(self, block: Block) -> list[tuple[int, ...] | None]:
        """The shapes beside a block."""
        return [
            None
            if shape is None
            else tuple(1 if n == 1 else each.stop - each.start for n, each in zip(shape, block, strict=True))
            for shape in self.parameters
        ]


def over(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    axis: Any,
    eps: float,
    weights: Array | None = None,
    moments: Any = None,
    out: Array | None = None,
) -> Call:
    """`normalize`, `layer_norm`, `moments`."""
    return _prepare(layouts.over, (axis,), x, gamma, beta, eps, weights, moments, out)


def rms(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    axis: Any,
    eps: float,
    weights: Array | None = None,
    out: Array | None = None,
) -> Call:
    """`rms_norm`."""
    return _prepare(layouts.over, (axis,), x, gamma, beta, eps, weights, None, out, False)


def chunk(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    axes: tuple[int, ...],
    eps: float,
    weights: Array | None,
    centred: bool,
    divisor: int | None,
) -> Call:
    """A part of an array that is run by itself."""
    return _prepare(layouts.chunk, (axes,), x, gamma, beta, eps, weights, None, None, centred, divisor)


def batch(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    channel_axis: Any,
    eps: float,
    weights: Array | None = None,
    moments: Any = None,
    out: Array | None = None,
    all_reduce: Callable[[Array], Any] | None = None,
) -> Call:
    """`batch_norm`."""
    if all_reduce is not None and not callable(all_reduce):
        raise TypeError(f"all_reduce must be a function of an array, got {type(all_reduce).__name__}")
    call = _prepare(layouts.batch, (channel_axis,), x, gamma, beta, eps, weights, moments, out)
    return call if all_reduce is None else _of_replicas(call, weights, all_reduce)


def instance(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    channel_axis: Any,
    eps: float,
    weights: Array | None = None,
    out: Array | None = None,
) -> Call:
    """`instance_norm`."""
    return _prepare(layouts.instance, (channel_axis,), x, gamma, beta, eps, weights, None, out)


def group(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    groups: Any,
    channel_axis: Any,
    eps: float,
    weights: Array | None = None,
    out: Array | None = None,
) -> Call:
    """`group_norm`."""
    return _prepare(layouts.group, (groups, channel_axis), x, gamma, beta, eps, weights, None, out)


def weight(v: Array, g: Array, *, axis: Any, out: Array | None = None) -> Call:
    """Weight normalization is RMS normalization with a sum in place of the mean, no eps, and g for gamma."""
    library_of("g", g)
    return direction(v, g, axis=axis, out=out)


def direction(v: Array, g: Array | None = None, *, axis: Any, out: Array | None = None, name: str = "v") -> Call:
    """`v`, in an argument of this name, brought to length 1."""
    return _prepare(layouts.weight, (axis,), v, g, None, 0.0, None, None, out, False, 1, (name, "g"))


MOST_PLANS = 1024
_plans: dict[Hashable, Plan] = {}


def _prepare(
    layout_of: Callable[..., Layout],
    options: tuple[Any, ...],
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    weights: Array | None,
    moments: Any,
    out: Array | None,
    centred: bool = True,
    divisor: int | None = None,
    names: tuple[str, str] = ("x", "gamma"),
) -> Call:
    mean = var = None
    if moments is not None:
        if not isinstance(moments, Statistics):
            raise TypeError(f"moments must be Moments or RunningStats, got {type(moments).__name__}")
        mean, var = moments.mean, moments.var
    key = _key(layout_of, options, eps, (centred, divisor), out, (x, gamma, beta, mean, var, weights))
    try:
        plan = None if key is None else _plans.get(key)
    except TypeError:  # something in it cannot be hashed
        key = plan = None
    if plan is None:
        others = {names[1]: gamma, "beta": beta, "moments.mean": mean, "moments.var": var, "weights": weights}
        arrays = {names[0]: x} | {name: array for name, array in others.items() if array is not None}
        plan = _plan(layout_of, options, arrays, out, eps, centred, divisor)
        if key is not None:
            if len(_plans) >= MOST_PLANS:
                _plans.clear()
            _plans[key] = plan
    if out is not None:
        check_out(plan.library, names[0], x, out, [each for each in (gamma, beta, mean, var) if each is not None])
    chunks = x.chunks if plan.library.chunked else None
    x = plan.enter(x)
    given = None if moments is None else _given(plan, moments)
    params, found = (_ready(plan, gamma, plan.gamma), _ready(plan, beta, plan.beta)), None
    if weights is not None:
        check_weights(plan.library, weights, plan.dtype)
        if not plan.given:  # to moments that are given they make no difference
            with plan.library.quiet():
                found = _placed(plan, plan.library.constant(weights))
    return Call(plan, x, *params, given, out, found, None, chunks)


def _given(plan: Plan, moments: Statistics[Any]) -> Spread:
    """The statistics that were given, and as a rest what the dtype of the computation has no room for of their mean."""
    return Spread(*(_ready(plan, each, plan.spread) for each in spread_of(moments, plan.dtype)))


def ready(library: Library, weights: Weights, dtype: Any) -> Weights:
    """Each in the dtype of the computation, divided by the unit."""
    each = cast(library, weights.each, dtype)
    return weights._replace(each=each if weights.unit is None else each / positive(library.xp, weights.unit))


def _placed(plan: Plan, weights: Array) -> Weights:
    """The weights of a call beside the view; not yet added up where a program may do that as it goes."""
    assert plan.weights is not None
    if plan.library.plain(weights):
        return Weights(plan.library.xp.reshape(weights, plan.weights.shape), None)
    return _weigh(plan, _ready(plan, weights, plan.weights))


def weighed(call: Call) -> Call:
    """The call with the sums of its weights."""
    if call.weights is None or call.weights.sums is not None:
        return call
    with call.plan.library.quiet():
        return call._replace(weights=_weigh(call.plan, call.weights.each)._replace(total=call.weights.total))


def at_once(call: Call, what: Hashable, work: Callable[..., Any], *others: Any) -> Any:
    """`work(call, *others)`, of which `what` says all that is not in the plan."""
    plan = call.plan

    def of_arrays(x: Array, gamma: Array, beta: Array, spread: Any, weights: Any, *others: Any) -> Any:
        return work(Call(plan, x, gamma, beta, spread, None, weights), *others)

    with plan.library.quiet():
        if call.all_reduce is not None:  # it is the caller's
            return work(call, *others)
        arrays = (call.x, call.gamma, call.beta, call.spread, call.weights, *others)
        return plan.library.at_once((id(plan), what), of_arrays, arrays)


def _weigh(plan: Plan, each: Array) -> Weights:
    """The weights beside the view and their sums; without a unit, if it turns out that they need none."""
    found: Weights = plan.library.at_once((id(plan), "weigh"), partial(_weighed, plan), (each,))
    return found


def _weighed(plan: Plan, each: Array) -> Weights:
    library, xp = plan.library, plan.library.xp
    times = math.prod([plan.view.shape[axis] for axis in plan.view.axes if each.shape[axis] == 1])
    sums = _of_groups(plan, each, Groups.mean, None) * times
    if math.prod(each.shape) == 0:
        return Weights(each, sums)
    # so that the square of a number that is not scaled, times its weight, has room; and a small number, times that
    if library.plain(each) and bool(xp.all((sums == 0) | ((sums >= 1) & (sums <= plan.limits.further / 8)))):
        return Weights(each, sums)
    unit = _of_groups(plan, each, _top, None)
    return Weights(each, _of_groups(plan, each, Groups.mean, unit) * times, unit)


def _of_groups(
    plan: Plan,
    weights: Array,
    take: Callable[[Groups, Namespace, Array], Array],
    unit: Array | None,
    dtype: Any = None,
) -> Array:
    """Something of the weights of each group, in this dtype or that of the computation; if they are plain, in parts."""
    xp, groups, shape = plan.library.xp, plan.groups.by(1.0), tuple(weights.shape)
    if dtype is None:
        dtype = plan.dtype
    else:
        groups = Groups(groups.axes, 1.0, plan.library.block)

    def taken(weights: Array, unit: Array | None) -> Array:
        return take(groups, xp, ready(plan.library, Weights(weights, None, unit), dtype).each)

    if not plan.library.plain(weights):
        return taken(weights, unit)
    room = plan.room // 4
    if math.prod(shape) <= room:
        return taken(weights, unit)
    grid = blocks(shape, groups.axes, max(1, room), max(1, room))
    every = empty(tuple(1 if axis in groups.axes else n for axis, n in enumerate(shape)), weights, dtype)
    for group in grid.groups:
        parts = [both(group, part) for part in grid.parts]
        found = [taken(weights[part], None if unit is None else unit[within(unit, part)]) for part in parts]
        every[within(every, group)] = take(Groups((0,), 1.0, groups.block), xp, xp.stack(found, axis=0))[0, ...]
    return every


def counted(call: Call) -> counts.Counted:
    """The sum of the weights of each group, beside the view."""
    plan, given = call.plan, call.weights
    assert given is not None
    library, xp, found = plan.library, plan.library.xp, given.total
    if found is None:
        with library.quiet():
            found = _total(plan, given.each)
    count, rest = (None if each is None else xp.broadcast_to(each, plan.spread.shape) for each in found)
    return count, rest


def _total(plan: Plan, weights: Array) -> counts.Counted:
    found: counts.Counted = plan.library.at_once((id(plan), "total"), partial(_totalled, plan), (weights,))
    return found


def _totalled(plan: Plan, weights: Array) -> counts.Counted:
    library, axes = plan.library, plan.view.axes
    times = math.prod([plan.view.shape[axis] for axis in axes if weights.shape[axis] == 1])
    if not library.float64(weights):
        return counts.total(library, weights, axes=axes, times=times)
    dtype = counts.dtype_of(library, weights, weights.dtype)
    return _of_groups(plan, weights, Groups.mean, None, dtype) * times, None


def _top(groups: Groups, xp: Namespace, weights: Array) -> Array:
    """The largest of each group; where its reciprocal would be subnormal, which XLA takes for 0, a smaller one does."""
    top = kernels.extremes(xp, weights, groups=groups)[1]
    return xp.minimum(top, xp.ones_like(top) * (1 / kernels.smallest_normal(xp, top.dtype)))


def _of_replicas(call: Call, weights: Array | None, all_reduce: Callable[[Array], Any]) -> Call:
    """The call of one of several replicas."""
    plan = call.plan
    library, xp = plan.library, plan.library.xp
    sums = library.summing(all_reduce)
    found = call.weights
    if not plan.given:
        with plan.library.quiet():
            x = cast(library, library.constant(call.x), plan.dtype)
            if weights is None:
                ready = zeros((1,) * len(plan.view.shape), x, plan.dtype) + 1.0
            else:
                ready = _ready(plan, library.constant(weights), plan.weights)
            count, rest = _total(plan, ready if call.weights is None else call.weights.each)
            parts = counts.parts(xp, (count, rest), plan.dtype)
            parts = [xp.broadcast_to(part, plan.spread.shape) for part in parts]
            join = joining(xp, sums)
            found, parts = replicas.weigh(xp, x, ready, parts, groups=plan.groups, eps=plan.eps, join=join)
            found = found._replace(total=counts.joined(library, parts, count.dtype))
    # not by `_replace`: a compiler must build it again where the sum over replicas breaks its graph
    return Call(plan, call.x, call.gamma, call.beta, call.spread, call.out, found, sums)


def _key(
    layout_of: Callable[..., Layout],
    options: tuple[Any, ...],
    eps: Any,
    norm: tuple[bool, int | None],
    out: Any,
    arrays: tuple[Any, ...],
) -> Hashable:
    """All that determines a plan; None where it is not to be kept."""
    library = known_library(arrays[0])
    if library is None or library.traced():
        return None
    try:
        key = [layout_of, eps, type(eps), norm, _order(library, arrays[0], out)]
        for value in options:  # 1 is True, to a dictionary
            if type(value) is tuple:
                key += (tuple(map(_fixed, value)), tuple(map(type, value)))
            else:
                key += (_fixed(value), type(value))
        for array in arrays:
            if array is None:
                key.append(None)
                continue
            key += (type(array), array.dtype, array.shape)
            if library.kind is not None:
                key.append(library.kind(array))
    except (AttributeError, TypeError, RuntimeError):  # PyTorch raises the last of sparse tensors
        return None
    return tuple(key)


def _fixed(value: Any) -> Any:
    """A number for what may be another one later: an array without axes, say."""
    return value if value is None or type(value) is int else operator.index(value)


def _plan(
    layout_of: Callable[..., Layout],
    options: tuple[Any, ...],
    arrays: dict[str, Array],
    out: Any,
    eps: float,
    centred: bool,
    divisor: float | None,
) -> Plan:
    (name, x), *others = arrays.items()
    library = one_library(**arrays)
    dtype = compute_dtype(library, name, x)
    shape = tuple(x.shape)
    if not shape:
        raise ValueError(f"{name} must have at least one axis, got a 0-d array")
    layout = layout_of(shape, *options)
    given = "moments.mean" in arrays
    if _unknown(shape if layout.channel is not None else () if given or library.chunked else (layout.group_size,)):
        raise ValueError(
            f"{name} must have known sizes to be divided into groups, got shape {shape}: "
            f"call {name}.compute_chunk_sizes() first"
        )
    eps = float(check_real("eps", eps, least=0))
    shapes = {other: _shape(library, layout, other, array) for other, array in others}
    view = _view(layout, list(shapes.values()), _order(library, x, out))
    fits = {other: _fit(library, array, view.of(shapes[other])) for other, array in others}
    gamma = fits.get("gamma", fits.get("g"))
    for other, array in others:
        check_device(library, name, x, other, array)
    spread = tuple(1 if axis in view.axes else n for axis, n in enumerate(view.shape))
    size = math.prod(view.shape)
    divisor = float(max(layout.group_size if divisor is None else divisor, 1))
    with library.quiet():  # an eps may be too large for the dtype
        number, addend = (library.number(n, dtype, x) for n in (divisor, eps))
    groups = Groups(view.axes, divisor, library.block if number is None else library.plain_block, number=number)
    if library.products and view.axes:
        last = len(view.shape) - 1
        # weights may have one number where x has none
        run = min(max(view.shape[last], 1), kernels.RUN) if last in view.axes else kernels.LEADING
        ones = library.xp.ones(run, dtype=dtype, device=library.device(x))
        groups = groups._replace(ones=ones)
    limits = kernels.limits(library.xp, dtype)
    beside = [fit.shape for fit in (gamma, fits.get("beta")) if fit is not None]
    affine = math.prod([max(sizes) for sizes in zip(spread, *beside, strict=True)])

    def short(name: str) -> bool:
        return name in arrays and tuple(arrays[name].shape) == layout.parameter_shape

    return Plan(
        library=library,
        layout=layout,
        view=view,
        groups=groups,
        eps=eps,
        addend=eps if addend is None else addend,
        centred=centred,
        dtype=dtype,
        limits=limits,
        tiny=eps < limits.eps,
        nbytes=size * library.xp.finfo(dtype).bits / 8,
        affine=affine,
        folds=affine * kernels.FOLD <= size,
        gamma=gamma,
        beta=fits.get("beta"),
        spread=fits.get("moments.mean", Fit(spread, None)),
        given=given,
        weights=fits.get("weights"),
        short=(short("gamma"), short("beta")),
    )


def _order(library: Library, x: Array, out: Any) -> tuple[int, ...] | None:
    """The axes of x, and of `out`, as they follow each other in memory, () for their own order; None if they do not."""
    if library.traced():
        return None
    order = memory_order(library, x)
    if order is None or out is None or (known_library(out) is library and memory_order(library, out) == order):
        return order
    return None


def _view(layout: Layout, others: list[tuple[int, ...]], order: tuple[int, ...] | None) -> View:
    """The layout's own view; or, in the order of memory and beside shapes that are treated alike, one with fewer axes.

    What is smaller than x stays in the order that it has.
    """
    shape = layout.view(layout.shape)
    if order is not None:
        order = layout.order(order)
        if all(layouts.in_order(each, order) for each in (layout.keepdims_shape, *others)):
            return layouts.joined(shape, layout.axes, others, order)
    return View(tuple((axis,) for axis in range(len(shape))), shape, layout.axes)


def _ready(plan: Plan, array: Array | None, fit: Fit | None) -> Array | None:
    """An argument beside x, in the view and the dtype of the computation."""
    if array is None or fit is None:
        return None
    if array.dtype != plan.dtype:
        array = plan.library.astype(array, plan.dtype)
    if plan.library.chunked:
        array = full_chunks(array)
    return plan.library.xp.reshape(array, fit.shape) if fit.axes is None else array[fit.axes]


def _fit(library: Library, array: Array, shape: tuple[int, ...]) -> Fit:
    own, index = list(array.shape), []
    for n in shape:
        index.append(slice(None) if same_shape(tuple(own[:1]), (n,)) else None)
        if index[-1] is None and n != 1:
            return Fit(shape, None)
        own = own[index[-1] is not None :]
    # Dask reshapes nothing to sizes that it does not know
    indexed = not own and (library.kind is None or library.chunked)
    return Fit(shape, tuple(index) if indexed else None)


def _unknown(sizes: tuple[Any, ...]) -> bool:
    """Whether Dask does not know one of them: it is NaN."""
    return any(n != n for n in sizes)


def _shape(library: Library, layout: Layout, name: str, array: Array) -> tuple[int, ...]:
    """The shape of an argument beside the layout's view of x; an error if it does not fit."""
    shape = tuple(array.shape)
    if name == "weights":
        check_weights_dtype(library, array)
        full = layout.broadcast(shape)
        if full is None:
            raise ValueError(f"weights must broadcast to the shape of x, {layout.shape}, got {shape}")
        return full
    compute_dtype(library, name, array)
    if name.startswith("moments."):
        if not same_shape(shape, layout.kept_shape):
            raise ValueError(f"{name} must have shape {layout.kept_shape}, got {shape}")
        return layout.keepdims_shape
    full = layout.full(shape)
    if full is None:
        rule = f"{name} must have shape {layout.parameter_shape} or, with as many axes, broadcast to {layout.shape}"
        raise ValueError(f"{rule}, got {shape}")
    return full
