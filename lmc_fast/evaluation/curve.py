"""Losses along a line: barrier, file, picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..engine.evaluate import require_finite
from ..errors import LmcError
from ..files import read_object, to_json
from ..output import write_whole
from .plots import is_own_picture, new_figure, save_figure

DEFINITION = (
    "barrier = max over the grid of L(lambda) - [(1 - lambda) L(A) + lambda L(B)], L in nats per token, or, of models "
    "without a loss, the squared distance of features from the mixture of A's and B's, relative to their squares"
)
OF_FEATURES = "of the features' squares"  # unit of distances between features


@dataclass(frozen=True)
class Curve:
    """Losses on the line between two models.

    Attributes:
        lambdas: places on the line, ascending from 0 (A) to 1 (B).
        losses: nats per prediction at each place.
        name: in pictures and files.
        accuracies: of image classifiers, the share whose first guess is right at each place; else None.
        errors: standard errors of `excess` in nats, from how much it differs between inputs; None where not known.
        unit: of the losses; of models without a loss, OF_FEATURES: squared distances from the mixture of the endpoints'
            features, relative to their squares.

    Raises:
        LmcError: a loss is not finite.
        ValueError: there are no losses, or not as many as places.

    >>> curve = lmc.Curve([0.0, 0.5, 1.0], [3.0, 3.6, 3.2])
    >>> f"{curve.barrier:.2f} at {curve.at}"
    '0.50 at 0.5'
    """

    lambdas: list[float]
    losses: list[float]
    name: str = "line"
    accuracies: list[float] | None = None
    errors: list[float] | None = None
    unit: str = "nats"

    def __post_init__(self) -> None:
        if not self.losses or len(self.losses) != len(self.lambdas):
            raise ValueError(f"{len(self.losses)} losses at {len(self.lambdas)} places")
        require_finite(self.lambdas, self.losses)

    @property
    def excess(self) -> list[float]:
        """Loss above the straight line between the endpoints' losses, at each lambda, in nats."""
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

    @property
    def middle(self) -> float:
        """The excess nearest to the middle of the line."""
        return self.excess[len(self.excess) // 2]

    @property
    def lowest(self) -> tuple[float, float]:
        """(the least excess, its lambda): how far the best model of the line is below it."""
        least = min(self.excess)
        return least, self.lambdas[self.excess.index(least)]

    @property
    def words(self) -> str:
        """Barrier, middle and lowest point in one line."""
        error = f" ± {self.errors[self.excess.index(self.barrier)]:.4f}" if self.errors else ""
        middle = f" ± {self.errors[len(self.errors) // 2]:.4f}" if self.errors else ""
        least, place = self.lowest
        return (
            f"{self.barrier:.4f}{error} {self.unit} at lambda {self.at:.2g}; middle {self.middle:+.4f}{middle}, "
            f"lowest {least:+.4f} at {place:.2g}"
        )

    def to_json(self) -> dict[str, Any]:
        """What `save` writes, but for the definition.

        Returns:
            All fields, and barrier, at, middle, lowest, lowest_at and words.
        """
        least, place = self.lowest
        more = {"middle": self.middle, "lowest": least, "lowest_at": place, "words": self.words}
        return asdict(self) | {"barrier": self.barrier, "at": self.at} | more

    def save(self, file: str | Path) -> None:
        """Writes a JSON file, whole or not at all.

        Args:
            file: where to.

        Raises:
            LmcError: the disk does not take it.
        """
        write_whole(Path(file), to_json(self.to_json() | {"definition": DEFINITION}, indent=2) + "\n")

    def plot(self, file: str | Path) -> None:
        """Draws the curve to an image file, whole or not at all.

        Args:
            file: its ending says the format: .png, .svg or .pdf.

        Raises:
            LmcError: the ending is another one, or the disk does not take it.
        """
        plot_curves([self], Path(file))


def is_own(file: Path) -> bool:
    """Whether a file is what `save` or `plot` wrote under a name with this ending."""
    if file.suffix == ".json":
        try:
            found = read_object(file)
        except LmcError:
            return False
        known = {"lambdas", "losses", "barrier"}, {"places", "losses", "barrier", "ensemble"}  # of a pair, of more
        ours = str(found.get("definition")).startswith("barrier = max over")
        return ours and any(keys <= found.keys() for keys in known)
    return is_own_picture(file)


def plot_curves(curves: list[Curve], file: Path) -> None:
    """Loss against lambda, one line per curve, its barrier in the legend."""
    figure, axes = new_figure()
    for curve in curves:
        axes.plot(curve.lambdas, curve.losses, marker="o", markersize=4, label=f"{curve.name}: {curve.barrier:.3f}")
    axes.set_xlabel("λ  (0: endpoint A, 1: endpoint B)")
    unit = curves[0].unit if curves else "nats"
    axes.set_ylabel("held-out loss (nats per token)" if unit == "nats" else f"distance from the mixture ({unit})")
    axes.legend(title=f"barrier ({unit})", frameon=False)
    save_figure(figure, file)
