"""Models on disk in the form that the ring reads: one file per segment, all members packed as in layout.py.

    index.json        format, version, members, fingerprint of the spec, dtype, key; files: places, size, checksums
    block-00000.bin   one segment each, read as a whole: blocks, then head-00000.bin, ... (runs of vocabulary rows)
    embed.bin         (V, 2, d): rows are read one by one
    lmc_fast.json     tells that the directory is ours
    ends.bin          what else lies outside the blocks; small, read at once

Files are read with preadv into the memory where the weights are used. They are not mapped: mapped pages would count as
the process's memory.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architectures import Spec
from ..checkpoints.lazy import Slots
from ..errors import LmcError
from ..output import OWNER, Names, atomic_directory, marker, write_synced
from .layout import Place, memory, views
from .packing import CHUNK, FORMAT, VERSION, Piece, Writer, checksum, fingerprint, named

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORE_NAMES: Names = dict.fromkeys((OWNER, "index.json", "block-*.bin", "head-*.bin", "embed.bin", "ends.bin"))
_MAKE_AGAIN = "delete the directory and make it again"


class Store:
    """An open store: the index is in memory, the weights are on disk.

    spec; dtype; path; key: what the maker wrote to recognise its work; layers, head_parts; segment_bytes: size of each.
    """

    def __init__(self, path: Path, spec: Spec, index: dict[str, Any]):
        self.path, self.spec, self._index = path, replace(spec, tied=False), index
        self.members = len(index["members"])
        self.dtype = _DTYPES[index["dtype"]]
        self.key: str = index["key"]
        self.layers = spec.layers
        self.head_parts = len(index["segments"]) - spec.layers
        self.segment_bytes = [entry["bytes"] for entry in index["segments"]]

    @staticmethod
    def create(
        directory: str | Path,
        spec: Spec,
        pieces: Iterable[Piece],
        dtype: torch.dtype = torch.float32,
        part_bytes: int | None = None,
        key: str = "",
        members: int = 2,
    ) -> Store:
        """Writes a store, holding one piece at a time, and opens it. It appears under its name when it is complete.

        pieces: (i, every member's slots) of every block, and ("ends", every member's slots): the latter any number of
        times, and tables (embed, head with head_bias) in as many runs of rows as wanted, in order. part_bytes: the
        most that a part of the head takes (default: as much as a block).

        Raises LmcError where the target is taken, the disk is full, a weight overflows in `dtype`, or pieces are
        missing, doubled or of a wrong shape. Then nothing is left behind.
        """
        target = Path(directory)
        with atomic_directory(target, STORE_NAMES) as work:
            write_synced(work / OWNER, marker())
            writer = Writer(work, replace(spec, tied=False), dtype, part_bytes, members)
            try:
                for name, slots in pieces:
                    writer.add(name, slots)
                    del slots  # else they live until the next piece is made
                writer.finish(key)
            finally:
                writer.close()
        return Store.open(target, spec)

    @staticmethod
    def open(directory: str | Path, spec: Spec, key: str | None = None) -> Store:
        """Raises LmcError, with the file named, where the store is missing, truncated, foreign or of another key."""
        path = Path(directory)
        file = path / "index.json"
        try:
            index = json.loads(file.read_bytes())
            sound = index.pop("checksum") == checksum(index)
        except OSError as error:
            raise LmcError(f"{file} cannot be read ({error.strerror}); {path} is not a complete store") from error
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise LmcError(f"{file} is corrupt; {_MAKE_AGAIN}") from error
        if not sound:
            raise LmcError(f"{file} is corrupt; {_MAKE_AGAIN}")
        members = index["members"] if isinstance(index["members"], list) else []
        known = len(members) > 1 and members == named(len(members))
        if (index["format"], index["version"]) != (FORMAT, VERSION) or not known:
            raise LmcError(f"{file} is of another format or version; {_MAKE_AGAIN}")
        if index["fingerprint"] != fingerprint(spec):
            raise LmcError(f"{file} belongs to models of another architecture; {_MAKE_AGAIN}")
        if key is not None and index["key"] != key:
            raise LmcError(f"{file} belongs to other models or another preparation of them; {_MAKE_AGAIN}")
        for entry in (*index["segments"], *index["tables"].values()):
            found = path / entry["file"]
            size = found.stat().st_size if found.is_file() else None
            if size != entry["bytes"]:
                state = "is missing" if size is None else f"is truncated or changed ({size} of {entry['bytes']} bytes)"
                raise LmcError(f"{found} {state}; {_MAKE_AGAIN}")
        return Store(path, spec, index)

    def file(self, segment: int) -> Path:
        return self.path / self._index["segments"][segment]["file"]

    def places(self, segment: int) -> dict[str, Place]:
        """Where the slots of a segment lie in its bytes."""
        slots = self._index["segments"][segment]["slots"]
        return {name: Place(offset, tuple(shape)) for name, (offset, shape) in slots.items()}

    def chunks(self, segment: int, into: memoryview, check: bool = True) -> list[_Chunk]:
        """The reads that fill `into` (segment_bytes[segment] bytes) with a segment: call each, in any order and thread.

        check: compare checksums. A call raises LmcError that names the file for an I/O error, a short or corrupt file.
        """
        return _chunks(self.path, self._index["segments"][segment], into, check)

    def read(self, segment: int, pool: Executor | None = None) -> tuple[Slots, ...]:
        """A segment in fresh memory, checked."""
        buffer = torch.empty(self.segment_bytes[segment], dtype=torch.uint8)
        read_all(self.chunks(segment, memory(buffer)), pool)
        return views(buffer, self.places(segment), self.dtype, self.members)

    def ends(self) -> tuple[Slots, ...]:
        """Every member's slots outside the blocks but embed and head, in fresh memory, checked."""
        entry = self._index["tables"]["ends"]
        buffer = torch.empty(entry["bytes"], dtype=torch.uint8)
        read_all(_chunks(self.path, entry, memory(buffer), True))
        places = {name: Place(offset, tuple(shape)) for name, (offset, shape) in entry["slots"].items()}
        return views(buffer, places, self.dtype, self.members)

    def embed_rows(self, rows: Sequence[int], memory_for: Callable[[int], Tensor] | None = None) -> Tensor:
        """Rows (ascending, each once) of all embedding tables: (U, members, d). Neighbours are read together.

        memory_for(bytes): uint8 memory to read them into, by default new.
        Raises LmcError for a row outside the table (or a model without one), an I/O error and a short file.
        """
        entry = self._index["tables"].get("embed")
        if entry is None:
            raise LmcError(f"{self.path} holds no token embeddings")
        count, width = entry["slots"]["embed"][1]
        shape, size = (len(rows), self.members, width), self.members * width * self.dtype.itemsize
        if not len(rows):
            return torch.empty(shape, dtype=self.dtype)
        if rows[0] < 0 or rows[-1] >= count:
            raise LmcError(f"token {rows[0] if rows[0] < 0 else rows[-1]} is outside the table of {count} embeddings")
        file = self.path / entry["file"]
        memory_for = memory_for or partial(torch.empty, dtype=torch.uint8)
        out = memory_for(len(rows) * size).view(self.dtype).view(shape)
        into = memory(out)
        with _opened(file) as fd:
            start = 0
            for i in range(1, len(rows) + 1):
                if i == len(rows) or rows[i] != rows[i - 1] + 1:
                    _fill(file, fd, into[start * size : i * size], rows[start] * size)
                    start = i
        return out

    def verify(self) -> None:
        """Reads every byte and compares checksums. Raises LmcError that names the first bad file."""
        for entry in (*self._index["segments"], *self._index["tables"].values()):
            scratch = bytearray(min(CHUNK, entry["bytes"]))
            for i, start in enumerate(range(0, entry["bytes"], CHUNK)):
                into = memoryview(scratch)[: min(CHUNK, entry["bytes"] - start)]
                _Chunk(self.path / entry["file"], into, start, entry["crc"][i])()


