"""`Moments`: mean, variance and count of a batch, of many, and of parts that are merged."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from anynorm import calls, executors, kernels
from anynorm.arrays import counts
from anynorm.arrays.checks import check_real
from anynorm.arrays.counts import is_number
from anynorm.arrays.pytree import pytree
from anynorm.arrays.recognize import is_array, library_of
from anynorm.calls import Call
from anynorm.calls.layouts import MOMENTS
from anynorm.kernels import Array, Namespace, Stats
from anynorm.keywords import checks_names
from anynorm.statistics import Statistics, cast_with, check_alike, corrected, merged_statistics
from anynorm.values import ArrayT

SeenT = TypeVar("SeenT")  # pyright takes one of the class for unknown in a class method
Axis = int | tuple[int, ...] | None


@pytree("mean", "var", "count", "_rest", "_count_rest")
@checks_names
@dataclass(frozen=True, eq=False, repr=False)
class Moments(Statistics[ArrayT]):
    r"""Mean, biased variance and count of the values of each group.

    .. math:: \mu = \frac{1}{n} \sum_i x_i, \qquad \sigma^2 = \frac{1}{n} \sum_i (x_i - \mu)^2

    Parameters
    ----------
    mean, var : array, shape (\*kept,)
        One value for each group: the shape of x without the axes that were averaged over. float32 for arrays of
        2-byte floats, else of x's dtype. The variance has the square of x's unit.
    count : int, or array of shape (\*kept,) or ()
        The number of values in each group: one for all of them, or an array of counts, whole or not, of the same
        library, kept as int64 or float64 where it has these; under ``jax.jit`` a traced number.

    Raises
    ------
    TypeError
        If mean or var is not a real floating array, or they come from two libraries.
    ValueError
        If their shapes or devices differ, or a count or, where the numbers can be read, a variance is negative.

    Notes
    -----
    Frozen, compared by identity, a JAX pytree where JAX is imported. Moments carry no autograd graph. With the mean
    they keep, out of sight, what rounding took from it, so that merging loses no more than one pass over the data does.

    References
    ----------
    Chan, Golub & LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.

    Examples
    --------
    >>> import numpy as np, anynorm
    >>> batch = anynorm.moments(np.array([[1.0, 2.0], [3.0, 6.0]]), axis=0)
    >>> batch
    Moments(numpy float64 (2,), mean=[2. 4.], std=[1. 2.], count=2)
    >>> batch.mean, batch.var
    (array([2., 4.]), array([1., 4.]))
    """

    @classmethod
    @checks_names
    def over(
        cls,
        batches: Iterable[SeenT],
        *,
        axis: Axis,
        weights: Any = None,
        dtype: Any = None,
        progress: bool = False,
    ) -> "Moments[SeenT]":
        """The moments of all batches together, of which one at a time need be in memory.

        Parameters
        ----------
        batches : iterable of array
            Of one library, each of any number of samples: a list, a generator, parts of a memory-mapped file. Where
            they differ in dtype, the moments have that of the first's.
        axis : int, tuple of int or None
            The axes of each batch to take them over, as in `moments`.
        weights : array, iterable of array or function, optional
            How much each number counts, as in `moments`: an array that broadcasts to each of the batches, the weights
            of each batch in turn, or a function that makes them of a batch. ``numpy.isfinite`` makes NaN missing.
        dtype : str or dtype, optional
            That of the moments, as in `moments`; ``"float64"`` adds up float32 in float64.
        progress : bool
            Show a progress bar on stderr, if that is a terminal and the package rich is installed.

        Returns
        -------
        Moments
            As if `moments` had seen all batches at once.

        Raises
        ------
        TypeError
            If `batches` or `weights` is not iterable; and as in `moments`.
        ValueError
            If there is no batch, or not as many weights, or the statistics of two have different shapes; and as in
            `moments`.

        Examples
        --------
        >>> import numpy as np, anynorm
        >>> batches = (np.full((n, 2), float(n)) for n in (1, 3))
        >>> seen = anynorm.Moments.over(batches, axis=0)
        >>> seen.mean, seen.count
        (array([2.5, 2.5]), 4)

        Two parts of a series, with a value that is missing:

        >>> parts = [np.array([1.0, np.nan]), np.array([3.0])]
        >>> anynorm.Moments.over(parts, axis=0, weights=np.isfinite)
        Moments(numpy float64 (), mean=2., std=1., count=2.0)
        """
        if not isinstance(batches, Iterable):
            raise TypeError(f"batches must be an iterable of arrays, got {type(batches).__name__}")
        # equals are merged with equals, as in a tournament: the rounding errors grow with the logarithm of their number
        parts: list[Moments[SeenT]] = []
        pairs = _weighted(_shown(batches) if progress else batches, weights)
        for number, (batch, own) in enumerate(pairs, start=1):
            part: Moments[SeenT] = of(batch, axis=axis, weights=own, dtype=dtype)
            if parts:
                check_alike(parts[0], "batches", part)
            for _ in range((number & -number).bit_length() - 1):
                part = parts.pop().merge(part)
            parts.append(part)
        if not parts:
            raise ValueError("batches must hold at least one array, got none")
        merged = parts.pop()
        while parts:
            merged = parts.pop().merge(merged)
        return merged

    @checks_names
    def std(self, correction: float = 0) -> ArrayT:
        r"""The standard deviation of each group.

        .. math:: \sqrt{\frac{1}{n - \text{correction}} \sum_i (x_i - \mu)^2}

        Parameters
        ----------
        correction : float
            What is taken from the count before it divides: 0 as in the norms, 1 as in an estimate of the spread of what
            the values are a sample of. NumPy and SciPy call it ddof.

        Returns
        -------
        array
            Of the shape and dtype of `var`. NaN in a group whose count, in an array of counts, is not more than a
            correction above 0.

        Raises
        ------
        TypeError, ValueError
            If correction is not a number of at least 0, or not less than a count that is one for all groups.

        Examples
        --------
        >>> import numpy as np, anynorm
        >>> seen = anynorm.moments(np.array([10000, 10001, 10002], np.float32), axis=0)
        >>> float(seen.std(correction=1)), round(float(seen.std()), 4)
        (1.0, 0.8165)
        """
        correction = check_real("correction", correction, least=0)
        var = corrected(self.var, self.count, correction)
        library = library_of("var", var)
        few = [] if not correction or is_number(self.count) else [counts.floating(library, self.count, var.dtype)]
        return library.xp.reshape(library.quietly(partial(_root, correction), var, *few)[0], tuple(var.shape))  # type: ignore[no-any-return]

    @checks_names
    def scaled(self, factor: float) -> "Moments[ArrayT]":
        """The same moments of `factor` times as many values: what is merged with others counts so much more, or less.

        Parameters
        ----------
        factor : float
            At least 0.

        Returns
        -------
        Moments

        Raises
        ------
        TypeError, ValueError
            If factor is not a finite number of at least 0.

        Examples
        --------
        A mixture of two data sets, in which both have the same share:

        >>> import numpy as np, anynorm
        >>> large, small = (anynorm.moments(np.full(n, float(n)), axis=0) for n in (8, 2))
        >>> large.scaled(1 / large.count).merge(small.scaled(1 / small.count)).mean
        array(5.)
        """
        factor = check_real("factor", factor, least=0)
        count, rest = counts.scaled(library_of("mean", self.mean), self._counted, factor)
        return Moments._with_rest(self.mean, self._rest, self.var, count, rest)

    def merge(self, *others: "Moments[Any]") -> "Moments[ArrayT]":
        """The moments of all the values together, as if they had been taken in one pass.

        Parameters
        ----------
        *others : Moments
            Of the same library, shape and device.

        Returns
        -------
        Moments
            Exact, as in Chan, Golub & LeVeque (1979), eq. 2.1, in any order; a part, or a group of one, whose count
            is 0 changes nothing. Of the dtype of these.

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
        library, dtype = library_of("mean", self.mean), self.mean.dtype  # type: ignore[attr-defined]
        for other in others:
            joint, counted = merged_statistics(merged, other)
            mean, rest = cast_with(library, joint.mean, joint.mean_lo, dtype)
            merged = Moments._with_rest(mean, rest, library.astype(joint.var, dtype), *counted)
        return merged

    def __post_init__(self) -> None:
        super().__post_init__()
        self._carrying(library_of("mean", self.mean).xp.zeros_like(self.mean))


