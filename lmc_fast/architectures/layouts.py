"""How slots lie in a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .spec import Spec


class Layout(Protocol):
    """How the parts of one checkpoint tensor lie in it."""

    def split(self, tensor: Tensor, spec: Spec) -> Sequence[Tensor]: ...

    def join(self, parts: Sequence[Tensor], spec: Spec) -> Tensor: ...


def _cat(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """torch.cat; on the meta device, where shapes are found, without importing torch._dynamo, which takes a second."""
    first = parts[0]
    if first.is_meta:
        return first.new_empty((*first.shape[:dim], sum(part.shape[dim] for part in parts), *first.shape[dim + 1 :]))
    return torch.cat(list(parts), dim)


def _stack(parts: Sequence[Tensor], dim: int) -> Tensor:
    return _cat([part.unsqueeze(dim) for part in parts], dim)


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
        return _cat(parts).mT if parts[0].dim() == 2 else _cat(parts)


class InterleavedHeads:
    """q, k and v of head 0, then of head 1, ...: rows (head, [q, k, v], head_dim), as in GPT-NeoX and BLOOM."""

    def split(self, tensor: Tensor, spec: Spec) -> Sequence[Tensor]:
        att = spec.attention
        rows = tensor.unflatten(0, (att.heads, 3, att.head_dim))
        return tuple(rows[:, i].flatten(0, 1) for i in range(3))

    def join(self, parts: Sequence[Tensor], spec: Spec) -> Tensor:
        att = spec.attention
        return _stack([p.unflatten(0, (att.heads, att.head_dim)) for p in parts], 1).flatten(0, 2)


class InterleavedGroups:
    """For each key/value group its queries, its key, its value, as in Falcon: rows (G, r + 2, head_dim)."""

    def split(self, tensor: Tensor, spec: Spec) -> Sequence[Tensor]:
        att, r = spec.attention, spec.attention.queries_per_group
        rows = tensor.unflatten(0, (att.kv_heads, r + 2, att.head_dim))
        return tuple(part.flatten(0, 2) for part in (rows[:, :r], rows[:, r : r + 1], rows[:, r + 1 :]))

    def join(self, parts: Sequence[Tensor], spec: Spec) -> Tensor:
        att = spec.attention
        return _cat([p.unflatten(0, (att.kv_heads, -1, att.head_dim)) for p in parts], 1).flatten(0, 2)


@dataclass(frozen=True)
class Stacked:
    """Slots one below the other, such as [q; k; v] or [gate; up]; their own row counts tell where to cut."""

    slots: tuple[str, ...]

    def split(self, tensor: Tensor, spec: Spec) -> Sequence[Tensor]:
        shapes = [spec.shape(slot) for slot in self.slots]
        return tensor.split([shape[0] for shape in shapes if shape])

    def join(self, parts: Sequence[Tensor], spec: Spec) -> Tensor:
        return _cat(parts)


class InterleavedPairs:
    """Rows of a query or key projection whose rotary pairs are neighbours (2i, 2i + 1), as in GPT-J."""

    def split(self, tensor: Tensor, spec: Spec) -> Sequence[Tensor]:
        rows = tensor.unflatten(0, (-1, spec.attention.head_dim))
        turned, rest = rows[:, : spec.rope.rotary_dim], rows[:, spec.rope.rotary_dim :]
        return (_cat([turned[:, ::2], turned[:, 1::2], rest], 1).flatten(0, 1),)

    def join(self, parts: Sequence[Tensor], spec: Spec) -> Tensor:
        rows = parts[0].unflatten(0, (-1, spec.attention.head_dim))
        half = spec.rope.rotary_dim // 2
        turned = _stack([rows[:, :half], rows[:, half : 2 * half]], 2).flatten(1, 2)
        return _cat([turned, rows[:, 2 * half :]], 1).flatten(0, 1)


class FourShards:
    """q, v, k of a quarter of the heads, four times, with GPT-J's pairs: rows (4, [q, v, k], H·e/4), as in CodeGen."""

    def split(self, tensor: Tensor, spec: Spec) -> Sequence[Tensor]:
        q, v, k = (part.flatten(0, 1) for part in tensor.unflatten(0, (4, 3, -1)).unbind(1))
        pairs = InterleavedPairs()
        return (*pairs.split(q, spec), *pairs.split(k, spec), v)

    def join(self, parts: Sequence[Tensor], spec: Spec) -> Tensor:
        q, k = (InterleavedPairs().join([part], spec) for part in parts[:2])
        return _stack([part.unflatten(0, (4, -1)) for part in (q, parts[2], k)], 1).flatten(0, 2)


class LessOne:
    """A gain stored less 1, as in Gemma."""

    def split(self, tensor: Tensor, spec: Spec) -> Sequence[Tensor]:
        return (tensor + 1,)

    def join(self, parts: Sequence[Tensor], spec: Spec) -> Tensor:
        return parts[0] - 1


@dataclass(frozen=True)
class Shaped:
    """A slot stored under another shape, such as (1, 1, d) for (1, d)."""

    stored: tuple[int, ...]  # 0 stands for the slot's width, -1 for the rest

    def split(self, tensor: Tensor, spec: Spec) -> Sequence[Tensor]:
        return (tensor.reshape(-1, spec.width),)

    def join(self, parts: Sequence[Tensor], spec: Spec) -> Tensor:
        return parts[0].reshape([spec.width if n == 0 else n for n in self.stored])


class PatchConvolution:
    """The patch embedding's (d, c, p, p) convolution as a matrix (d, c·p²)."""

    def split(self, tensor: Tensor, spec: Spec) -> Sequence[Tensor]:
        return (tensor.flatten(1),)

    def join(self, parts: Sequence[Tensor], spec: Spec) -> Tensor:
        assert spec.image is not None
        return parts[0].unflatten(1, (spec.image.channels, spec.image.patch, spec.image.patch))


class FusedExperts:
    """Gates and ups of all experts in one tensor, an expert's up below its gate: (E, 2x, d)."""

    def split(self, tensor: Tensor, spec: Spec) -> Sequence[Tensor]:
        return tensor.chunk(2, dim=1)

    def join(self, parts: Sequence[Tensor], spec: Spec) -> Tensor:
        return _cat(parts, 1)


class InterleavedExperts:
    """Gates and ups of all experts by turns, and inputs first: (E, d, 2x), or a bias (E, 2x), as in GPT-OSS."""

    def split(self, tensor: Tensor, spec: Spec) -> Sequence[Tensor]:
        parts = tensor[..., ::2], tensor[..., 1::2]
        return parts if tensor.dim() == 2 else tuple(part.mT for part in parts)

    def join(self, parts: Sequence[Tensor], spec: Spec) -> Tensor:
        parts = parts if parts[0].dim() == 2 else [part.mT for part in parts]
        return torch.stack(list(parts), dim=-1).flatten(-2)


class Transposed:
    """One slot, its inputs first."""

    def split(self, tensor: Tensor, spec: Spec) -> Sequence[Tensor]:
        return (tensor.mT,)

    def join(self, parts: Sequence[Tensor], spec: Spec) -> Tensor:
        return parts[0].mT


@dataclass(frozen=True)
class OfExpert:
    """One expert's matrix; the slot holds those of all experts, stacked."""

    index: int

    def split(self, tensor: Tensor, spec: Spec) -> Sequence[Tensor]:
        return (tensor,)

    def join(self, parts: Sequence[Tensor], spec: Spec) -> Tensor:
        return parts[0][self.index]
