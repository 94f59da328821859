"""Attention of every family: RoPE or ALiBi, grouped queries, norms on queries and keys, windows, soft caps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..architectures import Spec
from ..kernels.routes import Rope
from .slots import Slots, linear, linear_with_rope

Observer = Callable[[str, Tensor], None]  # called with the name and value of an intermediate


def ignore(name: str, value: Tensor) -> None:
    """The observer that looks at nothing."""


@dataclass(frozen=True)
class Positions:
    """What attention knows about positions, for one sequence length: made once, used by every block."""

    rope: Rope | None
    local_rope: Rope | None  # of the blocks with a window
    bias: dict[int, Tensor]  # window -> (heads or 1, T, T) added to the scores; none for plain causal or full attention
    rows: Tensor | None = None  # (T, T) of the table of relative positions, for each query and key

    @staticmethod
    def of(spec: Spec, length: int, dtype: torch.dtype, device: torch.device | str) -> Positions:
        rope = rope_table(spec, length, dtype, device)
        local = rope
        if spec.rope.local_inv_freq:
            local = _table(spec.rope.local_inv_freq, 1.0, length, dtype, device)
        att = spec.attention
        windows = set(att.windows) if att.windows else {0}
        special = {w for w in windows if w or att.alibi or att.sinks or (att.softcap and att.causal)}
        biases = {w: score_bias(spec, w, length, dtype, device) for w in special}
        return Positions(rope, local, biases, distance_rows(spec, length, device))

    def rope_of(self, spec: Spec, block: int) -> Rope | None:
        if not spec.rope.turns(block):
            return None
        return self.local_rope if spec.attention.window(block) else self.rope


def rope_table(spec: Spec, length: int, dtype: torch.dtype, device: torch.device | str) -> Rope | None:
    """cos and sin of every position and rotary pair, computed in float64 and rounded once."""
    return _table(spec.rope.inv_freq, spec.rope.scaling, length, dtype, device) if spec.rope.inv_freq else None


def _table(
    inv_freq: tuple[float, ...], scaling: float, length: int, dtype: torch.dtype, device: torch.device | str
) -> Rope:
    frequencies = torch.tensor(inv_freq, dtype=torch.float64, device=device)
    angles = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequencies
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def rotate(x: Tensor, rope: Rope | None) -> Tensor:
    """RoPE on x (..., T, head_dim): pairs (i, i + rotary_dim/2), the rest passes."""
    if rope is None:
        return x
    cos, sin = rope
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def score_bias(spec: Spec, window: int, length: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """(heads or 1, T, T): -inf where a token must not look, ALiBi's penalty elsewhere."""
    att = spec.attention
    place = torch.arange(length, device=device)
    back = place[:, None] - place
    hidden = back < 0 if att.causal else torch.zeros_like(back, dtype=torch.bool)
    if window:
        hidden = hidden | (back >= window) | (back <= -window)
    bias = torch.zeros(1, length, length, dtype=dtype, device=device)
    if att.alibi:
        slopes = alibi_slopes(att.heads).to(device, torch.bfloat16 if att.alibi_rounded else torch.float64)
        penalty = (slopes[:, None] * place).to(torch.float64)  # counted from the start: the softmax sees differences
        bias = (penalty * att.alibi).to(dtype)[:, None].expand(-1, length, -1)
    return bias.masked_fill(hidden, -torch.inf)


def distance_rows(spec: Spec, length: int, device: torch.device | str) -> Tensor | None:
    """(T, T): the row of the table of relative positions for query i and key j; None where there is no table."""
    if not spec.attention.distances:
        return None
    rows = torch.tensor(spec.attention.distances, device=device)
    place = torch.arange(length, device=device)
    return rows[place[:, None] - place + len(rows) // 2]


def distance_scores(spec: Spec, w: Slots, q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
    """What is added to q·k of (batch, heads, T, e) each: q·K and k·Q of their distance's row in the table."""
    att, table = spec.attention, w["relative"]
    if att.distances_normed:
        table = F.layer_norm(table, table.shape[-1:], w["relative_norm"], w["relative_norm_bias"], spec.norms.eps)

    def of_rows(slot: str) -> Tensor:
        return linear(w, slot, table[None]).unflatten(-1, (att.heads, att.head_dim)).transpose(1, 2)

    places, scores = rows.expand(len(q), att.heads, -1, -1), torch.zeros((), dtype=q.dtype, device=q.device)
    if "q" in att.distance_terms:
        scores = scores + (q @ of_rows("k").mT).gather(-1, places)
    if "k" in att.distance_terms:
        scores = scores + (k @ of_rows("q").mT).gather(-1, places.mT).mT
    return scores


def alibi_slopes(heads: int) -> Tensor:
    """One slope for each head (float64), as in the ALiBi paper."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.float64)


def attention(
    spec: Spec, w: Slots, x: Tensor, positions: Positions, index: int = 0, observe: Observer = ignore
) -> Tensor:
    """Attention of x (batch, T, d) in block `index`."""
    att = spec.attention
    bare = observe is ignore and not att.qk_norm and not att.clip_qkv  # nothing between a product and RoPE

    def heads(slot: str, count: int, rope: Rope | None = None) -> Tensor:
        y = linear_with_rope(w, slot, x, rope, count) if bare else None
        if y is not None:
            return y.unflatten(-1, (count, att.head_dim)).transpose(1, 2)
        y = linear(w, slot, x)
        observe(slot, y)
        if att.qk_norm == "full" and slot != "v":
            y = F.rms_norm(y, y.shape[-1:], w[f"{slot}_norm"], spec.norms.eps)
        if att.clip_qkv:
            y = y.clamp(-att.clip_qkv, att.clip_qkv)
        y = y.unflatten(-1, (count, att.head_dim)).transpose(1, 2)
        if att.qk_norm != "head" or slot == "v":
            return rotate(y, rope)
        if att.qk_norm_last:
            y = rotate(y, rope)
        y = F.rms_norm(y, y.shape[-1:], w[f"{slot}_norm"], spec.norms.eps)
        return y if att.qk_norm_last else rotate(y, rope)

    rope = positions.rope_of(spec, index)
    q, k = heads("q", att.heads, rope), heads("k", att.kv_heads, rope)
    v = heads("v", att.kv_heads)
    if att.queries_per_group > 1:
        k, v = (t.repeat_interleave(att.queries_per_group, dim=1) for t in (k, v))
    bias = positions.bias.get(att.window(index))
    if positions.rows is not None:
        scores = distance_scores(spec, w, q, k, positions.rows) * _scale(spec)
        bias = scores if bias is None else bias + scores
    if att.sinks and bias is not None:
        k, v, bias = _with_sink(w["sinks"], k, v, bias)
    mixed = _mix(spec, q, k, v, bias).transpose(1, 2).flatten(2)
    observe("mixed", mixed)
    return linear(w, "o", mixed)


def _with_sink(sinks: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One more key and value, which are 0, and the score that each head gives them."""
    k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
    column = sinks[:, None, None].expand(-1, bias.shape[-2], 1)
    return k, v, torch.cat([bias.expand(len(sinks), -1, -1), column], dim=-1)


def _scale(spec: Spec) -> float:
    return spec.attention.logit_scale or float(spec.attention.head_dim**-0.5)


def _mix(spec: Spec, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q·k) v for (batch, heads, T, e) each."""
    scale = _scale(spec)
    if not spec.attention.softcap:
        causal = spec.attention.causal and bias is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale)
    scores = spec.attention.softcap * torch.tanh(q @ k.mT * (scale / spec.attention.softcap))
    return (scores if bias is None else scores + bias).softmax(-1) @ v
