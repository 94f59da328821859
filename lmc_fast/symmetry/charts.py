"""Coordinates on the symmetry group near the identity: free tensors that gradient descent can move.

    rotation   R = Cayley(X), X the skew part of a free matrix (projected to X 1 = 0 for LayerNorm)
    V/O maps   M = Cayley(X) exp(H), X and H the skew and symmetric part of a free matrix; M⁻¹ = exp(-H) Cayley(X)ᵀ
    Q/K maps   the same on the dimensions that RoPE passes by; exp(s) times a plane rotation on each rotary pair
    units      D = exp(s), where the FFN allows scales

Only continuous legal groups have coordinates. Permutations and signs are discrete and stay what matching found.
"""

from __future__ import annotations

import math
from operator import itemgetter

import torch
from torch import Tensor

from ..architectures import Spec
from ..solvers import cayley, polar
from .elements import Dense, Element, Scale, compose, inverse_of
from .groups import query_key_maps, rotates, unit_scale_signs, value_maps
from .transform import Transform, rotary_map

MAX_STRETCH = 10.0  # singular values of head maps, and scales, stay within [1/10, 10]


class Chart:
    """Learnable elements g of the group, one for each of `sides` of the models: all of them, or all but the first.

    `tensors` are the leaves, all zero at the identity: rotation (S, d, d); vo (S, L, G, e, e); qk (S, L, G, n, n) for
    the n dimensions without RoPE; pair_scale, pair_angle (S, L, G, p); unit_scale (S, L, f); expert_scale
    (S, L, E, x). S sides, L blocks, G groups, p pairs.
    """

    def __init__(
        self,
        spec: Spec,
        sides: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        members: int = 2,
    ):
        if members - sides not in (0, 1):
            raise ValueError(f"{sides} of {members} models cannot move: all do, or all but the first")
        self.spec, self.sides, self.members = spec, sides, members
        per_group = (sides, spec.layers, spec.attention.kv_heads)
        shapes: dict[str, tuple[int, ...]] = {}
        if rotates(spec):
            shapes["rotation"] = (sides, spec.width, spec.width)
        if value_maps(spec) == "general":
            shapes["vo"] = (*per_group, spec.attention.head_dim, spec.attention.head_dim)
        if query_key_maps(spec) == "general":
            pairs, rest = len(spec.rope.inv_freq), spec.attention.head_dim - spec.rope.rotary_dim
            if rest:
                shapes["qk"] = (*per_group, rest, rest)
            if pairs:
                shapes |= {"pair_scale": (*per_group, pairs), "pair_angle": (*per_group, pairs)}
        if unit_scale_signs(spec) != "none":
            if spec.ffn.width:
                shapes["unit_scale"] = (sides, spec.layers, spec.ffn.width)
            if spec.ffn.experts.count:
                shapes["expert_scale"] = (sides, spec.layers, spec.ffn.experts.count, spec.ffn.experts.width)
        self.tensors = {
            name: torch.zeros(shape, dtype=dtype, device=device, requires_grad=True) for name, shape in shapes.items()
        }

    def elements(self) -> list[Transform]:
        """One group element per side; differentiable in `tensors`."""
        rotations, blocks = self._rotations(), [self._sides(self.coordinates(i)) for i in range(self.spec.layers)]
        streams = [_stream(r) for r in ([None] * self.sides if rotations is None else rotations)]
        return [Transform(streams[s], [sides[s] for sides in blocks]) for s in range(self.sides)]

    def relative(self) -> Transform:
        """g_A⁻¹ g_B (g_B alone for one side) of a pair: all that the loss along the line depends on."""
        (found,) = self.relatives()
        return found

    def relatives(self) -> list[Transform]:
        """The same of every model but the first, which the others are relative to."""
        rotations, blocks = self.rotations(), [self.blocks(i) for i in range(self.spec.layers)]
        streams = [_stream(r) for r in rotations] or [{}] * (self.members - 1)
        return [Transform(stream, [block[k] for block in blocks]) for k, stream in enumerate(streams)]

    def rotations(self) -> list[Tensor]:
        """(d, d) each, of `relatives`; none where nothing may rotate."""
        r = self._rotations()
        if r is None:
            return []
        return [r[k] if self._first_stays else r[0].mT @ r[k] for k in range(not self._first_stays, self.sides)]

    @property
    def _first_stays(self) -> bool:
        return self.sides < self.members

    def coordinates(self, i: int) -> dict[str, Tensor]:
        """The coordinates that belong to block i, (S, ...) each: all but the rotation's."""
        return {name: x[:, i] for name, x in self.tensors.items() if name != "rotation"}

    def blocks(self, i: int, coordinates: dict[str, Tensor] | None = None) -> list[dict[str, Element]]:
        """The parts of `relatives` inside block i, from `coordinates(i)` or what a caller puts in their place."""
        sides = self._sides(self.coordinates(i) if coordinates is None else coordinates)
        if self._first_stays:
            return sides
        back = inverse_of(sides[0])
        return [compose(back, side) for side in sides[1:]]

    def _rotations(self) -> Tensor | None:
        t = self.tensors
        return cayley(_skew(self._projected(t["rotation"]))) if "rotation" in t else None

    def _sides(self, t: dict[str, Tensor]) -> list[dict[str, Element]]:
        made: dict[str, Element] = {}
        if "vo" in t:
            made["vo"] = Dense(*_polar_map(t["vo"]))
        if "qk" in t or "pair_angle" in t:
            made["qk"] = Dense(*self._query_key_maps(t))
        for space, name in (("units", "unit_scale"), ("expert_units", "expert_scale")):
            if name in t:
                made[space] = Scale(t[name].exp())
        return [{space: g.map(itemgetter(s)) for space, g in made.items()} for s in range(self.sides)]

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keeps every stretch within MAX_STRETCH by scaling back the coordinates of a map that left it."""
        limit = math.log(MAX_STRETCH)
        for name in ("vo", "qk"):
            if name in self.tensors and self.tensors[name].numel():
                d = self.tensors[name]
                h = (d + d.mT) / 2
                if h.flatten(-2).norm(dim=-1).max() <= limit:  # bounds the spectral norm from above, cheaply
                    continue
                h *= (limit / torch.linalg.matrix_norm(h, 2).clamp(min=limit))[..., None, None]
                d.copy_((d - d.mT) / 2 + h)
        for name in ("pair_scale", "unit_scale", "expert_scale"):
            if name in self.tensors:
                self.tensors[name].clamp_(-limit, limit)

    def _projected(self, free: Tensor) -> Tensor:
        """LayerNorm: rows and columns without mean, so that the rotation fixes the ones vector."""
        if self.spec.norms.kind != "layernorm":
            return free
        free = free - free.mean(-1, keepdim=True)
        return free - free.mean(-2, keepdim=True)

    def _query_key_maps(self, t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        spec = self.spec
        if "qk" in t:
            rest, rest_inverse = _polar_map(t["qk"])
        else:
            rest = rest_inverse = t["pair_angle"].new_zeros(*t["pair_angle"].shape[:-1], 0, 0)
        if not spec.rope.inv_freq:
            return rest, rest_inverse
        grow, angle = t["pair_scale"], t["pair_angle"]
        cos, sin = angle.cos(), angle.sin()
        return (
            rotary_map(grow.exp() * cos, grow.exp() * sin, rest),
            rotary_map((-grow).exp() * cos, -(-grow).exp() * sin, rest_inverse),
        )


def _skew(free: Tensor) -> Tensor:
    half = free / 2
    return half - half.mT


def _polar_map(free: Tensor) -> tuple[Tensor, Tensor]:
    return polar(_skew(free), (free + free.mT) / 2)


def _stream(rotation: Tensor | None) -> dict[str, Element]:
    return {} if rotation is None else {"stream": Dense.orthogonal(rotation)}
