"""Means and variances as values: `Statistics`, the base of `Moments` and `RunningStats`, and how two are pooled."""

from dataclasses import dataclass, field, fields
from typing import Any, Self, TypeVar

from anynorm.arrays import (
    check_count,
    check_device,
    check_variance,
    compute_dtype,
    flush_pytrees,
    library_of,
    one_library,
)
from anynorm.files import Value
from anynorm.kernels import Array, Spread, merge
from anynorm.layouts import same_shape

ArrayT = TypeVar("ArrayT")
Count = Any
"""A Python number; or an array, one for each group or one for all of them. Under jax.jit, a traced number."""


@dataclass(frozen=True, eq=False, repr=False)
class Statistics(Value[ArrayT]):
    """A mean and a variance for each group, and the number of values behind each of them."""

    mean: ArrayT
    var: ArrayT
    count: Count
    _rest: Any = field(init=False, default=None)
    """What rounding took from the mean, where it is kept: mean + rest has twice the digits."""

    def __post_init__(self) -> None:
        flush_pytrees()
        library = one_library(mean=self.mean, var=self.var)
        for name in ("mean", "var"):
            compute_dtype(library, name, getattr(self, name))
        mean, var = _shape(self.mean), _shape(self.var)
        if not same_shape(mean, var):
            raise ValueError(f"var must have the shape of mean, {mean}, got {var}")
        check_device(library, "mean", self.mean, "var", self.var)
        count = check_count("count", self.count, self.mean)
        if not is_number(count) and _shape(count) and not same_shape(_shape(count), mean):
            raise ValueError(f"count must be a number or have the shape of mean, {mean}, got {_shape(count)}")
        check_variance(library, "var", self.var)
        object.__setattr__(self, "count", count)

    def __repr__(self) -> str:
        count = self.count if is_number(self.count) else describe(self.count)
        conventions = "".join(f", {each.name}={getattr(self, each.name)}" for each in fields(self) if each.kw_only)
        return f"{type(self).__name__}({describe(self.mean)}, count={count}{conventions})"

    @classmethod
    def _with_rest(cls, mean: ArrayT, rest: Any, var: ArrayT, count: Any, **conventions: Any) -> Self:
        """Statistics that the library computed and need not check, of mean + rest, to twice the digits."""
        flush_pytrees()
        made = object.__new__(cls)
        values = {"mean": mean, "var": var, "count": count, "_rest": rest}
        for name, value in (values | conventions).items():
            object.__setattr__(made, name, value)
        return made

    def _carrying(self, rest: Any) -> Self:
        """These, new as they are, with what rounding took from their mean."""
        object.__setattr__(self, "_rest", rest)
        return self

    @classmethod
    def _made(cls, parts: dict[str, Any]) -> Self:
        made = super()._made(parts)
        mean: Any = made.mean
        rest = made._rest
        if rest is not None and (not same_shape(_shape(rest), _shape(mean)) or rest.dtype != mean.dtype):
            raise ValueError(f"rest must be as mean, {describe(mean)}, got {describe(rest)}")
        return made

    def _cast(self, dtype: Any) -> dict[str, Any]:
        sample = spread_of(self).astype(library_of("mean", self.mean).xp, dtype)
        return {"mean": sample.mean, "var": sample.var} | ({} if self._rest is None else {"_rest": sample.rest})


def check_alike(these: Statistics[Any], name: str, others: Statistics[Any]) -> None:
    """An error unless the statistics in the argument `name` are of the library, shape and device of `these`."""
    library = one_library(**{"mean": these.mean, f"{name}.mean": others.mean})
    mean, other = _shape(these.mean), _shape(others.mean)
    if not same_shape(mean, other):
        raise ValueError(f"{name} must have the shape of the statistics they join, {mean}, got {other}")
    check_device(library, "mean", these.mean, f"{name}.mean", others.mean)


def pooled(these: Statistics[ArrayT], others: Statistics[ArrayT]) -> tuple[Spread, Count]:
    """Mean, biased variance and count of both together, from mean and biased variance of each."""
    xp, first, second = library_of("mean", these.mean).xp, widened(these), widened(others)
    count = added(these, others)
    if is_number(count):
        if these.count == 0 or others.count == 0:
            alone = first if others.count == 0 else second
            return Spread(*(each * 1.0 for each in alone)), count  # not the arrays of another state
        return merge(xp, first, second, (these.count / count, others.count / count)), count
    one, other = _counts(xp, these.count, others.count, first.mean.dtype)
    both = one + other
    some = xp.where(both > 0, both, xp.ones_like(both))
    joint = merge(xp, first, second, (one / some, other / some))

    def chosen(first: Array, second: Array, joint: Array) -> Array:
        return xp.where(other == 0, first, xp.where(one == 0, second, joint))

    return Spread(*map(chosen, first, second, joint)), count


def widened(these: Statistics[ArrayT]) -> Spread:
    """Mean and variance in the dtype that they are computed in."""
    library = library_of("mean", these.mean)
    dtype = compute_dtype(library, "mean", these.mean)
    return Spread(*(library.xp.astype(each, dtype, copy=False) for each in spread_of(these)))


def added(these: Statistics[Any], others: Statistics[Any]) -> Count:
    """The number of values in both."""
    one, other = these.count, others.count
    xp = library_of("mean", these.mean).xp

    def whole(count: Count) -> bool:
        return isinstance(count, int) if is_number(count) else xp.isdtype(count.dtype, "integral")

    if whole(one) is whole(other):
        return one + other
    # a whole number beside a fraction: the standard lets no integer array into a sum with one
    dtype = these.mean.dtype
    one, other = (xp.astype(each, dtype) if not is_number(each) and whole(each) else each for each in (one, other))
    return one + other


def is_number(count: Count) -> bool:
    """Whether it is a Python number, and not an array."""
    return isinstance(count, (int, float))


def describe(x: Array) -> str:
    """Library, dtype and shape, without the numbers."""
    try:
        library = library_of("x", x).name
    except TypeError:
        return type(x).__name__  # a placeholder that JAX put into a pytree
    return f"{library} {str(x.dtype).rpartition('.')[2]} {_shape(x)}"


def spread_of(these: Statistics[Any]) -> Spread:
    """Mean, rest and variance as they are kept."""
    xp = library_of("mean", these.mean).xp
    return Spread(these.mean, xp.zeros_like(these.mean) if these._rest is None else these._rest, these.var)


def _counts(xp: Any, one: Count, other: Count, dtype: Any) -> tuple[Array, Array]:
    """Both as floating arrays."""
    found = [each if is_number(each) else xp.astype(each, dtype) for each in (one, other)]
    nothing = xp.zeros_like(found[0] if is_number(found[1]) else found[1])
    return nothing + found[0], nothing + found[1]


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.shape)
