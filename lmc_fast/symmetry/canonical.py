"""Canonical form (norm absorption): what no output can see is folded away.

Afterwards every norm has gain 1; a LayerNorm model's writers have zero mean, so that its residual stream does; the
value bias is gone into the output bias; key biases that the softmax cannot see are 0; the head's mean row is 0. Each
step leaves the model's log-probabilities as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..architectures import Spec
from ..checkpoints.weights import Slots, Weights
from ..errors import LmcError


def canonicalize(weights: Weights) -> Weights:
    """The canonical form of a model: computed one block at a time in float64, returned in the dtype of `weights`."""
    spec = weights.spec
    return weights.in_dtype(
        torch.float64, lambda ends: canonical_ends(spec, ends), lambda _, block: canonical_block(spec, block)
    )


def canonical_block(spec: Spec, block: Slots) -> Slots:
    """One block in canonical form; the input is not changed."""
    w = dict(block)
    _absorb(spec, w, "attn_norm", ("q", "k", "v"))
    _absorb(spec, w, "ffn_norm", ("up", "gate"))
    if "v_bias" in w and "o_bias" in w:  # attention rows sum to one
        per_query = w["v_bias"].unflatten(0, (spec.kv_heads, 1, spec.head_dim)).expand(-1, spec.queries_per_group, -1)
        w["o_bias"] = w["o_bias"] + w["o"] @ per_query.flatten()
        w["v_bias"] = torch.zeros_like(w["v_bias"])
    if "k_bias" in w:  # q·b adds the same to every key, unless RoPE turns it by position
        bias = w["k_bias"].unflatten(0, (spec.kv_heads, spec.head_dim)).clone()
        bias[:, spec.rotary_dim :] = 0
        w["k_bias"] = bias.flatten()
    if spec.norm == "layernorm":
        for name in ("o", "o_bias", "down", "down_bias"):
            if name in w:
                w[name] = w[name] - w[name].mean(dim=0)
    return w


def canonical_ends(spec: Spec, ends: Slots) -> Slots:
    """Embeddings, final norm and head in canonical form; the input is not changed."""
    w = dict(ends)
    _absorb(spec, w, "final_norm", ("head",))
    if spec.norm == "layernorm":
        for name in ("embed", "positions"):
            if name in w:
                w[name] = w[name] - w[name].mean(dim=1, keepdim=True)
    w["head"] = w["head"] - w["head"].mean(dim=0)
    if "head_bias" in w:
        w["head_bias"] = w["head_bias"] - w["head_bias"].mean()
    return w


def _absorb(spec: Spec, w: Slots, name: str, readers: tuple[str, ...]) -> None:
    """Moves a norm's gain, and its bias where every reader can take it, into the readers."""
    readers = tuple(reader for reader in readers if reader in w)
    gain, shift = w[name], w.get(f"{name}_bias")
    if shift is not None and all(f"{reader}_bias" in w for reader in readers):
        for reader in readers:
            w[f"{reader}_bias"] = w[f"{reader}_bias"] + w[reader] @ shift
        w[f"{name}_bias"] = torch.zeros_like(shift)
    elif shift is not None:
        w[f"{name}_bias"] = _unscaled(gain, shift, [w[reader] for reader in readers], name)
    for reader in readers:
        w[reader] = w[reader] * gain
    w[name] = torch.ones_like(gain)


def _unscaled(gain: Tensor, shift: Tensor, readers: list[Tensor], name: str) -> Tensor:
    """c with W diag(gain) c = W shift for every reader W: shift / gain, or least squares where a gain is 0."""
    dead = gain == 0
    if not (dead & (shift != 0)).any():
        return torch.where(dead, torch.zeros_like(shift), shift / torch.where(dead, torch.ones_like(gain), gain))
    stacked = torch.cat(readers).double()
    scaled, wanted = stacked * gain.double(), stacked @ shift.double()
    solution = torch.linalg.lstsq(scaled, wanted[:, None], driver="gelsd").solution[:, 0]
    residual = (scaled @ solution - wanted).norm() / wanted.norm()
    if residual > 1e-6:
        raise LmcError(
            f"{name} has a zero gain with a non-zero bias that its readers cannot absorb ({residual:.1e} off)"
        )
    return solution.to(shift)
