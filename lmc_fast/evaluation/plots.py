"""Pictures: an empty figure, and learning curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..learning.learner import History


def new_figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def save_figure(figure: Any, file: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(file, dpi=144)
    pyplot.close(figure)


def plot_learning(history: History, file: Path) -> None:
    """Training loss (running mean) and validation excess against steps."""
    figure, axes = new_figure()
    width = max(1, len(history.loss) // 50)
    means = [
        sum(history.loss[i : i + width]) / len(history.loss[i : i + width]) for i in range(0, len(history.loss), width)
    ]
    axes.plot(
        [i * width + width / 2 for i in range(len(means))],
        means,
        label=f"loss, mean of {width}" if width > 1 else "loss",
    )
    axes.set_xlabel("step")
    axes.set_ylabel("calibration loss at λ (nats per token)")
    lines, labels = axes.get_legend_handles_labels()
    if history.excess:
        twin = axes.twinx()
        twin.spines[["top"]].set_visible(False)
        twin.plot(list(history.excess), list(history.excess.values()), "o--", color="tab:orange", label="validation")
        twin.set_ylabel("validation excess over the line (nats)")
        more_lines, more_labels = twin.get_legend_handles_labels()
        lines, labels = lines + more_lines, labels + more_labels
    axes.legend(lines, labels, frameon=False)
    save_figure(figure, file)
