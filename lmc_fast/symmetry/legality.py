"""Is a group element a symmetry of a spec?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures import Spec
from ..architectures.axes import HEAD_UNITS, MODEL_SPACES, STREAM, batch_of, size_of, slots_of
from ..errors import LmcError
from .elements import Dense, Element, Elements, Identity, Scale, Wreath
from .groups import (
    FIXED,
    FIXING_ONES,
    PERMUTATION,
    heads_move,
    query_key_maps,
    residual_group,
    rotates,
    unit_scale_signs,
    value_maps,
)
from .transform import Transform, rotary_map


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
        self.elements(transform.model, "the model", MODEL_SPACES)
        for i, block in enumerate(transform.blocks):
            self.elements(block, f"block {i}", tuple(_BLOCK))

    def elements(self, elements: Elements, at: str, spaces: tuple[str, ...]) -> None:
        for space, g in elements.items():
            known = space in spaces and self.exists(space)
            self.require(known, f"{at}: it moves {space}, which the model does not have")
            if isinstance(g, Identity):
                continue
            self.well_formed(space, g, at)
            {STREAM: _Check.stream, HEAD_UNITS: _Check.places_only, **_BLOCK}[space](self, g, f"{at}, {space}")

    def exists(self, space: str) -> bool:
        return size_of(self.spec, space) > 0 and next(slots_of(self.spec, space), None) is not None

    def require(self, holds: bool | Tensor, what: str) -> None:
        if not bool(holds):
            raise LmcError(f"not a symmetry of {self.spec.family}: {what}")

    def close(self, x: Tensor, y: Tensor) -> bool:
        return x.shape == y.shape and bool((x - y).abs().max() <= self.tolerance * y.abs().max().clamp(min=1))

    def well_formed(self, space: str, g: Element, at: str) -> None:
        """Shapes, permutations that are some, matrices that fit their inverse, factors that are not 0."""
        shape = (*batch_of(self.spec, space), size_of(self.spec, space))
        if isinstance(g, Dense):
            unit = torch.eye(shape[-1], dtype=g.matrix.dtype, device=g.matrix.device).expand(*shape, shape[-1])
            fits = g.matrix.shape == g.back.shape == unit.shape and self.close(g.matrix @ g.back, unit)
            self.require(fits, f"{at}: a map of {space} is not orthogonal or not invertible with the inverse beside it")
        if isinstance(g, Wreath):
            self.require(g.places.shape == shape, f"{at}: places of {space} have shape {list(g.places.shape)}")
            self.require(g.places.dtype == torch.int64, f"{at}: places of {space} are no whole numbers")
            all_places = torch.arange(shape[-1], device=g.places.device)
            self.require((g.places.sort(-1)[0] == all_places).all(), f"{at}: not a permutation of {space}")
        scale = g.inner if isinstance(g, Wreath) else g
        if isinstance(scale, Scale):
            self.require(scale.scale.shape == shape, f"{at}: a scale of {space} has shape {list(scale.scale.shape)}")
            sound = scale.scale.isfinite() & (scale.scale != 0)
            self.require(sound.all(), f"{at}: a scale of {space} is zero or not finite")

    def stream(self, g: Element, at: str) -> None:
        what = "the rotation moves the ones vector, which LayerNorm subtracts"
        if rotates(self.spec):
            orthogonal = self.close(g.back, g.matrix.mT) if isinstance(g, Dense) else self.signs_only(g)
            self.require(orthogonal, f"{at}: the rotation is not orthogonal")
            if residual_group(self.spec) == FIXING_ONES:
                image = _image_of_ones(g)
                self.require(self.close(image.abs(), torch.ones_like(image)) and _one_sign(image), what)
            return
        signed = isinstance(g, Wreath) and self.signs_only(g)
        self.require(signed, f"{at}: the stream has gains, so that only a signed permutation may act on it")
        if residual_group(self.spec) == FIXED:
            assert isinstance(g, Wreath)
            still = bool((_image_of_ones(g) == 1).all()) and torch.equal(
                g.places, torch.arange(len(g.places)).to(g.places)
            )
            self.require(still, f"{at}: the stream is the output, so that nothing may act on it")
        if residual_group(self.spec) == PERMUTATION:
            self.require(_one_sign(_image_of_ones(g)), "LayerNorm in the stream allows one sign for all channels")

    def signs_only(self, g: Element) -> bool:
        scale = g.inner if isinstance(g, Wreath) else g
        return not isinstance(scale, Scale) or self.close(scale.scale.abs(), torch.ones_like(scale.scale))

    def places_only(self, g: Element, at: str) -> None:
        self.require(isinstance(g, Wreath) and isinstance(g.inner, Identity), f"{at}: only permutations may act here")

    def heads(self, g: Element, at: str) -> None:
        self.places_only(g, at)
        assert isinstance(g, Wreath)
        stay = torch.equal(g.places, torch.arange(g.places.shape[-1], device=g.places.device).expand_as(g.places))
        self.require(heads_move(self.spec) or stay, f"{at}: heads are permuted, but ALiBi's slopes belong to places")

    def signed_permutation(self, maps: Tensor) -> bool:
        """Every row and column of (..., n, n) has one entry, 1 or -1."""
        size = maps.abs()
        ones = torch.ones_like(size[..., 0])
        return self.close(size, size.round()) and self.close(size.sum(-1), ones) and self.close(size.sum(-2), ones)

    def matrices(self, g: Element, at: str) -> Tensor:
        self.require(isinstance(g, Dense), f"{at}: maps of heads are matrices")
        assert isinstance(g, Dense)
        return g.matrix

    def value_maps(self, g: Element, at: str) -> None:
        legal = value_maps(self.spec) == "general" or self.signed_permutation(self.matrices(g, at))
        self.require(legal, f"{at}: values are clamped, so only signed permutations may act")

    def query_key_maps(self, g: Element, at: str) -> None:
        maps, rotary, kind = self.matrices(g, at), self.spec.rope.rotary_dim, query_key_maps(self.spec)
        if rotary:
            turned = _nearest_rotary(maps, rotary)
            self.require(self.close(turned, maps), f"{at}: a query/key map mixes rotary planes")
        if kind == "turns":
            self.require(self.signed_permutation(maps), f"{at}: queries are clamped, so only quarter turns may act")
        if kind == "signs":
            diagonal = torch.diag_embed(maps.diagonal(dim1=1, dim2=2))
            signs = self.signed_permutation(maps) and self.close(diagonal, maps)
            self.require(signs, f"{at}: queries are normalised with a gain, so only signs may act")

    def units(self, g: Element, at: str) -> None:
        self.require(not isinstance(g, Dense), f"{at}: units are permuted and scaled, not mixed")
        scale, signs = g.inner if isinstance(g, Wreath) else g, unit_scale_signs(self.spec)
        if isinstance(scale, Scale):
            why = "units are clamped" if self.spec.ffn.clamped else f"{self.spec.ffn.activation} is not homogeneous"
            self.require(signs != "none", f"{at}: {why}, so units cannot be scaled")
            self.require(signs == "any" or (scale.scale > 0).all(), f"{at}: ReLU units need positive scales")


_BLOCK = {
    "heads": _Check.heads,
    "queries": _Check.heads,
    "vo": _Check.value_maps,
    "qk": _Check.query_key_maps,
    "units": _Check.units,
    "experts": _Check.places_only,
    "expert_units": _Check.units,
}


def _image_of_ones(g: Element) -> Tensor:
    if isinstance(g, Dense):
        return g.matrix.sum(1)
    scale = g.inner if isinstance(g, Wreath) else g
    return scale.scale if isinstance(scale, Scale) else torch.ones(1)


def _one_sign(x: Tensor) -> bool:
    return bool((x > 0).all() or (x < 0).all())


def _nearest_rotary(maps: Tensor, rotary: int) -> Tensor:
    """The part of (G, e, e) maps that commutes with RoPE: a + b·J on each pair, anything on the passing dimensions."""
    half = rotary // 2
    first, second = slice(0, half), slice(half, rotary)

    def diagonal(rows: slice, columns: slice) -> Tensor:
        return maps[:, rows, columns].diagonal(dim1=1, dim2=2)

    a = (diagonal(first, first) + diagonal(second, second)) / 2
    b = (diagonal(second, first) - diagonal(first, second)) / 2
    return rotary_map(a, b, maps[:, rotary:, rotary:])
