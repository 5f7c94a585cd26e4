"""`vjp`: a norm and the pullback of a cotangent through it, in plain array API, as `jax.vjp` for every library."""

import inspect
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from anynorm import batches, calls, norms
from anynorm.arrays import check_bool, check_device, check_known_sizes, compute_dtype, one_library, pytree
from anynorm.arrays.library import Library
from anynorm.calls import Call, Fit, Plan, Wanted, views
from anynorm.executors import eager, whole
from anynorm.executors.dask import chunks
from anynorm.kernels import Array, Standardized, Stats
from anynorm.kernels.weighting import Weights
from anynorm.keywords import refuse
from anynorm.statistics import describe


def vjp(norm: Callable[..., Any], x: Array, /, *params: Array | None, **options: Any) -> tuple[Any, "Pullback"]:
    r"""The value of a norm, and its pullback: from a cotangent of y to those of x and of each parameter.

    With :math:`\hat{x} = (x - \mu) r`, :math:`r = 1 / \sqrt{\sigma^2 + \epsilon}`, :math:`g = \gamma \, dy` and
    means over the elements that share a mean and a variance:

    .. math:: dx = r \, (g - E(g) - \hat{x} \, E(g \hat{x})), \qquad
        d\gamma = \sum dy \, \hat{x}, \qquad d\beta = \sum dy

    Parameters
    ----------
    norm : function
        One of `normalize`, `layer_norm`, `batch_norm`, `instance_norm`, `group_norm`, `rms_norm`, `weight_norm`.
    x : array
        The norm's first argument; v for `weight_norm`.
    *params : array or None
        Its other arrays: gamma and beta; g for `weight_norm`.
    **options
        Its options. Given ``moments=`` are constants.

    Returns
    -------
    y : array
        What the norm returns; with ``return_moments=True``, (y, moments), of which moments take no cotangent.
    pullback : function
        ``dx, dgamma, dbeta = pullback(dy)``: for x and each of `params` the gradient of sum(y * dy), of its library,
        device, dtype and shape; None for a parameter that is None. It may be called more than once, copied and, without
        `all_reduce`, pickled. It keeps x, as PyTorch's autograd does, and no copy: x is not to be written to before the
        last call.

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
    arguments = _arguments(norm, x, params, options)
    wants_moments, given = arguments.pop("return_moments", False), arguments.get("moments")
    check_bool("return_moments", wants_moments)
    call = _CALLS[norm](**arguments)
    plan = call.plan
    names = [name for name in arguments if name in ("x", "gamma", "beta", "v", "g")]
    if plan.library.chunked:
        check_known_sizes(plan.library, **{name: arguments[name] for name in names})
    of: Standardized | Stats
    with plan.library.quiet():
        # what the pullback keeps is its own, but for x: the caller may do to gamma, y and the moments what they like
        kept, gamma = None, None if call.gamma is None else call.gamma * 1.0
        if call.stats is not None:
            call = call._replace(stats=Stats(*(None if each is None else each * 1.0 for each in call.stats)))
        if call.weights is not None and not plan.library.chunked:
            each = plan.library.xp.asarray(call.weights.each, copy=True)
            call = call._replace(weights=call.weights._replace(each=each))
        if chunks.takes(call):  # an array of Dask cannot be written to
            kept, (y, of) = call.x, chunks.forward(call)
            stats = of
        elif eager.keeps_x(call):
            kept = plan.library.constant(call.x)
            if call.out is not None and plan.library.overlap(call.x, call.out):
                kept = plan.library.xp.asarray(kept, copy=True)
            y, of = eager.forward(call)
            stats = of
        else:
            call = calls.weighed(call)
            y, of = whole.standardized(call)
            stats = of.stats
            if call.gamma is None and call.beta is None:
                of = of._replace(xhat=of.xhat * 1.0)
            if call.out is not None:
                call.out[...] = y
                y = call.out
    params_passed = names[1 : _arity(names, arguments, params)]
    parameters = tuple(_primal(arguments[name], plan.beta if name == "beta" else plan.gamma) for name in params_passed)
    pullback = Pullback(
        of=of,
        x=kept,
        version=_version(plan.library, kept) if call.stats is None or any(parameters[:1]) else None,
        gamma=gamma,
        given=call.stats,
        weights=call.weights,
        all_reduce=call.all_reduce,
        chunks=call.chunks,
        plan=plan,
        dtype=call.x.dtype,
        parameters=parameters,
    )
    if not wants_moments:
        return y, pullback
    return (y, batches.moments_of(call, stats) if given is None else given), pullback


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


@pytree("of", "x", "gamma", "given", "weights")
@dataclass(frozen=True, eq=False, repr=False)
class Pullback:
    """From a cotangent of y to those of x and of each parameter; a JAX pytree where JAX is imported."""

    of: Standardized | Stats
    """What x was standardized to; or, where x is kept, its statistics."""
    x: Array | None
    version: tuple[int, int] | None
    """Of x, where it is kept and read; another array is not held to it."""
    gamma: Array | None
    given: Stats | None
    """The statistics, where moments were given: they are constants."""
    weights: Weights | None
    all_reduce: Callable[[Array], Any] | None
    chunks: Any
    """Those of Dask that x came in."""
    plan: Plan
    dtype: Any
    """The dtype of x."""
    parameters: tuple[_Primal | None, ...]

    def __call__(self, dy: Array, /) -> tuple[Array | None, ...]:
        """The gradients of sum(y * dy)."""
        library, kept = self.plan.library, self._kept
        same = library.kind is None and type(dy) is type(kept) and dy.dtype == self.dtype
        if not same or dy.shape != self.plan.layout.shape:
            self._check(dy)
        before, now = self.version, None if self.version is None else _version(library, self.x)
        if before is not None and now is not None and now[0] == before[0] and now != before:
            raise ValueError("x must be to the pullback what it was to vjp, got memory that was written to in between")
        return self._pull(dy)

    def _check(self, dy: Array) -> None:
        plan, library, kept = self.plan, self.plan.library, self._kept
        one_library(y=kept, dy=dy)
        compute_dtype(library, "dy", dy)
        check_known_sizes(library, dy=dy)
        if tuple(dy.shape) != plan.layout.shape:
            raise ValueError(f"dy must have the shape of y, {plan.layout.shape}, got {tuple(dy.shape)}")
        check_device(library, "y", kept, "dy", dy)

    def _pull(self, dy: Array) -> tuple[Array | None, ...]:
        plan, library = self.plan, self.plan.library
        wanted = Wanted(self.dtype, tuple(None if primal is None else primal.full for primal in self.parameters))
        with library.quiet():
            call = Call(plan, self.x, self.gamma, None, self.given, None, self.weights, self.all_reduce)
            dy = views.to_view(plan, dy, dtype=plan.dtype if library.chunked else dy.dtype)
            if chunks.takes(call):
                dx, *gradients = chunks.backward(call, dy, wanted)
                found = [chunks.from_view(plan, dx, self.dtype, self.chunks)]
            else:
                dx, *gradients = eager.backward(call, dy, wanted, self.of)
                found = [views.from_view(plan, dx, self.dtype)]
            for primal, d in zip(self.parameters, gradients, strict=True):
                if primal is not None and d is not None:
                    d = d if tuple(d.shape) == primal.shape else library.xp.reshape(d, primal.shape)
                    d = d if d.dtype == primal.dtype else library.astype(d, primal.dtype)
                found.append(d)
        return tuple(found)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pullback":
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


_CALLS: dict[Callable[..., Any], Callable[..., Call]] = {
    norms.normalize: calls.over,
    norms.layer_norm: calls.over,
    norms.batch_norm: calls.batch,
    norms.instance_norm: calls.instance,
    norms.group_norm: calls.group,
    norms.rms_norm: calls.rms,
    norms.weight_norm: calls.weight,
}
_SIGNATURES = {norm: inspect.signature(norm) for norm in _CALLS}
_DEFAULTS = {
    norm: {name: each.default for name, each in signature.parameters.items()} for norm, signature in _SIGNATURES.items()
}
_BY_POSITION, _BY_NAME = (
    {
        norm: [name for name, each in signature.parameters.items() if each.kind is not other]
        for norm, signature in _SIGNATURES.items()
    }
    for other in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_ONLY)
)


def _arguments(
    norm: Callable[..., Any], x: Array, params: tuple[Array | None, ...], options: dict[str, Any]
) -> dict[str, Any]:
    """Every argument of the norm by its name."""
    signature = _SIGNATURES.get(norm) if inspect.isfunction(norm) else None
    if signature is None:
        norms = ", ".join(each.__name__ for each in _CALLS)
        raise TypeError(f"norm must be one of anynorm's {norms}, got {getattr(norm, '__name__', norm)!r}")
    names = _BY_POSITION[norm][: 1 + len(params)]
    arguments = _DEFAULTS[norm] | dict(zip(names, (x, *params), strict=False)) | options
    if unknown := [name for name in options if name not in _BY_NAME[norm]]:
        refuse(unknown, norm)
    # in lists, as Dynamo takes no generator
    missing = any([each is inspect.Parameter.empty for each in arguments.values()])  # noqa: C419
    if missing or len(names) <= len(params) or any([name in options for name in names]):  # noqa: C419
        try:
            signature.bind(x, *params, **options)
        except TypeError as error:
            raise TypeError(f"{norm.__name__}: {error}") from None
    return arguments


def _arity(arrays: list[str], arguments: dict[str, Any], params: tuple[Array | None, ...]) -> int:
    """How many gradients: as many as arrays were passed, by position or, those before them included, by name."""
    last = len(arrays) - 1
    while last > len(params) and arguments[arrays[last]] is None:
        last -= 1
    return max(last, len(params)) + 1


def _primal(parameter: Array | None, fit: Fit | None) -> _Primal | None:
    return None if parameter is None or fit is None else _Primal(tuple(parameter.shape), fit.shape, parameter.dtype)
