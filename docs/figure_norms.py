"""Draw Figure 1, which elements share a mean and a variance, from what the library does: `python docs/figure_norms.py`.

After figure 2 of Wu & He, "Group Normalization", ECCV 2018. No axis is written here: an element is blue where it moves
when the first one is moved.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import anynorm

Array = Any
Point = tuple[float, float]

FILE = Path(__file__).with_name("figure-norms.svg")
SHAPE = (6, 6, 3, 2)
"""N, C, H and W of the tensor that is drawn; H and W share an axis of the picture."""


class Panel(NamedTuple):
    """A norm, as it is called on the tensor x."""

    title: str
    call: str
    norm: Callable[[Array], Array]


PANELS = (
    Panel("Batch norm", "batch_norm(x)", anynorm.batch_norm),
    Panel("Layer norm", "layer_norm(x, axis=(1, 2, 3))", lambda x: anynorm.layer_norm(x, axis=(1, 2, 3))),
    Panel("Instance norm", "instance_norm(x)", anynorm.instance_norm),
    Panel("Group norm", "group_norm(x, groups=2)", lambda x: anynorm.group_norm(x, groups=2)),
)


def shares_statistics(norm: Callable[[Array], Array]) -> Array:
    """Which elements are normalized with the same mean and variance as the first: those that move when it is moved."""
    x = np.random.default_rng(0).standard_normal(SHAPE)
    moved = x.copy()
    moved[0, 0, 0, 0] += 1000.0
    return norm(moved) != norm(x)


CELL = 13.5
"""The edge of an element, in pixels."""
WIDTH, HEIGHT = 224.0, 268.0
"""Of a panel."""
BLUE = {"top": "#6d9fd8", "left": "#3f7fc4", "right": "#2f66a3"}
GREY = {"top": "#e6e9ed", "left": "#d8dde3", "right": "#c9d0d8"}
TEXT = "#24292f"


def draw() -> str:
    """The picture, as SVG."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(PANELS) * WIDTH:g} {HEIGHT:g}" '
        f'width="{len(PANELS) * WIDTH:g}" height="{HEIGHT:g}" font-family="Helvetica, Arial, sans-serif" '
        f'text-anchor="middle" fill="{TEXT}" role="img">',
        "<title>The elements in blue are normalized by the same mean and variance</title>",
        '<rect width="100%" height="100%" rx="8" fill="#ffffff"/>',
    ]
    for index, panel in enumerate(PANELS):
        lines += _panel(panel, (index + 0.5) * WIDTH)
    return "\n".join([*lines, "</svg>", ""])


def _panel(panel: Panel, middle: float) -> Iterator[str]:
    n, c, *space = SHAPE
    h = int(np.prod(space))
    blue = shares_statistics(panel.norm).reshape(n, c, h)
    bottom = 212.0

    def at(i: float, j: float, k: float) -> Point:
        """Where on the page: N runs to the left and back, C to the right and back, H and W down."""
        return middle + (j - i) * CELL * 0.866, bottom - (i + j) * CELL * 0.5 - (h - k) * CELL

    yield f'<text x="{middle:g}" y="30" font-size="16" font-weight="bold">{panel.title}</text>'
    yield '<g stroke="#ffffff" stroke-width="1" stroke-linejoin="round">'
    for i, j in np.ndindex(n, c):
        yield _face("top", blue[i, j, 0], at(i, j, 0), at(i + 1, j, 0), at(i + 1, j + 1, 0), at(i, j + 1, 0))
    for i, k in np.ndindex(n, h):
        yield _face("left", blue[i, 0, k], at(i, 0, k), at(i + 1, 0, k), at(i + 1, 0, k + 1), at(i, 0, k + 1))
    for j, k in np.ndindex(c, h):
        yield _face("right", blue[0, j, k], at(0, j, k), at(0, j + 1, k), at(0, j + 1, k + 1), at(0, j, k + 1))
    yield "</g>"
    for text, (x, y), (dx, dy) in (
        ("N", at(n / 2, 0, h), (-12, 14)),
        ("C", at(0, c / 2, h), (12, 14)),
        ("H, W", at(n, 0, h / 2), (-20, 5)),
    ):
        yield f'<text x="{x + dx:.1f}" y="{y + dy:.1f}" font-size="13">{text}</text>'
    yield f'<text x="{middle:g}" y="247" font-size="11.5" font-family="Menlo, Consolas, monospace">{panel.call}</text>'


def _face(side: str, blue: bool, *corners: Point) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    return f'<polygon points="{points}" fill="{(BLUE if blue else GREY)[side]}"/>'


if __name__ == "__main__":
    FILE.write_text(draw())
