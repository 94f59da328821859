"""The vocabulary in which an architecture is described: features, slots, and how slots lie in a checkpoint.

A *slot* is one matrix or vector of the normal form that the engine and the symmetry group work on, with PyTorch's
(out, in) orientation whatever the checkpoint's layout is:

block  q (H·e, d) · k, v (G·e, d) · o (d, H·e) · up, gate (f, d) · down (d, f) · each with `_bias` (out,)
       attn_norm, ffn_norm (d,) · attn_norm_bias, ffn_norm_bias (d,)
ends   embed (V, d) · positions (P, d) · final_norm, final_norm_bias (d,) · head (V, d) · head_bias (V,)

with d width, H heads, G key/value groups, e head_dim, f ffn_width, V vocab, P max_positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

BLOCK_NORMS = ("attn_norm", "ffn_norm")
BLOCK_READERS = ("q", "k", "v", "up", "gate")
BLOCK_WRITERS = ("o", "down")


@dataclass(frozen=True)
class Spec:
    """What a checkpoint computes: everything the engine and the symmetry group need to know."""

    family: str
    layers: int
    width: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_width: int
    max_positions: int
    norm: str  # "layernorm" or "rmsnorm"
    norm_eps: float
    activation: str  # a key of engine.block.ACTIVATIONS
    gated: bool
    parallel: bool  # attention and FFN both read the block's input
    tied: bool  # the head is the embedding table
    biases: frozenset[str] = frozenset()  # linear slots that have a bias
    position_table: bool = False
    inv_freq: tuple[float, ...] = ()  # one per rotary pair (i, i + rotary_dim/2); empty: no RoPE
    rope_scaling: float = 1.0  # factor on cos and sin (YaRN's attention factor)

    @property
    def rotary_dim(self) -> int:
        return 2 * len(self.inv_freq)

    @property
    def queries_per_group(self) -> int:
        return self.heads // self.kv_heads

    def shape(self, slot: str) -> tuple[int, ...] | None:
        """Shape of a slot, or None where this architecture has none of that name."""
        return self._shapes.get(slot)

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        d, q, kv = self.width, self.heads * self.head_dim, self.kv_heads * self.head_dim
        linear = {"q": (q, d), "k": (kv, d), "v": (kv, d), "o": (d, q)}
        linear |= {"up": (self.ffn_width, d), "down": (d, self.ffn_width), "head": (self.vocab, d)}
        if self.gated:
            linear["gate"] = linear["up"]
        shapes: dict[str, tuple[int, ...]] = dict(linear)
        shapes |= {f"{slot}_bias": shape[:1] for slot, shape in linear.items() if slot in self.biases}
        for norm in ("attn_norm", "ffn_norm", "final_norm"):
            shapes[norm] = (d,)
            if self.norm == "layernorm":
                shapes[f"{norm}_bias"] = (d,)
        shapes["embed"] = (self.vocab, d)
        if self.position_table:
            shapes["positions"] = (self.max_positions, d)
        return shapes


class Layout(Protocol):
    """How the parts of one checkpoint tensor lie in it."""

    def split(self, tensor: Tensor, spec: Spec) -> Sequence[Tensor]: ...

    def join(self, parts: Sequence[Tensor], spec: Spec) -> Tensor: ...


class Plain:
    """One slot, stored as it is."""

    def split(self, tensor: Tensor, spec: Spec) -> Sequence[Tensor]:
        return (tensor,)

    def join(self, parts: Sequence[Tensor], spec: Spec) -> Tensor:
        return parts[0]


@dataclass(frozen=True)
class Conv1D:
    """Slots of equal width side by side in an (in, out) matrix, as in GPT-2; biases are concatenated."""

    parts: int = 1

    def split(self, tensor: Tensor, spec: Spec) -> Sequence[Tensor]:
        return tensor.mT.chunk(self.parts) if tensor.dim() == 2 else tensor.chunk(self.parts)

    def join(self, parts: Sequence[Tensor], spec: Spec) -> Tensor:
        return torch.cat(list(parts)).mT if parts[0].dim() == 2 else torch.cat(list(parts))


class InterleavedHeads:
    """q, k and v of head 0, then of head 1, ...: rows (head, [q, k, v], head_dim), as in GPT-NeoX and BLOOM."""

    def split(self, tensor: Tensor, spec: Spec) -> Sequence[Tensor]:
        rows = tensor.unflatten(0, (spec.heads, 3, spec.head_dim))
        return tuple(rows[:, i].flatten(0, 1) for i in range(3))

    def join(self, parts: Sequence[Tensor], spec: Spec) -> Tensor:
        return torch.stack([p.unflatten(0, (spec.heads, spec.head_dim)) for p in parts], dim=1).flatten(0, 2)


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint: its name on disk ({i} is the block's index) and the slots it holds."""

    name: str
    slots: tuple[str, ...]
    layout: Layout = field(default_factory=Plain)

    def present(self, spec: Spec) -> bool:
        return spec.shape(self.slots[0]) is not None

    def shape(self, spec: Spec) -> tuple[int, ...]:
        """Shape on disk."""
        shapes = [spec.shape(slot) for slot in self.slots]
        assert None not in shapes, self
        return tuple(self.layout.join([torch.empty(s, device="meta") for s in shapes if s], spec).shape)


@dataclass(frozen=True)
class Family:
    """One model family: how its config becomes a Spec, and the table of its tensors."""

    name: str  # config.json's model_type
    spec: Callable[[Any], Spec]  # from a transformers config; raises LmcError for options we do not compute
    ends: tuple[Entry, ...]
    block: tuple[Entry, ...]
    prefix: str  # in front of every name but the head's; some hub checkpoints leave it out
    buffers: tuple[str, ...] = ()  # regular expressions of stored tensors that carry no weights

    def entries(self, spec: Spec, tied: bool = False) -> list[tuple[str, Entry, int | None]]:
        """(name on disk, entry, block index or None) of every tensor that a checkpoint of this spec must hold."""
        rows: list[tuple[str, Entry, int | None]] = [
            (e.name, e, None) for e in self.ends if e.present(spec) and not (tied and e.slots == ("head",))
        ]
        for i in range(spec.layers):
            rows += [(e.name.format(i=i), e, i) for e in self.block if e.present(spec)]
        return rows
