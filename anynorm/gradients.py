"""`vjp`: a norm and the pullback of a cotangent through it, in plain array API, as `jax.vjp` for every library."""

import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from anynorm import batches, calls, chunks, compilers, fused, norms, schedules
from anynorm.arrays import check_bool, check_device, compute_dtype, memory_order, one_library, pytree
from anynorm.calls import Call, Fit, Plan
from anynorm.combinations import Wanted
from anynorm.kernels import Array, Spread, Standardized
from anynorm.layouts import same_shape
from anynorm.library import Library
from anynorm.pullbacks import pull
from anynorm.statistics import describe
from anynorm.weights import Weights


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
        device, dtype and shape; None for a parameter that is None. It may be called more than once. It keeps x, as
        PyTorch's autograd does, and no copy: x is not to be written to before the last call.

    Raises
    ------
    TypeError
        If `norm` is not one of this library's, or as the norm does; from the pullback, if dy is not a real floating
        array of x's library.
    ValueError
        As the norm does; from the pullback, if dy has not the shape and the device of y, or if x is seen to have been
        written to: in PyTorch where autograd would see it; in NumPy by a look at some of its numbers; else never.

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
    of: Standardized | Spread
    with plan.library.quiet():
        # what the pullback keeps is its own, but for x: the caller may do to gamma, y and the moments what they like
        kept, gamma = None, None if call.gamma is None else call.gamma * 1.0
        if call.spread is not None:
            call = call._replace(spread=Spread(*(None if each is None else each * 1.0 for each in call.spread)))
        if call.weights is not None and not plan.library.chunked:
            each = plan.library.xp.asarray(call.weights.each, copy=True)
            call = call._replace(weights=call.weights._replace(each=each))
        arrays = schedules.arrays(call)
        if chunks.takes(call):  # an array of Dask cannot be written to
            kept, (y, of) = call.x, chunks.normalize(call)
            spread = of
        elif compilers.chosen(call, arrays) != "none" or fused.takes(call, arrays) or schedules.in_blocks(call):
            kept = plan.library.constant(call.x)
            if call.out is not None and plan.library.overlap(call.x, call.out):
                kept = plan.library.xp.asarray(kept, copy=True)
            y, of = schedules.normalize(call)
            spread = of
        else:
            of = schedules.standardize(call)
            y, spread = schedules.affine(call, of), of.spread
            if call.gamma is None and call.beta is None:
                of = of._replace(xhat=of.xhat * 1.0)
            if call.out is not None:
                call.out[...] = y
                y = call.out
    names = [name for name in arguments if name in ("x", "gamma", "beta", "v", "g")]
    params_passed = names[1 : _arity(names, arguments, params)]
    parameters = tuple(_primal(arguments[name], plan.beta if name == "beta" else plan.gamma) for name in params_passed)
    pullback = Pullback(
        of=of,
        x=kept,
        mark=_Mark.of(plan.library, kept) if call.spread is None or any(parameters[:1]) else None,
        gamma=gamma,
        given=call.spread,
        weights=call.weights,
        all_reduce=call.all_reduce,
        chunks=call.chunks,
        plan=plan,
        dtype=call.x.dtype,
        compiler=call.compiler,
        parameters=parameters,
    )
    if not wants_moments:
        return y, pullback
    return (y, batches.moments_of(call, spread) if given is None else given), pullback


class _Primal(NamedTuple):
    """What the gradient of a parameter must look like."""

    shape: tuple[int, ...]
    full: tuple[int, ...]
    """The shape beside the view of x."""
    dtype: Any


class _Mark:
    """What one array was like; another is not held to it. All are equal, and so are pytrees that differ in them."""

    def __init__(self, x: Array, value: Hashable) -> None:
        self._id, self._value = id(x), value

    @staticmethod
    def of(library: Library, x: Array | None) -> "_Mark | None":
        """That of an array, if the library can tell."""
        value = None if x is None else library.mark(x)
        return None if value is None else _Mark(x, value)

    def was_written_to(self, library: Library, x: Array) -> bool:
        """Whether it is the array, and no longer what it was."""
        return id(x) == self._id and library.mark(x) != self._value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Mark)

    def __hash__(self) -> int:
        return 0


