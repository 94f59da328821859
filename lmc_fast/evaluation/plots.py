"""Pictures: loss along the line, and learning curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..matching.learned import History
from .barrier import Curve


def _figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def _save(figure: Any, file: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(file, dpi=144)
    pyplot.close(figure)


def plot_curves(curves: list[Curve], file: Path) -> None:
    """Loss against lambda, one line per curve, its barrier in the legend."""
    figure, axes = _figure()
    for curve in curves:
        axes.plot(curve.lambdas, curve.losses, marker="o", markersize=4, label=f"{curve.name}: {curve.barrier:.3f}")
    axes.set_xlabel("λ  (0: endpoint A, 1: endpoint B)")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.legend(title="barrier (nats)", frameon=False)
    _save(figure, file)


def plot_learning(history: History, file: Path) -> None:
    """Training loss (running mean) and validation excess against steps."""
    figure, axes = _figure()
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
    _save(figure, file)
