"""Places between models: lambda on the line of a pair, or the share of each of any number of models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

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


def spread(place: Place, groups: Sequence[int]) -> Place:
    """The place where every group's share is divided evenly among its members. groups: the number of each one's."""
    shares = shares_of(place)
    return tuple(shares[g] / groups.count(g) for g in groups)


def inside(index: int, count: int) -> tuple[float, ...]:
    """Place number `index` of a sequence that covers the simplex of `count` models evenly at every length.

    The R sequence (Roberts 2018) in the cube, whose sorted coordinates cut the unit interval into shares.
    """
    dims, root = count - 1, 2.0
    for _ in range(64):  # towards the positive root of x^(dims + 1) = x + 1
        root = (1 + root) ** (1 / (dims + 1))
    cuts = sorted((0.5 + (index + 1) * root ** -(k + 1)) % 1 for k in range(dims))
    return tuple(high - low for low, high in zip([0.0, *cuts], [*cuts, 1.0], strict=True))


def simplex_places(count: int, points: int = 11) -> list[tuple[float, ...]]:
    """Where to measure: `points` on every edge, the centroid, and inside: of three a grid, of more as many places."""
    steps = points - 1
    found = [shares_of(corner(k, count)) for k in range(count)]
    for i, j in combinations(range(count), 2):
        found += [between(i, j, k / steps, count) for k in range(1, steps)]
    if count == 3:
        for i in range(1, steps - 1):
            found += [(1 - (i + j) / steps, i / steps, j / steps) for j in range(1, steps - i)]
    else:
        found += [inside(k, count) for k in range(points * (points + 1) // 2)]
    middle = shares_of(centroid(count))
    return found if middle in found else [*found, middle]
