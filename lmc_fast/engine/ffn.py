"""Feed-forward parts of a block: plain, gated, and mixtures of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..architectures import Spec
from ..architectures.activations import ACTIVATIONS
from .attention import Observer, ignore
from .slots import Slots, linear


def feed_forward(spec: Spec, w: Slots, x: Tensor, observe: Observer = ignore) -> Tensor:
    """Plain or gated FFN, or mixture, of x (..., d)."""
    out = _dense(spec, w, x, observe) if spec.ffn.width else None
    if not spec.ffn.experts.count:
        assert out is not None
        return out
    mixture = _mixture(spec, w, x.flatten(0, -2)).view_as(x)
    if out is None:
        return mixture
    return mixture + (linear(w, "switch", x).sigmoid() * out if spec.ffn.experts.switched else out)


def _dense(spec: Spec, w: Slots, x: Tensor, observe: Observer) -> Tensor:
    hidden = linear(w, "up", x)
    if spec.ffn.gated:
        hidden = _units(spec, linear(w, "gate", x), hidden)
    else:
        hidden = ACTIVATIONS[spec.ffn.activation](hidden)
    observe("hidden", hidden)
    return linear(w, "down", hidden)


def _units(spec: Spec, gate: Tensor, up: Tensor) -> Tensor:
    most, activation = spec.ffn.clamped, ACTIVATIONS[spec.ffn.activation]
    if not most:
        return up * activation(gate)
    return (up.clamp(-most, most) + 1) * activation(gate.clamp(max=most))


def _mixture(spec: Spec, w: Slots, x: Tensor) -> Tensor:
    """x (n, d) through the experts_per_token most probable experts of each row, weighted by their probability."""
    share, chosen = linear(w, "router", x).softmax(-1).topk(spec.ffn.experts.per_token, dim=-1)
    if spec.ffn.experts.renormalised:
        share = share / share.sum(-1, keepdim=True)

    def of_expert(slot: str, j: int, rows: Tensor) -> Tensor:
        y = rows @ w[slot][j].mT
        return y + w[f"{slot}_bias"][j] if f"{slot}_bias" in w else y

    out = torch.zeros_like(x)
    for j in range(spec.ffn.experts.count):
        rows, rank = (chosen == j).nonzero(as_tuple=True)
        if len(rows):
            part = x[rows]
            hidden = _units(spec, of_expert("experts_gate", j, part), of_expert("experts_up", j, part))
            out = out.index_add(0, rows, of_expert("experts_down", j, hidden) * share[rows, rank, None])
    return out
