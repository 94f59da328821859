"""Closed-form best fits: orthogonal, orthogonal fixing the ones vector, and rotary."""

from __future__ import annotations

import torch
from torch import Tensor

from ..architectures import Spec
from ..symmetry.transform import rotary_map


def nearest_orthogonal(x: Tensor) -> Tensor:
    """argmax over orthogonal Q of tr(Qᵀ x): the polar factor U Vᵀ of x (..., n, n) (Schönemann 1966)."""
    u, _, vt = torch.linalg.svd(x)
    return u @ vt


def nearest_rotation_fixing_ones(x: Tensor) -> Tensor:
    """The same over orthogonal Q with Q 1 = 1."""
    n = len(x)
    mean = torch.full_like(x, 1 / n)
    centred = x - mean @ x - x @ mean + mean @ x @ mean
    return nearest_orthogonal(centred + mean * centred.norm().clamp(min=1))


def residual_rotation(spec: Spec, x: Tensor) -> Tensor:
    """The legal residual rotation R that maximises tr(Rᵀ x)."""
    return nearest_rotation_fixing_ones(x) if spec.norm == "layernorm" else nearest_orthogonal(x)


def nearest_rotary(x: Tensor, rotary: int) -> Tensor:
    """Orthogonal maps that commute with RoPE on the first `rotary` dimensions and maximise tr(Nᵀ x); x (..., e, e)."""
    dot, cross = _plane_fit(x, rotary)
    length = torch.hypot(dot, cross)
    live = length > 0
    safe = torch.where(live, length, torch.ones_like(length))
    cos = torch.where(live, dot / safe, torch.ones_like(dot))
    return rotary_map(cos, torch.where(live, cross / safe, cross), nearest_orthogonal(x[..., rotary:, rotary:]))


def rotary_score(x: Tensor, rotary: int) -> Tensor:
    """The maximum that nearest_rotary reaches: Σ over pairs √(dot² + cross²) + nuclear norm of the rest."""
    return torch.hypot(*_plane_fit(x, rotary)).sum(-1) + nuclear_norm(x[..., rotary:, rotary:])


def nuclear_norm(x: Tensor) -> Tensor:
    return torch.linalg.svdvals(x).sum(-1)


def _plane_fit(x: Tensor, rotary: int) -> tuple[Tensor, Tensor]:
    """tr(Nᵀ x) on pair i for N = [[c, -s], [s, c]] is c·dot + s·cross."""
    half = rotary // 2
    diagonal = lambda rows, cols: x[..., rows, cols].diagonal(dim1=-2, dim2=-1)  # noqa: E731
    first, second = slice(0, half), slice(half, rotary)
    return diagonal(first, first) + diagonal(second, second), diagonal(second, first) - diagonal(first, second)
