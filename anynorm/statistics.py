"""Means and variances as values: `Moments`, and the base it shares with `RunningStats`."""

from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from anynorm.arrays import check_device, compute_dtype, flush_pytrees, library_of, one_library, pytree
from anynorm.kernels import Array, merge

ArrayT = TypeVar("ArrayT")
Count = Any
"""A Python int; under jax.jit, a traced number."""


@dataclass(frozen=True, eq=False, repr=False)
class Statistics(Generic[ArrayT]):
    """A mean and a variance for each group, and the number of values behind each of them."""

    mean: ArrayT
    var: ArrayT
    count: Count

    def __post_init__(self) -> None:
        flush_pytrees()
        library = one_library(mean=self.mean, var=self.var)
        for name in ("mean", "var"):
            compute_dtype(library, name, getattr(self, name))
        mean, var = _shape(self.mean), _shape(self.var)
        if mean != var:
            raise ValueError(f"var must have the shape of mean, {mean}, got {var}")
        check_device(library, "mean", self.mean, "var", self.var)
        if isinstance(self.count, bool) or not (isinstance(self.count, (int, float)) or hasattr(self.count, "dtype")):
            raise TypeError(f"count must be a number, got {type(self.count).__name__}")
        if isinstance(self.count, (int, float)) and not self.count >= 0:
            raise ValueError(f"count must be at least 0, got {self.count}")

    def __repr__(self) -> str:
        scalars = (field.name for field in fields(self) if field.name not in ("mean", "var"))
        return f"{type(self).__name__}({describe(self.mean)}{''.join(f', {name}={getattr(self, name)}' for name in scalars)})"


@pytree("mean", "var", "count")
@dataclass(frozen=True, eq=False, repr=False)
class Moments(Statistics[ArrayT]):
    r"""Mean, biased variance and count of the values of each group.

    .. math:: \mu = \frac{1}{n} \sum_i x_i, \qquad \sigma^2 = \frac{1}{n} \sum_i (x_i - \mu)^2

    Parameters
    ----------
    mean, var : array, shape (\*kept,)
        One value for each group: the shape of x without the axes that were averaged over. float32 for arrays of
        2-byte floats, else of x's dtype. The variance has the square of x's unit.
    count : int
        The number of values in each group; under ``jax.jit`` a traced number.

    Raises
    ------
    TypeError
        If mean or var is not a real floating array, or they come from two libraries.
    ValueError
        If their shapes or devices differ, or count is negative.

    Notes
    -----
    Frozen, compared by identity, a JAX pytree where JAX is imported. Moments carry no autograd graph.

    Examples
    --------
    >>> import numpy as np, anynorm
    >>> batch = anynorm.moments(np.array([[1.0, 2.0], [3.0, 6.0]]), axis=0)
    >>> batch
    Moments(numpy float64 (2,), count=2)
    >>> batch.mean, batch.var
    (array([2., 4.]), array([1., 4.]))
    """

    def merge(self, *others: "Moments[ArrayT]") -> "Moments[ArrayT]":
        """The moments of all the values together, as if they had been taken in one pass.

        Parameters
        ----------
        *others : Moments
            Of the same library, shape and device.

        Returns
        -------
        Moments
            Exact, as in Chan, Golub & LeVeque (1979), eq. 2.1; a part of count 0 changes nothing.

        Raises
        ------
        TypeError
            If an argument is not `Moments`, or comes from another library.
        ValueError
            If shapes or devices differ.

        Examples
        --------
        >>> import numpy as np, anynorm
        >>> left, right = anynorm.moments(np.zeros(1), axis=0), anynorm.moments(np.full(3, 4.0), axis=0)
        >>> both = left.merge(right)
        >>> float(both.mean), float(both.var), both.count
        (3.0, 3.0, 4)
        """
        for other in others:
            if not isinstance(other, Moments):
                raise TypeError(f"others must be Moments, got {type(other).__name__}")
            check_alike(self, other)
        merged: Moments[ArrayT] = self
        for other in others:
            merged = Moments(*pooled(merged, other))
        return merged


def check_alike(these: Statistics[Any], others: Statistics[Any]) -> None:
    """An error unless both are of one library, shape and device."""
    library = one_library(mean=these.mean, **{"the other mean": others.mean})
    if _shape(these.mean) != _shape(others.mean):
        raise ValueError(f"both must have the same shape, got {_shape(these.mean)} and {_shape(others.mean)}")
    check_device(library, "mean", these.mean, "the other mean", others.mean)


def pooled(these: Statistics[ArrayT], others: Statistics[ArrayT]) -> tuple[ArrayT, ArrayT, Count]:
    """Mean, biased variance and count of both together, from mean and biased variance of each; in the first's dtype."""
    library = library_of("mean", these.mean)
    count = these.count + others.count
    if isinstance(count, (int, float)):
        share = others.count / count if count else 0.0
    else:
        share = others.count / library.xp.maximum(count, library.xp.ones_like(count))
    with library.quiet():
        mean, var = merge((these.mean, these.var), (others.mean, others.var), share)
    dtype = these.mean.dtype  # type: ignore[attr-defined]
    return library.xp.astype(mean, dtype, copy=False), library.xp.astype(var, dtype, copy=False), count


def describe(x: Array) -> str:
    """Library, dtype and shape, without the numbers."""
    return f"{library_of('mean', x).name} {str(x.dtype).rpartition('.')[2]} {_shape(x)}"


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.shape)
