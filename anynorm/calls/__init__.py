"""One call of a norm: its arguments, checked before anything is computed, and what they determine."""

from anynorm.calls.call import Call, Wanted, at_once
from anynorm.calls.conditions import (
    exact_product,
    extent_of,
    folds,
    in_range,
    resolved,
    root,
    significant,
    within_spread,
)
from anynorm.calls.plan import MOST_PLANS, Fit, Plan
from anynorm.calls.prepare import batch, chunk, direction, group, instance, over, rms, weight
from anynorm.calls.results import Gradients, Normalized
from anynorm.calls.views import from_view, statistic, to_view
from anynorm.calls.weights import counted, ready, weighed, weighted_sums

__all__ = [
    "MOST_PLANS",
    "Call",
    "Fit",
    "Gradients",
    "Normalized",
    "Plan",
    "Wanted",
    "at_once",
    "batch",
    "chunk",
    "counted",
    "direction",
    "exact_product",
    "extent_of",
    "folds",
    "from_view",
    "group",
    "in_range",
    "instance",
    "over",
    "ready",
    "resolved",
    "rms",
    "root",
    "significant",
    "statistic",
    "to_view",
    "weighed",
    "weight",
    "weighted_sums",
    "within_spread",
]
