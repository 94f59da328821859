"""Elements of the symmetry group: apply, invert, compose.

The group acts on weights in canonical form. With R the rotation, p and s permutations, M, N head maps, D a diagonal:

    embed, positions   E -> E Rᵀ                     head, norm biases   W -> W Rᵀ,  c -> R c
    patch              W -> R W                      gains in the stream γ -> |R| γ  (R a signed permutation there)
    q (head h)         W -> N⁻ᵀ W[p] Rᵀ              k                   W -> N W[p] Rᵀ
    v                  W -> M W[p] Rᵀ                o (columns of h)    W -> R W[p] M⁻¹
    up, gate           W -> D W[s] Rᵀ, W[s] Rᵀ       down                W -> R W[:, s] D⁻¹
    router             W -> W[x] Rᵀ                  experts             as up, gate, down, each with its own s, D
    head transform     W -> W[h] Rᵀ                  head                W -> W[:, h]

Permutations act first, then maps and scales, the rotation last. `W[p]` takes key/value group p[h] to place h; within a
group, `queries` does the same for its query heads. Gains of queries and keys that differ by head move with the heads.
None stands for the identity everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..architectures import BLOCK_READERS, BLOCK_WRITERS, END_ROWS, END_WRITERS, POST_NORMS, Spec
from ..checkpoints.weights import Slots, Weights
from .groups import rotates


@dataclass
class BlockTransform:
    """The part of a group element inside one block.

    G key/value groups, r queries each, e head_dim, f units, E experts of x units.
    """

    heads: Tensor | None = None  # (G,) int64 permutation of key/value groups
    queries: Tensor | None = None  # (G, r) int64, a permutation in each row
    vo: Tensor | None = None  # (G, e, e) M
    vo_inverse: Tensor | None = None  # (G, e, e) M⁻¹, kept beside M so that learning needs no inversion
    qk: Tensor | None = None  # (G, e, e) N
    qk_inverse: Tensor | None = None
    units: Tensor | None = None  # (f,) int64 permutation
    unit_scale: Tensor | None = None  # (f,) D
    experts: Tensor | None = None  # (E,) int64 permutation
    expert_units: Tensor | None = None  # (E, x) int64, a permutation in each row; row j acts on what is at place j
    expert_scale: Tensor | None = None  # (E, x)

    def __post_init__(self) -> None:
        if self.vo is not None and self.vo_inverse is None:
            self.vo_inverse = inverse_of(self.vo)
        if self.qk is not None and self.qk_inverse is None:
            self.qk_inverse = inverse_of(self.qk)


@dataclass
class Transform:
    """A group element for a whole model."""

    rotation: Tensor | None  # (d, d) orthogonal R; a signed permutation where gains lie in the stream
    blocks: list[BlockTransform]
    head_units: Tensor | None = None  # (d,) int64 permutation between a head transform and the head

    @staticmethod
    def identity(spec: Spec) -> Transform:
        return Transform(None, [BlockTransform() for _ in range(spec.layers)])

    def map(self, function: Callable[[Tensor], Tensor]) -> Transform:
        """Applies `function` to every floating-point tensor (e.g. a change of dtype or device)."""
        change = lambda t: function(t) if t is not None and t.is_floating_point() else t  # noqa: E731
        blocks = [BlockTransform(**{f.name: change(getattr(b, f.name)) for f in fields(b)}) for b in self.blocks]
        return Transform(change(self.rotation), blocks, self.head_units)

    def apply(self, weights: Weights) -> Weights:
        """g · weights, block by block in the wider dtype of both, returned in that of `weights` and on their device;
        differentiable.
        """
        spec = weights.spec
        dtype = max((x.dtype for x in self._floats()), key=lambda d: d.itemsize, default=torch.float32)
        device = next((t.device for t in weights.ends.values()), torch.device("cpu"))
        moved = self.map(lambda t: t.to(device))
        return weights.in_dtype(
            dtype,
            lambda ends: apply_ends(spec, moved.rotation, ends, moved.head_units),
            lambda i, w: apply_block(spec, moved.rotation, moved.blocks[i], w),
        )

    def _floats(self) -> Iterator[Tensor]:
        for x in (self.rotation, *(getattr(b, f.name) for b in self.blocks for f in fields(b))):
            if x is not None and x.is_floating_point():
                yield x

    def inverse(self) -> Transform:
        """g⁻¹."""
        rotation = None if self.rotation is None else self.rotation.mT
        head = None if self.head_units is None else _inverse_permutation(self.head_units)
        return Transform(rotation, [inverse_block(block) for block in self.blocks], head)

    def compose(self, first: Transform) -> Transform:
        """self · first: what applying `first` and then self does."""
        blocks = [compose_block(a, b) for a, b in zip(self.blocks, first.blocks, strict=True)]
        head = first.head_units if self.head_units is None else self.head_units
        if first.head_units is not None and self.head_units is not None:
            head = first.head_units[self.head_units]
        return Transform(_product(self.rotation, first.rotation), blocks, head)


def inverse_of(maps: Tensor) -> Tensor:
    """Inverses of (batch, n, n), one LAPACK call each: torch's batched CPU LU is wrong with several threads."""
    return torch.stack([torch.linalg.inv(m) for m in maps])