class _Chunk:
    """One read of a part of a file into its place in memory."""

    def __init__(self, file: Path, into: memoryview, offset: int, crc: int | None):
        self.file, self.into, self.offset, self.crc = file, into, offset, crc

    def __call__(self) -> None:
        with _opened(self.file) as fd:
            _fill(self.file, fd, self.into, self.offset)
        if self.crc is not None and zlib.crc32(self.into) != self.crc:
            raise LmcError(f"{self.file} is corrupt (checksum at byte {self.offset}); {_MAKE_AGAIN}")


def _chunks(path: Path, entry: dict[str, Any], into: memoryview, check: bool) -> list[_Chunk]:
    assert len(into) == entry["bytes"], (entry["file"], len(into))
    return [
        _Chunk(path / entry["file"], into[at : at + CHUNK], at, entry["crc"][i] if check else None)
        for i, at in enumerate(range(0, entry["bytes"], CHUNK))
    ]


def read_all(chunks: list[_Chunk], pool: Executor | None = None) -> None:
    """Runs the reads, on the pool's threads where there is one. Raises what the first failing one raises."""
    if pool is None:
        for chunk in chunks:
            chunk()
        return
    futures = [pool.submit(chunk) for chunk in chunks]
    try:
        for future in futures:
            future.result()
    finally:  # nobody may write into the memory once this returns
        for future in futures:
            future.cancel() or future.exception()


class _opened:
    """A file descriptor; failures name the file."""

    def __init__(self, file: Path):
        self.file = file

    def __enter__(self) -> int:
        try:
            self.fd = os.open(self.file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise LmcError(f"{self.file} cannot be read ({error.strerror}); {_MAKE_AGAIN}") from error
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def _fill(file: Path, fd: int, into: memoryview, offset: int) -> None:
    """Reads until `into` is full: one call may deliver less than was asked for."""
    done = 0
    while done < len(into):
        try:
            got = os.preadv(fd, [into[done:]], offset + done)
        except OSError as error:
            raise LmcError(f"{file} cannot be read ({error.strerror or error})") from error
        if not got:
            raise LmcError(f"{file} is truncated at byte {offset + done}; {_MAKE_AGAIN}")
        done += got
