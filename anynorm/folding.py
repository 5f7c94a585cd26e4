"""A norm whose statistics are known is an affine map: into the linear layer before it, or after it."""

import math
from typing import Any, NamedTuple, TypeVar

from anynorm.arrays.checks import check_axes, check_device, check_int, check_real, compute_dtype
from anynorm.arrays.counts import dtype_of
from anynorm.arrays.library import Library
from anynorm.arrays.recognize import one_library
from anynorm.kernels import NO_STATS, Array, Stats, inverse_root, subtract_mean, total
from anynorm.keywords import checks_names
from anynorm.statistics import Statistics, stats_of

ArrayT = TypeVar("ArrayT")


@checks_names
def fold(
    w: ArrayT,
    b: Array | None,
    gamma: Array | None,
    beta: Array | None,
    /,
    *,
    moments: Statistics[Any],
    eps: float = 1e-5,
    axis: int = 0,
    in_axis: int | None = None,
    groups: int = 1,
) -> tuple[ArrayT, ArrayT]:
    r"""A batch norm that comes after a linear layer or a convolution, into the weight and bias of that layer.

    .. math:: w' = w s, \qquad b' = (b - \mu) s + \beta, \qquad s = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}

    Parameters
    ----------
    w : array, any shape
        The weight: ``(out, in / groups, *kernel)`` in PyTorch, with ``axis=-1`` ``(*kernel, in / groups, out)`` in
        Keras and Flax, with ``axis=1`` PyTorch's transposed convolutions, ``(in, out / groups, *kernel)``.
    b : array, shape (C,), or None
        The bias.
    gamma, beta : array, shape (C,), or None
        Of the norm.
    moments : Moments or RunningStats, shape (C,)
        The statistics by which the norm normalizes.
    eps : float
        The norm's.
    axis : int
        The axis of w along which its outputs lie: all C of them, or the C / groups of one group.
    in_axis : int, optional
        Where `axis` holds the outputs of one group, the axis that is divided into groups: 0, or 1 where `axis` is 0.
    groups : int
        Of the convolution.

    Returns
    -------
    w, b : array
        ``conv(x, w, b)`` is now what ``batch_norm(conv(x, w, b), gamma, beta, moments=moments)`` was. They have the
        dtypes of w and b, of w where b was None, and are computed in float64, where there is such, and rounded once.

    Raises
    ------
    TypeError
        If an argument is not a real floating array, or not of w's library.
    ValueError
        If a length does not fit the outputs of w; and as in `normalize`.

    Notes
    -----
    The norm must come directly after the layer, with nothing between them, and by statistics that are given: in
    training it has others for each batch.

    References
    ----------
    Jacob et al., "Quantization and Training of Neural Networks", CVPR 2018, section 3.2, eq. 14.

    Examples
    --------
    >>> import numpy as np, anynorm
    >>> x, w, b = np.array([[1.0, 2.0], [3.0, 5.0]]), np.array([[1.0, 0.0], [2.0, 3.0]]), np.array([1.0, -1.0])
    >>> batch = anynorm.moments(x @ w.T + b, axis=0)
    >>> folded, shift = anynorm.fold(w, b, None, None, moments=batch)
    >>> bool(np.allclose(x @ folded.T + shift, anynorm.batch_norm(x @ w.T + b)))
    True
    """
    layer = _layer(w, b, gamma, beta, moments=moments, axis=axis, other=("in_axis", in_axis), groups=groups)
    library, xp = layer.library, layer.library.xp
    with library.quiet():
        scale, stats = _affine(layer, gamma, moments, eps)
        shift = xp.zeros_like(stats.mean) if b is None else layer.wide(b)
        shift = subtract_mean(shift, stats) * scale
        if beta is not None:
            shift = shift + layer.wide(beta)
        like: Any = w if b is None else b
        return layer.scaled(w, scale), library.astype(shift, like.dtype)


