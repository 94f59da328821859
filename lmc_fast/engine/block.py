"""One generic pre-norm transformer block, driven by the spec and fed with named slots."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..architectures import Spec
from ..checkpoints.weights import Slots

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_fast": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}

Rope = tuple[Tensor, Tensor]  # cos, sin: (T, rotary_dim / 2)
Observer = Callable[[str, Tensor], None]  # called with the name and value of an intermediate


def ignore(name: str, value: Tensor) -> None:
    """The observer that looks at nothing."""


def rope_table(spec: Spec, length: int, dtype: torch.dtype, device: torch.device | str) -> Rope | None:
    """cos and sin of every position and rotary pair, computed in float64 and rounded once."""
    if not spec.inv_freq:
        return None
    frequencies = torch.tensor(spec.inv_freq, dtype=torch.float64, device=device)
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequencies
    return (angles.cos() * spec.rope_scaling).to(dtype), (angles.sin() * spec.rope_scaling).to(dtype)


def rotate(x: Tensor, rope: Rope | None) -> Tensor:
    """RoPE on x (..., T, head_dim): pairs (i, i + rotary_dim/2), the rest passes."""
    if rope is None:
        return x
    cos, sin = rope
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def norm(spec: Spec, slots: Slots, name: str, x: Tensor) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension, with the gain and bias that the slots hold."""
    gain, bias = slots.get(name), slots.get(f"{name}_bias")
    if spec.norm == "layernorm":
        return F.layer_norm(x, x.shape[-1:], gain, bias, spec.norm_eps)
    return F.rms_norm(x, x.shape[-1:], gain, spec.norm_eps)


def attention(spec: Spec, w: Slots, x: Tensor, rope: Rope | None, observe: Observer = ignore) -> Tensor:
    """Causal attention of x (batch, T, d)."""

    def heads(slot: str, count: int) -> Tensor:
        y = F.linear(x, w[slot], w.get(f"{slot}_bias"))
        observe(slot, y)
        return y.unflatten(-1, (count, spec.head_dim)).transpose(1, 2)

    q, k = rotate(heads("q", spec.heads), rope), rotate(heads("k", spec.kv_heads), rope)
    v = heads("v", spec.kv_heads)
    if spec.queries_per_group > 1:
        k, v = (t.repeat_interleave(spec.queries_per_group, dim=1) for t in (k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    observe("mixed", mixed)
    return F.linear(mixed, w["o"], w.get("o_bias"))


def feed_forward(spec: Spec, w: Slots, x: Tensor, observe: Observer = ignore) -> Tensor:
    """Plain or gated FFN of x (..., d)."""
    hidden = F.linear(x, w["up"], w.get("up_bias"))
    if spec.gated:
        hidden = hidden * ACTIVATIONS[spec.activation](F.linear(x, w["gate"], w.get("gate_bias")))
    else:
        hidden = ACTIVATIONS[spec.activation](hidden)
    observe("hidden", hidden)
    return F.linear(hidden, w["down"], w.get("down_bias"))


def block(spec: Spec, w: Slots, x: Tensor, rope: Rope | None, observe: Observer = ignore) -> Tensor:
    """x (batch, T, d) -> the block's output, same shape. `observe` sees q, k, v, mixed, hidden, attn_in and ffn_in."""
    attn_in = norm(spec, w, "attn_norm", x)
    observe("attn_in", attn_in)
    if not spec.parallel:
        x = x + attention(spec, w, attn_in, rope, observe)
    ffn_in = norm(spec, w, "ffn_norm", x)
    observe("ffn_in", ffn_in)
    if spec.parallel:
        x = x + attention(spec, w, attn_in, rope, observe)
    return x + feed_forward(spec, w, ffn_in, observe)
