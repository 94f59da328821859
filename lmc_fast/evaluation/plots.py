"""Pictures: an empty figure, and learning curves."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ..errors import LmcError
from ..files import MIB, read_bytes
from ..learning.learner import History
from ..output import atomic_file

_MAKER = "lmc-fast"  # in the picture's own metadata
_SIGNATURES = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
_METADATA: dict[str, dict[str, str | None]] = {
    ".png": {"Software": _MAKER},
    ".svg": {"Creator": _MAKER, "Date": None},
    ".pdf": {"Creator": _MAKER, "CreationDate": None},
}
_LARGEST = 64 * MIB


def new_figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure, axes


def new_page(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """(figure, its panels, row by row)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(rows, columns, figsize=size, layout="constrained")
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    return figure, list(panels.flat)


def save_figure(figure: Any, file: Path) -> None:
    """Writes the picture, whole or not at all, and closes the figure. Raises LmcError."""
    from matplotlib import pyplot, rc_context

    try:
        if file.suffix not in _SIGNATURES:
            raise LmcError(f"{file}: a picture is written as one of {', '.join(_SIGNATURES)}")
        picture = io.BytesIO()  # matplotlib's writers do not all survive a full disk
        with rc_context({"svg.hashsalt": _MAKER}):  # and no date: the same figure is the same file
            figure.savefig(picture, format=file.suffix[1:], dpi=144, metadata=_METADATA[file.suffix])
    finally:
        pyplot.close(figure)
    with atomic_file(file) as new:
        new.write_bytes(picture.getvalue())


def is_own_picture(file: Path) -> bool:
    """Whether save_figure wrote a file."""
    try:
        content = read_bytes(file, _LARGEST)
    except LmcError:
        return False
    return content.startswith(_SIGNATURES[file.suffix]) and _MAKER.encode() in content


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