@checks_names
def fold_next(
    w: ArrayT,
    b: Array | None,
    gamma: Array | None,
    beta: Array | None,
    /,
    *,
    moments: Statistics[Any] | None = None,
    eps: float = 1e-5,
    axis: int = 1,
    out_axis: int = 0,
    groups: int = 1,
) -> tuple[ArrayT, Array]:
    r"""The scale and shift of a norm that comes before a linear layer or a convolution, into that layer.

    A shift, which is `beta` or the mean in `moments`, does not fold into a convolution that pads with zeros, nor into a
    transposed one: what is next to the border would have been shifted, and the padding not. Inside it is right. Where
    the layer can pad its input with numbers, one for each channel, let it pad with :math:`-t / s`, which the norm takes
    to zero (:math:`s`, :math:`t` as below); a transposed convolution has no such padding, and has to keep the norm.

    .. math:: w' = w s, \qquad b' = b + \sum w t, \qquad s = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}}, \quad
        t = \beta - \mu s

    Parameters
    ----------
    w : array, two axes or more
        The weight: ``(out, in / groups, *kernel)`` in PyTorch, with ``axis=-2, out_axis=-1``
        ``(*kernel, in / groups, out)`` in Keras and Flax.
    b : array, shape (out,), or None
        The bias.
    gamma, beta : array, shape (C,), or None
        Of the norm: of layer and RMS normalization over the channels, or of batch norm with `moments`.
    moments : Moments or RunningStats, shape (C,), optional
        The statistics of a batch norm. Without them gamma and beta alone are folded: the norm stays, and has neither.
    eps : float
        The norm's, where there are moments.
    axis : int
        The axis of w along which its inputs lie: all C of them, or the C / groups of one group.
    out_axis : int
        The axis along which its outputs lie: all of them; those of one group where `axis` holds all inputs.
    groups : int
        Of the convolution.

    Returns
    -------
    w : array
        Of w's dtype; computed as in `fold`. w itself where there is nothing to scale by.
    b : array or None
        As it was where there is no shift, None included. Else of b's dtype, of w's where b was None.

    Raises
    ------
    TypeError, ValueError
        As in `fold`.

    References
    ----------
    As in `fold`; for RMS norm: Ashkboos et al., "SliceGPT", ICLR 2024, section 3.2.

    Examples
    --------
    >>> import numpy as np, anynorm
    >>> x, w = np.array([[1.0, 2.0], [3.0, 5.0]]), np.array([[1.0, 0.0], [2.0, 3.0]])
    >>> gamma, beta = np.array([2.0, 0.5]), np.array([1.0, -1.0])
    >>> folded, shift = anynorm.fold_next(w, None, gamma, beta)
    >>> bool(np.allclose(anynorm.layer_norm(x) @ folded.T + shift, anynorm.layer_norm(x, gamma, beta) @ w.T))
    True
    """
    if gamma is None and beta is None and moments is None:
        return w, b
    layer = _layer(w, b, gamma, beta, moments=moments, axis=axis, other=("out_axis", out_axis), groups=groups)
    library, xp = layer.library, layer.library.xp
    with library.quiet():
        scale, stats = _affine(layer, gamma, moments, eps)
        folded = w if scale is None else layer.scaled(w, scale)
        shift = None if beta is None else layer.wide(beta)
        if moments is not None:
            moved = subtract_mean(xp.zeros_like(scale), stats) * scale
            shift = moved if shift is None else moved + shift
        if shift is None:
            return folded, b
        axes = tuple(each for each in range(1, len(layer.shape) + 1) if each != layer.other + 1)
        sums = total(xp, layer.view(w) * layer.beside(shift), axes=axes, block=library.block)
        bias = xp.reshape(sums, (math.prod(sums.shape),))
        like: Any = w if b is None else b
        bias = bias if b is None else bias + layer.wide(b)
        return folded, library.astype(bias, like.dtype)


