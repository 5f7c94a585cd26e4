"""The figure of the curves."""

import io
import os
from collections.abc import Mapping
from pathlib import Path

from anynorm.demo.digits import TESTED
from anynorm.demo.network import METHODS
from anynorm.demo.training import History

# Okabe and Ito's colours, which colour-blind readers can tell apart
COLOURS = {
    "plain": "#000000",
    "BN": "#d55e00",
    "LN": "#0072b2",
    "RMS": "#56b4e9",
    "IN": "#e69f00",
    "GN": "#009e73",
    "WN": "#cc79a7",
    "WN+MBN": "#f0e442",
}


def save(histories: Mapping[str, History], title: str, path: Path) -> None:
    """Write the PNG, all of it or nothing."""
    image = _draw(histories, title)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(image)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _draw(histories: Mapping[str, History], title: str) -> bytes:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 5), layout=ConstrainedLayoutEngine(wspace=0.08))
    figure.suptitle(title)
    loss, accuracy = figure.subplots(1, 2)
    for name, history in histories.items():
        epochs = range(1, len(history.losses) + 1)
        percent = [100 * each for each in history.accuracies]
        for axes, values in ((loss, history.epoch_losses), (accuracy, percent)):
            axes.plot(epochs, values, "o-", color=COLOURS[name], label=METHODS[name].title, markersize=3.5)
    loss.set(title="Training loss", ylabel="mean cross-entropy of the epoch (nats)", yscale="log")
    accuracy.set(title="Test accuracy", ylabel=f"recognised of {TESTED} digits (%)")
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = loss.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=-(-len(histories) // 2), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
