"""Means and variances as values: `Moments`, and the base it shares with `RunningStats`."""

from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from anynorm.arrays import (
    check_count,
    check_device,
    compute_dtype,
    flush_pytrees,
    library_of,
    one_library,
    pytree,
)
from anynorm.kernels import Array, merge
from anynorm.layouts import same_shape

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
        if not same_shape(mean, var):
            raise ValueError(f"var must have the shape of mean, {mean}, got {var}")
        check_device(library, "mean", self.mean, "var", self.var)
        object.__setattr__(self, "count", check_count("count", self.count))

    def __repr__(self) -> str:
        scalars = (field.name for field in fields(self) if field.name not in ("mean", "var"))
        shown = "".join(f", {name}={getattr(self, name)}" for name in scalars)
        return f"{type(self).__name__}({describe(self.mean)}{shown})"

    def _like(self, value: ArrayT) -> ArrayT:
        """A value in the dtype of the mean."""
        library, dtype = library_of("mean", self.mean), self.mean.dtype  # type: ignore[attr-defined]
        cast: ArrayT = library.xp.astype(value, dtype, copy=False)
        return cast


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
            check_alike(self, "others", other)
        merged: Moments[ArrayT] = self
        with library_of("mean", self.mean).quiet():
            for other in others:
                mean, var, count = pooled(merged, other)
                merged = Moments(self._like(mean), self._like(var), count)
        return merged


def check_alike(these: Statistics[Any], name: str, others: Statistics[Any]) -> None:
    """An error unless the statistics in the argument `name` are of the library, shape and device of `these`."""
    library = one_library(**{"mean": these.mean, f"{name}.mean": others.mean})
    mean, other = _shape(these.mean), _shape(others.mean)
    if not same_shape(mean, other):
        raise ValueError(f"{name} must have the shape of the statistics they join, {mean}, got {other}")
    check_device(library, "mean", these.mean, f"{name}.mean", others.mean)


def pooled(these: Statistics[ArrayT], others: Statistics[ArrayT]) -> tuple[ArrayT, ArrayT, Count]:
    """Mean, biased variance and count of both together, from mean and biased variance of each."""
    library = library_of("mean", these.mean)
    count = these.count + others.count
    if is_number(count):
        if these.count == 0 or others.count == 0:
            return (*widened(these if others.count == 0 else others), count)
        share = others.count / count
    else:
        share = others.count / library.xp.maximum(count, library.xp.ones_like(count))
    return (*merge(widened(these), widened(others), share), count)


def widened(these: Statistics[ArrayT]) -> tuple[ArrayT, ArrayT]:
    """Mean and variance in the dtype that they are computed in."""
    library = library_of("mean", these.mean)
    dtype = compute_dtype(library, "mean", these.mean)
    mean, var = (library.xp.astype(each, dtype, copy=False) for each in (these.mean, these.var))
    return mean, var


def is_number(count: Count) -> bool:
    """Whether it is a Python number, and not a traced one."""
    return isinstance(count, (int, float))


def describe(x: Array) -> str:
    """Library, dtype and shape, without the numbers."""
    try:
        library = library_of("x", x).name
    except TypeError:
        return type(x).__name__  # a placeholder that JAX put into a pytree
    return f"{library} {str(x.dtype).rpartition('.')[2]} {_shape(x)}"


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.shape)
