"""All members with everything frozen applied, piece by piece: what a store of weights to learn on is filled with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..checkpoints import Slots, Weights
from ..streaming.packing import Piece
from ..symmetry import Transform


def prepare(members: Sequence[Weights], base: Sequence[Transform], dtype: torch.dtype) -> Iterator[Piece]:
    """Pieces for Store.create, of canonical models (lazy or not), moved by `base` in its dtype, then rounded.

    In this order: all small slots outside the blocks, the embedding (of text models) and the head by runs of rows, as
    long as Table.runs makes them, and every block.

    What is yielded belongs to the caller until the next piece is asked for; then the dicts are emptied, so that no two
    pieces are in memory.
    """
    moved = [g.apply(w).to(dtype) for g, w in zip(base, members, strict=True)]
    yield from _lent("ends", [{n: t for n, t in w.small_ends.items() if n != "head_bias"} for w in moved])
    for name in ("embed", "head"):
        table = moved[0].table(name)
        for start, stop in table.runs() if table else ():
            yield from _lent("ends", [_rows(w, name, start, stop) for w in moved])
    for i in range(moved[0].spec.layers):
        yield from _lent(i, [dict(w.blocks[i]) for w in moved])


def _lent(name: int | str, members: Sequence[Slots]) -> Iterator[Piece]:
    yield name, members
    for slots in members:
        slots.clear()


def _rows(weights: Weights, name: str, start: int, stop: int) -> Slots:
    table, bias = weights.table(name), weights.ends.get(f"{name}_bias")
    assert table is not None
    rows = {name: table.rows(start, stop)}
    return rows if bias is None else rows | {f"{name}_bias": bias[start:stop]}