def apply_ends(spec: Spec, rotation: Tensor | None, ends: Slots, head_units: Tensor | None = None) -> Slots:
    """The action on everything outside the blocks; differentiable."""
    out = dict(ends)
    if head_units is not None:
        for name in ("head_transform", "head_transform_bias", "head_norm", "head_norm_bias"):
            out[name] = out[name][head_units]
        out["head"] = out["head"][:, head_units]
    return {name: turn_end(spec, rotation, name, w) for name, w in out.items()}


def turn_end(spec: Spec, rotation: Tensor | None, name: str, w: Tensor) -> Tensor:
    """What the residual rotation makes of one slot outside the blocks."""
    if rotation is None:
        return w
    readers = ("head_transform", "pooler") if spec.head_transform else ("head", "final_norm_bias")
    if name in END_ROWS or name in readers:  # the head may read several vectors side by side
        return turn_rows(w, rotation)
    if name.removesuffix("_bias") in END_WRITERS:
        return rotation @ w
    return _turned_norm(spec, rotation, name, w) if name.removesuffix("_bias") == "embed_norm" else w


def turn_rows(w: Tensor, rotation: Tensor) -> Tensor:
    """w Rᵀ, for w (..., n d) on each of its n vectors side by side."""
    return (w.reshape(-1, len(rotation)) @ rotation.mT).view(w.shape)


def _turned_norm(spec: Spec, rotation: Tensor, name: str, w: Tensor) -> Tensor:
    """A norm in the stream's own path. Where R is not a signed permutation, its gains are equal and stay."""
    if name.endswith("_bias"):
        return rotation @ w
    return w if rotates(spec) else rotation.abs() @ w


def apply_block(spec: Spec, rotation: Tensor | None, t: BlockTransform, w: Slots) -> Slots:
    """The action on one block's slots; differentiable."""
    return {name: turn(spec, rotation, name, map_inside(spec, t, name, slot)) for name, slot in w.items()}


def map_inside(spec: Spec, t: BlockTransform, name: str, w: Tensor) -> Tensor:
    """What permutations, head maps and scales make of one slot of a block; itself where they leave it alone."""
    if name.startswith("experts_") or name == "router":
        return _move_experts(t, name, w)
    part = name.removesuffix("_bias")
    if part in ("q", "k", "v"):
        return _move_heads(spec, t, part, w)
    if name == "o":
        return _move_output(spec, t, w)
    if part in ("up", "gate") or name == "down":
        return _move_units(w, name, t.units, t.unit_scale)
    if name in ("q_norm", "k_norm") and spec.attention.qk_norm == "full":
        count = spec.attention.queries_per_group if name == "q_norm" else 1
        return _permute_heads(t, w.view(spec.attention.kv_heads, count, spec.attention.head_dim)).reshape(-1)
    return w


