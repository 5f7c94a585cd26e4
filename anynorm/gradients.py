"""`vjp`: a norm and the pullback of a cotangent through it, in plain array API, as `jax.vjp` for every library."""

import inspect
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, Generic, Literal, NamedTuple, TypeVar, TypeVarTuple, cast, overload

from anynorm import batches, executors, norms
from anynorm.arrays.checks import check_bool, check_device, check_known_sizes, compute_dtype, same_shape
from anynorm.arrays.convert import beside
from anynorm.arrays.library import Library
from anynorm.arrays.pytree import pytree
from anynorm.arrays.recognize import leading_library
from anynorm.calls import Call, Fit, Norm, Plan, Wanted, layouts, prepare
from anynorm.kernels import Array, Standardized, Stats
from anynorm.kernels.weighting import Weights
from anynorm.keywords import refuse
from anynorm.statistics import Statistics, describe

ArrayT = TypeVar("ArrayT")
GivenT = TypeVar("GivenT", bound=Statistics[Any])
Params = TypeVarTuple("Params")


@overload
def vjp(
    norm: Callable[..., Any], x: ArrayT, /, *params: *Params, return_moments: Literal[False] = False, **options: Any
) -> "tuple[ArrayT, Pullback[ArrayT, *Params]]": ...
@overload
def vjp(
    norm: Callable[..., Any], x: ArrayT, /, *params: *Params, return_moments: Literal[True],
    moments: None = None, **options: Any,
) -> "tuple[tuple[ArrayT, batches.Moments[ArrayT]], Pullback[ArrayT, *Params]]": ...  # fmt: skip
@overload
def vjp(
    norm: Callable[..., Any], x: ArrayT, /, *params: *Params, return_moments: Literal[True],
    moments: GivenT, **options: Any,
) -> "tuple[tuple[ArrayT, GivenT], Pullback[ArrayT, *Params]]": ...  # fmt: skip
def vjp(norm: Callable[..., Any], x: ArrayT, /, *params: *Params, **options: Any) -> tuple[Any, Any]:
    r"""The value of a norm, and its pullback: from a cotangent of y to those of x and of each parameter.

    With :math:`\hat{x} = (x - \mu) r`, :math:`r = 1 / \sqrt{\sigma^2 + \epsilon}`, :math:`g = \gamma \, dy` and
    means over the elements that share a mean and a variance:

    .. math:: dx = r \, (g - E(g) - \hat{x} \, E(g \hat{x})), \qquad
        d\gamma = \sum dy \, \hat{x}, \qquad d\beta = \sum dy

    Parameters
    ----------
    norm : function
        One of `normalize`, `layer_norm`, `batch_norm`, `instance_norm`, `group_norm`, `rms_norm`, `weight_norm`,
        `center`, `denormalize`.
    x : array
        The norm's first argument; v for `weight_norm`, y for `denormalize`.
    *params : array or None
        Its other arrays: gamma and beta; g for `weight_norm`, beta for `center`.
    **options
        Its options. Given ``moments=`` are constants.

    Returns
    -------
    y : array
        What the norm returns; with ``return_moments=True``, (y, moments), of which moments take no cotangent.
    pullback : function
        ``dx, dgamma, dbeta = pullback(dy)``: for x and each of `params` the gradient of sum(y * dy), of its library,
        device, dtype and shape; None for a parameter that is None, and for an x of integers. It may be called more than
        once, copied and, without `all_reduce`, pickled. It keeps x, as PyTorch's autograd does, and no copy: x is not
        to be written to before the last call.

    Raises
    ------
    TypeError
        If `norm` is not one of this library's, or as the norm does; from the pullback, if dy is not a real floating
        array of x's library.
    ValueError
        As the norm does, or if Dask does not know a size; from the pullback, if dy has not the shape and the device of
        y, or if x is seen to have been written to: in PyTorch where autograd would see it, else never.

    References
    ----------
    Ioffe & Szegedy, "Batch Normalization", ICML 2015, section 3; Salimans & Kingma, "Weight Normalization", NeurIPS
    2016, eq. 3.

    Examples
    --------
    >>> import numpy as np, anynorm
    >>> x, gamma = np.array([[1.0, 2.0, 6.0]]), np.ones(3)
    >>> y, pullback = anynorm.vjp(anynorm.layer_norm, x, gamma, axis=-1)
    >>> dx, dgamma = pullback(np.array([[1.0, 0.0, 0.0]]))
    >>> bool(np.isclose(dx.sum(), 0)), float(dgamma[0].round(3))
    (True, -0.926)
    """
    entry, arrays, options = _arguments(norm, x, params, options)
    wants_moments, moments = options.pop("return_moments", False), options.get("moments")
    if type(wants_moments) is not bool:
        check_bool("return_moments", wants_moments)
    no_gamma = [] if entry.norm.divides else [None]
    given = [arrays[0], *no_gamma, *arrays[1:]]
    call = prepare(entry.norm, tuple([options.pop(name) for name in entry.norm.options]), *given, **options)
    plan = call.plan
    if plan.library.takes_numpy:
        arrays = [beside(plan.library, x, *each) for each in zip(entry.arrays, arrays, strict=True)]
    if plan.library.chunked:
        check_known_sizes(plan.library, **dict(zip(entry.arrays, arrays, strict=True)))
    (y, stats), call, of = executors.linearize(call)
    while len(arrays) > 1 + len(params) and arrays[-1] is None:  # one that was given by name has those before it
        arrays.pop()
    fits = (plan.gamma, plan.beta)
    parameters = tuple([_primal(array, fit) for array, fit in zip([*no_gamma, *arrays[1:]], fits, strict=False)])
    reads_x = call.reads_x or (len(parameters) > 0 and parameters[0] is not None)
    pullback: Pullback[Any, *tuple[Any, ...]] = Pullback(
        of=of,
        x=call.x,
        version=_version(plan.library, call.x) if reads_x else None,
        gamma=call.gamma,
        beta=call.beta,
        given=call.stats,
        weights=call.weights,
        all_reduce=call.all_reduce,
        chunks=call.chunks,
        plan=plan,
        dtype=plan.of_x,
        parameters=parameters,
    )
    if not wants_moments:
        return y, pullback
    return (y, batches.moments_of(call, stats) if moments is None else moments), pullback


