"""What the types, shapes and options of a call determine, found once."""

import math
import operator
from collections.abc import Hashable
from typing import Any, NamedTuple

from anynorm import kernels
from anynorm.arrays.checks import (
    check_device,
    check_dtype_of_out,
    check_real,
    check_weights_dtype,
    compute_dtype,
    dtype_of_call,
    is_floating,
    same_shape,
)
from anynorm.arrays.dask import full_chunks
from anynorm.arrays.library import Library
from anynorm.arrays.recognize import known_library, leading_library, library_of
from anynorm.calls import layouts
from anynorm.calls.layouts import Layout, Norm, View
from anynorm.kernels import Array, Limits, Sums
from anynorm.settings import TRACED, Options, current


class Plan(NamedTuple):
    """All of a call but its arrays: what their types, shapes and dtypes and the options determine."""

    library: Library
    layout: Layout
    view: View
    """The shape in which it is computed."""
    groups: Sums
    eps: float
    addend: Array | float
    """eps as it is added to a variance: as an array, where the library adds one faster."""
    centred: bool
    divides: bool
    inverse: bool
    """As the `Norm` says."""
    dtype: Any
    """The dtype that it is computed in, which all arrays but x have."""
    result: Any
    """The dtype of the result, or of the moments where these are all that is asked for."""
    of_x: Any
    """The dtype of a gradient of x, which is x's own; None where x is of integers, which have none."""
    limits: Limits
    tiny: bool
    """Whether eps is so small that squares that underflow would be missed."""
    nbytes: float
    """The size of x in that dtype; NaN where it is not known."""
    gamma: "Fit | None"
    beta: "Fit | None"
    stats: "Fit"
    """Of the statistics."""
    given: bool
    """Whether they are given."""
    weights: "Fit | None"
    short: tuple[bool, bool]
    """Whether gamma and beta are the same for all replicas: one number for each channel, and no more axes than that
    takes; or, where short ones run along the axes of a group, one number for each group."""
    interleaved: bool
    """Whether groups lie in memory in short runs among those of others, and blocks add up rows of all of them first."""
    adds_products: bool
    """Whether blocks add products as they make them, so that these take no memory: of groups that are rows in memory.
    """
    gamma_last: bool
    """Whether gamma is one number for each group."""
    settings: Options
    """Those in force at the call, and so at its gradient."""
    block_numbers: int
    """How many numbers of the computation `settings.block_bytes` are."""

    @property
    def symbolic(self) -> bool:
        """Whether sizes of x may be others when what is computed runs again: they are taken from the arrays then."""
        return self.groups.block == math.inf

    def times(self, weights: Array) -> int:
        """How many numbers of x a weight beside the view stands for."""
        if self.symbolic:
            return 1
        return math.prod([self.view.shape[axis] for axis in self.view.axes if weights.shape[axis] == 1])

    def to_view(self, x: Array, dtype: Any = None) -> Array:
        """An array of the caller's shape in the view, and in this dtype."""
        xp, order, shape = self.library.xp, self.view.order, self.layout.shape
        if dtype is not None and x.dtype != dtype:
            x = self.library.astype(x, dtype)
        if self.library.chunked:
            x = full_chunks(x)
        if self.symbolic:
            return self.beside(x)
        if order:
            x = xp.permute_dims(xp.reshape(x, self.layout.view(shape)), order)
        elif self.view.shape == shape:  # not that of x, where sizes that are not known are none
            return x
        return xp.reshape(x, self.view.shape)

    def from_view(self, x: Array, dtype: Any = None) -> Array:
        """An array of the view in the caller's shape, and in this dtype."""
        xp, order, shape = self.library.xp, self.view.order, self.layout.shape
        if self.symbolic and self.layout.channel is not None:
            x = self.library.reshape(x, self.layout.whole(tuple(x.shape)))
        elif order:
            whole = self.layout.view(shape)
            x = xp.reshape(x, tuple(whole[axis] for axis in order))
            x = xp.permute_dims(x, tuple(order.index(axis) for axis in range(len(order))))
        if not self.symbolic and (order or self.view.shape != shape):
            x = xp.reshape(x, shape)
        return x if dtype is None or x.dtype == dtype else self.library.astype(x, dtype)

    def beside(self, x: Array) -> Array:
        """An array with as many axes as the caller's x has, in the view, by its own sizes."""
        channel = self.layout.channel
        if channel is None:
            return x
        own = list(x.shape)
        own[channel] = self.library.sizes(x)[channel]
        return self.library.reshape(x, self.layout.view(tuple(own)))


