"""The loss along the straight line between two endpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoints import Weights
from ..engine.source import Resident
from ..engine.step import line_scores
from ..examples import Data, Examples

DEFINITION = "barrier = max over the grid of L(lambda) - [(1 - lambda) L(A) + lambda L(B)], L in nats per token"


@dataclass(frozen=True)
class Curve:
    """Losses (nats per token) on a grid of lambda from 0 (A) to 1 (B)."""

    lambdas: list[float]
    losses: list[float]
    name: str = "line"
    accuracies: list[float] | None = None  # top-1, of image classifiers

    @property
    def excess(self) -> list[float]:
        """Loss above the straight line between the endpoints' losses, at each lambda."""
        first, last = self.losses[0], self.losses[-1]
        return [x - ((1 - t) * first + t * last) for t, x in zip(self.lambdas, self.losses, strict=True)]

    @property
    def barrier(self) -> float:
        """max of `excess`: 0 if no point lies above the line (the endpoints lie on it)."""
        return max(self.excess)

    @property
    def at(self) -> float:
        """The lambda of the barrier."""
        return self.lambdas[self.excess.index(self.barrier)]

    def to_json(self) -> dict:
        return asdict(self) | {"barrier": self.barrier, "at": self.at}

    def save(self, file: str | Path) -> None:
        Path(file).write_text(json.dumps(self.to_json() | {"definition": DEFINITION}, indent=2) + "\n")

    def plot(self, file: str | Path) -> None:
        """Draws the curve to an image file."""
        from .plots import plot_curves

        plot_curves([self], Path(file))


def curve_between(
    a: Weights,
    b: Weights,
    tokens: Data,
    points: int = 11,
    name: str = "line",
    progress: Callable[[float], None] | None = None,
    **portions: Any,
) -> Curve:
    """Losses at `points` evenly spaced lambdas between two models of one spec; tokens (n, T), or examples.

    A pass over the blocks of both models serves all points; of lazy models it holds one block. progress: called once
    per point. portions: batch, rows and logits of line_scores.
    """
    lambdas = [i / (points - 1) for i in range(points)]
    scores = line_scores(Resident(a, b), tokens, lambdas, **portions)
    for t in lambdas if progress else ():
        progress(t)  # type: ignore[misc]
    accuracies = None
    if isinstance(tokens, Examples) and a.spec.task == "image":
        accuracies = [score.accuracy for score in scores]
    return Curve(lambdas, [score.loss for score in scores], name, accuracies)
