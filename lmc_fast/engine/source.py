"""Where a step finds the weights of all members, one segment after the other."""

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
    """The members (endpoints A and B, or more), in the dtype and on the device that computes. Segments 0 ... layers
    - 1 are the blocks, the `head_parts` after them runs of the head's rows: {"head": (rows, d)}, with "head_bias"
    (rows,) where there is one.
    """

    spec: Spec
    head_parts: int

    @property
    def ends(self) -> tuple[Slots, ...]:
        """Of every member, what lies outside the blocks, but for TABLES: small, always at hand."""
        ...

    @property
    def sample(self) -> Tensor:
        """Any tensor of the dtype and device in use."""
        ...

    def begin(self, visits: Sequence[int]) -> None:
        """Announces the segments of the coming pass, in order. Without news, the pass after it is assumed alike."""
        ...

    def visit(self, segment: int) -> AbstractContextManager[tuple[Slots, ...]]:
        """Every member's slots of a segment; valid inside the `with` only."""
        ...

    def embed_rows(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """Rows (U, d) of every member's embedding table."""
        ...


class Resident:
    """Models in memory as a Source. Of lazy weights, a block or a run of a table is read when it is visited."""

    def __init__(self, *members: Weights):
        self.spec, self.members = members[0].spec, members
        self.ends: tuple[Slots, ...] = tuple(_small(w) for w in members)
        head = members[0].tables.get("head")
        # the rows of the head in each of its segments
        self.head_runs = [(0, self.spec.vocab)] if head is None else list(head.runs())
        self.head_parts = len(self.head_runs)

    @property
    def sample(self) -> Tensor:
        head = self.members[0].table("head")
        assert head is not None
        return head.rows(0, 0)

    def begin(self, visits: Sequence[int]) -> None:
        """Everything is there, or is read when it is wanted."""

    @contextmanager
    def visit(self, segment: int) -> Iterator[tuple[Slots, ...]]:
        if segment < self.spec.layers:
            yield tuple(w.blocks[segment] for w in self.members)
        else:
            run = self.head_runs[segment - self.spec.layers]
            yield tuple(_head(w, *run) for w in self.members)

    def embed_rows(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return tuple(_rows(w, tokens) for w in self.members)


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


def paired(*members: Weights) -> list[Weights]:
    """The same models with every matrix of a block beside those of the others, as one GEMM over [A | B] needs it."""
    blocks = [_paired_slots(slots) for slots in zip(*(w.blocks for w in members), strict=True)]
    return [Weights(w.spec, w.ends, [block[k] for block in blocks]) for k, w in enumerate(members)]


def _paired_slots(members: Sequence[Slots]) -> list[dict[str, Tensor]]:
    dims = {name: 1 if t.dim() == 2 else 0 for name, t in members[0].items()}
    together = {name: torch.stack([w[name] for w in members], dim) for name, dim in dims.items()}
    return [{name: t.select(dims[name], k) for name, t in together.items()} for k in range(len(members))]
