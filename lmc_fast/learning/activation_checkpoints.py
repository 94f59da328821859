"""The residual streams in front of every block, from forward to backward: on the device, or in main memory between."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class ActivationCheckpoints:
    """`put` streams block by block in forward; `take` them in backward: last block first, in a block in the same order.

    offload: CUDA streams are copied to pinned main memory, and back one stream ahead of their use, on a stream of
    their own. Elsewhere they stay where they are.
    """

    def __init__(self, offload: bool = False):
        self.offload = offload
        self._blocks: list[deque[Tensor]] = []
        self._ahead: tuple[Tensor, torch.cuda.Event] | None = None
        self._side: torch.cuda.Stream | None = None

    def next_block(self) -> None:
        self._blocks.append(deque())

    def put(self, x: Tensor) -> None:
        if not (self.offload and x.is_cuda):
            self._blocks[-1].append(x)
            return
        if self._side is None:
            self._side = torch.cuda.Stream(x.device)
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._side):
            host.copy_(x, non_blocking=True)
        x.record_stream(self._side)
        self._blocks[-1].append(host)

    def take(self) -> Tensor:
        if self._side is None:
            return self._next()  # type: ignore[return-value]
        if self._ahead is None:
            self._fetch()
        assert self._ahead is not None
        x, ready = self._ahead
        current = torch.cuda.current_stream(x.device)
        current.wait_event(ready)
        x.record_stream(current)
        self._ahead = None
        self._fetch()
        return x

    def _next(self) -> Tensor | None:
        while self._blocks and not self._blocks[-1]:
            self._blocks.pop()
        return self._blocks[-1].popleft() if self._blocks else None

    def _fetch(self) -> None:
        host = self._next()
        if host is None:
            return
        assert self._side is not None
        with torch.cuda.stream(self._side):
            x = host.to(self._side.device, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record(self._side)
        self._ahead = x, ready