class _Primal(NamedTuple):
    """What the gradient of a parameter must look like."""

    shape: tuple[int, ...]
    full: tuple[int, ...]
    """The shape beside the view of x."""
    dtype: Any


def _version(library: Library, x: Array | None) -> tuple[int, int] | None:
    """Which array it is, and how often it has been written to, if the library counts that."""
    count = None if x is None or library.traced() else library.version(x)
    return None if count is None else (id(x), count)


@pytree("of", "x", "gamma", "beta", "given", "weights")
@dataclass(frozen=True, eq=False, repr=False)
class Pullback(Generic[ArrayT, *Params]):
    """From a cotangent of y to those of x and of each parameter; a JAX pytree where JAX is imported."""

    of: Standardized | Stats
    """What x was standardized to; or, where x is kept, its statistics."""
    x: Array | None
    version: tuple[int, int] | None
    """Of x, where it is kept and read; another array is not held to it."""
    gamma: Array | None
    beta: Array | None
    """On the way back, which needs it."""
    given: Stats | None
    """The statistics, where moments were given: they are constants."""
    weights: Weights | None
    all_reduce: Callable[[Array], Any] | None
    chunks: Any
    """Those of Dask that x came in."""
    plan: Plan
    dtype: Any
    """The dtype of x; None where it has integers, and no gradient."""
    parameters: tuple[_Primal | None, ...]

    def __call__(self, dy: ArrayT, /) -> tuple[ArrayT, *Params]:
        """The gradients of sum(y * dy)."""
        library, kept, given = self.plan.library, self._kept, cast(Any, dy)
        same = library.one_device and type(dy) is type(kept) and given.dtype == self.dtype
        if not same or given.shape != self.plan.layout.shape:
            dy = self._check(dy)
        before, now = self.version, None if self.version is None else _version(library, self.x)
        if before is not None and now is not None and now[0] == before[0] and now != before:
            raise ValueError("x must be to the pullback what it was to vjp, got memory that was written to in between")
        return cast("tuple[ArrayT, *Params]", self._pull(dy))

    def _check(self, dy: Array) -> Array:
        plan, library, kept = self.plan, self.plan.library, self._kept
        leading_library(y=kept, dy=dy)
        compute_dtype(library, "dy", dy)
        check_known_sizes(library, dy=dy)
        if not same_shape(library.sizes(dy), plan.layout.shape):
            raise ValueError(f"dy must have the shape of y, {plan.layout.shape}, got {tuple(dy.shape)}")
        check_device(library, "y", kept, "dy", dy)
        return beside(library, kept, "dy", dy)

    def _pull(self, dy: Array) -> tuple[Array | None, ...]:
        plan, library = self.plan, self.plan.library
        wanted = Wanted(self.dtype, tuple([None if primal is None else primal.full for primal in self.parameters]))
        call = Call(plan, self.x, self.gamma, self.beta, self.given, None, self.weights, self.all_reduce, self.chunks)
        with library.quiet():
            dx, *gradients = executors.backward(call, dy, wanted, self.of)
            for i, (primal, d) in enumerate(zip(self.parameters, gradients, strict=True)):
                if primal is not None and d is not None:
                    d = d if tuple(d.shape) == primal.shape else library.reshape(d, primal.shape)
                    gradients[i] = d if d.dtype == primal.dtype else library.astype(d, primal.dtype)
        return dx, *(gradients if plan.divides else gradients[1:])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pullback[ArrayT, *Params]":
        try:
            return Pullback(**{each.name: deepcopy(getattr(self, each.name), memo) for each in fields(self)})
        except RuntimeError as error:  # PyTorch copies no tensor with a history
            raise TypeError(
                "a pullback of what autograd records cannot be deep-copied: detach what vjp is given"
            ) from error

    def __repr__(self) -> str:
        return f"Pullback({describe(self._kept)})"

    @property
    def _kept(self) -> Array:
        return self.x if isinstance(self.of, Stats) else self.of.xhat


