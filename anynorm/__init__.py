"""Neural-network normalization for any array library."""

from anynorm.gradients import vjp
from anynorm.norms import batch_norm, group_norm, instance_norm, layer_norm, moments, normalize, rms_norm, weight_norm
from anynorm.settings import options
from anynorm.state import RunningStats, WeightNorm
from anynorm.statistics import Moments

__version__ = "0.1.0"

__all__ = [
    "Moments",
    "RunningStats",
    "WeightNorm",
    "batch_norm",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "moments",
    "normalize",
    "options",
    "rms_norm",
    "vjp",
    "weight_norm",
]
