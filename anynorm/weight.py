"""`WeightNorm`: a weight as a direction and a magnitude."""

from dataclasses import KW_ONLY, dataclass
from typing import TypeVar

from anynorm import calls, executors
from anynorm.arrays.checks import as_ints
from anynorm.arrays.pytree import flush_pytrees, pytree
from anynorm.batches import Axis
from anynorm.calls.layouts import DIRECTION, WEIGHT
from anynorm.keywords import checks_names
from anynorm.norms import weight_norm
from anynorm.statistics import describe_with_numbers
from anynorm.values import Value

ArrayT = TypeVar("ArrayT")


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
    def from_weight(cls, w: ArrayT, axis: Axis = 0) -> "WeightNorm[ArrayT]":
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
        return cls(w, call.statistic(executors.length(call)), axis=axis)

    @property
    def weight(self) -> ArrayT:
        """The weight, ``weight_norm(v, g, axis=axis)``."""
        return weight_norm(self.v, self.g, axis=self.axis)

    def __repr__(self) -> str:
        return f"WeightNorm(v={describe_with_numbers(self.v)}, g={describe_with_numbers(self.g)}, axis={self.axis})"
