"""How a segment's slots of all members lie in one flat buffer, on disk and on the device alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures import Spec
from ..architectures.axes import END_SLOTS
from ..checkpoints.lazy import Slots

ALIGNMENT = 256  # bytes: what vectorised loads and copies of every device are content with
HEAD = ("head", "head_bias")


@dataclass(frozen=True)
class Place:
    """Where one slot of all members lies: `shape` is that of each, `offset` in bytes.

    Matrices lie side by side, (N, members, K), so that [A | B] is one (N, 2K) matrix; all else is (members, ...).
    """

    offset: int
    shape: tuple[int, ...]

    def packed(self, members: int) -> tuple[int, ...]:
        return (self.shape[0], members, self.shape[1]) if len(self.shape) == 2 else (members, *self.shape)


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def arrange(shapes: Mapping[str, tuple[int, ...]], itemsize: int, members: int = 2) -> tuple[dict[str, Place], int]:
    """Places of slots one behind the other, each aligned, and the bytes of them all."""
    places, end = {}, 0
    for name, shape in shapes.items():
        places[name] = Place(end, tuple(shape))
        end = aligned(end + members * math.prod(shape) * itemsize)
    return places, end


def side_by_side(members: Sequence[Tensor]) -> Tensor:
    """A slot of all members in the shape that is stored, see Place."""
    return torch.stack(tuple(members), dim=1 if members[0].dim() == 2 else 0)


def memory(buffer: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, to read into or write from."""
    return buffer.view(-1).view(torch.uint8).numpy().data


def views(buffer: Tensor, places: Mapping[str, Place], dtype: torch.dtype, members: int = 2) -> tuple[Slots, ...]:
    """Every member's slots in a flat uint8 buffer, without a copy. Matrices have rows members * K apart."""
    found: tuple[Slots, ...] = tuple({} for _ in range(members))
    for name, place in places.items():
        size = members * math.prod(place.shape) * dtype.itemsize
        together = buffer[place.offset : place.offset + size].view(dtype).view(place.packed(members))
        for slots, t in zip(found, together.unbind(1 if len(place.shape) == 2 else 0), strict=True):
            slots[name] = t
    return found


def slot_shapes(spec: Spec) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of the slots at the ends, and of those of one block. Optional slots are included."""
    ends: dict[str, tuple[int, ...]] = {}
    block: dict[str, tuple[int, ...]] = {}
    for name, shape in spec.shapes.items():
        (ends if name.removesuffix("_bias") in END_SLOTS else block)[name] = shape
    return ends, block


def block_bytes(spec: Spec, itemsize: int, members: int = 2) -> int:
    """Bytes of one block of all members."""
    return arrange(slot_shapes(spec)[1], itemsize, members)[1]


def head_rows(spec: Spec, itemsize: int, part_bytes: int | None = None, members: int = 2) -> list[int]:
    """Rows of each part of the head: even runs of at most `part_bytes` (default: the bytes of a block)."""
    shape = spec.shape("head")
    assert shape is not None
    row = members * itemsize * (shape[1] + (spec.shape("head_bias") is not None))
    limit = block_bytes(spec, itemsize, members) if part_bytes is None else part_bytes
    most = max(1, (limit - 2 * ALIGNMENT) // row)
    parts = -(-shape[0] // most)
    small, more = divmod(shape[0], parts)
    return [small + (i < more) for i in range(parts)]


def segment_bytes(spec: Spec, itemsize: int, part_bytes: int | None = None, members: int = 2) -> list[int]:
    """Bytes of every segment of all members: their blocks, then the parts of their heads."""
    ends, _ = slot_shapes(spec)
    parts = []
    for rows in head_rows(spec, itemsize, part_bytes, members):
        shapes = {name: (rows, *ends[name][1:]) for name in HEAD if name in ends}
        parts.append(arrange(shapes, itemsize, members)[1])
    return [block_bytes(spec, itemsize, members)] * spec.layers + parts
