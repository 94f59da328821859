"""Canonical form (norm absorption): what no output can see is folded away.

Afterwards every norm that readers see directly has gain 1; a LayerNorm model's writers have zero mean, so that its
residual stream does; the value bias is gone into the output bias; key biases that the softmax cannot see are 0;
layer-scales are 1; router rows and (where logits are read through a softmax) head rows have zero mean; gains of queries
and keys are positive and balanced. Each step leaves the model's log-probabilities as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..architectures import Spec
from ..architectures.axes import ATTN_READERS, END_ROWS, END_WRITERS, FFN_READERS
from ..checkpoints.lazy import Slots, Table
from ..checkpoints.weights import Weights
from ..errors import LmcError
from .groups import folds_value_bias, hides_head_mean, hides_key_bias, resolves_embedding


def canonicalize(weights: Weights) -> Weights:
    """The canonical form of a model: computed one block at a time in float64, returned in the dtype of `weights`.

    Lazy weights stay lazy; of their tables, everything is looked at once.
    """
    spec = weights.spec
    survey = _survey(weights)
    return weights.in_dtype(
        torch.float64, lambda ends: canonical_ends(spec, ends, survey), lambda _, block: canonical_block(spec, block)
    )


def canonical_block(spec: Spec, block: Slots) -> Slots:
    """One block in canonical form. The dict is used up, no tensor in it is changed."""
    w = block
    if spec.norms.shared:
        _absorb(spec, w, "attn_norm", ATTN_READERS + FFN_READERS)
    else:
        _absorb(spec, w, "attn_norm", ATTN_READERS)
        _absorb(spec, w, "ffn_norm", FFN_READERS)
    for scale, writer in (("attn_scale", "o"), ("ffn_scale", "down")):
        if scale in w:
            w[writer] = w[scale][:, None] * w[writer]
            if f"{writer}_bias" in w:
                w[f"{writer}_bias"] = w[scale] * w[f"{writer}_bias"]
            w[scale] = torch.ones_like(w[scale])
    if "v_bias" in w and "o_bias" in w and folds_value_bias(spec):
        att = spec.attention
        per_query = w["v_bias"].unflatten(0, (att.kv_heads, 1, att.head_dim)).expand(-1, att.queries_per_group, -1)
        w["o_bias"] = w["o_bias"] + w["o"] @ per_query.flatten()
        w["v_bias"] = torch.zeros_like(w["v_bias"])
    if "k_bias" in w and hides_key_bias(spec):  # RoPE turns it by position, and so shows it
        bias = w["k_bias"].unflatten(0, (spec.attention.kv_heads, spec.attention.head_dim)).clone()
        bias[:, spec.rope.rotary_dim :] = 0
        w["k_bias"] = bias.flatten()
    if spec.attention.qk_norm:
        _balance_gains(spec, w)
    if spec.norms.kind == "layernorm" and spec.norms.placement in ("pre", "post"):
        for name in ("o", "o_bias", "down", "down_bias"):
            if name in w:
                w[name] = w[name] - w[name].mean(dim=0)
    if "router" in w:
        w["router"] = w["router"] - w["router"].mean(dim=0)
    return w


@dataclass(frozen=True)
class Survey:
    """What the canonical form of each row of the embedding and of the head needs to know of all rows; float64."""

    norm_bias: Tensor | None = None  # (d,) what the bias of the norm before the head becomes
    head_bias: Tensor | None = None  # (V,) what the head's bias becomes
    head_mean: Tensor | None = None  # of the head's rows, once they have taken the gain
    embed_gain: Tensor | None = None  # the one gain of the norm behind a table that is solved anew


def canonical_ends(spec: Spec, ends: Slots, survey: Survey) -> Slots:
    """Embeddings, final norm and head in canonical form, each row of a table by itself; the input is not changed."""
    w = dict(ends)
    norm = _norm_before_head(ends)
    if norm:
        w["head"] = w["head"] * _for_reader(w[norm], w["head"])
        w[norm] = torch.ones_like(w[norm])
        if survey.norm_bias is not None:
            w[f"{norm}_bias"] = survey.norm_bias.to(w[norm])
    if survey.head_mean is not None:
        w["head"] = w["head"] - survey.head_mean
    if survey.head_bias is not None:
        w["head_bias"] = survey.head_bias.to(w["head_bias"])
    if survey.embed_gain is not None:
        _resolve_embedding(spec, w, survey.embed_gain)
    if spec.norms.kind == "layernorm" and (spec.norms.placement == "pre" or spec.norms.embedded):
        for name in END_ROWS:
            if name in w:
                w[name] = w[name] - w[name].mean(dim=1, keepdim=True)
        for name in END_WRITERS:
            for part in (name, f"{name}_bias"):
                if part in w:
                    w[part] = w[part] - w[part].mean(dim=0)
    return w


def _survey(weights: Weights) -> Survey:
    spec, ends = weights.spec, {name: t.double() for name, t in weights.small_ends.items()}
    head, embed = weights.table("head"), weights.table("embed")
    assert head is not None
    norm, bias, gain_of_embed = _norm_before_head(ends), ends.get("head_bias"), None
    shift = ends.get(f"{norm}_bias")
    norm_bias = shift
    if norm and shift is not None:
        gain = ends[norm]
        norm_bias = torch.zeros_like(shift) if bias is not None else _unscaled(gain, shift, [head], norm)
    if bias is not None and shift is not None:
        parts = [rows.double() @ _for_reader(shift, rows) for _, rows in head.chunks()]
        bias = bias + torch.cat(parts)
    mean = None
    if hides_head_mean(spec):
        sums = []
        for _, rows in head.chunks():
            rows = rows.double()
            sums.append((rows * _for_reader(ends[norm], rows) if norm else rows).sum(0))
        mean = torch.stack(sums).sum(0) / head.shape[0]
        bias = None if bias is None else bias - bias.mean()
    if resolves_embedding(spec):
        assert embed is not None
        largest = [_outcome(spec, ends, rows.double())[1].max() for _, rows in embed.chunks()]
        gain_of_embed = (2 * torch.stack(largest).max()).sqrt()
    return Survey(norm_bias, bias, mean, gain_of_embed)


def _norm_before_head(ends: Slots) -> str | None:
    return next((name for name in ("final_norm", "head_norm") if name in ends), None)


def _for_reader(of_norm: Tensor, reader: Tensor) -> Tensor:
    """A norm's gain or bias as a reader sees it, perhaps of several vectors side by side, as in DINOv2's classifier."""
    return of_norm.repeat(reader.shape[-1] // len(of_norm))


def _absorb(spec: Spec, w: Slots, name: str, readers: tuple[str, ...]) -> None:
    """Moves a norm's gain, and its bias where every reader can take it, into the readers."""
    if name not in w:
        return
    readers = tuple(reader for reader in readers if reader in w)
    gain, shift = w[name], w.get(f"{name}_bias")
    if shift is not None and all(f"{reader}_bias" in w for reader in readers):
        for reader in readers:
            w[f"{reader}_bias"] = w[f"{reader}_bias"] + w[reader] @ shift
        w[f"{name}_bias"] = torch.zeros_like(shift)
    elif shift is not None:
        w[f"{name}_bias"] = _unscaled(gain, shift, [Table.of(w[reader]) for reader in readers], name)
    for reader in readers:
        w[reader] = w[reader] * gain
    w[name] = torch.ones_like(gain)


