"""State as values: an update returns a new one, and nothing is mutated."""

from dataclasses import KW_ONLY, dataclass
from typing import Any, Generic, TypeVar

from anynorm import calls, schedules
from anynorm.arrays import (
    check_int,
    check_real,
    compute_dtype,
    flush_pytrees,
    library_of,
    pytree,
    zeros,
)
from anynorm.norms import Axis, weight_norm
from anynorm.statistics import Moments, Statistics, check_alike, describe, is_number, pooled, widened

ArrayT = TypeVar("ArrayT")


@pytree("mean", "var", "count")
@dataclass(frozen=True, eq=False, repr=False)
class RunningStats(Statistics[ArrayT]):
    r"""Running mean and variance of each channel, for inference.

    .. math:: \text{moving} = \text{momentum} \cdot \text{moving} + (1 - \text{momentum}) \cdot \text{batch}

    Parameters
    ----------
    mean, var : array, shape (C,)
        What inference uses, ``batch_norm(x, moments=running)``. The variance has the square of the data's unit.
    count : int
        The number of values seen.
    momentum : float in [0, 1] or None
        The weight of the old value. None keeps the exact statistics of everything seen.
    correction : float
        1 stores the unbiased variance, divided by count - 1, as PyTorch does; 0 the biased one.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind, or does not fit the others.

    Notes
    -----
    Frozen, compared by identity, a JAX pytree of mean, var and count where JAX is imported. PyTorch's momentum is
    1 - momentum. A float32 state takes no notice of a batch whose share of the mean is less than a rounding error: for
    exact statistics of very many batches start from a float64 `like`, whatever the dtype of the data.

    References
    ----------
    Ioffe & Szegedy, "Batch Normalization", ICML 2015, algorithm 2. Exact: Chan, Golub & LeVeque (1979), eq. 2.1.

    Examples
    --------
    >>> import numpy as np, anynorm
    >>> running = anynorm.RunningStats.init(1, like=np.zeros(1), momentum=None)
    >>> for batch in np.array([[1.0], [3.0]]), np.array([[8.0]]):
    ...     running = running.update(anynorm.moments(batch, axis=0))
    >>> running
    RunningStats(numpy float64 (1,), count=3, momentum=None, correction=0)
    >>> running.mean
    array([4.])
    """

    count: Any = 0
    _: KW_ONLY
    momentum: float | None = 0.9
    correction: float = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.momentum is not None:
            check_real("momentum", self.momentum, least=0, most=1)
        check_real("correction", self.correction, least=0)

    @classmethod
    def init(
        cls, num_channels: int, *, like: ArrayT, momentum: float | None = 0.9, correction: float = 0
    ) -> "RunningStats[ArrayT]":
        """Mean 0 and variance 1, nothing seen.

        Parameters
        ----------
        num_channels : int
            C.
        like : array
            Gives the library, the device and the dtype: float32 for 2-byte floats, else its own.
        momentum, correction
            As in the class.

        Returns
        -------
        RunningStats

        Raises
        ------
        TypeError, ValueError
            If an argument is of the wrong kind, or num_channels is negative.
        """
        channels = check_int("num_channels", num_channels)
        if channels < 0:
            raise ValueError(f"num_channels must be at least 0, got {channels}")
        library = library_of("like", like)
        dtype = compute_dtype(library, "like", like)
        mean = zeros(channels, like, dtype)
        return cls(mean, library.xp.ones_like(mean), 0, momentum=momentum, correction=correction)

    def update(self, moments: Moments[ArrayT]) -> "RunningStats[ArrayT]":
        """The state after one more batch.

        Parameters
        ----------
        moments : Moments, shape (C,)
            Of the batch: ``batch_norm(..., return_moments=True)``.

        Returns
        -------
        RunningStats
            A batch of size zero changes nothing.

        Raises
        ------
        TypeError
            If `moments` is not `Moments`, or of another library.
        ValueError
            If shapes or devices differ, or so few values have no variance with this correction.
        """
        if not isinstance(moments, Moments):
            raise TypeError(f"moments must be Moments, got {type(moments).__name__}")
        check_alike(self, "moments", moments)
        if is_number(moments.count) and moments.count == 0:
            return self
        if self.momentum is None:
            return self._joined(moments)
        library = library_of("mean", self.mean)
        new: Any = 1 - self.momentum
        if not is_number(moments.count):
            new = new * library.xp.astype(moments.count > 0, self.mean.dtype)  # type: ignore[attr-defined]
        bessel = _bessel(moments.count, self.correction, library.xp)
        with library.quiet():
            mean, var = ((1 - new) * old for old in widened(self))
            batch_mean, batch_var = widened(moments)
            return self._with(mean + new * batch_mean, var + new * (bessel * batch_var), self.count + moments.count)

    def merge(self, other: "RunningStats[ArrayT]") -> "RunningStats[ArrayT]":
        """The statistics of all that both have seen, as if one pass had seen it; for ``momentum=None`` alone.

        Parameters
        ----------
        other : RunningStats, shape (C,)
            Of the same library, device and correction.

        Returns
        -------
        RunningStats

        Raises
        ------
        TypeError
            If `other` is not `RunningStats`, or of another library.
        ValueError
            If either forgets (momentum is not None), or shapes, devices or corrections differ.
        """
        if not isinstance(other, RunningStats):
            raise TypeError(f"other must be RunningStats, got {type(other).__name__}")
        check_alike(self, "other", other)
        if self.momentum is not None or other.momentum is not None:
            raise ValueError(f"momentum must be None in both to merge, got {self.momentum} and {other.momentum}")
        if self.correction != other.correction:
            raise ValueError(f"correction must be the same in both, got {self.correction} and {other.correction}")
        with library_of("mean", self.mean).quiet():
            return self._joined(other._biased())

    def _joined(self, others: Statistics[ArrayT]) -> "RunningStats[ArrayT]":
        if is_number(others.count) and others.count == 0:
            return self
        library = library_of("mean", self.mean)
        with library.quiet():
            mean, var, count = pooled(self._biased(), others)
            return self._with(mean, var * _bessel(count, self.correction, library.xp), count)

    def _biased(self) -> Moments[ArrayT]:
        """These statistics with the variance divided by count, in the dtype that they are computed in."""
        mean, var = widened(self)
        if is_number(self.count) and self.count == 0:
            return Moments(mean, var, 0)
        return Moments(mean, var / _bessel(self.count, self.correction, library_of("mean", mean).xp), self.count)

    def _with(self, mean: Any, var: Any, count: Any) -> "RunningStats[ArrayT]":
        mean, var = self._like(mean), self._like(var)
        return RunningStats(mean, var, count, momentum=self.momentum, correction=self.correction)


