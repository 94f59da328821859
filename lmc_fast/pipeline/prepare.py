"""Both endpoints with everything frozen applied, unit by unit: what a store of weights to learn on is filled with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..checkpoints import Slots, Weights
from ..symmetry import Transform

Unit = tuple[str, int]  # ("ends", 0), ("embed", first row), ("head", first row), ("block", index)


def prepare(
    a: Weights,
    b: Weights,
    base: tuple[Transform, Transform],
    dtype: torch.dtype,
    head_runs: Sequence[tuple[int, int]] | None = None,
) -> Iterator[tuple[Unit, Slots, Slots]]:
    """(unit, A's slots, B's slots) of canonical endpoints (lazy or not), moved by `base` in its dtype, then rounded.

    In this order: all small slots outside the blocks, the embedding by runs of rows (text models), the head by
    `head_runs` (start, stop), {"head": (rows, d)} and "head_bias" (rows,) where there is one, and every block. By
    default runs are as long as Table.runs makes them.

    What is yielded belongs to the caller until the next unit is asked for; then both dicts are emptied, so that no two
    units are in memory.
    """
    pair = tuple(g.apply(w).to(dtype) for g, w in zip(base, (a, b), strict=True))
    yield from _lent(("ends", 0), *({n: t for n, t in w.small_ends.items() if n != "head_bias"} for w in pair))
    for name, runs in (("embed", None), ("head", head_runs)):
        for start, stop in runs or _runs(pair[0], name):
            yield from _lent((name, start), *(_rows(w, name, start, stop) for w in pair))
    for i in range(a.spec.layers):
        yield from _lent(("block", i), *(dict(w.blocks[i]) for w in pair))


def _lent(unit: Unit, a: Slots, b: Slots) -> Iterator[tuple[Unit, Slots, Slots]]:
    yield unit, a, b
    a.clear()
    b.clear()


def _runs(weights: Weights, name: str) -> Iterator[tuple[int, int]]:
    table = weights.table(name)
    return iter(()) if table is None else table.runs()


def _rows(weights: Weights, name: str, start: int, stop: int) -> Slots:
    table, bias = weights.table(name), weights.ends.get(f"{name}_bias")
    assert table is not None
    rows = {name: table.rows(start, stop)}
    return rows if bias is None else rows | {f"{name}_bias": bias[start:stop]}
