"""How a segment's slots of both endpoints lie in one flat buffer, on disk and on the device alike."""

from __future__ import annotations

import math
from collections.abc import Mapping
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
    """Where one slot of A and B lies: `shape` is that of either, `offset` in bytes.

    Matrices lie side by side, (N, 2, K), so that [A | B] is one (N, 2K) matrix; everything else is (2, ...).
    """

    offset: int
    shape: tuple[int, ...]

    @property
    def packed(self) -> tuple[int, ...]:
        return (self.shape[0], 2, self.shape[1]) if len(self.shape) == 2 else (2, *self.shape)


def aligned(size: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def arrange(shapes: Mapping[str, tuple[int, ...]], itemsize: int) -> tuple[dict[str, Place], int]:
    """Places of slots one behind the other, each aligned, and the bytes of them all."""
    places, end = {}, 0
    for name, shape in shapes.items():
        places[name] = Place(end, tuple(shape))
        end = aligned(end + 2 * math.prod(shape) * itemsize)
    return places, end


def side_by_side(a: Tensor, b: Tensor) -> Tensor:
    """A slot of both endpoints in the shape that is stored: (N, 2, K) or (2, ...)."""
    return torch.stack((a, b), dim=1 if a.dim() == 2 else 0)


def memory(buffer: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, to read into or write from."""
    return buffer.view(-1).view(torch.uint8).numpy().data


def views(buffer: Tensor, places: Mapping[str, Place], dtype: torch.dtype) -> tuple[Slots, Slots]:
    """A's and B's slots in a flat uint8 buffer, without a copy. Matrices have rows 2K apart."""
    a: Slots = {}
    b: Slots = {}
    for name, place in places.items():
        size = 2 * math.prod(place.shape) * dtype.itemsize
        both = buffer[place.offset : place.offset + size].view(dtype).view(place.packed)
        a[name], b[name] = both.unbind(1 if len(place.shape) == 2 else 0)
    return a, b


def slot_shapes(spec: Spec) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Shapes of the slots at the ends, and of those of one block. Optional slots are included."""
    ends: dict[str, tuple[int, ...]] = {}
    block: dict[str, tuple[int, ...]] = {}
    for name, shape in spec.shapes.items():
        (ends if name.removesuffix("_bias") in END_SLOTS else block)[name] = shape
    return ends, block


def block_bytes(spec: Spec, itemsize: int) -> int:
    """Bytes of one block of both endpoints."""
    return arrange(slot_shapes(spec)[1], itemsize)[1]


def head_rows(spec: Spec, itemsize: int, part_bytes: int | None = None) -> list[int]:
    """Rows of each part of the head: even runs of at most `part_bytes` (default: the bytes of a block)."""
    shape = spec.shape("head")
    assert shape is not None
    row = 2 * itemsize * (shape[1] + (spec.shape("head_bias") is not None))
    limit = block_bytes(spec, itemsize) if part_bytes is None else part_bytes
    most = max(1, (limit - 2 * ALIGNMENT) // row)
    parts = -(-shape[0] // most)
    small, more = divmod(shape[0], parts)
    return [small + (i < more) for i in range(parts)]


def segment_bytes(spec: Spec, itemsize: int, part_bytes: int | None = None) -> list[int]:
    """Bytes of every segment of a pair: its blocks, then the parts of its head."""
    ends, _ = slot_shapes(spec)
    parts = []
    for rows in head_rows(spec, itemsize, part_bytes):
        shapes = {name: (rows, *ends[name][1:]) for name in HEAD if name in ends}
        parts.append(arrange(shapes, itemsize)[1])
    return [block_bytes(spec, itemsize)] * spec.layers + parts