def _unscaled(gain: Tensor, shift: Tensor, readers: list[Table], name: str) -> Tensor:
    """c with W diag(gain) c = W shift for the readers' rows W: shift / gain, or least squares where a gain is 0."""
    dead = gain == 0
    if not (dead & (shift != 0)).any():
        return torch.where(dead, torch.zeros_like(shift), shift / torch.where(dead, torch.ones_like(gain), gain))
    triangle = gain.new_zeros(0, len(gain), dtype=torch.float64)
    for rows in (
        rows for reader in readers for _, rows in reader.chunks()
    ):  # W = Q R with orthonormal columns Q: R asks for the same c
        below = rows.double().reshape(-1, len(gain))
        triangle = torch.linalg.qr(torch.cat([triangle, below]), mode="r").R
    scaled, wanted = triangle * gain.double(), triangle @ shift.double()
    solution = torch.linalg.lstsq(scaled, wanted[:, None], driver="gelsd").solution[:, 0]
    residual = (scaled @ solution - wanted).norm() / wanted.norm()
    if residual > 1e-6:
        raise LmcError(
            f"{name} has a zero gain with a non-zero bias that its readers cannot absorb ({residual:.1e} off)"
        )
    found: Tensor = solution.to(shift)
    return found


def _balance_gains(spec: Spec, w: Slots) -> None:
    """Gains of queries and keys: signs go into the rows; each rotary pair's (or channel's) two gains get equal size.

    Clamped queries and keys keep the sizes.
    """
    groups, e = spec.attention.kv_heads, spec.attention.head_dim
    gains: dict[str, Tensor] = {}
    for slot in ("q", "k"):
        gain = w[f"{slot}_norm"]
        sign = torch.where(gain < 0, -torch.ones_like(gain), torch.ones_like(gain))
        gains[slot] = gain.abs()
        rows = sign.repeat(w[slot].shape[0] // len(sign))
        w[slot] = w[slot] * rows[:, None]
        if f"{slot}_bias" in w:
            w[f"{slot}_bias"] = w[f"{slot}_bias"] * rows
        w[f"{slot}_norm"] = gains[slot]
    if spec.attention.clip_qkv:
        return
    count = groups if spec.attention.qk_norm == "full" else 1
    sizes = [gains[slot].view(count, -1, e).square().mean(1) for slot in ("q", "k")]  # (count, e)
    half = spec.rope.rotary_dim // 2
    for size in sizes:
        pair = (size[:, :half] + size[:, half : 2 * half]) / 2
        size[:, : 2 * half] = pair.repeat(1, 2)
    live = (sizes[0] > 0) & (sizes[1] > 0)
    one = torch.ones_like(sizes[0])
    factor = (torch.where(live, sizes[1], one) / torch.where(live, sizes[0], one)) ** 0.25
    for slot, change in (("q", factor), ("k", 1 / factor)):
        w[f"{slot}_norm"] = (gains[slot].view(count, -1, e) * change[:, None]).reshape(-1)


def _outcome(spec: Spec, ends: Slots, embed: Tensor) -> tuple[Tensor, Tensor]:
    """(what the norm behind the embedding makes of its rows, centred; its variance), for (n, d): (n, d) and (n, 1)."""
    y = F.layer_norm(embed, embed.shape[-1:], ends["embed_norm"], ends["embed_norm_bias"], spec.norms.eps)
    y = y - y.mean(dim=1, keepdim=True)
    return y, y.square().mean(dim=1, keepdim=True)


def _resolve_embedding(spec: Spec, w: Slots, c: Tensor) -> None:
    """A new table whose norm has one gain c for all channels and no bias, and yields what the old one did.

    y = centred outcome, r = var(y)/c² ≤ 1/2; e' = (y/c) √(ε/(1-r)) has variance rε/(1-r), so its norm is c·(y/c).
    """
    y, variance = _outcome(spec, w, w["embed"])
    w["embed"] = y / c * (spec.norms.eps / (1 - variance / c**2)).sqrt()
    w["embed_norm"] = torch.full_like(w["embed_norm"], 1.0) * c
    w["embed_norm_bias"] = torch.zeros_like(w["embed_norm_bias"])
