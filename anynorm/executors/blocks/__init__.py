"""Large arrays of the host, block by block: in little memory, each block in the cache while it is worked on."""

from anynorm.executors.blocks.gradients import backward
from anynorm.executors.blocks.normalizing import forward, statistics
from anynorm.executors.blocks.parts import supports

__all__ = ["backward", "forward", "statistics", "supports"]
