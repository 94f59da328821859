"""Is a group element a symmetry of a spec?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures import Spec
from ..errors import LmcError
from .groups import FIXING_ONES, PERMUTATION, heads_move, query_key_maps, residual_group, unit_scale_signs, value_maps
from .transform import BlockTransform, Transform, rotary_map


def check_legal(transform: Transform, spec: Spec, tolerance: float = 1e-6) -> None:
    """Raises LmcError, naming the part, unless `transform` preserves the function of every model of this spec."""
    _Check(spec, tolerance).run(transform)


@dataclass(frozen=True)
class _Check:
    spec: Spec
    tolerance: float

    def run(self, transform: Transform) -> None:
        blocks = len(transform.blocks)
        self.require(blocks == self.spec.layers, f"it has {blocks} blocks, the model {self.spec.layers}")
        if transform.rotation is not None:
            self.rotation(transform.rotation)
        if transform.head_units is not None:
            self.require(self.spec.head_transform, "it permutes units of a head transform, of which there is none")
            self.permutation(transform.head_units, (self.spec.width,), "head transform")
        for i, t in enumerate(transform.blocks):
            self.heads(t, f"block {i}")
            self.units(t, f"block {i}")

    def require(self, holds: bool | Tensor, what: str) -> None:
        if not bool(holds):
            raise LmcError(f"not a symmetry of {self.spec.family}: {what}")

    def close(self, x: Tensor, y: Tensor) -> bool:
        return x.shape == y.shape and bool((x - y).abs().max() <= self.tolerance * y.abs().max().clamp(min=1))

    def rotation(self, r: Tensor) -> None:
        eye = torch.eye(self.spec.width, dtype=r.dtype, device=r.device)
        self.require(r.shape == eye.shape and self.close(r @ r.mT, eye), "the rotation is not orthogonal")
        group, ones = residual_group(self.spec), eye.sum(0)
        if group == FIXING_ONES:
            self.require(
                self.close((r @ ones).abs(), ones), "the rotation moves the ones vector, which LayerNorm subtracts"
            )
            self.require(_one_sign(r @ ones), "the rotation moves the ones vector, which LayerNorm subtracts")
        elif group != "orthogonal":
            self.require(
                self.signed_permutation(r), "the stream has gains, so that only a signed permutation may act on it"
            )
            if group == PERMUTATION:
                self.require(_one_sign(r @ ones), "LayerNorm in the stream allows one sign for all channels")

    def signed_permutation(self, maps: Tensor) -> bool:
        """Every row and column of (..., n, n) has one entry, 1 or -1."""
        size = maps.abs()
        ones = torch.ones_like(size[..., 0])
        return self.close(size, size.round()) and self.close(size.sum(-1), ones) and self.close(size.sum(-2), ones)

    def permutation(self, p: Tensor, shape: tuple[int, ...], at: str) -> None:
        self.require(p.shape == shape, f"{at}: a permutation has shape {list(p.shape)}, not {list(shape)}")
        self.require((p.sort(-1)[0] == torch.arange(shape[-1], device=p.device)).all(), f"{at}: not a permutation")

    def heads(self, t: BlockTransform, at: str) -> None:
        group, e = self.spec.attention.kv_heads, self.spec.attention.head_dim
        for p, shape in ((t.heads, (group,)), (t.queries, (group, self.spec.attention.queries_per_group))):
            if p is not None:
                self.permutation(p, shape, at)
                stay = torch.equal(p, torch.arange(shape[-1], device=p.device).expand(shape))
                self.require(
                    heads_move(self.spec) or stay, f"{at}: heads are permuted, but ALiBi's slopes belong to places"
                )
        for m, inverse in ((t.vo, t.vo_inverse), (t.qk, t.qk_inverse)):
            if m is not None and inverse is not None:
                unit = torch.eye(e, dtype=m.dtype, device=m.device).expand(group, e, e)
                self.require(
                    m.shape == unit.shape and self.close(m @ inverse, unit), f"{at}: a head map is not invertible"
                )
        if t.vo is not None and value_maps(self.spec) == "signed":
            self.require(
                self.signed_permutation(t.vo), f"{at}: values are clamped, so only signed permutations may act"
            )
        if t.qk is None:
            return
        if self.spec.rope.rotary_dim:
            self.require(
                self.close(_nearest_rotary(t.qk, self.spec.rope.rotary_dim), t.qk),
                f"{at}: a query/key map mixes rotary planes",
            )
        kind = query_key_maps(self.spec)
        if kind == "turns":
            self.require(self.signed_permutation(t.qk), f"{at}: queries are clamped, so only quarter turns may act")
        if kind == "signs":
            signs = self.signed_permutation(t.qk) and self.close(torch.diag_embed(t.qk.diagonal(dim1=1, dim2=2)), t.qk)
            self.require(signs, f"{at}: queries are normalised with a gain, so only signs may act")

    def units(self, t: BlockTransform, at: str) -> None:
        for p, shape in (
            (t.units, (self.spec.ffn.width,)),
            (t.experts, (self.spec.ffn.experts.count,)),
            (t.expert_units, (self.spec.ffn.experts.count, self.spec.ffn.experts.width)),
        ):
            if p is not None:
                self.require(all(shape), f"{at}: it permutes units or experts that the model does not have")
                self.permutation(p, shape, at)
        signs = unit_scale_signs(self.spec)
        for scale, shape in (
            (t.unit_scale, (self.spec.ffn.width,)),
            (t.expert_scale, (self.spec.ffn.experts.count, self.spec.ffn.experts.width)),
        ):
            if scale is not None:
                self.require(scale.shape == shape and all(shape), f"{at}: a scale has shape {list(scale.shape)}")
                self.require(
                    signs != "none",
                    f"{at}: {self.spec.ffn.activation} is not homogeneous, so its units cannot be scaled",
                )
                self.require(signs == "any" or (scale > 0).all(), f"{at}: ReLU units need positive scales")
                self.require((scale != 0).all(), f"{at}: a unit scale is zero")


def _one_sign(x: Tensor) -> bool:
    return bool((x > 0).all() or (x < 0).all())


def _nearest_rotary(maps: Tensor, rotary: int) -> Tensor:
    """The part of (G, e, e) maps that commutes with RoPE: a + b·J on each pair, anything on the passing dimensions."""
    half = rotary // 2
    first, second = slice(0, half), slice(half, rotary)
    diag = lambda rows, cols: maps[:, rows, cols].diagonal(dim1=1, dim2=2)  # noqa: E731
    a = (diag(first, first) + diag(second, second)) / 2
    b = (diag(second, first) - diag(first, second)) / 2
    return rotary_map(a, b, maps[:, rotary:, rotary:])
