"""Losses between more than two models: at each of them, on every edge, inside, and beside them the ensemble's."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from ..checkpoints import Weights
from ..engine.ensemble import ensemble_loss
from ..engine.evaluate import line_scores
from ..engine.source import Resident
from ..examples import Data
from ..files import to_json
from ..members import member_names
from ..output import write_whole
from ..places import Place, centroid, corner, shares_of, simplex_places
from .curve import OF_FEATURES, Curve, plot_curves
from .plots import new_figure, save_figure

SIMPLEX_DEFINITION = (
    "barrier = max over places s of L(sum of s_i theta_i) - sum of s_i L(theta_i), L in nats per token; ensemble = "
    "loss of the equal mixture of all models' predictions"
)


@dataclass(frozen=True)
class Simplex:
    """Losses at places between more than two models.

    Attributes:
        names: what the models are called: a, b, c, ...
        places: the share of each model, which sum to 1; those of each model alone and of the equal mixture are among
            them.
        losses: nats per prediction at each place.
        ensemble: loss of the equal mixture of all models' predictions, which no average of weights is expected to beat.
        name: in pictures and files.
        unit: of the losses, as of a Curve.

    >>> places = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1 / 3, 1 / 3, 1 / 3)]
    >>> found = lmc.Simplex(["a", "b", "c"], places, [3.0, 3.1, 3.2, 3.3], ensemble=2.9)
    >>> f"{found.centroid:.2f}"
    '0.20'
    """

    names: list[str]
    places: list[tuple[float, ...]]
    losses: list[float]
    ensemble: float
    name: str = "simplex"
    unit: str = "nats"

    def at_place(self, shares: Place) -> float:
        """The loss at one of `places`.

        Args:
            shares: one of `places`.

        Returns:
            Nats per prediction.

        Raises:
            ValueError: it was not measured there.
        """
        return self.losses[self.places.index(shares_of(shares))]

    @property
    def corners(self) -> list[float]:
        """The losses of the models themselves."""
        return [self.at_place(corner(k, len(self.names))) for k in range(len(self.names))]

    @property
    def excess(self) -> list[float]:
        """Loss above the same average of the models' own losses, at each place, in nats."""
        ends = self.corners
        return [
            loss - sum(s * end for s, end in zip(place, ends, strict=True))
            for place, loss in zip(self.places, self.losses, strict=True)
        ]

    @property
    def centroid(self) -> float:
        """The excess of the plain average of all."""
        return self.excess[self.places.index(shares_of(centroid(len(self.names))))]

    @property
    def barrier(self) -> float:
        """max of `excess`."""
        return max(self.excess)

    @property
    def at(self) -> tuple[float, ...]:
        """The place of the barrier."""
        return self.places[self.excess.index(self.barrier)]

    @property
    def edges(self) -> list[Curve]:
        """The line between every two models, named by them."""
        found = []
        for i, j in combinations(range(len(self.names)), 2):
            on = [
                (place[j], loss)
                for place, loss in zip(self.places, self.losses, strict=True)
                if math.isclose(place[i] + place[j], 1) and all(place[k] == 0 for k in _others(place, i, j))
            ]
            lambdas, losses = zip(*sorted(on), strict=True)
            found.append(Curve(list(lambdas), list(losses), f"{self.names[i]}-{self.names[j]}", unit=self.unit))
        return found

    @property
    def words(self) -> str:
        """The result in a line."""
        limit = self.ensemble - sum(self.corners) / len(self.names)
        return (
            f"{self.barrier:.4f} {self.unit}; the average of all {self.centroid:+.4f} over the mean of their losses, "
            f"their ensemble {limit:+.4f}"
        )

    def to_json(self) -> dict[str, Any]:
        """What `save` writes, but for the definition.

        Returns:
            All fields, and edges (the barrier of each), centroid, barrier, at and words.
        """
        return {
            "names": self.names,
            "places": [list(place) for place in self.places],
            "losses": self.losses,
            "ensemble": self.ensemble,
            "unit": self.unit,
            "name": self.name,
            "edges": {curve.name: curve.barrier for curve in self.edges},
            "centroid": self.centroid,
            "barrier": self.barrier,
            "at": list(self.at),
            "words": self.words,
        }

    def save(self, file: str | Path) -> None:
        """Writes a JSON file, whole or not at all.

        Args:
            file: where to.

        Raises:
            LmcError: the disk does not take it.
        """
        write_whole(Path(file), to_json(self.to_json() | {"definition": SIMPLEX_DEFINITION}, indent=2) + "\n")

    def plot(self, file: str | Path) -> None:
        """Draws three models as a triangle, more as the curves of all edges; whole or not at all.

        Args:
            file: its ending says the format: .png, .svg or .pdf.

        Raises:
            LmcError: the ending is another one, or the disk does not take it.
        """
        if len(self.names) == 3:
            _plot_triangle(self, Path(file))
        else:
            plot_curves(self.edges, Path(file))


def simplex_between(
    members: Sequence[Weights],
    tokens: Data,
    points: int = 11,
    name: str = "simplex",
    visited: Callable[[int, int], None] | None = None,
    **portions: Any,
) -> Simplex:
    """Losses at `simplex_places` of models of one spec; tokens (n, T), or examples.

    A pass over the blocks of all models serves all places, one more the ensemble; of lazy models one block is held.
    visited, portions (batch, rows and logits): see line_scores.
    """
    places = sorted(simplex_places(len(members), points), key=lambda place: place[1:])
    source = Resident(*members)
    scores = line_scores(source, tokens, places, visited=visited, **portions)
    limit = ensemble_loss(source, tokens, **portions)
    unit = OF_FEATURES if members[0].spec.task == "features" else "nats"
    return Simplex(member_names(len(members)), places, [score.loss for score in scores], limit, name, unit)


def _others(place: Sequence[float], *but: int) -> list[int]:
    return [k for k in range(len(place)) if k not in but]


def _plot_triangle(found: Simplex, file: Path) -> None:
    """Excess as colours over the triangle, with the contour where it is zero."""
    from matplotlib.tri import Triangulation

    figure, axes = new_figure()
    height = math.sqrt(3) / 2
    x = [place[1] + place[2] / 2 for place in found.places]
    y = [place[2] * height for place in found.places]
    triangles, excess = Triangulation(x, y), found.excess
    size = max(abs(value) for value in excess) or 1.0
    shades = axes.tricontourf(triangles, excess, levels=24, cmap="RdBu_r", vmin=-size, vmax=size)
    figure.colorbar(shades, label=f"excess over the average of the models' own losses ({found.unit})")
    if min(excess) < 0 < max(excess):
        axes.tricontour(triangles, excess, levels=[0.0], colors="black", linewidths=1.2)
    for label, loss, (px, py), side in zip(
        found.names, found.corners, ((0, 0), (1, 0), (0.5, height)), ("top", "top", "bottom"), strict=True
    ):
        text, off = f"{label}  {loss:.3f}", (0, 8 if py else -8)
        axes.annotate(text, (px, py), ha="center", va=side, xytext=off, textcoords="offset points")
    middle = (0.5, height / 3)
    axes.plot(*middle, "k+")
    axes.annotate(f"{found.centroid:+.3f}", middle, xytext=(6, 4), textcoords="offset points")
    axes.set_title(f"barrier {found.barrier:.3f} {found.unit}; ensemble {found.ensemble:.3f}", fontsize=10)
    axes.set_aspect("equal")
    axes.set_axis_off()
    save_figure(figure, file)