class _Layer(NamedTuple):
    """The weight of a layer, seen with an axis of groups before its own, and channels by their groups."""

    library: Library
    dtype: Any
    """That it is computed in."""
    shape: tuple[int, ...]
    axis: int
    """Of the channels: those of one group, in the view."""
    other: int
    split: int
    """The axis that is divided into groups."""
    groups: int

    def wide(self, x: Array) -> Array:
        """An array in the dtype that is computed in."""
        return self.library.astype(x, self.dtype)

    def view(self, w: Array) -> Array:
        """(groups, ...), and all axes of w."""
        xp, at = self.library.xp, self.split
        n = self.shape[at] // self.groups
        w = xp.reshape(self.wide(w), (*self.shape[:at], self.groups, n, *self.shape[at + 1 :]))
        return xp.permute_dims(w, (at, *(each for each in range(len(self.shape) + 1) if each != at)))

    def beside(self, values: Array) -> Array:
        """One value for each channel, beside the view."""
        sizes = [1] * len(self.shape)
        sizes[self.axis] = values.shape[0] // self.groups
        return self.library.xp.reshape(values, (self.groups, *sizes))

    def scaled(self, w: Array, scale: Array) -> Any:
        """The weight times one value for each channel, in its own shape and dtype."""
        xp, at = self.library.xp, self.split
        order = (*range(1, at + 1), 0, *range(at + 1, len(self.shape) + 1))
        product = xp.permute_dims(self.view(w) * self.beside(scale), order)
        return self.library.astype(xp.reshape(product, self.shape), w.dtype)


def _layer(
    w: Array,
    b: Array | None,
    gamma: Array | None,
    beta: Array | None,
    *,
    moments: Any,
    axis: Any,
    other: tuple[str, Any],
    groups: Any,
) -> _Layer:
    """The layer, all arguments checked: `other` is what the axis of its other channels is called, and that axis."""
    outputs = other[0] == "in_axis"
    if not isinstance(moments, Statistics) and (outputs or moments is not None):
        raise TypeError(f"moments must be Moments or RunningStats, got {type(moments).__name__}")
    given = {"gamma": gamma, "beta": beta, "moments": None if moments is None else moments.mean}
    vectors: dict[str, Array] = {name: x for name, x in given.items() if x is not None}
    others = vectors if b is None else {"b": b, **vectors}
    library = one_library(w=w, **others)
    compute_dtype(library, "w", w)
    for name, x in others.items():
        compute_dtype(library, name, x)
        check_device(library, "w", w, name, x)
    shape = tuple(w.shape)
    axis, groups = check_axes("axis", check_int("axis", axis), shape)[0], check_int("groups", groups)
    rest = (1 if axis == 0 else 0) if other[1] is None else check_axes(other[0], check_int(*other), shape)[0]
    if rest == axis:
        raise ValueError(f"{other[0]} must be another axis than axis, {axis}, got {other[1]}")
    if groups < 1:
        raise ValueError(f"groups must be at least 1, got {groups}")
    n = shape[axis]
    first, x = next(iter(vectors.items()))
    channels = math.prod(x.shape)
    kind = "outputs" if outputs else "inputs"
    if channels not in (n, n * groups):
        wanted = f"({n},)" if groups == 1 else f"({n},) or ({n * groups},)"
        raise ValueError(
            f"{first} must have shape {wanted}, one for each of the {kind} of w along axis {axis}, got {tuple(x.shape)}"
        )
    split = axis if channels == n else rest
    if split >= len(shape) or shape[split] % groups:
        raise ValueError(f"groups must divide axis {split} of w, of shape {shape}, got {groups}")
    made = channels if outputs or len(shape) < 2 else shape[rest] * (groups if split == axis else 1)
    lengths = dict.fromkeys(vectors, channels) | {"b": made}
    for name, each in others.items():
        if tuple(each.shape) != (lengths[name],):
            raise ValueError(f"{name} must have shape ({lengths[name]},), got {tuple(each.shape)}")
    return _Layer(library, dtype_of(library, w, w.dtype), shape, axis, rest, split, groups)


def _affine(layer: _Layer, gamma: Array | None, moments: Any, eps: float) -> tuple[Array, Stats]:
    """What a norm multiplies with, None if with nothing, and the statistics of its moments."""
    if moments is None:
        check_real("eps", eps, least=0)
        return None if gamma is None else layer.wide(gamma), NO_STATS
    scale, stats = rstd_of(layer.library, moments, eps, layer.dtype)
    return (scale if gamma is None else scale * layer.wide(gamma)), stats


def rstd_of(library: Library, moments: Statistics[Any], eps: float, dtype: Any) -> tuple[Array, Stats]:
    """1 / sqrt(var + eps), 1 where that is 1 / 0 as in every norm, and the statistics, in this dtype."""
    eps = check_real("eps", eps, least=0)
    stats = stats_of(moments, dtype)
    return inverse_root(library.xp, stats.var + eps, rstd_at_zero=1.0), stats
