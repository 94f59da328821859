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
from ..architectures.axes import ATTN_READERS, BLOCK_READERS, END_ROWS, END_WRITERS
from ..checkpoints.lazy import Slots, Table
from ..checkpoints.weights import Weights
from ..errors import LmcError
from .groups import folds_value_bias, hides_head_mean, hides_key_bias, resolves_embedding

LAYER_SCALES = (("attn_scale", "o"), ("ffn_scale", "down"))  # (factor on what a branch adds, its writer)
HEAD_READERS = ("head_transform", "pooler")  # of the final norm, where the head reads a transform of it
_MOST_SHARE = 0.75  # of a squared gain that the variance behind a norm may be, for the table to be solved well


def canonicalize(weights: Weights, like: Weights | None = None) -> Weights:
    """The canonical form of a model: computed one block at a time in float64, returned in the dtype of `weights`.

    Lazy weights stay lazy; of their tables, everything is looked at once.

    like: a model, not in canonical form, that this one was trained from. Where the canonical form is a choice (signs
    and balance of gains on queries and keys, the gain behind a table that is solved anew), the one made for `like` is
    taken, so that what differs little differs little afterwards. All else, the folded norms above all, is the model's.
    """
    spec = weights.spec
    survey = _survey(weights, like)
    blocks = like.blocks if like and spec.attention.qk_norm else None

    def block(index: int, slots: Slots) -> Slots:
        return canonical_block(spec, slots, None if blocks is None else blocks[index])

    return weights.in_dtype(torch.float64, lambda ends: canonical_ends(spec, ends, survey), block)


def norm_read_by(spec: Spec, slot: str) -> str | None:
    """The norm whose gain moves into a slot, because the slot alone, or with others, reads what it yields."""
    if slot == "head":
        return _norm_before_head(spec)
    if slot in ("head_transform", "pooler"):
        return "final_norm" if slot in HEAD_READERS and folds_final_norm(spec) else None
    if slot not in BLOCK_READERS:
        return None
    norm = "attn_norm" if spec.norms.shared or slot in ATTN_READERS else "ffn_norm"
    return norm if norm in spec.shapes else None


def centred_axis(spec: Spec, slot: str) -> int | None:
    """The axis of a matrix along which its mean is subtracted: the stream's, or one that no output can see."""
    if spec.pooling == "raw":
        return None  # every channel's mean is seen
    layernorm, placement = spec.norms.kind == "layernorm", spec.norms.placement
    if slot in ("o", "down"):
        return 0 if layernorm and placement in ("pre", "post") else None
    if slot in (*END_ROWS, *END_WRITERS):
        centres = layernorm and (placement == "pre" or spec.norms.embedded)
        return (1 if slot in END_ROWS else 0) if centres else None
    return 0 if slot == "router" or (slot == "head" and hides_head_mean(spec)) else None


def canonical_block(spec: Spec, block: Slots, like: Slots | None = None) -> Slots:
    """One block in canonical form. The dict is used up, no tensor in it is changed. like: see canonicalize."""
    w = block
    for norm in ("attn_norm", "ffn_norm"):
        _absorb(w, norm, tuple(slot for slot in BLOCK_READERS if norm_read_by(spec, slot) == norm))
    for scale, writer in LAYER_SCALES:
        if scale in w:
            w[writer] = w[scale][:, None] * w[writer]
            if f"{writer}_bias" in w:
                w[f"{writer}_bias"] = w[scale] * w[f"{writer}_bias"]
            w[scale] = torch.ones_like(w[scale])
    if "v_bias" in w and "o_bias" in w and folds_value_bias(spec):
        w["o_bias"] = w["o_bias"] + w["o"] @ for_each_query(spec, w["v_bias"])
        w["v_bias"] = torch.zeros_like(w["v_bias"])
    if "k_bias" in w and hides_key_bias(spec):  # RoPE turns it by position, and so shows it
        bias = w["k_bias"].unflatten(0, (spec.attention.kv_heads, spec.attention.head_dim)).clone()
        bias[:, spec.rope.rotary_dim :] = 0
        w["k_bias"] = bias.flatten()
    if spec.attention.qk_norm:
        _balance_gains(spec, w, like or w)
    for slot in ("o", "down", "router"):
        if centred_axis(spec, slot) == 0:
            for name in (slot, f"{slot}_bias"):
                if name in w:
                    w[name] = w[name] - w[name].mean(dim=0)
    return w


