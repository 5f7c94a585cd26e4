"""Means and variances as values: `Statistics`, the base of `Moments` and `RunningStats`, and how two are merged."""

from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Self

from anynorm.arrays import counts
from anynorm.arrays.checks import check_count, check_device, check_variance, compute_dtype, same_shape
from anynorm.arrays.convert import Bits, from_bits, moved, shown, split_bits
from anynorm.arrays.counts import Counted, is_number
from anynorm.arrays.library import Library
from anynorm.arrays.pytree import flush_pytrees
from anynorm.arrays.recognize import library_beside, library_of, one_library
from anynorm.kernels import Array, Namespace, Stats, merge, recast
from anynorm.values import ArrayT, Value


@dataclass(frozen=True, eq=False, repr=False)
class Statistics(Value[ArrayT]):
    """A mean and a variance for each group, and the number of values behind each of them."""

    mean: ArrayT
    var: ArrayT
    count: Any
    _rest: Any = field(init=False, default=None)
    """What rounding took from the mean, where it is kept: mean + rest has twice the digits."""
    _var_rest: Any = field(init=False, default=None)
    """The same of the variance."""
    _count_rest: Any = field(init=False, default=None)
    """The same of an array of counts, where there is no float64."""

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
        if not is_number(count):
            count, rest = counts.widened(library, count)
            object.__setattr__(self, "_count_rest", rest)
        object.__setattr__(self, "count", count)

    def __repr__(self) -> str:
        count = self.count if is_number(self.count) else shown(self.count) or describe(self.count)
        mean, std = shown(self.mean), shown(self.var, root=True)
        numbers = "" if mean is None or std is None else f", mean={mean}, std={std}"
        options = {each.name: getattr(self, each.name) for each in fields(self) if each.kw_only}
        conventions = "".join(f", {name}={each}" for name, each in options.items() if each is not False)
        return f"{type(self).__name__}({describe(self.mean)}{numbers}, count={count}{conventions})"

    @classmethod
    def _with_rest(
        cls, mean: ArrayT, rest: Any, var: ArrayT, count: Any, count_rest: Any = None, **others: Any
    ) -> Self:
        """Statistics that the library computed and need not check, of mean + rest, to twice the digits."""
        flush_pytrees()
        made = object.__new__(cls)
        values = {"mean": mean, "var": var, "count": count, "_rest": rest, "_count_rest": count_rest}
        for name, value in (values | others).items():
            object.__setattr__(made, name, value)
        return made

    def _carrying(self, rest: Any, var_rest: Any = None, count_rest: Any = None) -> Self:
        """These, new as they are, with what rounding took from their mean, variance and count."""
        for name, each in (("_rest", rest), ("_var_rest", var_rest), ("_count_rest", count_rest)):
            if each is not None:
                object.__setattr__(self, name, each)
        return self

    @property
    def _counted(self) -> Counted:
        return self.count, self._count_rest

    @classmethod
    def _made(cls, parts: dict[str, Any]) -> Self:
        made = super()._made(parts)
        for name in ("mean", "var", "count"):
            rest, of = getattr(made, "_rest" if name == "mean" else f"_{name}_rest"), getattr(made, name)
            if rest is None:
                continue
            if is_number(of) or not same_shape(_shape(rest), _shape(of)) or rest.dtype != of.dtype:
                raise ValueError(f"the rest of {name} must be as it is, {describe(of)}, got {describe(rest)}")
        return made

    def _cast(self, dtype: Any) -> dict[str, Any]:
        library = library_of("mean", self.mean)
        mean, rest = cast_with(library, self.mean, self._rest, dtype)
        var, var_rest = cast_with(library, self.var, self._var_rest, dtype)
        return {"mean": mean, "_rest": rest, "var": var, "_var_rest": var_rest}

    def _moved(self, like: Any) -> dict[str, Any]:
        if is_number(self.count):
            return super()._moved(like)
        there, (count, rest) = library_beside(like), self._counted
        parts = {name: moved(name, x, like) for name, x in self._arrays().items() if name not in _COUNTED}
        if rest is None and not there.has_float64(like):
            count, rest = counts.pair(library_of("count", count).xp, count)
        count, rest = (None if each is None else moved("count", each, like) for each in (count, rest))
        return parts | dict(zip(_COUNTED, counts.kept(there, count, rest), strict=True))

    @classmethod
    def _loaded(cls, bits: dict[str, Bits], like: Any) -> dict[str, Any]:
        there, bits = library_beside(like), dict(bits)
        if "count" not in bits:
            return super()._loaded(bits, like)
        count, rest = bits.pop("count"), bits.pop("_count_rest", None)
        parts = super()._loaded(bits, like)
        if rest is None and not there.has_float64(like):
            count, rest = split_bits(count)
        found = (None if each is None else from_bits(each, like) for each in (count, rest))
        return parts | dict(zip(_COUNTED, counts.kept(there, *found), strict=True))


