"""One call of a norm: its arguments, all of them checked before anything is computed, and ready for the kernels."""

from collections.abc import Callable
from typing import Any, NamedTuple

from anynorm import layouts
from anynorm.arrays import Library, check_device, check_real, compute_dtype, library_of, one_library
from anynorm.kernels import Array, Groups
from anynorm.layouts import Layout, same_shape
from anynorm.statistics import Statistics


class Call(NamedTuple):
    """What a schedule runs: x in the view of the layout, and what goes with it; `mean` and `var` where given."""

    library: Library
    layout: Layout
    groups: Groups
    x: Array
    gamma: Array | None
    beta: Array | None
    eps: float
    centred: bool
    mean: Array | None
    var: Array | None
    dtype: Any
    """The dtype that it is computed in, which all arrays but x have; the result has that of x."""


def over(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    *,
    axis: Any,
    eps: float,
    moments: Any = None,
    centred: bool = True,
) -> Call:
    """`normalize`, `layer_norm`, `moments`; and, not `centred`, `rms_norm`."""
    return _prepare(lambda shape: layouts.over(shape, axis=axis), x, gamma, beta, eps, moments, centred=centred)


def rms(x: Array, gamma: Array | None, beta: Array | None, *, axis: Any, eps: float) -> Call:
    """`rms_norm`."""
    return over(x, gamma, beta, axis=axis, eps=eps, centred=False)


def batch(x: Array, gamma: Array | None, beta: Array | None, *, channel_axis: Any, eps: float, moments: Any) -> Call:
    """`batch_norm`."""
    return _prepare(lambda shape: layouts.batch(shape, channel_axis=channel_axis), x, gamma, beta, eps, moments)


def instance(x: Array, gamma: Array | None, beta: Array | None, *, channel_axis: Any, eps: float) -> Call:
    """`instance_norm`."""
    return _prepare(lambda shape: layouts.instance(shape, channel_axis=channel_axis), x, gamma, beta, eps)


def group(x: Array, gamma: Array | None, beta: Array | None, *, groups: Any, channel_axis: Any, eps: float) -> Call:
    """`group_norm`."""
    return _prepare(lambda shape: layouts.group(shape, groups=groups, channel_axis=channel_axis), x, gamma, beta, eps)


def weight(v: Array, g: Array, *, axis: Any) -> Call:
    """Weight normalization is RMS normalization with a sum in place of the mean, no eps, and g for gamma."""
    library_of("g", g)
    return direction(v, g, axis=axis)


def direction(v: Array, g: Array | None = None, *, axis: Any) -> Call:
    """`v` brought to length 1."""
    return _prepare(
        lambda shape: layouts.weight(shape, axis=axis), v, g, None, 0.0, centred=False, divisor=1, names=("v", "g")
    )


def _prepare(
    layout_of: Callable[[tuple[int, ...]], Layout],
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    moments: Any = None,
    *,
    centred: bool = True,
    divisor: int | None = None,
    names: tuple[str, str] = ("x", "gamma"),
) -> Call:
    if moments is not None and not isinstance(moments, Statistics):
        raise TypeError(f"moments must be Moments or RunningStats, got {type(moments).__name__}")
    parameters = {names[1]: gamma, "beta": beta}
    given = {} if moments is None else {"moments.mean": moments.mean, "moments.var": moments.var}
    others = {name: array for name, array in (parameters | given).items() if array is not None}
    library = one_library(**{names[0]: x}, **others)
    dtype = compute_dtype(library, names[0], x)
    shape = tuple(x.shape)
    if not shape:
        raise ValueError(f"{names[0]} must have at least one axis, got a 0-d array")
    layout = layout_of(shape)
    if _unknown(shape if layout.channel is not None else () if given else (layout.group_size,)):
        raise ValueError(f"{names[0]} must have known sizes where it is divided and counted, got shape {shape}")
    eps = check_real("eps", eps, least=0)
    views = {name: _view(library, layout, name, array, given) for name, array in others.items()}
    for name, array in others.items():
        check_device(library, names[0], x, name, array)

    def ready(name: str) -> Array | None:
        if name not in others:
            return None
        return library.xp.reshape(library.xp.astype(others[name], dtype, copy=False), views[name])

    with library.quiet():
        return Call(
            library=library,
            layout=layout,
            groups=Groups(layout.axes, layout.group_size if divisor is None else divisor, library.block),
            x=x if layout.channel is None else library.xp.reshape(x, layout.view(shape)),
            gamma=ready(names[1]),
            beta=ready("beta"),
            eps=eps,
            centred=centred,
            mean=ready("moments.mean"),
            var=ready("moments.var"),
            dtype=dtype,
        )


def _unknown(sizes: tuple[Any, ...]) -> bool:
    """Whether Dask does not know one of them: it is NaN."""
    return any(n != n for n in sizes)


def _view(library: Library, layout: Layout, name: str, array: Array, given: dict[str, Array]) -> tuple[int, ...]:
    """The shape of an argument beside the view of x; an error if it does not fit."""
    compute_dtype(library, name, array)
    shape = tuple(array.shape)
    if name in given:
        if not same_shape(shape, layout.kept_shape):
            raise ValueError(f"{name} must have shape {layout.kept_shape}, got {shape}")
        return layout.keepdims_shape
    full = layout.full(shape)
    if full is None:
        raise ValueError(f"{name} must have shape {layout.parameter_shape} or broadcast to {layout.shape}, got {shape}")
    return full
