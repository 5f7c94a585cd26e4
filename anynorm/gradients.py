"""`vjp`: a norm and the pullback of a cotangent through it, in plain array API, as `jax.vjp` for every library."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from anynorm import calls, compilers, kernels, norms, schedules
from anynorm.arrays import Library, check_device, compute_dtype, one_library, pytree
from anynorm.calls import Call
from anynorm.kernels import Array, Groups, Standardized
from anynorm.layouts import Layout, same_shape
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
        device, dtype and shape; None for a parameter that is None. It may be called more than once.

    Raises
    ------
    TypeError
        If `norm` is not one of this library's, or as the norm does; from the pullback, if dy is not a real floating
        array of x's library.
    ValueError
        As the norm does; from the pullback, if dy has not the shape and the device of y.

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
    >>> bool(np.isclose(dx.sum(), 0)), dgamma.round(3)
    (True, array([-0.926,  0.   ,  0.   ]))
    """
    arguments = _arguments(norm, x, params, options)
    wants_moments, given = arguments.pop("return_moments", False), arguments.get("moments")
    call = _CALLS[norm](**arguments)
    compiler = compilers.chosen(call)
    if compiler == "none" or compilers.records(call):
        compiler = "none"
        standardized = schedules.standardize(call)
        y = schedules.affine(call, standardized)
    else:
        y, standardized = schedules.compiled(call, compiler, keep=True)
        y = schedules.restore(call.library, call.layout, y, call.x.dtype)
    arrays = [name for name in arguments if name in ("x", "gamma", "beta", "v", "g")]
    params_passed = arrays[1 : _arity(arrays, arguments, params)]
    # what the pullback keeps is its own: the caller may do to y and to gamma what they like
    pullback = Pullback(
        standardized=standardized if call.gamma is not None or call.beta is not None else _copied(standardized),
        gamma=None if call.gamma is None else call.gamma * 1.0,
        library=call.library,
        layout=call.layout,
        groups=call.groups,
        centred=call.centred,
        given=call.mean is not None,
        dtype=call.x.dtype,
        compiler=compiler,
        parameters=tuple(_primal(call.layout, arguments[name]) for name in params_passed),
    )
    if not wants_moments:
        return y, pullback
    return (y, norms.moments_of(call, standardized) if given is None else given), pullback


class _Primal(NamedTuple):
    """What the gradient of a parameter must look like."""

    shape: tuple[int, ...]
    full: tuple[int, ...]
    """The shape beside the view of x."""
    dtype: Any


@pytree("standardized", "gamma")
@dataclass(frozen=True, eq=False, repr=False)
class Pullback:
    """From a cotangent of y to those of x and of each parameter; a JAX pytree where JAX is imported."""

    standardized: Standardized
    gamma: Array | None
    library: Library
    layout: Layout
    groups: Groups
    centred: bool
    given: bool
    """Whether the moments were, and are constants."""
    dtype: Any
    """The dtype of x."""
    compiler: str
    parameters: tuple[_Primal | None, ...]

    def __call__(self, dy: Array, /) -> tuple[Array | None, ...]:
        """The gradients of sum(y * dy)."""
        library, xp, xhat = self.library, self.library.xp, self.standardized.xhat
        one_library(y=xhat, dy=dy)
        compute_dtype(library, "dy", dy)
        if not same_shape(tuple(dy.shape), self.layout.shape):
            raise ValueError(f"dy must have the shape of y, {self.layout.shape}, got {tuple(dy.shape)}")
        check_device(library, "y", xhat, "dy", dy)
        with library.quiet():
            if self.compiler in ("torch", "jax") and library.present(dy) and library.present(xhat):
                return self._compiled(dy)
            dy = schedules.enter(library, self.layout, dy, xhat.dtype)
            groups = None if self.given else self.groups
            dx = kernels.input_gradient(xp, dy, self.gamma, self.standardized, groups=groups, centred=self.centred)
            gradients = [schedules.restore(library, self.layout, dx, self.dtype)]
            for primal, factor in zip(self.parameters, (xhat, None), strict=False):
                gradients.append(None if primal is None else self._parameter(dy, factor, primal))
        return tuple(gradients)

    def __repr__(self) -> str:
        return f"Pullback({describe(self.standardized.xhat)})"

    def _compiled(self, dy: Array) -> tuple[Array | None, ...]:
        library = self.library
        dx, *found = compilers.gradients(
            self.compiler,
            library,
            schedules.enter(library, self.layout, dy, dy.dtype),
            self.gamma,
            self.standardized,
            groups=None if self.given else self.groups,
            centred=self.centred,
            shapes=[None if primal is None else primal.full for primal in self.parameters],
            dtype=self.dtype,
        )
        gradients = [schedules.restore(library, self.layout, dx, self.dtype)]
        for primal, d in zip(self.parameters, found, strict=True):
            gradients.append(
                primal and library.xp.astype(library.xp.reshape(d, primal.shape), primal.dtype, copy=False)
            )
        return tuple(gradients)

    def _parameter(self, dy: Array, factor: Array | None, primal: _Primal) -> Array:
        xp, summand = self.library.xp, kernels.affine(dy, factor, None)
        d = kernels.parameter_gradient(xp, summand, primal.full, block=self.groups.block)
        return xp.astype(xp.reshape(d, primal.shape), primal.dtype, copy=False)


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


def _primal(layout: Layout, parameter: Array | None) -> _Primal | None:
    if parameter is None:
        return None
    shape = tuple(parameter.shape)
    return _Primal(shape, layout.full(shape) or shape, parameter.dtype)


def _copied(standardized: Standardized) -> Standardized:
    return standardized._replace(xhat=standardized.xhat * 1.0)
