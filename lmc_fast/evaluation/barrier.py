"""The loss along the straight line between two endpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..checkpoints import Weights
from ..engine.evaluate import Score, line_scores
from ..engine.source import Resident
from ..examples import Data, Examples
from .curve import OF_FEATURES, Curve


def curve_between(
    a: Weights,
    b: Weights,
    tokens: Data,
    points: int = 11,
    name: str = "line",
    visited: Callable[[int, int], None] | None = None,
    known: dict[float, Score] | None = None,
    **portions: Any,
) -> Curve:
    """Losses at `points` evenly spaced lambdas between two models of one spec; tokens (n, T), or examples.

    A pass over the blocks of both models serves all points; of lazy models it holds one block. visited, portions
    (batch, rows and logits): see line_scores. known: scores of the endpoints on these tokens by lambda, 0 and 1, which
    are not measured again; those that are missing are added.
    """
    lambdas = [i / (points - 1) for i in range(points)]
    known = {} if known is None else known
    missing = [place for place in lambdas if place not in known]
    found = dict(zip(missing, line_scores(Resident(a, b), tokens, missing, visited=visited, **portions), strict=True))
    known |= {end: found[end] for end in (0.0, 1.0) if end in found}
    scores = [(known | found)[place] for place in lambdas]
    accuracies = None
    if isinstance(tokens, Examples) and a.spec.task in ("image", "label", "tags"):
        accuracies = [score.accuracy for score in scores]
    errors = _errors(lambdas, [score.inputs for score in scores])
    unit = OF_FEATURES if a.spec.task == "features" else "nats"
    return Curve(lambdas, [score.loss for score in scores], name, accuracies, errors, unit)


def _errors(lambdas: list[float], inputs: list[Tensor]) -> list[float] | None:
    """Standard error of the excess at each place, from how much it differs between inputs; see Score.inputs."""
    counts = inputs[0][:, 1]
    if len(counts) < 2:
        return None
    found = []
    for place, scores in zip(lambdas, inputs, strict=True):
        excess = scores[:, 0] - (1 - place) * inputs[0][:, 0] - place * inputs[-1][:, 0]
        rest = excess - counts * (excess.sum() / counts.sum())
        found.append(float((len(counts) / (len(counts) - 1) * rest.square().sum()).sqrt() / counts.sum()))
    return found
