"""One call of a norm: its arguments, checked before anything is computed, and what they determine."""

from anynorm.calls.call import Call, Gradients, Normalized, Wanted, compiled
from anynorm.calls.layouts import Norm
from anynorm.calls.plan import Fit, Plan
from anynorm.calls.prepare import prepare
from anynorm.calls.weights import counted, ready, weighed, weighted_sums

__all__ = [
    "Call",
    "Fit",
    "Gradients",
    "Norm",
    "Normalized",
    "Plan",
    "Wanted",
    "compiled",
    "counted",
    "prepare",
    "ready",
    "weighed",
    "weighted_sums",
]
