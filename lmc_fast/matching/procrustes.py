"""Closed-form best fits within each group: orthogonal, fixing the ones vector, rotary, signed permutations, signs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..architectures import Spec
from ..solvers import solve_assignments
from ..symmetry.groups import FIXED, FIXING_ONES, ORTHOGONAL, PERMUTATION, query_key_maps, residual_group, value_maps
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


def nearest_signed_permutation(x: Tensor, gains: Tensor | None = None, one_sign: bool = False) -> Tensor:
    """The signed permutation Q (n, n) that maximises tr(Qᵀ x) + tr(|Q|ᵀ gains); `one_sign`: plus or minus for all."""
    gains = torch.zeros_like(x) if gains is None else gains
    options = [x + gains, gains - x] if one_sign else [x.abs() + gains]
    places = solve_assignments(options, maximize=True)
    rows = torch.arange(len(x), device=x.device)
    scores = [option[rows, p.to(x.device)].sum() for option, p in zip(options, places, strict=True)]
    best = max(range(len(options)), key=lambda i: float(scores[i]))
    p = places[best].to(x.device)
    signs = torch.full_like(x[:, 0], 1.0 - 2 * best) if one_sign else torch.where(x[rows, p] < 0, -1.0, 1.0).to(x)
    out = torch.zeros_like(x)
    out[rows, p] = signs
    return out


def residual_rotation(spec: Spec, x: Tensor, gains: Tensor | None = None) -> Tensor:
    """The legal residual element R that maximises tr(Rᵀ x), and tr(|R|ᵀ gains) where gains lie in the stream."""
    group = residual_group(spec)
    if group == FIXED:
        return torch.eye(len(x), dtype=x.dtype, device=x.device)
    if group == FIXING_ONES:
        return nearest_rotation_fixing_ones(x)
    if group == ORTHOGONAL:
        return nearest_orthogonal(x)
    return nearest_signed_permutation(x, gains, one_sign=group == PERMUTATION)


def nearest_value_map(spec: Spec, x: Tensor) -> Tensor:
    """The legal value/output maps that maximise tr(Mᵀ x) among the orthogonal ones; x (G, e, e)."""
    if value_maps(spec) == "general":
        return nearest_orthogonal(x)
    return torch.stack([nearest_signed_permutation(m) for m in x])


def value_score(spec: Spec, x: Tensor) -> Tensor:
    """The maximum that nearest_value_map reaches, for x (..., e, e)."""
    return nuclear_norm(x) if value_maps(spec) == "general" else _assignment_score(x)


def nearest_query_key_map(spec: Spec, x: Tensor) -> Tensor:
    """The legal query/key maps that maximise tr(Nᵀ x) among the orthogonal ones; x (G, e, e)."""
    kind, rotary = query_key_maps(spec), spec.rope.rotary_dim
    if kind == "general":
        return nearest_rotary(x, rotary)
    dot, cross = _plane_fit(x, rotary)
    rest = x[..., rotary:, rotary:]
    if kind == "signs":
        return rotary_map(_sign(dot), torch.zeros_like(dot), torch.diag_embed(_sign(rest.diagonal(dim1=-2, dim2=-1))))
    upright = dot.abs() >= cross.abs()
    zero = torch.zeros_like(dot)
    passing = torch.stack([nearest_signed_permutation(m) for m in rest]) if rest.numel() else rest
    return rotary_map(torch.where(upright, _sign(dot), zero), torch.where(upright, zero, _sign(cross)), passing)


def query_key_score(spec: Spec, x: Tensor) -> Tensor:
    """The maximum that nearest_query_key_map reaches, for x (..., e, e)."""
    kind, rotary = query_key_maps(spec), spec.rope.rotary_dim
    if kind == "general":
        return rotary_score(x, rotary)
    dot, cross = (t.abs() for t in _plane_fit(x, rotary))
    rest = x[..., rotary:, rotary:]
    if kind == "signs":
        return dot.sum(-1) + rest.diagonal(dim1=-2, dim2=-1).abs().sum(-1)
    return torch.maximum(dot, cross).sum(-1) + _assignment_score(rest)


def _assignment_score(x: Tensor) -> Tensor:
    """Best sum of absolute values that a permutation picks, for each matrix of x (..., n, n)."""
    size = x.abs().flatten(0, -3) if x.dim() > 2 else x.abs()[None]
    rows = torch.arange(x.shape[-1], device=x.device)
    found = [m[rows, p.to(x.device)].sum() for m, p in zip(size, solve_assignments(list(size)), strict=True)]
    return torch.stack(found).view(x.shape[:-2])


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
    first, second = slice(0, half), slice(half, rotary)

    def diagonal(rows: slice, columns: slice) -> Tensor:
        return x[..., rows, columns].diagonal(dim1=-2, dim2=-1)

    return diagonal(first, first) + diagonal(second, second), diagonal(second, first) - diagonal(first, second)


def _sign(x: Tensor) -> Tensor:
    return torch.where(x < 0, -1.0, 1.0).to(x)
