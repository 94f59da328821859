"""Writing a store: pieces of all members become files, one at a time."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architectures import FFN, Attention, Norms, Spec, flat_fields
from ..checkpoints.lazy import Slots
from ..checkpoints.weights import Weights
from ..errors import LmcError
from ..members import listed, member_names
from .layout import HEAD, Place, aligned, arrange, head_rows, memory, side_by_side, slot_shapes

FORMAT, VERSION = "lmc_fast store", 3
CHUNK = 8 << 20  # bytes read by one thread at a time, each with a checksum

Piece = tuple[int | str, Sequence[Slots]]  # a block's number or "ends", and every member's slots


def named(members: int) -> list[dict[str, str]]:
    """What an index says of the members: side by side in every file, in this order."""
    return [{"name": name} for name in member_names(members)]


_LATER = (
    *("qk_norm_last", "blocks", "biased", "branch_scale", "head_scale", "headless", "head_activation", "head_normed"),
    *("bare_start", "distances", "distance_rows", "distance_terms", "distances_normed"),
    *("sinks", "clamped"),
)
_PLAIN = flat_fields(Spec("", 1, 1, 1, 1, Attention(1, 1, 1), FFN(1, "gelu"), Norms("rmsnorm", 0.0)))


def fingerprint(spec: Spec) -> str:
    """Tells architectures apart; a tied pair and its untied copy are the same."""
    fields = flat_fields(replace(spec, tied=False)) | {"biases": sorted(spec.biases)}
    for name in _LATER:  # where they say nothing, stores that were written without them fit
        if fields[name] == _PLAIN[name]:
            del fields[name]
    fields["image"] = asdict(spec.image) if spec.image else None
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def pieces(*members: Weights) -> Iterator[Piece]:
    """What Store.create wants, of models that are in memory."""
    yield "ends", [w.ends for w in members]
    yield from enumerate(zip(*(w.blocks for w in members), strict=True))


def checksum(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


class Writer:
    """Collects pieces into files; knows which are still missing."""

    def __init__(self, path: Path, spec: Spec, dtype: torch.dtype, part_bytes: int | None, members: int):
        self.path, self.spec, self.dtype, self.members = path, spec, dtype, members
        self.expected, self.block = slot_shapes(spec)
        self.blocks: dict[int, dict[str, Any]] = {}
        self.ends: dict[str, Tensor] = {}
        heads = tuple(name for name in HEAD if name in self.expected)
        part_rows = head_rows(spec, dtype.itemsize, part_bytes, members)
        self.tables = {
            "embed": _Table(self, ("embed",), "embed.bin", list(self.expected.get("embed", ())[:1])),
            "head": _Table(self, heads, "head-{:05d}.bin", part_rows),
        }

    def add(self, name: int | str, members: Sequence[Slots]) -> None:
        first = members[0]
        for slots in members:
            if first.keys() != slots.keys():
                raise LmcError(f"the endpoints differ in slots {sorted(first.keys() ^ slots.keys())} of {name}")
        together = {slot: [slots[slot] for slots in members] for slot in first}
        if name != "ends":
            if not isinstance(name, int) or not 0 <= name < self.spec.layers or name in self.blocks:
                raise LmcError(f"block {name} is unknown or was given twice")
            for slot, tensors in together.items():
                self._require(slot, tensors, self.block.get(slot))
            packed = (self.packed(slot, tensors) for slot, tensors in together.items())
            self.blocks[name] = self._unit(f"block-{name:05d}.bin", {s: tuple(first[s].shape) for s in first}, packed)
            return
        for slot, tensors in together.items():
            if slot in ("embed", "head"):
                self.tables[slot].add({s: together[s] for s in (slot, f"{slot}_bias") if s in together})
            elif slot != "head_bias":
                self._require(slot, tensors, self.expected.get(slot))
                if slot in self.ends:
                    raise LmcError(f"slot {slot} was given twice")
                self.ends[slot] = self.packed(slot, tensors)

    def packed(self, slot: str, members: Sequence[Tensor]) -> Tensor:
        together = side_by_side([t.to("cpu", self.dtype) for t in members])
        if not together.isfinite().all():
            raise LmcError(f"slot {slot} overflows in {dtype_name(self.dtype)}; use another dtype")
        return together

    def _require(self, slot: str, members: Sequence[Tensor], shape: tuple[int, ...] | None) -> None:
        shapes = [list(t.shape) for t in members]
        if len(members) != self.members:
            raise LmcError(f"slot {slot} is of {len(members)} models, expected {self.members}")
        if shape is None or any(found != list(shape) for found in shapes):
            raise LmcError(f"slot {slot} has shapes {listed([str(found) for found in shapes])}, expected {shape}")

    def _unit(self, file: str, shapes: dict[str, tuple[int, ...]], packed: Iterable[Tensor]) -> dict[str, Any]:
        places, size = arrange(shapes, self.dtype.itemsize, self.members)
        with closing(File(self.path / file)) as out:
            for t in packed:
                out.write(t)
                out.pad()
            assert out.size == size
        return out.entry(places)

    def finish(self, key: str) -> None:
        missing = sorted(set(range(self.spec.layers)) - self.blocks.keys())
        if missing:
            raise LmcError(f"block {missing[0]} ({len(missing)} in all) is missing")
        tables = {}
        if "embed" in self.expected:
            (tables["embed"],) = self.tables["embed"].entries()
        shapes = {name: self.expected[name] for name in self.ends}
        tables["ends"] = self._unit("ends.bin", shapes, self.ends.values())
        index = {
            "format": FORMAT,
            "version": VERSION,
            "members": named(self.members),
            "fingerprint": fingerprint(self.spec),
            "family": self.spec.family,
            "dtype": dtype_name(self.dtype),
            "key": key,
            "segments": [self.blocks[i] for i in range(self.spec.layers)] + self.tables["head"].entries(),
            "tables": tables,
        }
        index = json.loads(json.dumps(index))  # tuples become lists, as they will be read
        (self.path / "index.json").write_text(json.dumps(index | {"checksum": checksum(index)}, indent=1))

    def close(self) -> None:
        for table in self.tables.values():
            table.close()


class _Table:
    """Rows that arrive in runs and are cut into files of given numbers of rows."""

    def __init__(self, writer: Writer, names: tuple[str, ...], file: str, rows: list[int]):
        self.writer, self.names, self.file, self.rows = writer, names, file, rows
        self.done: list[dict[str, Any]] = []
        self.out: File | None = None
        self.filled = 0  # rows in the open file
        self.rest: list[Tensor] = []  # biases of the open file: they lie behind the matrix

    def add(self, slots: dict[str, list[Tensor]]) -> None:
        if tuple(slots) != self.names:
            raise LmcError(f"the rows of {self.names[0]} come with {', '.join(slots)}, not {', '.join(self.names)}")
        start, count = 0, len(slots[self.names[0]][0])
        for name, members in slots.items():
            shapes = [tuple(t.shape) for t in members]
            if any(shape != (count, *self.writer.expected[name][1:]) for shape in shapes):
                raise LmcError(f"rows of {name} have shapes {listed([str(list(shape)) for shape in shapes])}")
        while start < count:
            if len(self.done) == len(self.rows):
                raise LmcError(f"{self.names[0]} has more rows than the {sum(self.rows)} that were expected")
            if self.out is None:
                self.out = File(self.writer.path / self.file.format(len(self.done)))
            end = min(count, start + self.rows[len(self.done)] - self.filled)
            parts = {name: self.writer.packed(name, [t[start:end] for t in ts]) for name, ts in slots.items()}
            self.out.write(parts[self.names[0]])
            self.rest += [parts[name] for name in self.names[1:]]
            self.filled += end - start
            start = end
            if self.filled == self.rows[len(self.done)]:
                self._complete()

    def _complete(self) -> None:
        assert self.out is not None
        expected = self.writer.expected
        shapes = {name: (self.filled, *expected[name][1:]) for name in self.names}
        places, size = arrange(shapes, self.writer.dtype.itemsize, self.writer.members)
        self.out.pad()
        if self.rest:
            self.out.write(torch.cat(self.rest, dim=1))
            self.out.pad()
        assert self.out.size == size
        self.out.close()
        self.done.append(self.out.entry(places))
        self.out, self.filled, self.rest = None, 0, []

    def entries(self) -> list[dict[str, Any]]:
        if len(self.done) < len(self.rows):
            raise LmcError(f"{self.names[0]} has fewer rows than the {sum(self.rows)} that were expected")
        return self.done

    def close(self) -> None:
        if self.out is not None:
            self.out.close()


class File:
    """A file that is written front to back, with a checksum for every CHUNK bytes."""

    def __init__(self, path: Path):
        self.path, self.size = path, 0
        self.crc: list[int] = []
        self._file = open(path, "wb")  # noqa: SIM115

    def close(self) -> None:
        self._file.close()

    def write(self, tensor: Tensor) -> None:
        self._bytes(memory(tensor.contiguous()))

    def pad(self) -> None:
        self._bytes(memoryview(bytes(aligned(self.size) - self.size)))

    def _bytes(self, data: memoryview) -> None:
        self._file.write(data)
        while len(data):
            room = CHUNK - self.size % CHUNK
            if room == CHUNK:
                self.crc.append(0)
            self.crc[-1] = zlib.crc32(data[:room], self.crc[-1])
            self.size += len(data[:room])
            data = data[room:]

    def entry(self, places: dict[str, Place]) -> dict[str, Any]:
        slots = {name: (place.offset, place.shape) for name, place in places.items()}
        return {"file": self.path.name, "bytes": self.size, "crc": self.crc, "slots": slots}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
