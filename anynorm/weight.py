"""`WeightNorm`: a weight as a direction and a magnitude."""

from dataclasses import KW_ONLY, dataclass
from typing import Any, TypeVar

from anynorm import calls, executors
from anynorm.arrays.checks import as_ints, check_device, compute_dtype, same_shape
from anynorm.arrays.counts import dtype_of
from anynorm.arrays.pytree import flush_pytrees, pytree
from anynorm.arrays.recognize import one_library
from anynorm.batches import Axis, Moments
from anynorm.calls.layouts import DIRECTION, WEIGHT
from anynorm.folding import rstd_of
from anynorm.kernels import subtract_mean
from anynorm.keywords import checks_names
from anynorm.norms import weight_norm
from anynorm.statistics import Statistics, describe_with_numbers
from anynorm.values import ArrayT, Value

LikeT = TypeVar("LikeT")  # pyright takes one of the class for unknown in a class method


@pytree("v", "g")
@checks_names
@dataclass(frozen=True, eq=False, repr=False)
class WeightNorm(Value[ArrayT]):
    r"""A weight by its direction and magnitude, :math:`\mathbf{w} = g \mathbf{v} / \|\mathbf{v}\|`.

    Parameters
    ----------
    v : array, shape (out, \*rest)
        Direction.
    g : array, shape (out,)
        Magnitude, one for each index along `axis`.
    axis : int, tuple of int or None
        The axes that keep a norm of their own; None is one norm for all of v.

    Raises
    ------
    TypeError, ValueError
        As in `weight_norm`.

    Notes
    -----
    Frozen, compared by identity, a JAX pytree of v and g where JAX is imported. The gradient is
    ``vjp(weight_norm, state.v, state.g, axis=state.axis)``.

    References
    ----------
    Salimans & Kingma, "Weight Normalization", NeurIPS 2016, eq. 2.

    Examples
    --------
    >>> import numpy as np, anynorm
    >>> state = anynorm.WeightNorm.from_weight(np.array([[3.0, 4.0], [0.0, 2.0]]))
    >>> state
    WeightNorm(v=numpy float64 (2, 2) [[3. 4.] [0. 2.]], g=numpy float64 (2,) [5. 2.], axis=0)
    >>> state.g
    array([5., 2.])
    >>> state.weight
    array([[3., 4.],
           [0., 2.]])
    """

    v: ArrayT
    g: ArrayT
    _: KW_ONLY
    axis: Axis = 0

    def __post_init__(self) -> None:
        flush_pytrees()
        calls.prepare(WEIGHT, (self.axis,), self.v, self.g)
        object.__setattr__(self, "axis", as_ints(self.axis))

    @classmethod
    @checks_names
    def from_weight(cls, w: LikeT, axis: Axis = 0) -> "WeightNorm[LikeT]":
        r"""The state whose weight is w: v is w, and g its norm, in float32 for 2-byte floats.

        Parameters
        ----------
        w : array, shape (out, \*rest)
            The weight to start from.
        axis : int, tuple of int or None
            The axes that keep a norm of their own.

        Returns
        -------
        WeightNorm

        Raises
        ------
        TypeError, ValueError
            As in `weight_norm`.
        """
        call = calls.prepare(DIRECTION, (axis,), w)
        return WeightNorm(w, call.statistic(executors.length(call)), axis=axis)

    @classmethod
    @checks_names
    def fitted(cls, v: ArrayT, moments: Moments[Any], *, axis: Axis = 0) -> tuple["WeightNorm[ArrayT]", ArrayT]:
        r"""The state, and the bias beside it, with which a layer's outputs over a batch have mean 0 and variance 1.

        .. math:: t = \frac{\mathbf{v} \cdot \mathbf{x}}{\|\mathbf{v}\|}, \qquad
            g = \frac{1}{\sigma[t]}, \qquad b = \frac{-\mu[t]}{\sigma[t]}

        Parameters
        ----------
        v : array, shape (out, \*rest)
            Direction, as it was drawn.
        moments : Moments, shape (out,)
            Of t: of what the layer gives for a batch, before its nonlinearity, with ``weight_norm(v, ones)`` in place
            of its weight and without a bias. For a convolution over the batch and the space, as in batch norm.
        axis : int, tuple of int or None
            The axes that keep a norm of their own, those of the outputs.

        Returns
        -------
        state : WeightNorm
            Its v is v, its g of the dtype of the moments; 1 for an output without spread.
        b : array, shape (out,)
            The bias, of that dtype.

        Raises
        ------
        TypeError, ValueError
            If the moments are none, of another library, device or shape; and as in `weight_norm`.

        References
        ----------
        Salimans & Kingma, "Weight Normalization", NeurIPS 2016, section 3, eq. 5 and 6.

        Examples
        --------
        >>> import numpy as np, anynorm
        >>> x, v = np.array([[1.0, 2.0], [3.0, 6.0]]), np.array([[3.0, 4.0], [0.0, 2.0]])
        >>> t = x @ anynorm.weight_norm(v, np.ones(2)).T
        >>> state, b = anynorm.WeightNorm.fitted(v, anynorm.moments(t, axis=0))
        >>> x @ state.weight.T + b
        array([[-1., -1.],
               [ 1.,  1.]])
        """
        if not isinstance(moments, Statistics):
            raise TypeError(f"moments must be Moments, got {type(moments).__name__}")
        library = one_library(v=v, **{"moments.mean": moments.mean})
        check_device(library, "v", v, "moments.mean", moments.mean)
        compute_dtype(library, "v", v)
        kept, found = calls.layouts.weight(tuple(v.shape), axis).kept_shape, tuple(moments.mean.shape)  # type: ignore[attr-defined]
        if not same_shape(kept, found):
            raise ValueError(f"moments must have shape {kept}, one for each index of v along axis {axis}, got {found}")
        with library.quiet():
            rstd, stats = rstd_of(library, moments, 0, dtype_of(library, v, moments.mean.dtype))
            b = subtract_mean(library.xp.zeros_like(rstd), stats) * rstd
        g, b = (library.astype(each, moments.mean.dtype) for each in (rstd, b))
        return cls(v, g, axis=axis), b

    @property
    def weight(self) -> ArrayT:
        """The weight, ``weight_norm(v, g, axis=axis)``."""
        return weight_norm(self.v, self.g, axis=self.axis)

    def __repr__(self) -> str:
        return f"WeightNorm(v={describe_with_numbers(self.v)}, g={describe_with_numbers(self.g)}, axis={self.axis})"
