"""Neural-network normalization for any array library."""

from anynorm.batches import Moments
from anynorm.checkpoints import NormParams, from_checkpoint, to_checkpoint
from anynorm.folding import fold, fold_next
from anynorm.gradients import vjp
from anynorm.norms import (
    batch_norm,
    center,
    denormalize,
    group_norm,
    instance_norm,
    layer_norm,
    moments,
    normalize,
    rms_norm,
    weight_norm,
)
from anynorm.saving import load, save
from anynorm.settings import options
from anynorm.state import RunningStats
from anynorm.weight import WeightNorm

__version__ = "0.1.0"

__all__ = [
    "Moments",
    "NormParams",
    "RunningStats",
    "WeightNorm",
    "batch_norm",
    "center",
    "denormalize",
    "fold",
    "fold_next",
    "from_checkpoint",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "load",
    "moments",
    "normalize",
    "options",
    "rms_norm",
    "save",
    "to_checkpoint",
    "vjp",
    "weight_norm",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
