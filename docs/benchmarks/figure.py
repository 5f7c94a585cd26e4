"""The figure: how long each candidate takes, as a multiple of the native kernel."""

from pathlib import Path
from typing import Any

from candidates import COPY, PEER
from report import Report

# Okabe and Ito's colours, which colour-blind readers can tell apart: one for each library
COLOURS = {
    "NumPy": "#0072b2",
    "PyTorch": "#d55e00",
    "jax.jit": "#009e73",
    "torch.compile": "#f0b040",
    "CuPy": "#cc79a7",
}
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


def draw(report: Report, path: Path) -> bool:
    """Write the SVG, a panel for each dtype; False, and no file, where the native kernel was not measured."""
    dtypes = report.dtypes
    drawn = [name for name in report.columns() if name not in (COPY, PEER)]
    panels = {dtype: _points(report, dtype, drawn) for dtype in dtypes}
    if not any(panels.values()):
        path.unlink(missing_ok=True)
        return False

    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": "anynorm"}):
        works = list(dict.fromkeys(row.work for row in report.rows))
        figure = Figure(figsize=(5 + 5 * len(dtypes), 2.2 + 0.34 * len(works)), layout="constrained")
        every_axes = figure.subplots(1, len(dtypes), sharex=True, sharey=True, squeeze=False)[0]
        for dtype, axes in zip(dtypes, every_axes, strict=True):
            _panel(axes, dtype, works, panels[dtype])
        multiples = [multiple for panel in panels.values() for points in panel.values() for _, multiple in points]
        every_axes[0].set_xlim(min([0.5, *multiples]) / 1.2, max([2, *multiples]) * 1.2)
        handles = {
            label: handle
            for axes in every_axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
    return True


def _points(report: Report, dtype: str, names: list[str]) -> dict[str, list[tuple[str, float]]]:
    """For each candidate that has some, its works and its multiples."""
    found: dict[str, list[tuple[str, float]]] = {}
    for name in names:
        for row in report.rows:
            multiple = row.outcomes[name].to_peer if name in row.outcomes and row.dtype == dtype else None
            if multiple is not None:
                found.setdefault(name, []).append((row.work, multiple))
    return found


def _panel(axes: Any, dtype: str, works: list[str], points: dict[str, list[tuple[str, float]]]) -> None:
    axes.set_title(dtype)
    axes.axvline(1, color="#24292f", linewidth=1)
    axes.set(xscale="log", xlabel=f"time / time of {PEER} (left is faster)")
    axes.set_yticks(range(len(works)), works)
    axes.set_ylim(len(works) - 0.5, -0.5)
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.minorticks_off()
    for name, of_works in points.items():
        places = [works.index(work) for work, _ in of_works]
        axes.plot([multiple for _, multiple in of_works], places, label=name, linestyle="", **_marker(name))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _marker(name: str) -> dict[str, Any]:
    """The formula is hollow, anynorm is full, and each way to run it has its own shape."""
    colour = next(colour for library, colour in COLOURS.items() if library in name)
    marks = {"autograd": "v", "arrays": "s", "compiler": "D"}  # the last in earlier reports
    marker = next((mark for word, mark in marks.items() if word in name), "o")
    face = "none" if name.startswith("formula") else colour
    return {"marker": marker, "markeredgecolor": colour, "markerfacecolor": face, "markersize": 6, "alpha": 0.85}
