"""Elements of the symmetry group: apply, invert, compose.

The group acts on weights in canonical form. With R the rotation, p and s permutations, M, N head maps, D a diagonal:

    embed, positions   E -> E Rᵀ                     head, norm biases   W -> W Rᵀ,  c -> R c
    q (head h)         W -> N⁻ᵀ W[p] Rᵀ              k                   W -> N W[p] Rᵀ
    v                  W -> M W[p] Rᵀ                o (columns of h)    W -> R W[p] M⁻¹
    up, gate           W -> D W[s] Rᵀ, W[s] Rᵀ       down                W -> R W[:, s] D⁻¹

Permutations act first, then maps and scales, the rotation last. `W[p]` takes key/value group p[h] to place h; within a
group, `queries` does the same for its query heads. None stands for the identity everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..architectures import Spec
from ..checkpoints.weights import Slots, Weights
from ..errors import LmcError
from .groups import unit_scale_signs


@dataclass
class BlockTransform:
    """The part of a group element inside one block. G key/value groups, r queries each, e head_dim, f units."""

    heads: Tensor | None = None  # (G,) int64 permutation of key/value groups
    queries: Tensor | None = None  # (G, r) int64, a permutation in each row
    vo: Tensor | None = None  # (G, e, e) M
    vo_inverse: Tensor | None = None  # (G, e, e) M⁻¹, kept beside M so that learning needs no inversion
    qk: Tensor | None = None  # (G, e, e) N
    qk_inverse: Tensor | None = None
    units: Tensor | None = None  # (f,) int64 permutation
    unit_scale: Tensor | None = None  # (f,) D

    def __post_init__(self) -> None:
        if self.vo is not None and self.vo_inverse is None:
            self.vo_inverse = inverse_of(self.vo)
        if self.qk is not None and self.qk_inverse is None:
            self.qk_inverse = inverse_of(self.qk)


@dataclass
class Transform:
    """A group element for a whole model."""

    rotation: Tensor | None  # (d, d) orthogonal R
    blocks: list[BlockTransform]

    @staticmethod
    def identity(spec: Spec) -> Transform:
        return Transform(None, [BlockTransform() for _ in range(spec.layers)])

    def map(self, function: Callable[[Tensor], Tensor]) -> Transform:
        """Applies `function` to every floating-point tensor (e.g. a change of dtype or device)."""
        change = lambda t: function(t) if t is not None and t.is_floating_point() else t  # noqa: E731
        blocks = [BlockTransform(**{f.name: change(getattr(b, f.name)) for f in fields(b)}) for b in self.blocks]
        return Transform(change(self.rotation), blocks)

    def apply(self, weights: Weights) -> Weights:
        """g · weights, block by block in the wider dtype of both, returned in that of `weights`; differentiable."""
        rotation, spec = self.rotation, weights.spec
        dtype = max((x.dtype for x in self._floats()), key=lambda d: d.itemsize, default=torch.float32)
        return weights.in_dtype(
            dtype,
            lambda ends: apply_ends(rotation, ends),
            lambda i, w: apply_block(spec, rotation, self.blocks[i], w),
        )

    def _floats(self) -> Iterator[Tensor]:
        for x in (self.rotation, *(getattr(b, f.name) for b in self.blocks for f in fields(b))):
            if x is not None and x.is_floating_point():
                yield x

    def inverse(self) -> Transform:
        """g⁻¹."""
        rotation = None if self.rotation is None else self.rotation.mT
        return Transform(rotation, [_inverse_block(block) for block in self.blocks])

    def compose(self, first: Transform) -> Transform:
        """self · first: what applying `first` and then self does."""
        blocks = [_compose_block(a, b) for a, b in zip(self.blocks, first.blocks, strict=True)]
        return Transform(_product(self.rotation, first.rotation), blocks)


def inverse_of(maps: Tensor) -> Tensor:
    """Inverses of (batch, n, n), one LAPACK call each: torch's batched CPU LU is wrong with several threads."""
    return torch.stack([torch.linalg.inv(m) for m in maps])


