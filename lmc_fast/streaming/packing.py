"""Writing a store: pieces of a pair become files, one at a time."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architectures import Spec, flat_fields
from ..checkpoints.lazy import Slots
from ..checkpoints.weights import Weights
from ..errors import LmcError
from .layout import HEAD, Place, aligned, arrange, head_rows, memory, side_by_side, slot_shapes

FORMAT, VERSION = "lmc_fast store", 3
MEMBERS = [{"name": "a"}, {"name": "b"}]  # side by side in every file, in this order
CHUNK = 8 << 20  # bytes read by one thread at a time, each with a checksum

Piece = tuple[int | str, Slots, Slots]


def fingerprint(spec: Spec) -> str:
    """Tells architectures apart; a tied pair and its untied copy are the same."""
    fields = flat_fields(replace(spec, tied=False)) | {"biases": sorted(spec.biases)}
    fields["image"] = asdict(spec.image) if spec.image else None
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def pieces(a: Weights, b: Weights) -> Iterator[Piece]:
    """What Store.create wants, of a pair that is in memory."""
    yield "ends", a.ends, b.ends
    for i, (x, y) in enumerate(zip(a.blocks, b.blocks, strict=True)):
        yield i, x, y


def checksum(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


class Writer:
    """Collects pieces into files; knows which are still missing."""

    def __init__(self, path: Path, spec: Spec, dtype: torch.dtype, part_bytes: int | None):
        self.path, self.spec, self.dtype = path, spec, dtype
        self.expected, self.block = slot_shapes(spec)
        self.blocks: dict[int, dict[str, Any]] = {}
        self.ends: dict[str, Tensor] = {}
        heads = tuple(name for name in HEAD if name in self.expected)
        rows = {"embed": list(self.expected.get("embed", ())[:1]), "head": head_rows(spec, dtype.itemsize, part_bytes)}
        self.tables = {
            "embed": _Table(self, ("embed",), "embed.bin", rows["embed"]),
            "head": _Table(self, heads, "head-{:05d}.bin", rows["head"]),
        }

    def add(self, name: int | str, a: Slots, b: Slots) -> None:
        if a.keys() != b.keys():
            raise LmcError(f"the endpoints differ in slots {sorted(a.keys() ^ b.keys())} of {name}")
        if name != "ends":
            if not isinstance(name, int) or not 0 <= name < self.spec.layers or name in self.blocks:
                raise LmcError(f"block {name} is unknown or was given twice")
            for slot, t in a.items():
                self._require(slot, t, b[slot], self.block.get(slot))
            packed = (self.packed(slot, a[slot], b[slot]) for slot in a)
            self.blocks[name] = self._unit(f"block-{name:05d}.bin", {s: tuple(a[s].shape) for s in a}, packed)
            return
        for slot in a:
            if slot in ("embed", "head"):
                self.tables[slot].add({s: (a[s], b[s]) for s in (slot, f"{slot}_bias") if s in a})
            elif slot != "head_bias":
                self._require(slot, a[slot], b[slot], self.expected.get(slot))
                if slot in self.ends:
                    raise LmcError(f"slot {slot} was given twice")
                self.ends[slot] = self.packed(slot, a[slot], b[slot])

    def packed(self, slot: str, a: Tensor, b: Tensor) -> Tensor:
        both = side_by_side(a.to("cpu", self.dtype), b.to("cpu", self.dtype))
        if not both.isfinite().all():
            raise LmcError(f"slot {slot} overflows in {dtype_name(self.dtype)}; use another dtype")
        return both

    def _require(self, slot: str, a: Tensor, b: Tensor, shape: tuple[int, ...] | None) -> None:
        if shape is None or a.shape != shape or b.shape != shape:
            raise LmcError(f"slot {slot} has shapes {list(a.shape)} and {list(b.shape)}, expected {shape}")

    def _unit(self, file: str, shapes: dict[str, tuple[int, ...]], packed: Iterable[Tensor]) -> dict[str, Any]:
        places, size = arrange(shapes, self.dtype.itemsize)
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
            "members": MEMBERS,
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

    def add(self, slots: dict[str, tuple[Tensor, Tensor]]) -> None:
        if tuple(slots) != self.names:
            raise LmcError(f"the rows of {self.names[0]} come with {', '.join(slots)}, not {', '.join(self.names)}")
        start, count = 0, len(slots[self.names[0]][0])
        for name, (a, b) in slots.items():
            if a.shape != b.shape or a.shape != (count, *self.writer.expected[name][1:]):
                raise LmcError(f"rows of {name} have shapes {list(a.shape)} and {list(b.shape)}")
        while start < count:
            if len(self.done) == len(self.rows):
                raise LmcError(f"{self.names[0]} has more rows than the {sum(self.rows)} that were expected")
            if self.out is None:
                self.out = File(self.writer.path / self.file.format(len(self.done)))
            end = min(count, start + self.rows[len(self.done)] - self.filled)
            parts = {name: self.writer.packed(name, a[start:end], b[start:end]) for name, (a, b) in slots.items()}
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
        places, size = arrange(shapes, self.writer.dtype.itemsize)
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