def for_each_query(spec: Spec, per_group: Tensor) -> Tensor:
    """What key/value groups have (G·e,), as the columns of o see it: once for each query head, (H·e,)."""
    att = spec.attention
    found: Tensor = per_group.unflatten(0, (att.kv_heads, 1, att.head_dim)).expand(-1, att.queries_per_group, -1)
    return found.flatten()


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
    norm = _norm_before_head(spec)
    if folds_final_norm(spec):
        _absorb(w, "final_norm", HEAD_READERS)
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
    for name in (*END_ROWS, *END_WRITERS):
        axis = centred_axis(spec, name)
        for part in (name, f"{name}_bias") if axis == 0 else (name,):
            if part in w and axis is not None:
                w[part] = w[part] - w[part].mean(dim=axis, keepdim=True)
    return w


def _survey(weights: Weights, like: Weights | None = None) -> Survey:
    spec, ends = weights.spec, {name: t.double() for name, t in weights.small_ends.items()}
    head = weights.table("head")
    assert head is not None
    norm, bias, gain_of_embed = _norm_before_head(spec), ends.get("head_bias"), None
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
        largest = _largest_outcome(spec, weights)
        own = 2 * largest
        before = own if like is None else 2 * _largest_outcome(spec, like)
        gain_of_embed = (before if largest < _MOST_SHARE * before else own).sqrt()
    return Survey(norm_bias, bias, mean, gain_of_embed)


def _norm_before_head(spec: Spec) -> str | None:
    """The norm whose gain the head takes: none where a transform stands between, or where nothing is a head."""
    name = "head_norm" if spec.head_transform else "final_norm"
    return name if name in spec.shapes and not spec.headless else None


def folds_final_norm(spec: Spec) -> bool:
    """The final norm's gain goes into a transform in front of the head."""
    return spec.head_transform and "final_norm" in spec.shapes


def _for_reader(of_norm: Tensor, reader: Tensor) -> Tensor:
    """A norm's gain or bias as a reader sees it, perhaps of several vectors side by side, as in DINOv2's classifier."""
    return of_norm.repeat(reader.shape[-1] // len(of_norm))


def _absorb(w: Slots, name: str, readers: tuple[str, ...]) -> None:
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


def signs_of_gain(w: Slots, slot: str) -> Tensor:
    """Of the gain on queries or keys (slot q or k), one for each row of the slot."""
    gain = w[f"{slot}_norm"]
    sign = torch.where(gain < 0, -torch.ones_like(gain), torch.ones_like(gain))
    return sign.repeat(w[slot].shape[0] // len(sign))


def _balance_gains(spec: Spec, w: Slots, like: Slots) -> None:
    """Gains of queries and keys: signs go into the rows; each rotary pair's (or channel's) two gains get equal size.

    Clamped queries and keys keep the sizes. Signs and sizes are those of the gains of `like`. Behind RoPE only the
    product of two gains counts, and the sign of one goes into the other.
    """
    last = spec.attention.qk_norm_last
    groups, e = spec.attention.kv_heads, spec.attention.head_dim
    gains: dict[str, Tensor] = {slot: like[f"{slot}_norm"].double().abs() for slot in ("q", "k")}
    own: dict[str, Tensor] = {}
    for slot in ("q", "k"):
        rows = signs_of_gain(like, "q" if last else slot).to(w[slot])
        own[slot] = w[f"{slot}_norm"] * rows[: len(w[f"{slot}_norm"])]
        if last:
            continue
        w[slot] = w[slot] * rows[:, None]
        if f"{slot}_bias" in w:
            w[f"{slot}_bias"] = w[f"{slot}_bias"] * rows
    for slot in ("q", "k"):
        w[f"{slot}_norm"] = own[slot]
    if spec.attention.clip_qkv:
        return
    count = groups if spec.attention.qk_norm == "full" else 1
    sizes = [gains[slot].view(count, -1, e).square().mean(1) for slot in ("q", "k")]  # (count, e)
    half = 0 if last else spec.rope.rotary_dim // 2
    for size in sizes:
        pair = (size[:, :half] + size[:, half : 2 * half]) / 2
        size[:, : 2 * half] = pair.repeat(1, 2)
    live = (sizes[0] > 0) & (sizes[1] > 0)
    one = torch.ones_like(sizes[0])
    factor = (torch.where(live, sizes[1], one) / torch.where(live, sizes[0], one)) ** 0.25
    for slot, change in (("q", factor), ("k", 1 / factor)):
        w[f"{slot}_norm"] = (own[slot].view(count, -1, e) * change[:, None].to(own[slot])).reshape(-1)


def _largest_outcome(spec: Spec, weights: Weights) -> Tensor:
    """The largest variance of an embedding's row behind its norm."""
    ends, embed = {name: t.double() for name, t in weights.small_ends.items()}, weights.table("embed")
    assert embed is not None
    return torch.stack([_outcome(spec, ends, rows.double())[1].max() for _, rows in embed.chunks()]).max()


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