@pytree("v", "g")
@dataclass(frozen=True, eq=False, repr=False)
class WeightNorm(Generic[ArrayT]):
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
    WeightNorm(v=numpy float64 (2, 2), g=numpy float64 (2,), axis=0)
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
        calls.weight(self.v, self.g, axis=self.axis)

    @classmethod
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
        call = calls.direction(w, axis=axis)
        return cls(w, schedules.statistic(call, schedules.length(call)), axis=axis)

    @property
    def weight(self) -> ArrayT:
        """The weight, ``weight_norm(v, g, axis=axis)``."""
        return weight_norm(self.v, self.g, axis=self.axis)

    def __repr__(self) -> str:
        return f"WeightNorm(v={describe(self.v)}, g={describe(self.g)}, axis={self.axis})"


def _bessel(count: Any, correction: float, xp: Any) -> Any:
    """What turns a biased variance of `count` values into a corrected one."""
    if not correction:
        return 1
    if not is_number(count):
        some = count > correction
        return xp.where(some, count / xp.where(some, count - correction, xp.ones_like(count)), xp.ones_like(count))
    if count <= correction:
        raise ValueError(
            f"a batch of one value has no variance with correction={correction}, got count {count}"
            if count == 1
            else f"count must be more than correction={correction}, got {count}"
        )
    return count / (count - correction)
