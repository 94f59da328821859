"""One generic transformer block, driven by the spec and fed with named slots."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..architectures import Spec
from .attention import Observer, Positions, attention, ignore
from .ffn import feed_forward
from .slots import Slots


def norm(spec: Spec, slots: Slots, name: str, x: Tensor) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension, with the gain and bias that the slots hold."""
    gain, bias = slots.get(name), slots.get(f"{name}_bias")
    if spec.norms.kind == "layernorm":
        return F.layer_norm(x, x.shape[-1:], gain, bias, spec.norms.eps)
    return F.rms_norm(x, x.shape[-1:], gain, spec.norms.eps)


def block(spec: Spec, w: Slots, x: Tensor, positions: Positions, index: int = 0, observe: Observer = ignore) -> Tensor:
    """x (batch, T, d) -> the output of block `index`, same shape.

    `observe` sees q, k, v, mixed, hidden, attn_in and ffn_in.
    """
    before = spec.norms.placement in ("pre", "sandwich")

    def reads(name: str, stream: Tensor) -> Tensor:
        bare = spec.norms.bare_start and index == 0 and name == "attn_norm"
        value = norm(spec, w, name, stream) if before and not bare else stream
        observe(name.replace("_norm", "_in"), value)
        return value

    def adds(stream: Tensor, branch: str, value: Tensor) -> Tensor:
        if spec.norms.layer_scale:
            value = value * w[f"{branch}_scale"]
        if spec.norms.placement in ("branch", "sandwich"):
            value = norm(spec, w, f"{branch}_post_norm", value)
        stream = stream + (value if spec.branch_scale == 1 else value * spec.branch_scale)
        return norm(spec, w, f"{branch}_post_norm", stream) if spec.norms.placement == "post" else stream

    attn_in = reads("attn_norm", x)
    if not spec.parallel:
        x = adds(x, "attn", attention(spec, w, attn_in, positions, index, observe))
        return adds(x, "ffn", feed_forward(spec, w, reads("ffn_norm", x), observe))
    if spec.norms.shared:
        observe("ffn_in", attn_in)
    ffn_in = attn_in if spec.norms.shared else reads("ffn_norm", x)
    x = adds(x, "attn", attention(spec, w, attn_in, positions, index, observe))
    return adds(x, "ffn", feed_forward(spec, w, ffn_in, observe))