class Fit(NamedTuple):
    """How an argument goes beside x in the view."""

    shape: tuple[int, ...]
    axes: tuple[Any, ...] | None
    """The index that gives the argument this shape, where new axes are all it needs: it is faster than a reshape."""


MOST_PLANS = 1024
_plans: dict[Hashable, Plan] = {}


def plan_of(
    norm: Norm, options: tuple[Any, ...], arrays: tuple[Array | None, ...], *, eps: float, out: Any, dtype: Any = None
) -> Plan:
    """The plan of a call of x, gamma, beta, a mean, a variance and weights: kept for the next call like it.

    `dtype` is that of the moments, where it was asked for.
    """
    library = library_of(norm.names[0], arrays[0])
    settings, key, order, plan = TRACED, None, None, None
    if not library.traced():
        settings = current()
        try:
            order = _order(library, arrays[0], out)
            result = dtype if out is None else out.dtype
            key = _key(library, norm, options, arrays, eps, (order, result, settings))
            plan = _plans.get(key)
        except (
            AttributeError,
            TypeError,
            RuntimeError,
        ):  # no array, no hash; PyTorch raises the last of sparse tensors
            key = None
    if plan is None:
        every = zip((*norm.names, "beta", "moments.mean", "moments.var", "weights"), arrays, strict=True)
        named = {name: array for i, (name, array) in enumerate(every) if array is not None or i == 0}
        plan = _plan(norm, options, named, eps, order, out, dtype, settings)
        if key is not None:
            if len(_plans) >= MOST_PLANS:
                _plans.clear()
            _plans[key] = plan
    return plan


def _key(
    library: Library, norm: Norm, options: tuple[Any, ...], arrays: tuple[Any, ...], eps: Any, others: Any
) -> Hashable:
    """All that determines a plan."""
    key = [norm, eps, type(eps), others]
    for value in options:  # 1 is True, to a dictionary
        if type(value) is tuple:
            key += (tuple(map(_fixed, value)), tuple(map(type, value)))
        else:
            key += (_fixed(value), type(value))
    for array in arrays:
        if array is None:
            key.append(None)
            continue
        if library.one_device:
            key += (type(array), array.dtype, array.shape)
        else:
            key += (type(array), array.dtype, library.sizes(array), library.device_key(array))
    return tuple(key)


def _fixed(value: Any) -> Any:
    """A number for what may be another one later: an array without axes, say."""
    return value if value is None or type(value) is int else operator.index(value)


