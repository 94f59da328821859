"""Places between models: lambda on the line of a pair, or the share of each of any number of models."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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


def blend(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Σ share · tensor."""
    if len(tensors) == 2:
        return torch.lerp(tensors[0], tensors[1], shares[1])
    (first, share), *rest = ((t, share) for t, share in zip(tensors, shares, strict=True) if share)
    total = first * share
    for t, share in rest:
        total = torch.add(total, t, alpha=share)
    return total
