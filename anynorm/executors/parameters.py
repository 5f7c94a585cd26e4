"""What the gradients of parameters need, on whole arrays and in blocks."""

from collections.abc import Sequence

from anynorm import kernels
from anynorm.calls import Call, Plan
from anynorm.kernels import Array, Outputs


def near_power(call: Call, rstd: Array) -> Array | None:
    """For `kernels.input_gradient`."""
    if call.gamma is None or call.gamma_last:
        return None
    xp, limits = call.plan.library.xp, call.plan.limits
    power = kernels.power_of_two(xp, rstd)
    return xp.minimum(
        power, xp.ones_like(power) * (limits.step * limits.further)
    )  # sums of what it makes do not overflow


def parameter_gradients(
    plan: Plan,
    dy: Array,
    xhat: Array,
    shapes: Sequence[tuple[int, ...] | None],
    *,
    block: float | None,
    ones: Array | None,
    places: Outputs = kernels.NEW,
) -> list[Array | None]:
    """Of a gamma, or of a gamma and a beta, of these shapes; None for None."""
    return [
        None
        if shape is None
        else kernels.parameter_gradient(plan.library.xp, dy, factor, shape, block=block, ones=ones, ops=places.product)
        for shape, factor in zip(shapes, (xhat, None), strict=False)
    ]


def run_of_ones(plan: Plan, dy: Array) -> Array | None:
    """A run of ones as long as the sums over dy need."""
    if not plan.library.blas_sums:
        return None
    n = max(kernels.LEADING, min(dy.shape[-1], kernels.RUN))
    return plan.library.xp.ones(n, dtype=plan.dtype, device=plan.library.device(dy))
