"""One call of a norm: its arguments, all of them checked before anything is computed, and ready for the kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anynorm import layouts
from anynorm.arrays import Library, check_device, check_real, compute_dtype, library_of, one_library
from anynorm.kernels import Array, Groups
from anynorm.layouts import Layout, same_shape
from anynorm.statistics import Statistics


@dataclass(frozen=True, eq=False, slots=True)
class Call:
    """What a schedule runs: arrays in the compute dtype and the view of the layout; `mean` and `var` where given."""

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
    """The dtype of the result."""


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
    """V brought to length 1."""
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
    given = () if moments is None else (("moments.mean", moments.mean), ("moments.var", moments.var))
    parameters = ((names[1], gamma), ("beta", beta))
    arrays = {names[0]: x} | {name: array for name, array in (*parameters, *given) if array is not None}
    library = one_library(**arrays)
    dtype = compute_dtype(library, names[0], x)
    shape = tuple(x.shape)
    if not shape:
        raise ValueError(f"{names[0]} must have at least one axis, got a 0-d array")
    layout = layout_of(shape)
    eps = check_real("eps", eps, least=0)
    full = {name: _fit(library, layout, x, names[0], name, array) for name, array in parameters if array is not None}
    for name, array in given:
        if not same_shape(tuple(array.shape), layout.kept_shape):
            raise ValueError(f"{name} must have shape {layout.kept_shape}, got {tuple(array.shape)}")
        check_device(library, names[0], x, name, array)
        full[name] = layout.keepdims_shape
    count = layout.group_size
    if _unknown(shape if layout.channel is not None else () if given else (count,)):
        raise ValueError(f"{names[0]} must have known sizes where it is divided and counted, got shape {shape}")

    def ready(array: Array, shape: tuple[int, ...] | None) -> Array:
        array = library.xp.astype(array, dtype, copy=False)
        return array if shape is None or tuple(array.shape) == shape else library.xp.reshape(array, shape)

    with library.quiet():
        prepared = {name: ready(arrays[name], shape) for name, shape in full.items()}
        values = ready(x, None if layout.channel is None else layout.view(shape))
    return Call(
        library=library,
        layout=layout,
        groups=Groups(layout.axes, count if divisor is None else divisor, library.block),
        x=values,
        gamma=prepared.get(names[1]),
        beta=prepared.get("beta"),
        eps=eps,
        centred=centred,
        mean=prepared.get("moments.mean"),
        var=prepared.get("moments.var"),
        dtype=x.dtype,
    )


def _unknown(sizes: tuple[Any, ...]) -> bool:
    """Whether Dask does not know one of them: it is NaN."""
    return any(n != n for n in sizes)


def _fit(library: Library, layout: Layout, x: Array, x_name: str, name: str, parameter: Array) -> tuple[int, ...]:
    """The view of a parameter that is allowed to come in."""
    compute_dtype(library, name, parameter)
    shape = tuple(parameter.shape)
    full = layout.full(shape)
    if full is None:
        raise ValueError(f"{name} must have shape {layout.parameter_shape} or broadcast to {layout.shape}, got {shape}")
    check_device(library, x_name, x, name, parameter)
    return full
