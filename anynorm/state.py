"""`RunningStats`: the running statistics of batch norm as a value; an update returns a new one."""

from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, TypeVar

from anynorm.arrays import counts
from anynorm.arrays.checks import check_int, check_real, compute_dtype
from anynorm.arrays.counts import is_number
from anynorm.arrays.pytree import pytree
from anynorm.arrays.recognize import library_of
from anynorm.batches import Moments
from anynorm.kernels import Array, Namespace, weighted_mean
from anynorm.keywords import checks_names
from anynorm.statistics import Statistics, cast_with, check_alike, merged_statistics, stats_of

ArrayT = TypeVar("ArrayT")


@pytree("mean", "var", "count", "_rest", "_var_rest", "_count_rest")
@checks_names
@dataclass(frozen=True, eq=False, repr=False)
class RunningStats(Statistics[ArrayT]):
    r"""Running mean and variance of each channel, for inference.

    .. math:: \text{moving} = \text{momentum} \cdot \text{moving} + (1 - \text{momentum}) \cdot \text{batch}

    Parameters
    ----------
    mean, var : array, shape (C,)
        What inference uses, ``batch_norm(x, moments=running)``. The variance has the square of the data's unit.
    count : int, or array of shape (C,) or ()
        The number of values seen: in every channel, or an array of counts of the same library, as in `Moments`.
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
    Frozen, compared by identity, a JAX pytree where JAX is imported. PyTorch's momentum is 1 - momentum. It keeps, out
    of sight, what rounding took from the mean, and with a momentum from the variance, so that a batch counts however
    small its share.

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
        xp = library_of("mean", self.mean).xp
        if self.momentum is not None:
            object.__setattr__(self, "momentum", check_real("momentum", self.momentum, least=0, most=1))
        object.__setattr__(self, "correction", check_real("correction", self.correction, least=0))
        self._carrying(xp.zeros_like(self.mean), None if self.momentum is None else xp.zeros_like(self.var))

    @classmethod
    @checks_names
    def init(
        cls,
        num_channels: int,
        *,
        like: ArrayT,
        momentum: float | None = 0.9,
        correction: float = 0,
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
        mean = library.zeros(channels, like, dtype)
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
        if self.momentum is None:
            return self._merged_with(moments)
        number = is_number(moments.count)
        if number and moments.count == 0:
            return self
        library = library_of("mean", self.mean)
        dtype = compute_dtype(library, "mean", self.mean)
        mean, rest, _ = stats_of(self, dtype)
        var, var_rest = cast_with(library, self.var, self._var_rest, dtype)
        batch = stats_of(moments, dtype)
        batch = batch._replace(var=self._corrected(batch.var, moments.count))
        count = [] if number else [counts.floating(library, moments.count, dtype)]
        work = partial(_moved, self.momentum)
        mean, rest, var, var_rest = library.quietly(work, mean, rest, var, var_rest, *batch, *count)
        return self._with(mean, rest, var, var_rest, counts.added(library, self._counted, moments._counted))

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
        return self._merged_with(other._biased())

    def _merged_with(self, others: Statistics[ArrayT]) -> "RunningStats[ArrayT]":
        if is_number(others.count) and others.count == 0:
            return self
        joint, counted = merged_statistics(self._biased(), others)
        return self._with(joint.mean, joint.mean_lo, self._corrected(joint.var, counted[0]), None, counted)

    def _biased(self) -> Moments[ArrayT]:
        """These statistics with the variance divided by count, in the dtype that they are computed in."""
        mean, rest, var = stats_of(self, compute_dtype(library_of("mean", self.mean), "mean", self.mean))
        if not is_number(self.count) or self.count > 0:
            var = self._corrected(var, self.count, back=True)
        return Moments._with_rest(mean, rest, var, *self._counted)

    def _corrected(self, var: Any, count: Any, *, back: bool = False) -> Any:
        """The corrected variance of `count` values from the biased one, or `back`."""
        if not self.correction:
            return var
        number = is_number(count)
        if number and count <= self.correction:
            raise ValueError(
                (
                    f"statistics of one value have no variance with correction={self.correction}, got count {count}"
                    if count == 1
                    else f"count must be more than correction={self.correction}, got {count}"
                )
                + ": leave this batch out, or keep statistics with correction=0"
            )
        library = library_of("var", var)
        work = partial(_corrected, self.correction, count if number else None, back)
        return library.quietly(work, var, *([] if number else [counts.floating(library, count, var.dtype)]))[0]

    def _with(self, mean: Any, rest: Any, var: Any, var_rest: Any, counted: counts.Counted) -> "RunningStats[ArrayT]":
        library, dtype = library_of("mean", self.mean), self.mean.dtype  # type: ignore[attr-defined]
        mean, rest = cast_with(library, mean, rest, dtype)
        var, var_rest = cast_with(library, var, var_rest, dtype)
        conventions = {"momentum": self.momentum, "correction": self.correction}
        return RunningStats._with_rest(mean, rest, var, *counted, _var_rest=var_rest, **conventions)


def _moved(momentum: float, xp: Namespace, *arrays: Array) -> tuple[Array, ...]:
    """Mean, variance and what rounding took from each, moved toward those of a batch by 1 - momentum.

    The arrays are (mean, rest, var, var_rest), (mean, rest, var) of the batch, and its count where that is an array.
    """
    mean, rest, var, var_rest, batch_mean, batch_rest, batch_var, *count = arrays
    shares = (momentum, 1 - momentum)
    moved = (
        *weighted_mean(xp, (mean, rest), (batch_mean, batch_rest), shares),
        *weighted_mean(xp, (var, var_rest), (batch_var, xp.zeros_like(batch_var)), shares),
    )
    if not count:
        return moved
    return tuple(xp.where(count[0] > 0, new, old) for new, old in zip(moved, arrays[:4], strict=True))


def _corrected(
    correction: float, number: float | None, back: bool, xp: Namespace, var: Array, *count: Array
) -> tuple[Array]:
    """A variance times n / (n - correction), or `back`; n is the number, or the array that comes last.

    It stays as it is in a group of too few values.
    """
    if number is not None:
        factor: Any = number / (number - correction)
    else:
        (n,) = count
        more = xp.where(n > correction, n - correction, xp.full_like(n, float("inf")))
        factor = xp.astype(1 + correction / more, var.dtype, copy=False)
    return (var / factor if back else var * factor,)