def _root(correction: float, xp: Namespace, var: Array, *count: Array) -> tuple[Array]:
    std = xp.sqrt(var)
    return (xp.where(count[0] > correction, std, xp.full_like(std, float("nan"))) if count else std,)


def _weighted(batches: Iterable[ArrayT], weights: Any) -> Iterator[tuple[ArrayT, Any]]:
    """Each batch with its weights."""
    if weights is None or is_array(weights):
        yield from ((batch, weights) for batch in batches)
    elif callable(weights):
        yield from ((batch, weights(batch)) for batch in batches)
    elif isinstance(weights, Iterable):
        given, end = iter(weights), object()
        for batch in batches:
            if (own := next(given, end)) is end:
                raise ValueError("weights must be as many as batches, got fewer")
            yield batch, own
        if next(given, end) is not end:
            raise ValueError("weights must be as many as batches, got more")
    else:
        raise TypeError(f"weights must be an array, an iterable of arrays or a function, got {type(weights).__name__}")


def of(x: ArrayT, *, axis: Axis, weights: Any = None, dtype: Any = None) -> Moments[ArrayT]:
    """The moments of one array."""
    call = calls.prepare(MOMENTS, (axis,), x, weights=weights, dtype=dtype)
    return moments_of(call, executors.statistics(call), call.plan.result)


def moments_of(call: Call, stats: Stats, dtype: Any = None) -> Moments[Any]:
    """The moments that a call took, as the caller sees them, in this dtype or that of the computation."""
    library = call.plan.library
    mean, mean_rest, var = library.quietly(partial(_copied, call.plan.dtype if dtype is None else dtype), *stats)
    count: Any = call.plan.layout.group_size
    rest: Any = None
    if call.weights is not None or count != count or call.plan.symbolic:  # no number yet
        count, rest = (None if value is None else call.statistic(value) for value in executors.count(call))
    mean, mean_rest, var = (call.statistic(value) for value in (mean, mean_rest, var))
    return Moments._with_rest(mean, mean_rest, var, count, rest)


def _copied(dtype: Any, xp: Namespace, *parts: Array) -> tuple[Array, ...]:
    """Statistics in a dtype, in new arrays: a gradient may need the others."""
    mean, rest, var = Stats(*parts).astype(xp, dtype)
    return *kernels.renormalized(xp, mean, rest), var * 1.0


def _shown(batches: Iterable[ArrayT]) -> Iterable[ArrayT]:
    """The same, with a progress bar where one can be shown."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return batches
    console = Console(stderr=True)
    return track(batches, "Moments", console=console, transient=True) if console.is_terminal else batches