def turn(spec: Spec, rotation: Tensor | None, name: str, w: Tensor) -> Tensor:
    """What the residual rotation makes of one slot of a block."""
    part = name.removesuffix("_bias")
    if rotation is None:
        return w
    if name in BLOCK_READERS or name in ("attn_norm_bias", "ffn_norm_bias"):
        return w @ rotation.mT
    if part in BLOCK_WRITERS:
        return rotation @ w
    return _turned_norm(spec, rotation, name, w) if part in POST_NORMS else w


def _move_heads(spec: Spec, t: BlockTransform, slot: str, w: Tensor) -> Tensor:
    """Rows of q, k or v, or their bias."""
    count = spec.attention.queries_per_group if slot == "q" else 1
    maps = head_maps(t, slot)
    if maps is None and t.heads is None and (t.queries is None or count == 1):
        return w
    heads = w.view(spec.attention.kv_heads, count, spec.attention.head_dim, -1)  # last: the width, or 1 for a bias
    rows = _permute_heads(t, heads)
    return (rows if maps is None else maps[:, None] @ rows).reshape(w.shape)


def head_maps(t: BlockTransform, slot: str) -> Tensor | None:
    """(G, e, e): what multiplies the rows of q, k or v, or, for o, its columns from the right."""
    if slot == "q":
        return None if t.qk_inverse is None else t.qk_inverse.mT
    return {"k": t.qk, "v": t.vo, "o": t.vo_inverse}[slot]


def _move_output(spec: Spec, t: BlockTransform, w: Tensor) -> Tensor:
    """Columns of o."""
    if t.heads is None and t.queries is None and t.vo_inverse is None:
        return w
    att = spec.attention
    columns = w.view(-1, att.kv_heads, att.queries_per_group, att.head_dim).permute(1, 2, 0, 3)
    columns = _permute_heads(t, columns)
    if t.vo_inverse is not None:
        columns = columns @ t.vo_inverse[:, None]
    return columns.permute(2, 0, 1, 3).reshape(w.shape)


def _move_units(w: Tensor, name: str, units: Tensor | None, scale: Tensor | None) -> Tensor:
    """One FFN slot, its units permuted, then (but for the gate) scaled."""
    unit = w.mT if name == "down" else w
    if units is not None:
        unit = unit[units]
    if scale is not None and not name.startswith("gate"):
        factor = 1 / scale if name == "down" else scale
        unit = unit * (factor[:, None] if unit.dim() == 2 else factor)
    return unit.mT if name == "down" else unit


def _move_experts(t: BlockTransform, name: str, w: Tensor) -> Tensor:
    """Experts to their new places, then the units of each."""
    if t.experts is not None:
        w = w[t.experts]
    if name == "router" or (t.expert_units is None and t.expert_scale is None):
        return w
    pick = lambda x, j: None if x is None else x[j]  # noqa: E731
    part = name.removeprefix("experts_")
    return torch.stack(
        [_move_units(e, part, pick(t.expert_units, j), pick(t.expert_scale, j)) for j, e in enumerate(w)]
    )


def _permute_heads(t: BlockTransform, rows: Tensor) -> Tensor:
    """rows (G, r, ...): groups, then queries within each group where the slot has them."""
    if t.heads is not None:
        rows = rows[t.heads]
    if t.queries is not None and rows.shape[1] > 1:
        rows = rows[torch.arange(len(rows), device=rows.device)[:, None], t.queries]
    return rows


def _inverse_permutation(p: Tensor) -> Tensor:
    return torch.argsort(p, dim=-1)