_COUNTED = ("count", "_count_rest")


def check_alike(these: Statistics[Any], name: str, others: Statistics[Any]) -> None:
    """An error unless the statistics in the argument `name` are of the library, shape and device of `these`."""
    library = one_library(**{"mean": these.mean, f"{name}.mean": others.mean})
    mean, other = _shape(these.mean), _shape(others.mean)
    if not same_shape(mean, other):
        raise ValueError(f"{name} must have the shape of the statistics they join, {mean}, got {other}")
    check_device(library, "mean", these.mean, f"{name}.mean", others.mean)


def merged_statistics(these: Statistics[ArrayT], others: Statistics[ArrayT]) -> tuple[Stats, Counted]:
    """Mean, biased variance and count of both together, from mean and biased variance of each."""
    library = library_of("mean", these.mean)
    dtype = library.xp.result_type(*(compute_dtype(library, "mean", value.mean) for value in (these, others)))
    first, second = stats_of(these, dtype), stats_of(others, dtype)
    counted = counts.added(library, these._counted, others._counted)
    each = [counts.floating(library, value.count, dtype) for value in (these, others)]
    known = tuple(count if is_number(count) else None for count in each)
    arrays = [count for count in each if not is_number(count)]
    return Stats(*library.quietly(partial(_merged, known), *first, *second, *arrays)), counted


def _merged(known: tuple[float | None, ...], xp: Namespace, *parts: Array) -> Stats:
    """Two statistics, by counts: those that are known, and behind the six arrays those that are arrays."""
    first, second, left = Stats(*parts[:3]), Stats(*parts[3:6]), iter(parts[6:])
    one, other = (next(left) if count is None else count for count in known)
    both = one + other
    if None not in known:
        if one and other:
            return merge(xp, first, second, (one / both, other / both))
        return Stats(*(part * 1.0 for part in (second if other else first)))  # not the arrays of another state
    some = xp.where(both > 0, both, xp.ones_like(both))
    one, other = one + xp.zeros_like(both), other + xp.zeros_like(both)
    shares = [xp.astype(count / some, first.mean.dtype, copy=False) for count in (one, other)]
    joint = merge(xp, first, second, (shares[0], shares[1]))

    def pick(first: Array, second: Array, joint: Array) -> Array:
        return xp.where(other == 0, first, xp.where(one == 0, second, joint))

    return Stats(*map(pick, first, second, joint))


def corrected(var: Any, count: Any, correction: float, *, back: bool = False) -> Any:
    """The variance of `count` values divided by count - correction, from the biased one; or `back`."""
    if not correction:
        return var
    number = is_number(count)
    if number and count <= correction:
        raise ValueError(
            (
                f"statistics of one value have no variance with correction={correction}, got count {count}"
                if count == 1
                else f"count must be more than correction={correction}, got {count}"
            )
            + ": leave this batch out, or keep statistics with correction=0"
        )
    library = library_of("var", var)
    work = partial(_corrected, correction, count if number else None, back)
    return library.quietly(work, var, *([] if number else [counts.floating(library, count, var.dtype)]))[0]


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


def stats_of(these: Statistics[Any], dtype: Any) -> Stats:
    """Mean, rest and variance in a dtype."""
    library = library_of("mean", these.mean)
    mean, rest = cast_with(library, these.mean, these._rest, dtype)
    return Stats(mean, rest, cast_with(library, these.var, these._var_rest, dtype)[0])


def cast_with(library: Library, value: Array, rest: Array | None, dtype: Any) -> tuple[Array, Array | None]:
    """A number and its rest, if it has one, in a dtype."""
    if rest is None:
        return library.astype(value, dtype), None
    if value.dtype == dtype == rest.dtype:
        return value, rest
    found: tuple[Array, Array] = library.quietly(partial(_recast, dtype), value, rest)
    return found


def _recast(dtype: Any, xp: Namespace, value: Array, rest: Array) -> tuple[Array, Array]:
    return recast(xp, value, rest, dtype)


def describe_with_numbers(x: Array) -> str:
    """Library, dtype and shape, and the numbers where they are few and can be read."""
    numbers = shown(x)
    return describe(x) if numbers is None else f"{describe(x)} {numbers}"


def describe(x: Array) -> str:
    """Library, dtype and shape."""
    try:
        library = library_of("x", x).name
    except TypeError:
        return type(x).__name__  # a placeholder that JAX put into a pytree
    return f"{library} {str(x.dtype).rpartition('.')[2]} {_shape(x)}"


def _shape(x: Any) -> tuple[int, ...]:
    return tuple(x.shape)
