"""The named norms. They differ in which axes share a mean and a variance; `layouts.py` says which."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar, overload

from anynorm import executors
from anynorm.arrays.checks import check_bool
from anynorm.batches import Axis, Moments, moments_of, of
from anynorm.calls import Call, prepare
from anynorm.calls.layouts import BATCH, CENTER, DENORMALIZE, GROUP, INSTANCE, LAYER, NORMALIZE, RMS, WEIGHT
from anynorm.kernels import Array
from anynorm.keywords import checks_names
from anynorm.statistics import Statistics

ArrayT = TypeVar("ArrayT")
AllReduce = Callable[[Any], Any]
GivenT = TypeVar("GivenT", bound=Statistics[Any])


@overload
def normalize(
    x: ArrayT, /, gamma: Array | None = None, beta: Array | None = None, *, axis: Axis, eps: float = 1e-5,
    weights: Array | None = None, moments: Statistics[Any] | None = None, return_moments: Literal[False] = False,
    out: ArrayT | None = None,
) -> ArrayT: ...  # fmt: skip
@overload
def normalize(
    x: ArrayT, /, gamma: Array | None = None, beta: Array | None = None, *, axis: Axis, eps: float = 1e-5,
    weights: Array | None = None, moments: None = None, return_moments: Literal[True], out: ArrayT | None = None,
) -> tuple[ArrayT, Moments[ArrayT]]: ...  # fmt: skip
@overload
def normalize(
    x: ArrayT, /, gamma: Array | None = None, beta: Array | None = None, *, axis: Axis, eps: float = 1e-5,
    weights: Array | None = None, moments: GivenT, return_moments: Literal[True], out: ArrayT | None = None,
) -> tuple[ArrayT, GivenT]: ...  # fmt: skip
@checks_names
def normalize(
    x: ArrayT,
    /,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis,
    eps: float = 1e-5,
    weights: Array | None = None,
    moments: Statistics[Any] | None = None,
    return_moments: bool = False,
    out: ArrayT | None = None,
) -> ArrayT | tuple[ArrayT, Statistics[Any]]:
    r"""Bring x to mean 0 and variance 1 over any axes, then scale and shift it.

    .. math:: y = \frac{x - E(x)}{\sqrt{Var(x) + \epsilon}} \, \gamma + \beta

    Every norm with a mean is this one; the named ones only say which axes.

    Parameters
    ----------
    x : array, any shape but ()
        Real and floating. 2-byte floats are computed in float32 and returned in their own dtype. With `out` also of
        integers or bools, which are computed in float32 if they have up to 16 bits, and else in float64.
    gamma : array, optional
        The scale, of the shape of the normalized axes in the order of x, or of x's rank and broadcasting to x.
    beta : array, optional
        The shift, of such a shape.
    axis : int, tuple of int or None
        The axes that share a mean and a variance; None is all of them.
    eps : float
        Added to the variance; it has the square of x's unit.
    weights : array, optional
        How much each number counts for the mean and the variance: a boolean mask, or finite numbers of at least 0, of
        any integer or real floating dtype, broadcasting to x; the largest is in the range of the dtype that is computed
        in. All numbers are normalized, also those that count for nothing; these may be NaN. To gradients, weights are
        constants.
    moments : Moments or RunningStats, optional
        Normalize with these, of the shape of the kept axes, in place of x's own.
    return_moments : bool
        Also return the moments that were used.
    out : array, optional
        Where to write the result: a writeable array of x's library, device and shape, or x itself. It may have any real
        floating dtype: what is wider, this or x's, is computed in.

    Returns
    -------
    y : array
        Of x's library, device, dtype and shape; `out` where it is given. A group whose values are all equal, or whose
        weights are all 0, becomes beta.
    moments : Moments
        With `return_moments`: of the kept axes, without a gradient; ``moments`` itself where it was given.

    Raises
    ------
    TypeError
        If an argument is not a real floating array, or of integers where these are not taken, or two are of different
        libraries.
    ValueError
        If a shape, a device, an axis or eps does not fit, or a weight is negative or not finite.

    Notes
    -----
    The mean is taken away in two stages, so that a large offset costs no digits, and a power of two is taken out of
    groups so large or small that their squares would overflow or vanish.

    References
    ----------
    Ioffe & Szegedy, "Batch Normalization", ICML 2015, algorithm 1; Wu & He, "Group Normalization", ECCV 2018, eq. 1.

    Examples
    --------
    >>> import numpy as np, anynorm
    >>> x = np.array([[1.0, 3.0], [10.0, 30.0]])
    >>> anynorm.normalize(x, axis=1, eps=0)
    array([[-1.,  1.],
           [-1.,  1.]])
    """
    call = prepare(NORMALIZE, (axis,), x, gamma, beta, eps=eps, weights=weights, moments=moments, out=out)
    return _run(call, moments, return_moments)


@checks_names
def denormalize(
    y: ArrayT,
    /,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis,
    moments: Statistics[Any],
    eps: float = 1e-5,
    out: ArrayT | None = None,
) -> ArrayT:
    r"""The way back: what `normalize` with these moments made y of.

    .. math:: x = \frac{y - \beta}{\gamma} \sqrt{Var + \epsilon} + E

    Every norm with a mean has this way back: a batch norm of (N, C, H, W) with ``axis=(0, 2, 3)``, an instance norm
    with ``axis=(2, 3)``, a group norm on arrays of shape (N, G, C // G, H, W) with ``axis=(2, 3, 4)``.

    Parameters
    ----------
    y : array, any shape but ()
        Real and floating; with `out` also of integers or bools, as in `normalize`. Along `axis` it may have another
        length than the data that the moments are of.
    gamma, beta : array, optional
        The scale and the shift that made y, of the shape of the axes of `axis`, or of y's rank and broadcasting to y.
    axis : int, tuple of int or None
        The axes that share a mean and a variance; None is all of them.
    moments : Moments or RunningStats
        Those that y was normalized with, of the shape of the kept axes. To gradients they are constants.
    eps : float
        That of the norm.
    out : array, optional
        Where to write the result: a writeable array of y's library, device and shape, or y itself, as in `normalize`.

    Returns
    -------
    array
        Of y's library, device, dtype and shape.

    Raises
    ------
    TypeError
        If an argument is not a real floating array, two are of different libraries, or there are no moments.
    ValueError
        If a shape, a device, an axis or eps does not fit; or a gamma is 0, where its numbers can be read: not in an
        array that is traced, or of Dask before it is computed.

    Notes
    -----
    All digits of the mean are used. A group without spread is its mean, and where the root is 0 it is taken to be 1, as
    in `normalize` with moments. Of numbers whose variance is out of the range of their dtype (in float32 below 1e-38,
    or above 1e38) the moments say no more than 0 or inf: give those to `normalize` too.

    References
    ----------
    Kim et al., "Reversible Instance Normalization for Accurate Time-Series Forecasting against Distribution Shift",
    ICLR 2022, eq. 3.

    Examples
    --------
    Forecast three steps in the normalized scale, and bring them back to that of the past:

    >>> import numpy as np, anynorm
    >>> past = np.array([[10.0, 30.0, 10.0, 30.0], [5.0, 5.0, 5.0, 5.0]])
    >>> y, moments = anynorm.normalize(past, axis=1, return_moments=True)
    >>> anynorm.denormalize(np.array([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]]), axis=1, moments=moments).round(3)
    array([[20., 30., 40.],
           [ 5.,  5.,  5.]])
    """
    return _run(prepare(DENORMALIZE, (axis,), y, gamma, beta, eps=eps, moments=moments, out=out), moments, False)  # type: ignore[return-value]


@overload
def layer_norm(
    x: ArrayT, /, gamma: Array | None = None, beta: Array | None = None, *, axis: Axis = -1, eps: float = 1e-5,
    weights: Array | None = None, moments: Statistics[Any] | None = None, return_moments: Literal[False] = False,
    out: ArrayT | None = None,
) -> ArrayT: ...  # fmt: skip
@overload
def layer_norm(
    x: ArrayT, /, gamma: Array | None = None, beta: Array | None = None, *, axis: Axis = -1, eps: float = 1e-5,
    weights: Array | None = None, moments: None = None, return_moments: Literal[True], out: ArrayT | None = None,
) -> tuple[ArrayT, Moments[ArrayT]]: ...  # fmt: skip
@overload
def layer_norm(
    x: ArrayT, /, gamma: Array | None = None, beta: Array | None = None, *, axis: Axis = -1, eps: float = 1e-5,
    weights: Array | None = None, moments: GivenT, return_moments: Literal[True], out: ArrayT | None = None,
) -> tuple[ArrayT, GivenT]: ...  # fmt: skip
@checks_names
def layer_norm(
    x: ArrayT,
    /,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis = -1,
    eps: float = 1e-5,
    weights: Array | None = None,
    moments: Statistics[Any] | None = None,
    return_moments: bool = False,
    out: ArrayT | None = None,
) -> ArrayT | tuple[ArrayT, Statistics[Any]]:
    r"""Layer normalization: each sample by the mean and variance over its own features.

    .. math:: y_{n i} = \frac{x_{n i} - \mu_n}{\sqrt{\sigma_n^2 + \epsilon}} \, \gamma_i + \beta_i

    Parameters
    ----------
    x : array, shape (\*samples, \*features)
        Real and floating.
    gamma : array, shape (\*features,), optional
        The scale; or of x's rank and broadcasting to x.
    beta : array, shape (\*features,), optional
        The shift; or of x's rank and broadcasting to x.
    axis : int, tuple of int or None
        The feature axes, by default the last; None is all axes.
    eps : float
        Added to the variance.
    weights : array, optional
        A mask, or how much each number counts for the mean and the variance, as in `normalize`.
    moments : Moments, optional
        Normalize with these, of the shape of the kept axes, in place of x's own.
    return_moments : bool
        Also return the moments, of shape (\*samples,).
    out : array, optional
        Where to write the result: a writeable array of x's library, device and shape, or x itself, as in `normalize`.

    Returns
    -------
    y : array
        Of x's library, device, dtype and shape.
    moments : Moments
        With `return_moments`; without a gradient; ``moments`` itself where it was given.

    Raises
    ------
    TypeError, ValueError
        As in `normalize`.

    References
    ----------
    Ba, Kiros & Hinton, "Layer Normalization", arXiv:1607.06450, eq. 3 and 4.

    Examples
    --------
    >>> import numpy as np, anynorm
    >>> x = np.array([[1.0, 3.0], [5.0, 5.0]])
    >>> gamma, beta = np.array([2.0, 2.0]), np.array([0.0, 1.0])
    >>> anynorm.layer_norm(x, gamma, beta, eps=0)
    array([[-2.,  3.],
           [ 0.,  1.]])
    """
    call = prepare(LAYER, (axis,), x, gamma, beta, eps=eps, weights=weights, moments=moments, out=out)
    return _run(call, moments, return_moments)


@overload
def batch_norm(
    x: ArrayT, /, gamma: Array | None = None, beta: Array | None = None, *, channel_axis: int = 1, eps: float = 1e-5,
    weights: Array | None = None, moments: Statistics[Any] | None = None, return_moments: Literal[False] = False,
    out: ArrayT | None = None,
    all_reduce: AllReduce | None = None,
) -> ArrayT: ...  # fmt: skip
@overload
def batch_norm(
    x: ArrayT, /, gamma: Array | None = None, beta: Array | None = None, *, channel_axis: int = 1, eps: float = 1e-5,
    weights: Array | None = None, moments: None = None, return_moments: Literal[True], out: ArrayT | None = None,
    all_reduce: AllReduce | None = None,
) -> tuple[ArrayT, Moments[ArrayT]]: ...  # fmt: skip
@overload
def batch_norm(
    x: ArrayT, /, gamma: Array | None = None, beta: Array | None = None, *, channel_axis: int = 1, eps: float = 1e-5,
    weights: Array | None = None, moments: GivenT, return_moments: Literal[True], out: ArrayT | None = None,
    all_reduce: AllReduce | None = None,
) -> tuple[ArrayT, GivenT]: ...  # fmt: skip
@checks_names
def batch_norm(
    x: ArrayT,
    /,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    weights: Array | None = None,
    moments: Statistics[Any] | None = None,
    return_moments: bool = False,
    out: ArrayT | None = None,
    all_reduce: AllReduce | None = None,
) -> ArrayT | tuple[ArrayT, Statistics[Any]]:
    r"""Batch normalization: each channel by its mean and variance over the batch and the space.

    .. math:: y = \frac{x - E(x)}{\sqrt{Var(x) + \epsilon}} \, \gamma + \beta

    Parameters
    ----------
    x : array, shape (N, C, \*spatial)
        Real and floating; the channels may stand on another axis.
    gamma : array, shape (C,), optional
        The scale; or of x's rank and broadcasting to x.
    beta : array, shape (C,), optional
        The shift; or of x's rank and broadcasting to x.
    channel_axis : int
        The axis of the channels.
    eps : float
        Added to the variance.
    weights : array, optional
        A mask, or how much each number counts for the mean and the variance, as in `normalize`.
    moments : Moments or RunningStats, shape (C,), optional
        Normalize with these in place of the batch's own: inference.
    return_moments : bool
        Also return the moments that were used: those of the batch, for `RunningStats.update`.
    out : array, optional
        Where to write the result: a writeable array of x's library, device and shape, or x itself, as in `normalize`.
    all_reduce : function, optional
        Sums an array over the replicas among which the batch is divided: what it is given, of one axis, becomes the sum
        in place, or that is returned. Moments, and the gradients of x and of gamma and beta of shape (C,), are then
        those of the whole batch. All replicas must make the same calls; their shares may be of any size, 0 included.

    Returns
    -------
    y : array
        Of x's library, device, dtype and shape.
    moments : Moments
        With `return_moments`; without a gradient; ``moments`` itself where it was given.

    Raises
    ------
    TypeError, ValueError
        As in `normalize`.

    References
    ----------
    Ioffe & Szegedy, "Batch Normalization", ICML 2015, algorithm 1; inference: algorithm 2.

    Examples
    --------
    One training step, then inference:

    >>> import numpy as np, anynorm
    >>> x = np.array([[1.0, 0.0], [3.0, 8.0]])
    >>> running = anynorm.RunningStats.init(2, like=x, momentum=0.5)
    >>> y, batch = anynorm.batch_norm(x, eps=0, return_moments=True)
    >>> running = running.update(batch)
    >>> running.mean, running.var
    (array([1., 2.]), array([1. , 8.5]))
    >>> anynorm.batch_norm(np.array([[2.0, 2.0]]), moments=running, eps=0)
    array([[1., 0.]])
    """
    options: dict[str, Any] = {"eps": eps, "weights": weights, "moments": moments, "out": out, "all_reduce": all_reduce}
    call = prepare(BATCH, (channel_axis,), x, gamma, beta, **options)
    return _run(call, moments, return_moments)


@overload
def instance_norm(
    x: ArrayT, /, gamma: Array | None = None, beta: Array | None = None, *, channel_axis: int = 1, eps: float = 1e-5,
    weights: Array | None = None, moments: Statistics[Any] | None = None, return_moments: Literal[False] = False,
    out: ArrayT | None = None,
) -> ArrayT: ...  # fmt: skip
@overload
def instance_norm(
    x: ArrayT, /, gamma: Array | None = None, beta: Array | None = None, *, channel_axis: int = 1, eps: float = 1e-5,
    weights: Array | None = None, moments: None = None, return_moments: Literal[True], out: ArrayT | None = None,
) -> tuple[ArrayT, Moments[ArrayT]]: ...  # fmt: skip
@overload
def instance_norm(
    x: ArrayT, /, gamma: Array | None = None, beta: Array | None = None, *, channel_axis: int = 1, eps: float = 1e-5,
    weights: Array | None = None, moments: GivenT, return_moments: Literal[True], out: ArrayT | None = None,
) -> tuple[ArrayT, GivenT]: ...  # fmt: skip
@checks_names
def instance_norm(
    x: ArrayT,
    /,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    channel_axis: int = 1,
    eps: float = 1e-5,
    weights: Array | None = None,
    moments: Statistics[Any] | None = None,
    return_moments: bool = False,
    out: ArrayT | None = None,
) -> ArrayT | tuple[ArrayT, Statistics[Any]]:
    r"""Instance normalization: each channel of each sample by its mean and variance over the space.

    .. math:: y_{tijk} = \frac{x_{tijk} - \mu_{ti}}{\sqrt{\sigma_{ti}^2 + \epsilon}} \, \gamma_i + \beta_i

    Parameters
    ----------
    x : array, shape (N, C, \*spatial)
        Real and floating, with at least one spatial axis. With ``channel_axis=0`` x is one sample, (C, \*spatial).
    gamma : array, shape (C,), optional
        The scale; or of x's rank and broadcasting to x.
    beta : array, shape (C,), optional
        The shift; or of x's rank and broadcasting to x.
    channel_axis : int
        The axis of the channels. Where it is not axis 0, that is the batch: one sample with channels last is
        ``x[None, ...]``.
    eps : float
        Added to the variance.
    weights : array, optional
        A mask, or how much each number counts for the mean and the variance, as in `normalize`.
    moments : Moments, optional
        Normalize with these, of shape (N, C), in place of x's own.
    return_moments : bool
        Also return the moments, of shape (N, C).
    out : array, optional
        Where to write the result: a writeable array of x's library, device and shape, or x itself, as in `normalize`.

    Returns
    -------
    y : array
        Of x's library, device, dtype and shape.
    moments : Moments
        With `return_moments`; without a gradient; ``moments`` itself where it was given.

    Raises
    ------
    TypeError, ValueError
        As in `normalize`.

    References
    ----------
    Ulyanov, Vedaldi & Lempitsky, "Instance Normalization", arXiv:1607.08022, eq. 2. Its sigma is printed for the
    mean of squares; it is the variance.

    Examples
    --------
    >>> import numpy as np, anynorm
    >>> anynorm.instance_norm(np.array([[[1.0, 3.0], [50.0, 70.0]]]), eps=0)
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """
    call = prepare(INSTANCE, (channel_axis,), x, gamma, beta, eps=eps, weights=weights, moments=moments, out=out)
    return _run(call, moments, return_moments)


@overload
def group_norm(
    x: ArrayT, /, gamma: Array | None = None, beta: Array | None = None, *, groups: int, channel_axis: int = 1,
    eps: float = 1e-5, weights: Array | None = None, moments: Statistics[Any] | None = None,
    return_moments: Literal[False] = False, out: ArrayT | None = None,
) -> ArrayT: ...  # fmt: skip
@overload
def group_norm(
    x: ArrayT, /, gamma: Array | None = None, beta: Array | None = None, *, groups: int, channel_axis: int = 1,
    eps: float = 1e-5, weights: Array | None = None, moments: None = None, return_moments: Literal[True],
    out: ArrayT | None = None,
) -> tuple[ArrayT, Moments[ArrayT]]: ...  # fmt: skip
@overload
def group_norm(
    x: ArrayT, /, gamma: Array | None = None, beta: Array | None = None, *, groups: int, channel_axis: int = 1,
    eps: float = 1e-5, weights: Array | None = None, moments: GivenT, return_moments: Literal[True],
    out: ArrayT | None = None,
) -> tuple[ArrayT, GivenT]: ...  # fmt: skip
@checks_names
def group_norm(
    x: ArrayT,
    /,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    groups: int,
    channel_axis: int = 1,
    eps: float = 1e-5,
    weights: Array | None = None,
    moments: Statistics[Any] | None = None,
    return_moments: bool = False,
    out: ArrayT | None = None,
) -> ArrayT | tuple[ArrayT, Statistics[Any]]:
    r"""Group normalization: each run of C / groups channels of each sample by its mean and variance.

    .. math:: y_i = \frac{x_i - \mu_i}{\sqrt{\sigma_i^2 + \epsilon}} \, \gamma_{c(i)} + \beta_{c(i)}, \qquad
        S_i = \{k : k_N = i_N, \lfloor k_C / (C / G) \rfloor = \lfloor i_C / (C / G) \rfloor\}

    Parameters
    ----------
    x : array, shape (N, C, \*spatial)
        Real and floating. With ``channel_axis=0`` x is one sample, (C, \*spatial).
    gamma : array, shape (C,), optional
        The scale, one for each channel; or of x's rank and broadcasting to x.
    beta : array, shape (C,), optional
        The shift, one for each channel; or of x's rank and broadcasting to x.
    groups : int
        The number of groups, G, a divisor of C. 1 is layer normalization over channels and space, C is instance
        normalization.
    channel_axis : int
        The axis of the channels. Where it is not axis 0, that is the batch: one sample with channels last is
        ``x[None, ...]``.
    eps : float
        Added to the variance.
    weights : array, optional
        A mask, or how much each number counts for the mean and the variance, as in `normalize`.
    moments : Moments, optional
        Normalize with these, of shape (N, G), in place of x's own.
    return_moments : bool
        Also return the moments, of shape (N, G).
    out : array, optional
        Where to write the result: a writeable array of x's library, device and shape, or x itself, as in `normalize`.

    Returns
    -------
    y : array
        Of x's library, device, dtype and shape.
    moments : Moments
        With `return_moments`; without a gradient; ``moments`` itself where it was given.

    Raises
    ------
    TypeError, ValueError
        As in `normalize`; also if `groups` does not divide the channels.

    References
    ----------
    Wu & He, "Group Normalization", ECCV 2018, eq. 1, 2, 3 and 7.

    Examples
    --------
    >>> import numpy as np, anynorm
    >>> anynorm.group_norm(np.array([[1.0, 3.0, 10.0, 30.0]]), groups=2, eps=0)
    array([[-1.,  1., -1.,  1.]])
    """
    options: dict[str, Any] = {"eps": eps, "weights": weights, "moments": moments, "out": out}
    call = prepare(GROUP, (groups, channel_axis), x, gamma, beta, **options)
    return _run(call, moments, return_moments)


@checks_names
def rms_norm(
    x: ArrayT,
    /,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    axis: Axis = -1,
    eps: float = 1e-5,
    weights: Array | None = None,
    out: ArrayT | None = None,
) -> ArrayT:
    r"""Root mean square normalization: layer normalization that takes no mean away.

    .. math:: y_i = \frac{x_i}{\sqrt{\frac{1}{n} \sum_j x_j^2 + \epsilon}} \, \gamma_i + \beta_i

    Parameters
    ----------
    x : array, shape (\*samples, \*features)
        Real and floating.
    gamma : array, shape (\*features,), optional
        The scale; or of x's rank and broadcasting to x.
    beta : array, shape (\*features,), optional
        The shift; or of x's rank and broadcasting to x.
    axis : int, tuple of int or None
        The feature axes, by default the last; None is all axes.
    eps : float
        Added to the mean of squares.
    weights : array, optional
        A mask, or how much each number counts for the mean of squares, as in `normalize`.
    out : array, optional
        Where to write the result: a writeable array of x's library, device and shape, or x itself, as in `normalize`.

    Returns
    -------
    array
        Of x's library, device, dtype and shape.

    Raises
    ------
    TypeError, ValueError
        As in `normalize`.

    References
    ----------
    Zhang & Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, eq. 4.

    Examples
    --------
    >>> import numpy as np, anynorm
    >>> anynorm.rms_norm(np.array([[1.0, 7.0], [5.0, 5.0]]), eps=0)
    array([[0.2, 1.4],
           [1. , 1. ]])
    """
    return _run(prepare(RMS, (axis,), x, gamma, beta, eps=eps, weights=weights, out=out), None, False)  # type: ignore[return-value]


@overload
def center(
    x: ArrayT, /, beta: Array | None = None, *, axis: Axis, weights: Array | None = None,
    moments: Statistics[Any] | None = None, return_moments: Literal[False] = False,
    all_reduce: AllReduce | None = None, out: ArrayT | None = None,
) -> ArrayT: ...  # fmt: skip
@overload
def center(
    x: ArrayT, /, beta: Array | None = None, *, axis: Axis, weights: Array | None = None, moments: None = None,
    return_moments: Literal[True], all_reduce: AllReduce | None = None, out: ArrayT | None = None,
) -> tuple[ArrayT, Moments[ArrayT]]: ...  # fmt: skip
@overload
def center(
    x: ArrayT, /, beta: Array | None = None, *, axis: Axis, weights: Array | None = None, moments: GivenT,
    return_moments: Literal[True], all_reduce: AllReduce | None = None, out: ArrayT | None = None,
) -> tuple[ArrayT, GivenT]: ...  # fmt: skip
@checks_names
def center(
    x: ArrayT,
    /,
    beta: Array | None = None,
    *,
    axis: Axis,
    weights: Array | None = None,
    moments: Statistics[Any] | None = None,
    return_moments: bool = False,
    all_reduce: AllReduce | None = None,
    out: ArrayT | None = None,
) -> ArrayT | tuple[ArrayT, Statistics[Any]]:
    r"""Take the mean away, and divide by nothing: mean-only batch normalization, over any axes.

    .. math:: y = x - E(x) + \beta

    Parameters
    ----------
    x : array, any shape but ()
        Real and floating. A mean-only batch norm of (N, C, \*spatial) has all axes but 1 in `axis`.
    beta : array, optional
        Shift, of the shape of the axes of `axis`, or of x's rank and broadcasting to x: (1, C, 1, 1), say.
    axis : int, tuple of int or None
        The axes that share a mean; None is all of them.
    weights : array, optional
        A mask, or how much each number counts for the mean, as in `normalize`.
    moments : Moments or RunningStats, optional
        Take their mean away in place of x's own.
    return_moments : bool
        Also return the moments that were used: those of `moments`, with the variance.
    all_reduce : function, optional
        Sums an array over the replicas among which the numbers of each group are divided, as in `batch_norm`: their
        arrays may differ in length along `axis` alone. Moments, and the gradients of x and of a beta of x's rank that
        has length 1 along `axis`, are then those of all replicas; any other beta is each replica's own.
    out : array, optional
        Where to write the result: a writeable array of x's library, device and shape, or x itself, as in `normalize`.

    Returns
    -------
    y : array
        Of x's library, device, dtype and shape. A group whose values are all equal, or whose weights are all 0, becomes
        beta.
    moments : Moments
        With `return_moments`: of the kept axes, without a gradient; ``moments`` itself where it was given.

    Raises
    ------
    TypeError, ValueError
        As in `normalize`.

    Notes
    -----
    The gradient of x is dy less the sum of dy times the share of each number in the weight of its group: dy - E(dy)
    where there are no weights.

    References
    ----------
    Salimans & Kingma, "Weight Normalization", NeurIPS 2016, section 4.

    Examples
    --------
    >>> import numpy as np, anynorm
    >>> anynorm.center(np.array([[1.0, 10.0], [3.0, 30.0]]), np.array([[0.0, 5.0]]), axis=0)
    array([[-1., -5.],
           [ 1., 15.]])
    """
    options: dict[str, Any] = {"weights": weights, "moments": moments, "out": out, "all_reduce": all_reduce}
    return _run(prepare(CENTER, (axis,), x, None, beta, **options), moments, return_moments)


@checks_names
def weight_norm(v: ArrayT, g: Array, /, *, axis: Axis = 0, out: ArrayT | None = None) -> ArrayT:
    r"""Weight normalization: the weight of direction v and magnitude g.

    .. math:: \mathbf{w} = \frac{g}{\|\mathbf{v}\|} \mathbf{v}

    Parameters
    ----------
    v : array, shape (out, \*rest)
        Direction, real and floating, of any scale.
    g : array, shape (out,)
        Magnitude, one for each index along `axis`; shape () where `axis` is None; or of v's rank and broadcasting to v.
    axis : int, tuple of int or None
        The axes that keep a norm of their own; None is one norm for all of v.
    out : array, optional
        Where to write the result: a writeable array of v's library, device and shape, and any real floating dtype.

    Returns
    -------
    array
        Of v's library, device, dtype and shape. A zero row of v has weight 0, and a finite gradient.

    Raises
    ------
    TypeError, ValueError
        As in `normalize`.

    Notes
    -----
    PyTorch's ``dim`` is this `axis`, but its ``dim=-1`` means all of v.

    References
    ----------
    Salimans & Kingma, "Weight Normalization", NeurIPS 2016, eq. 2; the gradient: eq. 3.

    Examples
    --------
    >>> import numpy as np, anynorm
    >>> anynorm.weight_norm(np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([10.0, 1.0]))
    array([[6., 8.],
           [0., 1.]])
    """
    return _run(prepare(WEIGHT, (axis,), v, g, out=out), None, False)  # type: ignore[return-value]


@checks_names
def moments(x: ArrayT, /, *, axis: Axis, weights: Array | None = None, dtype: Any = None) -> Moments[ArrayT]:
    r"""Mean, biased variance and count over some axes.

    .. math:: \mu = \frac{1}{n} \sum_i x_i, \qquad \sigma^2 = \frac{1}{n} \sum_i (x_i - \mu)^2

    Parameters
    ----------
    x : array, any shape but ()
        Real and floating, or of integers or bools.
    axis : int, tuple of int or None
        The axes to take them over; None is all of them.
    weights : array, optional
        A mask, or how much each number counts, as in `normalize`; ``count`` is their sum, an array.
    dtype : str or dtype, optional
        Of the mean and the variance, real and floating: as ``"float64"``, or a dtype of x's library. What is wider,
        this or x's own, is computed in. Without it that is x's own; float32 for 2-byte floats and for integers of up to
        16 bits, and float64 for longer ones.

    Returns
    -------
    Moments
        Of the shape of the kept axes, without a gradient; of an empty batch, or of a group without weight, mean 0,
        variance 0 and count 0.

    Raises
    ------
    TypeError, ValueError
        As in `normalize`; also if `dtype` is not real and floating, or the library has none such here.

    References
    ----------
    Chan, Golub & LeVeque, "Algorithms for computing the sample variance", 1983, eq. 1.7: the two-pass algorithm with
    correction, of which centring in two stages is a variant.

    Examples
    --------
    >>> import numpy as np, anynorm
    >>> anynorm.moments(np.ones((8, 3, 5, 5), dtype=np.float32), axis=(0, 2, 3))
    Moments(numpy float32 (3,), mean=[1. 1. 1.], std=[0. 0. 0.], count=200)
    """
    return of(x, axis=axis, weights=weights, dtype=dtype)


def _run(call: Call, given: Statistics[Any] | None, return_moments: bool) -> ArrayT | tuple[ArrayT, Statistics[Any]]:
    if type(return_moments) is not bool:
        check_bool("return_moments", return_moments)
    done = executors.forward(call, keep=return_moments)
    y: ArrayT = done.y
    if not return_moments:
        return y
    return y, (moments_of(call, done.stats) if given is None else given)
