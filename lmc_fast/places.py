"""Places between models: lambda on the line of a pair, or the share of each of any number of models."""

from __future__ import annotations

Place = float | tuple[float, ...]  # lambda, which stands for the shares (1 - lambda, lambda); or shares, which sum to 1


def shares_of(place: Place) -> tuple[float, ...]:
    """How much each model counts at a place."""
    return place if isinstance(place, tuple) else (1 - place, place)


def corner(model: int, count: int) -> Place:
    """The place of one of `count` models alone."""
    return float(model) if count == 2 else tuple(float(k == model) for k in range(count))


def centroid(count: int) -> Place:
    """Where `count` models have equal shares."""
    return 0.5 if count == 2 else (1 / count,) * count


def between(first: int, second: int, lam: float, count: int) -> tuple[float, ...]:
    """The place lambda of the edge from one of `count` models to another."""
    place = [0.0] * count
    place[first], place[second] = 1 - lam, lam
    return tuple(place)


def inside(index: int, count: int) -> tuple[float, ...]:
    """Place number `index` of a sequence that covers the simplex of `count` models evenly at every length.

    The R sequence (Roberts 2018) in the cube, whose sorted coordinates cut the unit interval into shares.
    """
    dims, root = count - 1, 2.0
    for _ in range(64):  # towards the positive root of x^(dims + 1) = x + 1
        root = (1 + root) ** (1 / (dims + 1))
    cuts = sorted((0.5 + (index + 1) * root ** -(k + 1)) % 1 for k in range(dims))
    return tuple(high - low for low, high in zip([0.0, *cuts], [*cuts, 1.0], strict=True))
