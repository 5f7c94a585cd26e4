"""One call of a norm: its arguments, checked before anything is computed, and what they determine."""

from anynorm.calls.call import Call, Wanted, compiled
from anynorm.calls.plan import Fit, Plan
from anynorm.calls.prepare import batch, chunk, direction, group, instance, over, rms, weight
from anynorm.calls.results import Gradients, Normalized
from anynorm.calls.weights import counted, ready, weighed, weighted_sums

__all__ = [
    "Call",
    "Fit",
    "Gradients",
    "Normalized",
    "Plan",
    "Wanted",
    "batch",
    "chunk",
    "compiled",
    "counted",
    "direction",
    "group",
    "instance",
    "over",
    "ready",
    "rms",
    "weighed",
    "weight",
    "weighted_sums",
]
