"""The source of weights that holds a few segments at a time: a ring of buffers, filled ahead of the computation."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.lazy import Slots
from ..errors import LmcError
from .layout import views
from .schedule import Action, Compute, Load, Release, schedule
from .store import Store
from .transport import Copied, Direct, Reader

POISON = 255  # a float of any width whose bytes are all 255 is NaN


@dataclass
class Traffic:
    """What a ring moved, and what it cost: counted since the ring was made."""

    visits: int = 0
    loads: int = 0
    bytes: int = 0  # of segments, resident ones included
    row_bytes: int = 0  # of embedding rows
    stall_seconds: float = 0.0  # the computation waited for a segment
    read_seconds: float = 0.0  # files were being read

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Ticket:
    """One load: done when the segment is in its buffer, or failed."""

    def __init__(self, segment: int, buffer: int):
        self.segment, self.buffer = segment, buffer
        self.done = Event()
        self.error: BaseException | None = None


class Streamed:
    """A Source that reads from a store into a ring of buffers. Use it in a `with`: its threads and memory end there.

    device: where the weights are wanted. buffers: size of the ring (2: one to compute with, one to load). resident:
    segments that are loaded at once and stay. readers: threads that read. pinned: (CUDA) keep every segment in pinned
    main memory instead of reading the file again. check: compare a segment's checksums the first time it is read.
    poison: fill a buffer with NaN when it is released, which shows a use after it.

    The views that `visit` yields are in the store's dtype, with the layout of layout.py; they must not be written to
    and are valid inside the `with` only. Visits come one at a time, in the order that `begin` announced.

    Raises LmcError, here and in `visit` and `embed_rows`, with the file named, for what is wrong with the store.
    """

    def __init__(
        self,
        store: Store,
        device: torch.device | str = "cpu",
        buffers: int = 2,
        resident: Collection[int] = (),
        readers: int = 2,
        pinned: bool = False,
        check: bool = True,
        poison: bool = False,
    ):
        self.store, self.spec, self.head_parts = store, store.spec, store.head_parts
        self.device, self.poison = torch.device(device), poison
        self.resident = frozenset(resident)
        streamed = [size for segment, size in enumerate(store.segment_bytes) if segment not in self.resident]
        self.buffers = buffers if streamed else 0
        if streamed and buffers < 1:
            raise LmcError("segments that are not resident need at least one buffer")
        self._traffic = Traffic()
        self._tickets: list[_Ticket | None] = [None] * self.buffers
        self._actions: deque[Action] = deque()
        self._jobs: SimpleQueue[_Ticket | None] = SimpleQueue()
        self._inside = self._closed = False
        self._reader = Reader(store, readers, check)
        self._loader = Thread(target=self._load_all, name="load", daemon=True)
        with ExitStack() as undo:
            undo.callback(self._reader.close)
            self.transport: Direct | Copied = Direct(self._reader)
            if self.device.type == "cuda":
                self.transport = Copied(self._reader, self.device, self.buffers, max(store.segment_bytes), pinned)
            undo.callback(self.transport.close)
            self.ends: tuple[Slots, ...] = self._to_device(store.ends())
            self._ring = [self.transport.allocate(max(streamed)) for _ in range(self.buffers)]
            self._kept: dict[int, Tensor] = {}
            for segment in sorted(self.resident):
                self._kept[segment] = self.transport.allocate(store.segment_bytes[segment])
                self.transport.load_now(segment, self._kept[segment])
                self._traffic.bytes += store.segment_bytes[segment]
            undo.pop_all()
        self._loader.start()

    def __enter__(self) -> Streamed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and gives the memory back; whatever was being loaded is dropped."""
        if self._closed:
            return
        self._closed = True
        self._reader.stop()
        self._jobs.put(None)
        self._loader.join()
        self._reader.close()
        self.transport.close()
        self._actions.clear()
        self._ring, self._kept = [], {}

    @property
    def sample(self) -> Tensor:
        """An empty tensor of the dtype and on the device of the weights."""
        return torch.empty(0, dtype=self.store.dtype, device=self.device)

    def begin(self, visits: Sequence[int]) -> None:
        """Announces the segments of the coming pass, in order. The pass after it is taken to be alike.

        What is in the buffers, or on its way, is used again. A pass may be left before its end.
        """
        self._require_ready()
        held = tuple(None if ticket is None else ticket.segment for ticket in self._tickets)
        actions, _ = schedule(visits, self.buffers, self.resident, held)
        self._actions = deque(actions)
        self._issue()

    @contextmanager
    def visit(self, segment: int) -> Iterator[tuple[Slots, ...]]:
        """Every member's slots of a block, or of part segment - layers of the head; waits until they are there."""
        self._require_ready()
        action = self._actions.popleft() if self._actions else None
        if not isinstance(action, Compute) or action.segment != segment:
            self._actions.clear()
            raise RuntimeError(f"visit of segment {segment}, but {action} comes next in the pass that was announced")
        if action.buffer is None:
            buffer = self._kept[segment]
        else:
            self._await(action.buffer)
            buffer = self._ring[action.buffer]
        self._traffic.visits += 1
        self._inside = True
        try:
            yield views(buffer, self.store.places(segment), self.store.dtype, self.store.members)
        finally:
            self._inside = False
            if action.buffer is not None:
                self.transport.after_compute(action.buffer)
        self._issue()

    def embed_rows(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Rows (U, d) of every member's embedding table for tokens (U,), ascending and each once."""
        together = self.transport.rows(tokens.tolist())
        self._traffic.row_bytes += together.nbytes
        return together.unbind(1)

    @property
    def traffic(self) -> Traffic:
        """What was moved so far (on CUDA this waits for the device)."""
        self._traffic.read_seconds = self._reader.seconds
        counted = Traffic(**asdict(self._traffic))
        counted.stall_seconds += self.transport.stall_seconds()
        return counted

    def _to_device(self, ends: tuple[Slots, ...]) -> tuple[Slots, ...]:
        return tuple({name: t.to(self.device) for name, t in slots.items()} for slots in ends)

    def _require_ready(self) -> None:
        if self._closed:
            raise RuntimeError("the ring is closed")
        if self._inside:
            raise RuntimeError("one visit at a time: leave the one that is open first")

    def _issue(self) -> None:
        """Everything that the schedule has before the next visit."""
        while self._actions and not isinstance(self._actions[0], Compute):
            action = self._actions.popleft()
            if isinstance(action, Load):
                ticket = _Ticket(action.segment, action.buffer)
                self._tickets[action.buffer] = ticket
                self._traffic.loads += 1
                self._traffic.bytes += self.store.segment_bytes[action.segment]
                self._jobs.put(ticket)
            elif isinstance(action, Release) and self.poison:
                self._await(action.buffer)  # a load that is under way would overwrite it
                self._ring[action.buffer].fill_(POISON)
                self.transport.after_compute(action.buffer)

    def _await(self, buffer: int) -> None:
        ticket = self._tickets[buffer]
        assert ticket is not None
        if not ticket.done.is_set():
            began = time.perf_counter()
            ticket.done.wait()
            self._traffic.stall_seconds += time.perf_counter() - began
        if ticket.error is not None:
            self._actions.clear()
            kind = LmcError if isinstance(ticket.error, LmcError) else RuntimeError
            raise kind(f"{ticket.error}") from ticket.error
        self.transport.before_compute(buffer)

    def _load_all(self) -> None:
        """The loader's thread: one load after the other, in the order of the schedule. After a failure all fail."""
        failure: BaseException | None = None
        while (ticket := self._jobs.get()) is not None:
            try:
                if failure is None:
                    self.transport.load(ticket.segment, ticket.buffer, self._ring[ticket.buffer])
            except BaseException as error:
                failure = error
            ticket.error = failure
            ticket.done.set()
