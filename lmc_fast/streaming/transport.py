"""Bringing a segment from the store into a buffer: from the file itself on the CPU, by way of pinned memory on CUDA."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .layout import ALIGNMENT, memory
from .store import Store, read_all


class Stopped(Exception):
    """The reader was told to stop; nobody waits for what it was reading."""


class Reader:
    """Reads segments with several threads; checks each segment's checksums the first time."""

    def __init__(self, store: Store, threads: int, check: bool = True):
        self.store, self.check = store, check
        self.seconds = 0.0  # spent reading
        self._checked: set[int] = set()
        self._stopped = threading.Event()
        self._pool = ThreadPoolExecutor(threads, "read")

    def fill(self, segment: int, into: memoryview) -> None:
        """Returns when `into` holds the segment. Raises LmcError that names the file, or Stopped."""
        began = time.perf_counter()
        reads = self.store.chunks(segment, into, self.check and segment not in self._checked)
        read_all([self._unless_stopped(read) for read in reads], self._pool)
        self._checked.add(segment)
        self.seconds += time.perf_counter() - began

    def _unless_stopped(self, read: Any) -> Any:
        def run() -> None:
            if self._stopped.is_set():
                raise Stopped
            read()

        return run

    def stop(self) -> None:
        """What is being read ends at its next chunk; from now on nothing is read."""
        self._stopped.set()

    def close(self) -> None:
        self.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)


class Direct:
    """Buffers in main memory: the file is read into the buffer itself."""

    def __init__(self, reader: Reader):
        self.reader = reader

    def allocate(self, size: int) -> Tensor:
        """Uninitialised bytes, aligned."""
        raw = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        start = -raw.data_ptr() % ALIGNMENT
        return raw[start : start + size]

    def load(self, segment: int, index: int, buffer: Tensor) -> None:
        """On the loader's thread: returns when the computation may be told that the segment is there."""
        self.reader.fill(segment, memory(buffer[: self.reader.store.segment_bytes[segment]]))

    def load_now(self, segment: int, buffer: Tensor) -> None:
        """On the caller's thread: returns when the segment is there."""
        self.load(segment, -1, buffer)

    def rows(self, tokens: Sequence[int]) -> Tensor:
        """Rows of the embedding tables: Store.embed_rows."""
        return self.reader.store.embed_rows(tokens)

    def before_compute(self, index: int) -> None:
        """Called when `load` has returned and the computation is about to start."""

    def after_compute(self, index: int) -> None:
        """Called when all work with the buffer has been handed to the device."""

    def stall_seconds(self) -> float:
        """Time that the device, not this process, waited for buffers."""
        return 0.0

    def close(self) -> None:
        """Called when the loader's thread has ended."""


class Pinned:
    """Page-locked main memory of exactly the wanted size: the caching allocator would round up to a power of two."""

    def __init__(self, size: int):
        self._pages = mmap.mmap(-1, max(1, size))
        self.buffer = torch.frombuffer(self._pages, dtype=torch.uint8)[:size]
        self._runtime = torch.cuda.cudart()
        torch.cuda.check_error(int(self._runtime.cudaHostRegister(self.buffer.data_ptr(), len(self._pages), 1)))

    def close(self) -> None:
        torch.cuda.check_error(int(self._runtime.cudaHostUnregister(self.buffer.data_ptr())))


class Copied:
    """Buffers on a CUDA device: file -> pinned memory -> buffer, on a stream of its own.

    Two events per buffer: `copied` before the computation may read it, `computed` before a copy may overwrite it. keep:
    every segment stays in pinned memory once it was read, else two staging buffers serve in turn.
    """

    def __init__(self, reader: Reader, device: torch.device, buffers: int, staging_bytes: int, keep: bool = False):
        self.reader, self.device, self.keep = reader, device, keep
        self._stream = torch.cuda.Stream(device)
        self._copied = [torch.cuda.Event() for _ in range(buffers)]
        self._computed = [torch.cuda.Event() for _ in range(buffers)]
        self._staging = [] if keep else [Pinned(staging_bytes) for _ in range(2)]
        self._emptied = [torch.cuda.Event() for _ in self._staging]
        self._turn = 0
        self._kept: dict[int, Pinned] = {}
        self._rows: Pinned | None = None
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._stalled = 0.0

    def allocate(self, size: int) -> Tensor:
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        # kernels that used this memory before may still be running on the current stream
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return buffer

    def load(self, segment: int, index: int, buffer: Tensor) -> None:
        size = self.reader.store.segment_bytes[segment]
        source, emptied = self._read(segment, size)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            if index >= 0:
                self._stream.wait_event(self._computed[index])
            buffer[:size].copy_(source[:size], non_blocking=True)
            if emptied is not None:
                emptied.record(self._stream)
            if index >= 0:
                self._copied[index].record(self._stream)

    def _read(self, segment: int, size: int) -> tuple[Tensor, torch.cuda.Event | None]:
        """The segment in pinned memory, and the event to record when it has been copied from there."""
        if self.keep:
            if segment not in self._kept:
                self._kept[segment] = Pinned(size)
                self.reader.fill(segment, memory(self._kept[segment].buffer))
            return self._kept[segment].buffer, None
        turn, self._turn = self._turn, 1 - self._turn
        self._emptied[turn].synchronize()
        self.reader.fill(segment, memory(self._staging[turn].buffer[:size]))
        return self._staging[turn].buffer, self._emptied[turn]

    def load_now(self, segment: int, buffer: Tensor) -> None:
        self.load(segment, -1, buffer)
        self._stream.synchronize()
        if segment in self._kept:
            self._kept.pop(segment).close()  # it is not loaded again

    def rows(self, tokens: Sequence[int]) -> Tensor:
        # one place for all calls: the pages of new memory cost more than reading the rows
        return self.reader.store.embed_rows(tokens, self._room_for_rows).to(self.device)

    def _room_for_rows(self, size: int) -> Tensor:
        if self._rows is None or self._rows.buffer.nbytes < size:
            if self._rows is not None:
                self._rows.close()
            self._rows = Pinned(size + size // 4)
        return self._rows.buffer[:size]

    def before_compute(self, index: int) -> None:
        stream = torch.cuda.current_stream(self.device)
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record(stream)
        stream.wait_event(self._copied[index])
        after.record(stream)
        self._waits.append((before, after))
        while self._waits and self._waits[0][1].query():
            self._count(*self._waits.pop(0))

    def _count(self, before: torch.cuda.Event, after: torch.cuda.Event) -> None:
        self._stalled += before.elapsed_time(after) / 1000

    def after_compute(self, index: int) -> None:
        self._computed[index].record(torch.cuda.current_stream(self.device))

    def stall_seconds(self) -> float:
        torch.cuda.synchronize(self.device)
        while self._waits:
            self._count(*self._waits.pop())
        return self._stalled

    def close(self) -> None:
        self._stream.synchronize()
        for pinned in (*self._staging, *self._kept.values(), *([self._rows] if self._rows else [])):
            pinned.close()
        self._staging, self._kept, self._rows = [], {}, None
