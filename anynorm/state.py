"""`RunningStats`: the running statistics of batch norm as a value; an update returns a new one."""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any, Self, TypeVar

from anynorm.arrays import counts
from anynorm.arrays.checks import check_bool, check_int, check_real, compute_dtype, plain_name
from anynorm.arrays.counts import is_number
from anynorm.arrays.pytree import pytree
from anynorm.arrays.recognize import library_of
from anynorm.batches import Moments
from anynorm.kernels import Array, Namespace, weighted_mean
from anynorm.keywords import checks_names
from anynorm.statistics import Statistics, cast_with, check_alike, corrected, describe, merged_statistics, stats_of
from anynorm.values import ArrayT

LikeT = TypeVar("LikeT")  # pyright takes one of the class for unknown in a class method
LEAST = 1e-300
"""In place of a momentum of 0, which has no logarithm."""


@pytree("mean", "var", "count", "_rest", "_var_rest", "_count_rest", "_updates")
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
    debias : bool
        Divide by the weight that was seen: after n updates of a state that `init` made by 1 - momentum**n. The first
        batch then takes the place of the start. A state that is constructed from a mean and a variance has seen all,
        and follows the rule as it stands.

    Raises
    ------
    TypeError, ValueError
        If an argument is of the wrong kind, or does not fit the others.

    Notes
    -----
    Frozen, compared by identity, a JAX pytree where JAX is imported. PyTorch's momentum is 1 - momentum. It keeps, out
    of sight, what rounding took from the mean, and with a momentum from the variance, so that a batch counts however
    small its share; and with `debias` the number of updates, for each channel where counts are.

    References
    ----------
    Ioffe & Szegedy, "Batch Normalization", ICML 2015, algorithm 2. Exact: Chan, Golub & LeVeque (1979), eq. 2.1.
    Debiased: Kingma & Ba, "Adam", ICLR 2015, section 3; Haiku's ``ExponentialMovingAverage``.

    Examples
    --------
    >>> import numpy as np, anynorm
    >>> running = anynorm.RunningStats.init(1, like=np.zeros(1), momentum=None)
    >>> for batch in np.array([[1.0], [3.0]]), np.array([[8.0]]):
    ...     running = running.update(anynorm.moments(batch, axis=0))
    >>> running
    RunningStats(numpy float64 (1,), mean=[4.], std=[2.9439], count=3, momentum=None, correction=0)
    >>> running.mean
    array([4.])
    """

    count: Any = 0
    _: KW_ONLY
    momentum: float | None = 0.9
    correction: float = 0
    debias: bool = False
    _updates: Any = field(init=False, default=None, kw_only=False)
    """How many updates there were, as a number or as integers, one for all channels or for each; None where it has seen
    all, or nothing is to be divided by."""

    _later = frozenset({"debias"})

    def __post_init__(self) -> None:
        super().__post_init__()
        xp = library_of("mean", self.mean).xp
        if self.momentum is not None:
            object.__setattr__(self, "momentum", check_real("momentum", self.momentum, least=0, most=1))
        object.__setattr__(self, "correction", check_real("correction", self.correction, least=0))
        check_bool("debias", self.debias)
        object.__setattr__(self, "debias", bool(self.debias))
        self._carrying(xp.zeros_like(self.mean), None if self.momentum is None else xp.zeros_like(self.var))

    @classmethod
    @checks_names
    def init(
        cls,
        shape: int | tuple[int, ...],
        *,
        like: LikeT,
        momentum: float | None = 0.9,
        correction: float = 0,
        debias: bool = False,
    ) -> "RunningStats[LikeT]":
        """Mean 0 and variance 1, nothing seen.

        Parameters
        ----------
        shape : int or tuple of int
            That of the mean and the variance: the number of channels, or the shape of the kept axes.
        like : array
            Gives the library, the device and the dtype: float32 for 2-byte floats, else its own.
        momentum, correction, debias
            As in the class.

        Returns
        -------
        RunningStats

        Raises
        ------
        TypeError, ValueError
            If an argument is of the wrong kind, or a length is negative.
        """
        lengths = shape if isinstance(shape, tuple) else (shape,)
        lengths = tuple([check_int("shape", n, "an int or a tuple of ints") for n in lengths])
        if min(lengths, default=0) < 0:
            raise ValueError(f"shape must be at least 0, got {shape}")
        library = library_of("like", like)
        dtype = compute_dtype(library, "like", like)
        mean = library.zeros(lengths, like, dtype)
        made = RunningStats(
            mean, library.xp.ones_like(mean), 0, momentum=momentum, correction=correction, debias=debias
        )
        if made.debias and made.momentum is not None:
            object.__setattr__(made, "_updates", 0)
        return made

    def update(self, moments: Moments[Any]) -> "RunningStats[ArrayT]":
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
        batch = batch._replace(var=corrected(batch.var, moments.count, self.correction))
        count = [] if number else [counts.floating(library, moments.count, dtype)]
        updates, some = self._updates, []
        shares: Any = (self.momentum, 1 - self.momentum)
        if updates is not None:
            if is_number(updates):
                shares = _debiased(self.momentum, updates, math.expm1)
            else:
                shares, some = None, [library.astype(updates, dtype)]
            updates = updates + (1 if number else library.astype(count[0] > 0, library.xp.int32))
        work = partial(_moved, self.momentum, shares)
        mean, rest, var, var_rest = library.quietly(work, mean, rest, var, var_rest, *batch, *some, *count)
        counted = counts.added(library, self._counted, moments._counted)
        return self._with(mean, rest, var, var_rest, counted, updates)

    def std(self) -> ArrayT:
        """The standard deviation of each channel: the square root of `var`, which `correction` is in already.

        Returns
        -------
        array
            Of the shape and dtype of `var`.
        """
        return Moments(self.mean, self.var, 0).std()

    def merge(self, other: "RunningStats[Any]") -> "RunningStats[ArrayT]":
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
        return self._with(joint.mean, joint.mean_lo, corrected(joint.var, counted[0], self.correction), None, counted)

    def _biased(self) -> Moments[ArrayT]:
        """These statistics with the variance divided by count, in the dtype that they are computed in."""
        mean, rest, var = stats_of(self, compute_dtype(library_of("mean", self.mean), "mean", self.mean))
        if not is_number(self.count) or self.count > 0:
            var = corrected(var, self.count, self.correction, back=True)
        return Moments._with_rest(mean, rest, var, *self._counted)

    def _with(
        self, mean: Any, rest: Any, var: Any, var_rest: Any, counted: counts.Counted, updates: Any = None
    ) -> "RunningStats[ArrayT]":
        library, dtype = library_of("mean", self.mean), self.mean.dtype  # type: ignore[attr-defined]
        mean, rest = cast_with(library, mean, rest, dtype)
        var, var_rest = cast_with(library, var, var_rest, dtype)
        conventions = {"momentum": self.momentum, "correction": self.correction, "debias": self.debias}
        others: dict[str, Any] = {"_var_rest": var_rest, "_updates": updates, **conventions}
        return RunningStats._with_rest(mean, rest, var, *counted, **others)

    def _options(self) -> dict[str, Any]:
        """Without what an older anynorm would not know, where it makes no difference."""
        options, updates = super()._options(), self._updates
        if not self.debias:
            del options["debias"]
        return options | ({"_updates": updates} if is_number(updates) else {})

    @classmethod
    def _made(cls, parts: dict[str, Any]) -> Self:
        made = super()._made(parts)
        updates: Any = made._updates
        if updates is None:
            return made
        if not made.debias or made.momentum is None:
            raise ValueError("a state that is not debiased must have no number of updates, got one")
        if is_number(updates):
            check_real("updates", check_int("updates", updates), least=0)
        elif tuple(updates.shape) not in ((), tuple(made.mean.shape)) or "int" not in plain_name(updates.dtype):  # type: ignore[attr-defined]
            raise ValueError(f"updates must be integers, one or as many as means, got {describe(updates)}")
        return made


def _debiased(momentum: Any, updates: Any, expm1: Callable[[Any], Any]) -> tuple[Any, Any]:
    """The shares of the old statistics and of the batch, after so many updates.

    They are those of a mean that began at 0, divided by the weight that it has then seen, 1 - momentum**updates.
    """
    if momentum == 1:
        return 1.0, 0.0
    rate = math.log(max(momentum, LEAST))
    before, after = -expm1(updates * rate), -expm1((updates + 1) * rate)
    return momentum * before / after, (1 - momentum) / after


def _moved(momentum: float, shares: Any, xp: Namespace, *arrays: Array) -> tuple[Array, ...]:
    """Mean, variance and what rounding took from each, moved toward those of a batch by these shares.

    The arrays are (mean, rest, var, var_rest), (mean, rest, var) of the batch, where there are no `shares` the number
    of updates that they follow from, and the count of the batch where that is an array.
    """
    mean, rest, var, var_rest, batch_mean, batch_rest, batch_var, *count = arrays
    if shares is None:
        shares = _debiased(momentum, count.pop(0), xp.expm1)
    moved = (
        *weighted_mean(xp, (mean, rest), (batch_mean, batch_rest), shares),
        *weighted_mean(xp, (var, var_rest), (batch_var, xp.zeros_like(batch_var)), shares),
    )
    if not count:
        return moved
    return tuple(xp.where(count[0] > 0, new, old) for new, old in zip(moved, arrays[:4], strict=True))
