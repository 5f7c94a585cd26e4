"""What the gradients of parameters need, on whole arrays and in blocks."""

from collections.abc import Sequence

from anynorm import kernels
from anynorm.calls import Plan
from anynorm.kernels import Array, Outputs


def near_power(plan: Plan, gamma: Array | None, rstd: Array) -> Array | None:
    """For `kernels.input_gradient`."""
    if gamma is None or kernels.one_per_group(gamma, plan.view.axes):
        return None
    return kernels.power_of_two(plan.library.xp, rstd)


def parameter_gradients(
    plan: Plan,
    dy: Array,
    xhat: Array,
    shapes: Sequence[tuple[int, ...] | None],
    *,
    block: int | None,
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
    n = max(kernels.LEADING, min(dy.shape[-1], kernels.RUN))
    return plan.library.xp.ones(n, dtype=plan.dtype, device=plan.library.device(dy)) if plan.library.blas_sums else None
