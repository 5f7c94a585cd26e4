"""From the shapes of the caller to those that are computed in, and back."""

from typing import Any

from anynorm.calls.call import Call
from anynorm.calls.plan import Plan
from anynorm.kernels import Array


def to_view(plan: Plan, value: Array, *, dtype: Any) -> Array:
    """An array of the caller's shape in the view and this dtype."""
    return plan.to_view(plan.library.astype(value, dtype))


def from_view(plan: Plan, value: Array, dtype: Any) -> Array:
    """An array of the view in the caller's shape and this dtype."""
    return plan.library.astype(plan.from_view(value), dtype)


def statistic(call: Call, value: Any) -> Array:
    """A mean, a variance or a norm, of the shape that the caller sees, as a constant."""
    plan = call.plan
    xp = plan.library.xp
    value = plan.library.constant(xp.squeeze(value, axis=plan.view.axes))
    return xp.reshape(value, plan.layout.kept_shape) if plan.view.joined else value
