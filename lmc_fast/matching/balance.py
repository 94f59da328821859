"""Balancing: spreads scale evenly between value and output, query and key, and (where legal) FFN up and down.

After it, what is left to match between two endpoints is nearly orthogonal (measured), so that Procrustes finds it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..architectures import Spec
from ..checkpoints.lazy import Slots
from ..checkpoints.weights import Weights
from ..symmetry.groups import query_key_maps, unit_scale_signs, value_maps
from ..symmetry.transform import BlockTransform, Transform, rotary_map

_RIDGE = 1e-8


def balance(weights: Weights) -> Transform:
    """The transform (head maps and unit scales, float64) that balances canonical `weights`."""
    return Transform(None, [_balance_block(weights.spec, weights.blocks[i]) for i in range(weights.spec.layers)])


def _balance_block(spec: Spec, block: Slots) -> BlockTransform:
    g, r, e = spec.attention.kv_heads, spec.attention.queries_per_group, spec.attention.head_dim
    found = BlockTransform()
    double = lambda names: {name: block[name].double() for name in names if name in block}  # noqa: E731
    if value_maps(spec) == "general":
        w = double(("v", "v_bias", "o"))
        o = w["o"].view(-1, g, r, e).permute(1, 2, 0, 3).flatten(1, 2)  # (g, r d, e)
        found = replace(found, vo=_equaliser(_gram(_with_bias(w, "v", (g, e))), o.mT @ o))
    if query_key_maps(spec) == "general":
        w = double(("q", "q_bias", "k", "k_bias"))
        q = _with_bias(w, "q", (g, r, e)).transpose(1, 2).flatten(2)
        k = _with_bias(w, "k", (g, e))
        rotary, half = spec.rope.rotary_dim, spec.rope.rotary_dim // 2
        pair_norm = lambda x: x[:, :rotary].square().sum(-1).view(g, 2, half).sum(1)  # noqa: E731
        scale = ((pair_norm(q) + _tiny(q)) / (pair_norm(k) + _tiny(k))) ** 0.25
        rest = _equaliser(_gram(k[:, rotary:]), _gram(q[:, rotary:]))
        found = replace(found, qk=rotary_map(scale, torch.zeros_like(scale), rest))
    if unit_scale_signs(spec) != "none":
        if spec.ffn.width:
            found = replace(found, unit_scale=_unit_balance(double(("up", "up_bias", "down"))))
        if spec.ffn.experts.count:
            experts = zip(block["experts_up"], block["experts_down"], strict=True)
            scales = [_unit_balance({"up": up.double(), "down": down.double()}) for up, down in experts]
            found = replace(found, expert_scale=torch.stack(scales))
    return found


def _unit_balance(w: Slots) -> Tensor:
    """D with rows of D·up as long as columns of down·D⁻¹."""
    inner = w["up"].square().sum(1) + (w["up_bias"].square() if "up_bias" in w else 0)
    outer = w["down"].square().sum(0)
    return ((outer + _tiny(w["down"])) / (inner + _tiny(w["up"]))) ** 0.25


def _with_bias(w: Slots, slot: str, rows: tuple[int, ...]) -> Tensor:
    """Rows of a slot by head, its bias as one more column."""
    matrix = w[slot].unflatten(0, rows)
    bias = w.get(f"{slot}_bias")
    return matrix if bias is None else torch.cat([matrix, bias.view(*rows, 1)], dim=-1)


def _gram(x: Tensor) -> Tensor:
    return x @ x.mT


def _tiny(x: Tensor) -> Tensor:
    return _RIDGE * x.square().mean() + torch.finfo(x.dtype).tiny


def _equaliser(inner: Tensor, outer: Tensor) -> Tensor:
    """M with M inner Mᵀ = M⁻ᵀ outer M⁻¹, symmetric positive: M = K^½, K = I^-½ (I^½ O I^½)^½ I^-½."""
    if inner.shape[-1] == 0:
        return inner
    eye = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
    ridge = lambda x: x + eye * (_RIDGE * x.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + 1e-30)  # noqa: E731
    root = _power(ridge(inner), 0.5)
    back = _power(ridge(inner), -0.5)
    return _power(back @ _power(root @ ridge(outer) @ root, 0.5) @ back, 0.5)


def _power(x: Tensor, exponent: float) -> Tensor:
    """Power of symmetric positive (batch, n, n)."""
    values, vectors = torch.linalg.eigh((x + x.mT) / 2)
    values = values.clamp(min=torch.finfo(x.dtype).tiny)
    return (vectors * values[..., None, :] ** exponent) @ vectors.mT