def apply_ends(rotation: Tensor | None, ends: Slots) -> Slots:
    if rotation is None:
        return dict(ends)
    turned = {"embed", "positions", "head", "final_norm_bias"}
    return {name: w @ rotation.mT if name in turned else w for name, w in ends.items()}


def apply_block(spec: Spec, rotation: Tensor | None, t: BlockTransform, w: Slots) -> Slots:
    """The action on one block's slots; differentiable."""
    g, r, e = spec.kv_heads, spec.queries_per_group, spec.head_dim
    out = dict(w)

    for slot, count, maps in (("q", r, t.qk_inverse), ("k", 1, t.qk), ("v", 1, t.vo)):
        if maps is not None and slot == "q":
            maps = maps.mT
        for name in (slot, f"{slot}_bias"):
            if name in w:
                rows = w[name].view(g, count, e, -1)  # the last axis is the width, or 1 for a bias
                rows = _permute_heads(t, rows)
                if maps is not None:
                    rows = maps[:, None] @ rows
                out[name] = rows.reshape(w[name].shape)
    columns = w["o"].view(-1, g, r, e).permute(1, 2, 0, 3)
    columns = _permute_heads(t, columns)
    if t.vo_inverse is not None:
        columns = columns @ t.vo_inverse[:, None]
    out["o"] = columns.permute(2, 0, 1, 3).reshape(w["o"].shape)

    for name in ("up", "up_bias", "gate", "gate_bias", "down"):
        if name not in w:
            continue
        unit = w[name].mT if name == "down" else w[name]
        if t.units is not None:
            unit = unit[t.units]
        if t.unit_scale is not None and not name.startswith("gate"):
            scale = 1 / t.unit_scale if name == "down" else t.unit_scale
            unit = unit * (scale[:, None] if unit.dim() == 2 else scale)
        out[name] = unit.mT if name == "down" else unit

    if rotation is not None:
        for name in ("q", "k", "v", "up", "gate", "attn_norm_bias", "ffn_norm_bias"):
            if name in out:
                out[name] = out[name] @ rotation.mT
        for name in ("o", "down", "o_bias", "down_bias"):
            if name in out:
                out[name] = rotation @ out[name]
    return out


def _permute_heads(t: BlockTransform, rows: Tensor) -> Tensor:
    """rows (G, r, ...): groups, then queries within each group where the slot has them."""
    if t.heads is not None:
        rows = rows[t.heads]
    if t.queries is not None and rows.shape[1] > 1:
        rows = rows[torch.arange(len(rows), device=rows.device)[:, None], t.queries]
    return rows


def _inverse_permutation(p: Tensor) -> Tensor:
    return torch.argsort(p, dim=-1)


def _inverse_block(t: BlockTransform) -> BlockTransform:
    back = None if t.heads is None else _inverse_permutation(t.heads)
    moved = lambda x: x if x is None or back is None else x[back]  # noqa: E731
    units = None if t.units is None else _inverse_permutation(t.units)
    scale = None if t.unit_scale is None else 1 / t.unit_scale
    return BlockTransform(
        heads=back,
        queries=None if t.queries is None else moved(_inverse_permutation(t.queries)),
        vo=moved(t.vo_inverse),
        vo_inverse=moved(t.vo),
        qk=moved(t.qk_inverse),
        qk_inverse=moved(t.qk),
        units=units,
        unit_scale=scale if scale is None or units is None else scale[units],
    )


def _product(second: Tensor | None, first: Tensor | None) -> Tensor | None:
    """second @ first, None being the identity."""
    if second is None or first is None:
        return first if second is None else second
    return second @ first


