"""Matching of the residual stream: evidence for R from all that writes to the stream or reads it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..architectures import BLOCK_READERS, BLOCK_WRITERS, END_WRITERS, POST_NORMS, Spec
from ..checkpoints.weights import Slots, Weights
from ..engine.block import norm
from ..symmetry.groups import resolves_embedding
from ..symmetry.transform import Transform, apply_block
from .procrustes import residual_rotation

_ROWS = ("embed", "positions", "types", "cls", "distill")


def double(w: Slots) -> Slots:
    return {name: t.double() for name, t in w.items()}


def match_stream(
    a: Weights, b: Weights, found: Transform | None, activations: Tensor | None, shares: tuple[float, float]
) -> Tensor:
    """The legal R (d, d) float64 that brings b closest to a.

    `found`: maps of b's blocks and head, as far as they are known. activations (d, d): evidence beside the weights;
    shares: how much either counts.
    """
    spec = a.spec
    x, y = double(a.ends), double(b.ends)
    total = _ends(spec, x, y, None if found is None else found.head_units)
    gains = _gains(x, y, ("embed_norm",))
    total = total + _shifts(x, y, ("embed_norm",))
    for w, u, t in zip(a.blocks, b.blocks, found.blocks if found else [], strict=found is not None):
        x, y = double(w), apply_block(spec, None, t, double(u))
        for name in BLOCK_READERS:
            if name in x:
                total = total + x[name].flatten(0, -2).mT @ y[name].flatten(0, -2)
        for name in BLOCK_WRITERS:
            if name in x:
                total = total + (x[name] @ y[name].mT).reshape(-1, spec.width, spec.width).sum(0)
            if f"{name}_bias" in x:
                total = total + torch.outer(x[f"{name}_bias"], y[f"{name}_bias"])
        gains = gains + _gains(x, y, POST_NORMS)
        total = total + _shifts(x, y, POST_NORMS)
    return residual_rotation(spec, weigh(total, activations, shares), gains * shares[0])


def weigh(from_weights: Tensor, from_activations: Tensor | None, shares: tuple[float, float]) -> Tensor:
    """Weighted sum of two pieces of evidence. Activations are first scaled to the weights' Frobenius norm.

    Weights themselves are never normalised one matrix at a time: large matrices should count more (measured: 0.57
    against 0.71 nats).
    """
    total = shares[0] * from_weights
    if from_activations is not None:
        scale = from_weights.norm() / from_activations.norm().clamp(min=1e-30)
        total = total + from_activations * (shares[1] * scale)
    return total


def _ends(spec: Spec, x: Slots, y: Slots, head_units: Tensor | None) -> Tensor:
    total = x["head"].new_zeros(spec.width, spec.width)
    for name in _ROWS:
        if name in x:
            left, right = (_written(spec, w, name) for w in (x, y))
            total = total + left.mT @ right
    for name in END_WRITERS:
        if name in x:
            total = total + x[name] @ y[name].mT
        if f"{name}_bias" in x:
            total = total + torch.outer(x[f"{name}_bias"], y[f"{name}_bias"])
    if not spec.head_transform:
        return total + x["head"].reshape(-1, spec.width).mT @ y["head"].reshape(-1, spec.width)
    if head_units is not None:
        total = total + x["head_transform"].mT @ y["head_transform"][head_units]
    return total


def _written(spec: Spec, w: Slots, name: str) -> Tensor:
    """What the rows of an input table add to the stream."""
    if name != "embed":
        return w[name]
    return norm(spec, w, "embed_norm", w[name]) if resolves_embedding(spec) else w[name] * spec.embed_scale


def _gains(x: Slots, y: Slots, names: tuple[str, ...]) -> Tensor:
    return _sum_of_products(x, y, names)


def _shifts(x: Slots, y: Slots, names: tuple[str, ...]) -> Tensor:
    return _sum_of_products(x, y, tuple(f"{name}_bias" for name in names))


def _sum_of_products(x: Slots, y: Slots, names: tuple[str, ...]) -> Tensor:
    found = [torch.outer(x[name], y[name]) for name in names if name in x]
    return torch.stack(found).sum(0) if found else next(iter(x.values())).new_zeros(())