def _plan(
    norm: Norm,
    options: tuple[Any, ...],
    arrays: dict[str, Array],
    eps: float,
    order: tuple[int, ...] | None,
    out: Any,
    result: Any,
    settings: Options,
) -> Plan:
    (name, x), *others = arrays.items()
    library = leading_library(**arrays)
    if out is not None:
        check_dtype_of_out(library, name, x, out)
        result = out.dtype
    dtype = dtype_of_call(library, name, x, result, integers=norm.moments or (norm.centred and out is not None))
    shape = library.sizes(x)
    if not shape:
        raise ValueError(f"{name} must have at least one axis, got a 0-d array")
    layout = norm.layout(shape, *options)
    given = "moments.mean" in arrays
    symbolic = not library.chunked and library.sizes_vary(shape)
    c = layout.channel
    if c is not None and _unknown(shape if library.chunked else shape[c : c + 1]):
        how = f": call {name}.compute_chunk_sizes() first" if library.chunked else ""
        raise ValueError(f"{name} must have known sizes to be divided into groups, got shape {tuple(x.shape)}{how}")
    eps = float(check_real("eps", eps, least=0))
    shapes = {other: _shape(library, layout, other, array) for other, array in others}
    view = _view(layout, list(shapes.values()), None if symbolic else order)
    fits = {other: _fit(library, array, view.of(shapes[other]), symbolic) for other, array in others}
    gamma = fits.get("gamma", fits.get("g"))
    for other, array in others:
        check_device(library, name, x, other, array)
    stats = tuple(1 if axis in view.axes else n for axis, n in enumerate(view.shape))
    size = math.prod(view.shape)
    divisor = float(max(layout.group_size if norm.divisor is None else norm.divisor, 1))
    if symbolic and norm.divisor is None and library.sizes_vary(tuple([view.shape[axis] for axis in view.axes])):
        divisor = math.nan
    with library.quiet():  # an eps may be too large for the dtype
        number, addend = (library.number(n, dtype, x) for n in (divisor, eps))
    groups = Sums(view.axes, divisor, library.block if number is None else library.eager_block, number=number)
    if symbolic:
        groups = groups._replace(block=math.inf, number=None)
    elif library.blas_sums:
        run = max(min(view.shape[-1], kernels.RUN), kernels.LEADING)
        groups = groups._replace(ones=library.xp.ones(run, dtype=dtype, device=library.device(x)))
    limits, bits = kernels.limits(library.xp, dtype), library.xp.finfo(dtype).bits

    def short(name: str) -> bool:
        own = () if name not in arrays else library.sizes(arrays[name])
        if layout.parameter_axes != layout.axes:
            return own == layout.parameter_shape
        return len(own) == len(shape) and all([own[axis] == 1 for axis in layout.axes])  # noqa: C419 - as Dynamo

    return Plan(
        library=library,
        layout=layout,
        view=view,
        groups=groups,
        eps=eps,
        addend=eps if addend is None else addend,
        centred=norm.centred,
        divides=norm.divides,
        inverse=norm.inverse,
        dtype=dtype,
        result=result if result is not None else dtype if norm.moments else x.dtype,
        of_x=x.dtype if is_floating(library, x.dtype) else None,
        limits=limits,
        tiny=eps < limits.eps,
        nbytes=size * bits / 8,
        gamma=gamma,
        beta=fits.get("beta"),
        stats=fits.get("moments.mean", Fit(stats, None)),
        given=given,
        weights=fits.get("weights"),
        short=(short("gamma"), short("beta")),
        interleaved=view.interleaved,
        adds_products=library.blas_sums and view.axes[-1:] == (len(view.shape) - 1,) and not view.interleaved,
        gamma_last=gamma is not None and all([gamma.shape[axis] == 1 for axis in view.axes]),  # noqa: C419 - as Dynamo
        settings=settings,
        block_numbers=settings.block_bytes * 8 // bits,
    )


def _order(library: Library, x: Array, out: Any) -> tuple[int, ...] | None:
    """The axes of x, and of `out`, as they follow each other in memory, () for their own order; None if they do not."""
    order = library.memory_order(x)
    if order is None or out is None or (known_library(out) is library and library.memory_order(out) == order):
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
            return layouts.merge_axes(shape, layout.axes, others, order)
    return View(tuple((axis,) for axis in range(len(shape))), shape, layout.axes)


def _fit(library: Library, array: Array, shape: tuple[int, ...], symbolic: bool) -> Fit:
    own, index = list(library.sizes(array)), []
    for n in shape:
        same = same_shape(tuple(own[:1]), (n,)) and (n != 1 or own[0] == 1)
        index.append(slice(None) if same else None)
        if index[-1] is None and n != 1:
            return Fit(shape, None)
        own = own[index[-1] is not None :]
    # Dask reshapes nothing to sizes that it does not know
    indexed = not own and (library.one_device or library.chunked or symbolic)
    return Fit(shape, tuple(index) if indexed else None)


def _unknown(sizes: tuple[Any, ...]) -> bool:
    """Whether one of them is not known: it is NaN."""
    return any(n != n for n in sizes)


def _shape(library: Library, layout: Layout, name: str, array: Array) -> tuple[int, ...]:
    """The shape of an argument beside the layout's view of x; an error if it does not fit."""
    shape = library.sizes(array)
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
