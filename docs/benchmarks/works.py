"""What is measured: a norm on a shape, forward or with its gradient."""

import math
from typing import Any, NamedTuple

Shape = tuple[int, ...]

WORDS = {
    "layer_norm": "layer norm",
    "rms_norm": "RMS norm",
    "batch_norm": "batch norm",
    "group_norm": "group norm",
    "instance_norm": "instance norm",
    "weight_norm": "weight norm",
}


class Work(NamedTuple):
    """A norm on a shape; for weight norm, x is v and gamma is g."""

    norm: str
    shape: Shape
    gradient: bool = False
    """With the gradient of x and of each parameter."""
    inference: bool = False
    """With a mean and a variance that are given."""
    masked: bool = False
    """With weights, a mask of a random half."""
    dy_mean: int = 0
    """The mean of dy, of which the standard deviation is 1."""
    channel_axis: int = 1
    """Of batch, group and instance norm."""
    groups: int = 1
    """Of group norm."""

    @property
    def title(self) -> str:
        """What a reader calls it, and the shape."""
        words = WORDS[self.norm] + (" + gradient" if self.gradient else "")
        notes = [f"{self.groups} groups"] if self.norm == "group_norm" else []
        notes += ["inference"] if self.inference else []
        notes += ["channels last"] if self.channel_axis == -1 else []
        notes += ["random half masked"] if self.masked else []
        notes += [f"dy of mean {self.dy_mean}"] if self.dy_mean else []
        return ", ".join([f"{words} {self.shape}", *notes])

    @property
    def size(self) -> int:
        """How many numbers x has."""
        return math.prod(self.shape)

    @property
    def options(self) -> dict[str, Any]:
        """How anynorm is told."""
        options: dict[str, Any] = {}
        if self.norm in ("batch_norm", "group_norm", "instance_norm"):
            options["channel_axis"] = self.channel_axis
        if self.norm == "group_norm":
            options["groups"] = self.groups
        return options

    @property
    def parameters(self) -> tuple[str, ...]:
        """The arrays beside x that have a gradient."""
        return ("gamma",) if self.norm in ("rms_norm", "weight_norm") else ("gamma", "beta")

    @property
    def parameter_shape(self) -> Shape:
        """Of gamma and beta."""
        if self.norm == "weight_norm":
            return self.shape[:1]
        return self.shape[-1:] if self.norm in ("layer_norm", "rms_norm") else (self.shape[self.channel_axis],)

    @property
    def beside(self) -> Shape:
        """The shape in which gamma and beta stand beside x."""
        axis = {"layer_norm": -1, "rms_norm": -1, "weight_norm": 0}.get(self.norm, self.channel_axis)
        beside = [1] * len(self.shape)
        beside[axis] = self.shape[axis]
        return tuple(beside)

    @property
    def view(self) -> Shape:
        """The shape of x in which whole axes share a mean and a variance."""
        if self.norm != "group_norm":
            return self.shape
        channel = self._channel
        split = (self.groups, self.shape[channel] // self.groups)
        return (*self.shape[:channel], *split, *self.shape[channel + 1 :])

    @property
    def axes(self) -> Shape:
        """The axes of the view that share a mean and a variance."""
        if self.norm in ("layer_norm", "rms_norm"):
            return (len(self.shape) - 1,)
        kept = {"batch_norm": {self._channel}, "weight_norm": {0}}.get(self.norm, {0, self._channel})
        return tuple(axis for axis in range(len(self.view)) if axis not in kept)

    @property
    def _channel(self) -> int:
        return self.channel_axis % len(self.shape)

    def shortened(self, most: int) -> "Work":
        """With a first axis so short that x has about as many numbers as that, and no fewer than two rows."""
        rows = max(2, most // math.prod(self.shape[1:]))
        return self._replace(shape=(min(rows, self.shape[0]), *self.shape[1:]))


WORKS = (
    Work("layer_norm", (8, 64)),
    Work("layer_norm", (64, 512)),
    Work("layer_norm", (4096, 1024)),
    Work("layer_norm", (4096, 1024), masked=True),
    Work("layer_norm", (8192, 4096)),
    Work("layer_norm", (262144, 64)),
    Work("rms_norm", (4096, 1024)),
    Work("rms_norm", (8192, 4096)),
    Work("batch_norm", (32, 64, 56, 56)),
    Work("batch_norm", (32, 64, 56, 56), masked=True),
    Work("batch_norm", (32, 56, 56, 64), channel_axis=-1),
    Work("batch_norm", (40, 64, 112, 112)),
    Work("batch_norm", (32, 64, 56, 56), inference=True),
    Work("group_norm", (32, 64, 56, 56), groups=32),
    Work("group_norm", (32, 56, 56, 64), groups=32, channel_axis=-1),
    Work("instance_norm", (32, 64, 56, 56)),
    Work("weight_norm", (4096, 4096)),
    Work("layer_norm", (32, 64), gradient=True),
    Work("layer_norm", (4096, 1024), gradient=True),
    Work("layer_norm", (4096, 1024), gradient=True, dy_mean=5),
    Work("layer_norm", (8192, 4096), gradient=True),
    Work("rms_norm", (4096, 1024), gradient=True),
    Work("batch_norm", (32, 64, 56, 56), gradient=True),
    Work("batch_norm", (32, 64, 56, 56), gradient=True, dy_mean=5),
    Work("batch_norm", (32, 56, 56, 64), channel_axis=-1, gradient=True),
    Work("batch_norm", (32, 64, 56, 56), inference=True, gradient=True),
    Work("group_norm", (32, 64, 56, 56), groups=32, gradient=True),
    Work("group_norm", (32, 56, 56, 64), groups=32, channel_axis=-1, gradient=True),
    Work("instance_norm", (32, 64, 56, 56), gradient=True),
    Work("weight_norm", (4096, 4096), gradient=True),
)
GIGABYTE = (
    Work("layer_norm", (65536, 4096)),
    Work("rms_norm", (65536, 4096)),
    Work("batch_norm", (320, 64, 112, 112)),
    Work("group_norm", (320, 64, 112, 112), groups=32),
    Work("layer_norm", (65536, 4096), gradient=True),
)
"""About 1 GB in float32: for a GPU."""
OF_EVERY_DTYPE = (
    Work("layer_norm", (4096, 1024)),
    Work("batch_norm", (32, 64, 56, 56)),
    Work("layer_norm", (4096, 1024), gradient=True),
    Work("batch_norm", (32, 64, 56, 56), gradient=True),
)
"""On a CPU the others are measured in float32 alone."""