class _Entry(NamedTuple):
    """A norm as `vjp` calls it."""

    norm: Norm
    signature: inspect.Signature
    arrays: list[str]
    """The names of what is passed by position."""
    by_name: frozenset[str]
    """What may be passed by name."""
    required: frozenset[str]
    defaults: dict[str, Any]
    """Of all but the arrays."""


def _entry(function: Callable[..., Any], norm: Norm) -> _Entry:
    signature = inspect.signature(function)
    arguments = signature.parameters.values()
    arrays = [argument.name for argument in arguments if argument.kind is not argument.KEYWORD_ONLY]
    return _Entry(
        norm,
        signature,
        arrays,
        frozenset(argument.name for argument in arguments if argument.kind is not argument.POSITIONAL_ONLY),
        frozenset(argument.name for argument in arguments if argument.default is argument.empty),
        {argument.name: argument.default for argument in arguments if argument.name not in arrays},
    )


_NORMS: dict[Callable[..., Any], Norm] = {
    norms.normalize: layouts.NORMALIZE,
    norms.layer_norm: layouts.LAYER,
    norms.batch_norm: layouts.BATCH,
    norms.instance_norm: layouts.INSTANCE,
    norms.group_norm: layouts.GROUP,
    norms.rms_norm: layouts.RMS,
    norms.weight_norm: layouts.WEIGHT,
    norms.center: layouts.CENTER,
    norms.denormalize: layouts.DENORMALIZE,
}
_ENTRIES = {function: _entry(function, norm) for function, norm in _NORMS.items()}


def _arguments(
    norm: Callable[..., Any], x: Array, params: tuple[Array | None, ...], options: dict[str, Any]
) -> tuple[_Entry, list[Array | None], dict[str, Any]]:
    """The norm, its arrays in their order, and all its other arguments by their names."""
    entry = _ENTRIES.get(norm) if inspect.isfunction(norm) else None
    if entry is None:
        names = ", ".join(function.__name__ for function in _ENTRIES)
        found = norm if isinstance(norm, str) else getattr(norm, "__name__", type(norm).__name__)
        raise TypeError(f"norm must be one of anynorm's {names}, got {found!r:.60}")
    if not entry.by_name.issuperset(options):
        refuse([name for name in options if name not in entry.by_name], norm)
    arrays, passed = [x, *params], entry.arrays[: 1 + len(params)]
    # in a list, as Dynamo takes no generator
    twice = any([name in options for name in passed])  # noqa: C419
    if twice or len(arrays) > len(entry.arrays) or not entry.required.issubset([*passed, *options]):
        try:
            entry.signature.bind(x, *params, **options)
        except TypeError as error:
            raise TypeError(f"{norm.__name__}: {error}") from None
    every = entry.defaults | options
    arrays += [every.pop(name, None) for name in entry.arrays[len(passed) :]]
    return entry, arrays, every


def _primal(parameter: Array | None, fit: Fit | None) -> _Primal | None:
    return None if parameter is None or fit is None else _Primal(tuple(parameter.shape), fit.shape, parameter.dtype)
