"""Cross-covariances between two endpoints, from one pass of calibration tokens through both in lock-step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.lazy import Slots, Table, row_runs
from ..checkpoints.tensor_file import TensorFile
from ..checkpoints.weights import Weights
from ..checkpoints.writer import Stored, write_file
from ..engine.layerwise import Walk
from ..examples import Data, inputs_of
from ..output import Names, disk_errors
from .evidence import work_dtype

GATHERED = 2048  # tokens that go through a block together, or one sequence
STATISTICS_NAMES: Names = {"statistics-*.safetensors": None}  # files of gather_statistics


class Covariance:
    """Running centred cross-covariance of two streams of rows, in float64; `correlation` scales it by coordinate.

    Between many FFN units it is larger than their weights: but for the sum itself, it is worked on by runs of rows.
    """

    def __init__(self) -> None:
        self.count = 0
        self._cross: Tensor | None = None  # (m, n) Σ x yᵀ
        self._sides: list[tuple[Tensor, Tensor]] = []  # of x and of y: sum and sum of squares

    def add(self, x: Tensor, y: Tensor) -> None:
        """x (..., m), y (..., n): one row each per token."""
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        if self._cross is None:
            self._cross = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64, device=x.device)
            sums = ([self._cross.new_zeros(t.shape[1]) for _ in range(2)] for t in (x, y))
            self._sides = [(total, squares) for total, squares in sums]
        for run in row_runs(self._cross):
            self._cross[run] += x[:, run].mT @ y
        for t, (total, squares) in zip((x, y), self._sides, strict=True):
            total += t.sum(0)
            squares += t.square().sum(0)
        self.count += len(x)

    @property
    def covariance(self) -> Tensor:
        return self.read(torch.float64, scaled=False)

    @property
    def correlation(self) -> Tensor:
        return self.read(torch.float64, scaled=True)

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        assert self._cross is not None, "nothing was added"
        return self._cross.shape[0], self._cross.shape[1]

    def read(self, dtype: torch.dtype, scaled: bool) -> Tensor:
        """(m, n) covariance or correlation."""
        assert self._cross is not None, "nothing was added"
        out = torch.empty_like(self._cross, dtype=dtype)
        for run, part in zip(row_runs(out), self.parts(dtype, scaled), strict=True):
            out[run] = part
        return out

    def parts(self, dtype: torch.dtype, scaled: bool) -> Iterator[Tensor]:
        """The same by runs of rows."""
        assert self._cross is not None, "nothing was added"
        (x, xx), (y, yy) = ((total / self.count, squares / self.count) for total, squares in self._sides)
        left, right = ((square - mean**2).clamp(min=1e-12).sqrt() for mean, square in ((x, xx), (y, yy)))
        for run in row_runs(self._cross):
            part = (self._cross[run] / self.count).addr_(x[run], y, alpha=-1)
            yield (part.div_(left[run, None]).div_(right) if scaled else part).to(dtype)


@dataclass
class Statistics:
    """What activations say: matrices C between a part of A (rows) and of B (columns).

    Of a block: q, k, v, mixed (attention output before the output projection), and hidden (FFN units), where there are
    any outside experts.
    """

    stream: Tensor  # (d, d) over the normalised residual stream at every norm
    blocks: Sequence[Mapping[str, Table]]


@torch.no_grad()
def gather_statistics(
    a: Weights,
    b: Weights,
    data: Data,
    batch: int | None = None,
    keep: Path | None = None,
    visited: Callable[[int], None] | None = None,
    name: str = "",
) -> Statistics:
    """Tokens (n, T), or examples, through both endpoints; a and b canonical and balanced, on one device.

    Of lazy weights one block is in memory at a time, beside the residual streams of all data. keep: a directory for
    what is found out about each block, which may be larger than the block; by default it stays in memory. batch:
    sequences at a time, by default as many as have GATHERED tokens. visited: told the number of each block before it.
    name: of this pair, in the names of files.
    """
    spec, dtype = a.spec, work_dtype(a.spec)
    batch = batch or max(1, GATHERED // spec.length(inputs_of(data).shape))
    batches = [inputs_of(some) for some in data.split(batch)]
    left, right = Walk(a, batches), Walk(b, batches)
    stream = Covariance()
    names = ("q", "k", "v", "mixed") + (("hidden",) if spec.ffn.width else ())

    def visit(i: int) -> dict[str, Covariance]:
        if visited:
            visited(i)
        w, u = a.blocks[i], b.blocks[i]
        found = {name: Covariance() for name in names}
        for j in range(len(batches)):
            seen_a: Slots = {}
            seen_b: Slots = {}
            left.advance(j, i, w, seen_a.__setitem__)
            right.advance(j, i, u, seen_b.__setitem__)
            for name in names:
                found[name].add(seen_a[name], seen_b[name])
            for name in ("attn_in", "ffn_in"):
                stream.add(seen_a[name], seen_b[name])
        return found

    if keep is None:
        blocks = [_held(visit(i), dtype) for i in range(spec.layers)]
    else:
        blocks = [_written(visit(i), dtype, keep / f"statistics-{name}{i}.safetensors") for i in range(spec.layers)]
    return Statistics(stream.covariance, blocks)


def _held(found: dict[str, Covariance], dtype: torch.dtype) -> dict[str, Table]:
    """Evidence in memory; what it was found from is used up."""
    return {name: Table.of(found.pop(name).read(dtype, scaled=name == "hidden")) for name in list(found)}


def _written(found: dict[str, Covariance], dtype: torch.dtype, file: Path) -> dict[str, Table]:
    """The same in a file that is written now, and from which runs of rows are read."""
    parts = {name: partial(c.parts, dtype, scaled=name == "hidden") for name, c in found.items()}
    with disk_errors(file):
        write_file(file, [Stored(name, dtype, c.shape, parts[name]) for name, c in found.items()])
    opened = TensorFile(file)
    return {name: Table(c.shape, partial(opened.read_rows, name)) for name, c in found.items()}
