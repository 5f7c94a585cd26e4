"""`vjp`: a norm and the pullback of a cotangent through it, in plain array API, as `jax.vjp` for every library."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from anynorm import calls, kernels, norms, schedules
from anynorm.arrays import check_device, compute_dtype, one_library
from anynorm.calls import Call
from anynorm.kernels import Array, Standardized
from anynorm.layouts import same_shape

Pullback = Callable[[Array], tuple[Array | None, ...]]


def vjp(norm: Callable[..., Any], x: Array, /, *params: Array | None, **options: Any) -> tuple[Any, Pullback]:
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
    standardized = schedules.standardize(call)
    y = schedules.affine(call, standardized)
    # what the pullback keeps is its own: the caller may do to y and to gamma what they like, and x is not needed
    if call.gamma is None and call.beta is None:
        standardized = standardized._replace(xhat=standardized.xhat * 1.0)
    kept = call._replace(x=None, gamma=None if call.gamma is None else call.gamma * 1.0)
    arrays = [name for name in arguments if name in ("x", "gamma", "beta", "v", "g")]
    params_passed = arrays[1 : _arity(arrays, arguments, params)]
    pullback = partial(_pull, kept, standardized, call.x.dtype, [_Primal.of(arguments[name]) for name in params_passed])
    if not wants_moments:
        return y, pullback
    return (y, norms.moments_of(call, standardized) if given is None else given), pullback


class _Primal(NamedTuple):
    """What the gradient of a parameter must look like."""

    shape: tuple[int, ...]
    dtype: Any

    @classmethod
    def of(cls, array: Array | None) -> "_Primal | None":
        return None if array is None else cls(tuple(array.shape), array.dtype)


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


def _pull(
    call: Call, standardized: Standardized, dtype: Any, parameters: list[_Primal | None], dy: Array, /
) -> tuple[Array | None, ...]:
    library, xp = call.library, call.library.xp
    one_library(y=standardized.xhat, dy=dy)
    compute_dtype(library, "dy", dy)
    if not same_shape(tuple(dy.shape), call.layout.shape):
        raise ValueError(f"dy must have the shape of y, {call.layout.shape}, got {tuple(dy.shape)}")
    check_device(library, "y", standardized.xhat, "dy", dy)
    with library.quiet():
        dy = xp.astype(dy, standardized.xhat.dtype, copy=False)
        if call.layout.channel is not None:
            dy = xp.reshape(dy, tuple(standardized.xhat.shape))
        groups = call.groups if call.mean is None else None
        dx = kernels.input_gradient(xp, dy, call.gamma, standardized, groups=groups, centred=call.centred)
        gradients = [schedules.restore(call, dx, dtype)]
        summands = (dy * standardized.xhat, dy)
        for primal, parameter, summand in zip(parameters, (call.gamma, call.beta), summands, strict=False):
            if primal is None:
                gradients.append(None)
                continue
            d = kernels.parameter_gradient(xp, summand, parameter, block=call.groups.block)
            gradients.append(xp.astype(xp.reshape(d, primal.shape), primal.dtype, copy=False))
    return tuple(gradients)