def inverse_block(t: BlockTransform) -> BlockTransform:
    """The inverse of the part inside a block."""
    back = None if t.heads is None else _inverse_permutation(t.heads)
    moved = lambda x: x if x is None or back is None else x[back]  # noqa: E731
    units = None if t.units is None else _inverse_permutation(t.units)
    scale = None if t.unit_scale is None else 1 / t.unit_scale
    places = None if t.experts is None else _inverse_permutation(t.experts)
    at_place = lambda x: x if x is None or places is None else x[places]  # noqa: E731
    inner = None if t.expert_units is None else _inverse_permutation(t.expert_units)
    expert_scale = None if t.expert_scale is None else 1 / t.expert_scale
    if expert_scale is not None and inner is not None:
        expert_scale = expert_scale.gather(1, inner)
    return BlockTransform(
        heads=back,
        queries=None if t.queries is None else moved(_inverse_permutation(t.queries)),
        vo=moved(t.vo_inverse),
        vo_inverse=moved(t.vo),
        qk=moved(t.qk_inverse),
        qk_inverse=moved(t.qk),
        units=units,
        unit_scale=scale if scale is None or units is None else scale[units],
        experts=places,
        expert_units=at_place(inner),
        expert_scale=at_place(expert_scale),
    )


def _product(second: Tensor | None, first: Tensor | None) -> Tensor | None:
    """second @ first, None being the identity."""
    if second is None or first is None:
        return first if second is None else second
    return second @ first


def compose_block(second: BlockTransform, first: BlockTransform) -> BlockTransform:
    """second · first. With W' = M W[p]: M₂ (M₁ W[p₁])[p₂] = (M₂ M₁[p₂]) W[p₁[p₂]]."""
    by_heads = lambda x: x if x is None or second.heads is None else x[second.heads]  # noqa: E731
    by_units = lambda x: x if x is None or second.units is None else x[second.units]  # noqa: E731
    queries = by_heads(first.queries)
    if second.queries is not None:
        queries = second.queries if queries is None else queries.gather(1, second.queries)
    scale = by_units(first.unit_scale)
    if second.unit_scale is not None:
        scale = second.unit_scale if scale is None else second.unit_scale * scale
    by_experts = lambda x: x if x is None or second.experts is None else x[second.experts]  # noqa: E731
    expert_units, expert_scale = by_experts(first.expert_units), by_experts(first.expert_scale)
    if second.expert_units is not None:
        inner = second.expert_units
        expert_units = inner if expert_units is None else expert_units.gather(1, inner)
        expert_scale = None if expert_scale is None else expert_scale.gather(1, inner)
    if second.expert_scale is not None:
        expert_scale = second.expert_scale if expert_scale is None else second.expert_scale * expert_scale
    return BlockTransform(
        heads=second.heads if first.heads is None else by_heads(first.heads),
        queries=queries,
        vo=_product(second.vo, by_heads(first.vo)),
        vo_inverse=_product(by_heads(first.vo_inverse), second.vo_inverse),
        qk=_product(second.qk, by_heads(first.qk)),
        qk_inverse=_product(by_heads(first.qk_inverse), second.qk_inverse),
        units=second.units if first.units is None else by_units(first.units),
        unit_scale=scale,
        experts=second.experts if first.experts is None else by_experts(first.experts),
        expert_units=expert_units,
        expert_scale=expert_scale,
    )


def rotary_map(a: Tensor, b: Tensor, rest: Tensor) -> Tensor:
    """Head maps that commute with RoPE: [[a, -b], [b, a]] on pair i = (i, i + p), `rest` on the passing dimensions.

    a, b (..., p), rest (..., e - 2p, e - 2p) -> (..., e, e).
    """
    diag_a, diag_b = torch.diag_embed(a), torch.diag_embed(b)
    turned = torch.cat([torch.cat([diag_a, -diag_b], -1), torch.cat([diag_b, diag_a], -1)], -2)
    n = rest.shape[-1]
    if n == 0:
        return turned
    p = turned.shape[-1]
    upper = torch.cat([turned, turned.new_zeros(*turned.shape[:-1], n)], -1)
    lower = torch.cat([rest.new_zeros(*rest.shape[:-1], p), rest], -1)
    return torch.cat([upper, lower], -2)
