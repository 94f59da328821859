"""Balancing: spreads scale evenly between value and output, query and key, and (where legal) FFN up and down.

After it, what is left to match between two endpoints is nearly orthogonal (measured), so that Procrustes finds it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..architectures import Spec
from ..architectures.axes import PARENT, Index, Move, size_of, unfolded
from ..checkpoints.lazy import LazyBlocks, Slots
from ..checkpoints.weights import Weights
from ..symmetry.elements import Dense, Element, Scale
from ..symmetry.groups import query_key_maps, unit_scale_signs, value_maps
from ..symmetry.transform import Transform, apply, rotary_map

_RIDGE = 1e-8


def balance(weights: Weights) -> Transform:
    """The transform (head maps and unit scales, float64) that balances canonical `weights`."""
    return Transform({}, [_balance_block(weights.spec, weights.blocks[i]) for i in range(weights.spec.layers)])


def balanced(weights: Weights) -> tuple[Transform, Weights]:
    """(the transform that balances canonical `weights`, the weights so balanced).

    A block is balanced when it is asked for, so that no second copy of the model exists; the transform is complete once
    every block was.
    """
    spec, found = weights.spec, Transform.identity(weights.spec)

    def even(i: int, block: Slots) -> Slots:
        found.blocks[i] = found.blocks[i] or _balance_block(spec, block)
        return apply(spec, found.blocks[i], block)

    blocks = LazyBlocks(spec.layers, lambda i: dict(weights.blocks[i]))
    moved = Weights(spec, {}, blocks).in_dtype(torch.float64, dict, even).blocks
    return found, Weights(spec, weights.ends, moved, weights.tables)


def _balance_block(spec: Spec, block: Slots) -> dict[str, Element]:
    found: dict[str, Element] = {}
    if value_maps(spec) == "general":
        inner, outer = (_gram(_rows(spec, "vo", move, block)) for move in (Move.CO, Move.CONTRA))
        found["vo"] = Dense.of(_equaliser(inner, outer))
    if query_key_maps(spec) == "general":
        k, q = (_rows(spec, "qk", move, block) for move in (Move.CO, Move.CONTRA))
        scale = ((_pair_norm(spec, q) + _tiny(q)) / (_pair_norm(spec, k) + _tiny(k))) ** 0.25
        rotary = spec.rope.rotary_dim
        rest = _equaliser(_gram(k[:, rotary:]), _gram(q[:, rotary:]))
        found["qk"] = Dense.of(rotary_map(scale, torch.zeros_like(scale), rest))
    if unit_scale_signs(spec) != "none":
        for space in ("units", "expert_units"):
            if size_of(spec, space):
                inner, outer = (_rows(spec, space, move, block) for move in (Move.CO, Move.CONTRA))
                found[space] = Scale(_length_ratio(inner, outer))
    return found


def _rows(spec: Spec, space: str, move: Move, block: Slots) -> Tensor:
    """All that moves with a space in this way, as rows: (its places, n), or (places of its parent, its places, n)."""
    rows = []
    for slot, w in block.items():
        indices, shape = unfolded(spec, slot)
        for dim, index in enumerate(indices):
            if index == Index(space, move):
                lead = [d for d, i in enumerate(indices) if i.space == PARENT.get(space)]
                x = w.double().reshape(shape).movedim((*lead, dim), (*range(len(lead)), len(lead)))
                rows.append(x.flatten(len(lead) + 1) if x.dim() > len(lead) + 1 else x[..., None])
    return torch.cat(rows, dim=-1)


def _length_ratio(inner: Tensor, outer: Tensor) -> Tensor:
    """D with rows of D·inner as long as those of D⁻¹·outer."""
    return ((outer.square().sum(-1) + _tiny(outer)) / (inner.square().sum(-1) + _tiny(inner))) ** 0.25


def _pair_norm(spec: Spec, x: Tensor) -> Tensor:
    """Squared length of each rotary pair's two rows of x (G, e, n): (G, pairs)."""
    return x[:, : spec.rope.rotary_dim].square().sum(-1).view(len(x), 2, spec.rope.rotary_dim // 2).sum(1)


def _gram(x: Tensor) -> Tensor:
    return x @ x.mT


def _tiny(x: Tensor) -> Tensor:
    return _RIDGE * x.square().mean() + torch.finfo(x.dtype).tiny


def _equaliser(inner: Tensor, outer: Tensor) -> Tensor:
    """M with M inner Mᵀ = M⁻ᵀ outer M⁻¹, symmetric positive: M = K^½, K = I^-½ (I^½ O I^½)^½ I^-½."""
    if inner.shape[-1] == 0:
        return inner
    eye = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
    inner, outer = (x + eye * (_RIDGE * _mean_diagonal(x)[:, None, None] + 1e-30) for x in (inner, outer))
    root, back = _power(inner, 0.5), _power(inner, -0.5)
    return _power(back @ _power(root @ outer @ root, 0.5) @ back, 0.5)


def _mean_diagonal(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).mean(-1)


def _power(x: Tensor, exponent: float) -> Tensor:
    """Power of symmetric positive (batch, n, n)."""
    values, vectors = torch.linalg.eigh((x + x.mT) / 2)
    values = values.clamp(min=torch.finfo(x.dtype).tiny)
    return (vectors * values[..., None, :] ** exponent) @ vectors.mT