def _compose_block(second: BlockTransform, first: BlockTransform) -> BlockTransform:
    """second · first. With W' = M W[p]: M₂ (M₁ W[p₁])[p₂] = (M₂ M₁[p₂]) W[p₁[p₂]]."""
    by_heads = lambda x: x if x is None or second.heads is None else x[second.heads]  # noqa: E731
    by_units = lambda x: x if x is None or second.units is None else x[second.units]  # noqa: E731
    queries = by_heads(first.queries)
    if second.queries is not None:
        queries = second.queries if queries is None else queries.gather(1, second.queries)
    scale = by_units(first.unit_scale)
    if second.unit_scale is not None:
        scale = second.unit_scale if scale is None else second.unit_scale * scale
    return BlockTransform(
        heads=second.heads if first.heads is None else by_heads(first.heads),
        queries=queries,
        vo=_product(second.vo, by_heads(first.vo)),
        vo_inverse=_product(by_heads(first.vo_inverse), second.vo_inverse),
        qk=_product(second.qk, by_heads(first.qk)),
        qk_inverse=_product(by_heads(first.qk_inverse), second.qk_inverse),
        units=second.units if first.units is None else by_units(first.units),
        unit_scale=scale,
    )


def check_legal(transform: Transform, spec: Spec, tolerance: float = 1e-6) -> None:
    """Raises LmcError, naming the part, unless `transform` preserves the function of every model of this spec."""

    def require(holds: bool | Tensor, what: str) -> None:
        if not bool(holds):
            raise LmcError(f"not a symmetry of {spec.family}: {what}")

    def close(x: Tensor, y: Tensor) -> bool:
        return x.shape == y.shape and bool((x - y).abs().max() <= tolerance * y.abs().max().clamp(min=1))

    require(len(transform.blocks) == spec.layers, f"it has {len(transform.blocks)} blocks, the model {spec.layers}")
    r = transform.rotation
    if r is not None:
        eye = torch.eye(spec.width, dtype=r.dtype, device=r.device)
        require(r.shape == eye.shape and close(r @ r.mT, eye), "the rotation is not orthogonal")
        ones = eye.sum(0)
        if spec.norm == "layernorm":
            require(close((r @ ones).abs(), ones), "the rotation moves the ones vector, which LayerNorm subtracts")
    group, e = spec.kv_heads, spec.head_dim
    for i, t in enumerate(transform.blocks):
        at = f"block {i}"
        for p, shape in (
            (t.heads, (group,)),
            (t.queries, (group, spec.queries_per_group)),
            (t.units, (spec.ffn_width,)),
        ):
            if p is not None:
                require(p.shape == shape, f"{at}: a permutation has shape {list(p.shape)}, not {list(shape)}")
                require((p.sort(-1)[0] == torch.arange(shape[-1], device=p.device)).all(), f"{at}: not a permutation")
        for m, inverse in ((t.vo, t.vo_inverse), (t.qk, t.qk_inverse)):
            if m is not None and inverse is not None:
                unit = torch.eye(e, dtype=m.dtype, device=m.device).expand(group, e, e)
                require(m.shape == unit.shape and close(m @ inverse, unit), f"{at}: a head map is not invertible")
        if t.qk is not None and spec.rotary_dim:
            require(close(_nearest_rotary(t.qk, spec.rotary_dim), t.qk), f"{at}: a query/key map mixes rotary planes")
        if t.unit_scale is not None:
            signs = unit_scale_signs(spec)
            require(signs != "none", f"{at}: {spec.activation} is not homogeneous, so its units cannot be scaled")
            require(signs == "any" or (t.unit_scale > 0).all(), f"{at}: ReLU units need positive scales")
            require((t.unit_scale != 0).all(), f"{at}: a unit scale is zero")


def _nearest_rotary(maps: Tensor, rotary: int) -> Tensor:
    """The part of (G, e, e) maps that commutes with RoPE: a + b·J on each pair, anything on the passing dimensions."""
    half = rotary // 2
    first, second = slice(0, half), slice(half, rotary)
    diag = lambda rows, cols: maps[:, rows, cols].diagonal(dim1=1, dim2=2)  # noqa: E731
    a = (diag(first, first) + diag(second, second)) / 2
    b = (diag(second, first) - diag(first, second)) / 2
    return rotary_map(a, b, maps[:, rotary:, rotary:])


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