@pytree("of", "x", "gamma", "given", "weights")
@dataclass(frozen=True, eq=False, repr=False)
class Pullback:
    """From a cotangent of y to those of x and of each parameter; a JAX pytree where JAX is imported."""

    of: Standardized | Spread
    """What x was standardized to; or, where x is kept, its statistics."""
    x: Array | None
    mark: "_Mark | None"
    """Of x, where it is kept, is read, and the library can tell."""
    gamma: Array | None
    given: Spread | None
    """The statistics, where moments were given: they are constants."""
    weights: Weights | None
    all_reduce: Callable[[Array], Any] | None
    chunks: Any
    """Those of Dask that x came in."""
    plan: Plan
    dtype: Any
    """The dtype of x."""
    compiler: str
    parameters: tuple[_Primal | None, ...]

    def __call__(self, dy: Array, /) -> tuple[Array | None, ...]:
        """The gradients of sum(y * dy)."""
        plan, library, kept = self.plan, self.plan.library, self._kept
        one_library(y=kept, dy=dy)
        compute_dtype(library, "dy", dy)
        if not same_shape(tuple(dy.shape), plan.layout.shape):
            raise ValueError(f"dy must have the shape of y, {plan.layout.shape}, got {tuple(dy.shape)}")
        check_device(library, "y", kept, "dy", dy)
        if self.mark is not None and not library.traced() and self.mark.was_written_to(library, self.x):
            raise ValueError("x must be to the pullback what it was to vjp, got memory that was written to in between")
        return self._beside(dy)._pull(dy)

    def _pull(self, dy: Array) -> tuple[Array | None, ...]:
        plan, library, xp = self.plan, self.plan.library, self.plan.library.xp
        wanted = Wanted(self.dtype, tuple(None if primal is None else primal.full for primal in self.parameters))
        with library.quiet():
            call = Call(plan, self.x, self.gamma, None, self.given, None, self.compiler, self.weights, self.all_reduce)
            dy = schedules.enter(plan, dy, dtype=plan.dtype if library.chunked else dy.dtype)
            if chunks.takes(call):
                dx, *gradients = chunks.pull(call, dy, wanted)
                found = [chunks.restore(plan, dx, self.dtype, self.chunks)]
            else:
                dx, *gradients = pull(call, dy, wanted, self.of)
                found = [schedules.restore(plan, dx, self.dtype)]
            for primal, d in zip(self.parameters, gradients, strict=True):
                if primal is not None:
                    d = xp.astype(self._shaped(d, primal.shape), primal.dtype, copy=False)
                found.append(d)
        return tuple(found)

    def _shaped(self, gradient: Array, shape: tuple[int, ...]) -> Array:
        """The gradient of a parameter in its shape; Dask reshapes nothing to sizes that it does not know."""
        xp, kept, rank = self.plan.library.xp, self.plan.layout.parameter_axes, gradient.ndim
        if all(n == n for n in shape):
            return xp.reshape(gradient, shape)
        return gradient if rank == len(shape) else xp.squeeze(gradient, axis=tuple({*range(rank)} - {*kept}))

    def _beside(self, dy: Array) -> "Pullback":
        """Itself; for a dy of another order in memory than x, one in a view whose axes are one in that memory too."""
        plan, library = self.plan, self.plan.library
        if not isinstance(self.of, Spread) or not library.plain(dy):
            return self
        order = memory_order(library, dy)
        if order is not None and plan.layout.order(order) == plan.view.order:
            return self
        whole = plan.layout.view(plan.layout.shape)
        view = plan.view.parted(whole, library.strides(library.xp.reshape(dy, whole)))
        if view == plan.view:
            return self

        def beside(shape: tuple[int, ...]) -> tuple[int, ...]:
            return plan.view.beside(view, shape, whole)

        def entered(array: Array | None) -> Array | None:
            return None if array is None else library.xp.reshape(array, beside(tuple(array.shape)))

        return replace(
            self,
            of=Spread(*map(entered, self.of)),
            x=entered(self.x),
            gamma=entered(self.gamma),
            given=self.given and Spread(*map(entered, self.given)),
            weights=self.weights and Weights(*map(entered, self.weights)),
            plan=plan._replace(view=view, groups=plan.groups._replace(axes=view.axes)),
            parameters=tuple(each and each._replace(full=beside(each.full)) for each in self.parameters),
        )

    def __repr__(self) -> str:
        return f"Pullback({describe(self._kept)})"

    @property
    def _kept(self) -> Array:
        return self.x if isinstance(self.of, Spread) else self.of.xhat


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


def _arguments(
    norm: Callable[..., Any], x: Array, params: tuple[Array | None, ...], options: dict[str, Any]
) -> dict[str, Any]:
    """Every argument of the norm by its name."""
    signature = _SIGNATURES.get(norm) if inspect.isfunction(norm) else None
    if signature is None:
        names = ", ".join(each.__name__ for each in _CALLS)
        raise TypeError(f"norm must be one of anynorm's {names}, got {getattr(norm, '__name__', norm)!r}")
    try:
        bound = signature.bind(x, *params, **options)
    except TypeError as error:
        raise TypeError(f"{norm.__name__}: {error}") from None
    bound.apply_defaults()
    return dict(bound.arguments)


def _arity(arrays: list[str], arguments: dict[str, Any], params: tuple[Array | None, ...]) -> int:
    """How many gradients: as many as arrays were passed, by position or, those before them included, by name."""
    last = max(index for index, name in enumerate(arrays) if index == 0 or arguments[name] is not None)
    return max(last, len(params)) + 1


def _primal(parameter: Array | None, fit: Fit | None) -> _Primal | None:
    return None if parameter is None or fit is None else _Primal(tuple(parameter.shape), fit.shape, parameter.dtype)
