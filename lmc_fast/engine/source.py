"""Where a step finds the weights of both endpoints, one segment after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from ..architectures import Spec
from ..checkpoints.weights import Weights
from .slots import Slots

TABLES = ("embed", "head", "head_bias")


class Source(Protocol):
    """Both endpoints, in the dtype and on the device that computes. Units 0 ... layers - 1 are the blocks, the
    `head_parts` after them runs of the head's rows: {"head": (rows, d)}, with "head_bias" (rows,) where there is one.
    """

    spec: Spec
    head_parts: int

    @property
    def ends(self) -> tuple[Slots, Slots]:
        """What lies outside the blocks, but for TABLES: small, always at hand."""
        ...

    @property
    def sample(self) -> Tensor:
        """Any tensor of the dtype and device in use."""
        ...

    def begin(self, visits: Sequence[int]) -> None:
        """Announces the segments of the coming pass, in order. Without news, the pass after it is assumed alike."""
        ...

    def visit(self, segment: int) -> AbstractContextManager[tuple[Slots, Slots]]:
        """A's and B's slots of a segment; valid inside the `with` only."""
        ...

    def embed_rows(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (U, d) of both embedding tables."""
        ...


class Resident:
    """Two models in memory as a Source. Of lazy weights, a block or a run of a table is read when it is visited."""

    def __init__(self, a: Weights, b: Weights):
        self.spec, self.a, self.b = a.spec, a, b
        self.ends: tuple[Slots, Slots] = (_small(a), _small(b))
        head = a.tables.get("head")
        # the rows of the head in each of its segments
        self.head_runs = [(0, a.spec.vocab)] if head is None else list(head.runs())
        self.head_parts = len(self.head_runs)

    @property
    def sample(self) -> Tensor:
        head = self.a.table("head")
        assert head is not None
        return head.rows(0, 0)

    def begin(self, visits: Sequence[int]) -> None:
        """Everything is there, or is read when it is wanted."""

    @contextmanager
    def visit(self, segment: int) -> Iterator[tuple[Slots, Slots]]:
        if segment < self.spec.layers:
            yield self.a.blocks[segment], self.b.blocks[segment]
        else:
            run = self.head_runs[segment - self.spec.layers]
            yield _head(self.a, *run), _head(self.b, *run)

    def embed_rows(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return _rows(self.a, tokens), _rows(self.b, tokens)


def _small(weights: Weights) -> Slots:
    return {name: w for name, w in weights.ends.items() if name not in TABLES}


def _head(weights: Weights, start: int, stop: int) -> Slots:
    table = weights.table("head")
    assert table is not None
    slots = {"head": table.rows(start, stop)}
    bias = weights.ends.get("head_bias")
    return slots if bias is None else slots | {"head_bias": bias[start:stop]}


def _rows(weights: Weights, tokens: Tensor) -> Tensor:
    lazy = weights.tables.get("embed")
    return weights.ends["embed"][tokens] if lazy is None else lazy.pick(tokens)


def paired(a: Weights, b: Weights) -> tuple[Weights, Weights]:
    """The same models with every matrix of a block of A beside that of B, as one GEMM over [A | B] needs it."""
    blocks = [_paired_slots(x, y) for x, y in zip(a.blocks, b.blocks, strict=True)]
    return Weights(a.spec, a.ends, [x for x, _ in blocks]), Weights(b.spec, b.ends, [y for _, y in blocks])


def _paired_slots(a: Slots, b: Slots) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    both = {n: torch.stack([a[n], b[n]], dim=1) if a[n].dim() == 2 else torch.stack([a[n], b[n]]) for n in a}
    x, y = ({n: t.select(1 if a[n].dim() == 2 else 0, k) for n, t in both.items()} for k in range(2))
    return x, y
