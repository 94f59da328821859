"""Cross-covariances between two endpoints, from one pass of calibration tokens through both in lock-step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.lazy import LazyBlocks, Slots, row_runs
from ..checkpoints.reader import TensorFile
from ..checkpoints.weights import Weights
from ..checkpoints.writer import save_tensor_file
from ..engine.walk import Walk
from ..examples import Data, inputs_of
from .stream import work_dtype


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
            zero = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=x.device)  # noqa: E731
            self._cross = zero(x.shape[1], y.shape[1])
            self._sides = [(zero(t.shape[1]), zero(t.shape[1])) for t in (x, y)]
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

    def read(self, dtype: torch.dtype, scaled: bool) -> Tensor:
        """(m, n) covariance or correlation."""
        assert self._cross is not None, "nothing was added"
        (x, xx), (y, yy) = ((total / self.count, squares / self.count) for total, squares in self._sides)
        left, right = ((square - mean**2).clamp(min=1e-12).sqrt() for mean, square in ((x, xx), (y, yy)))
        out = torch.empty_like(self._cross, dtype=dtype)
        for run in row_runs(self._cross):
            part = (self._cross[run] / self.count).addr_(x[run], y, alpha=-1)
            out[run] = part.div_(left[run, None]).div_(right) if scaled else part
        return out


@dataclass
class Statistics:
    """What activations say: matrices C between a part of A (rows) and of B (columns).

    Of a block: q, k, v, mixed (attention output before the output projection), and hidden (FFN units), where there are
    any outside experts.
    """

    stream: Tensor  # (d, d) over the normalised residual stream at every norm
    blocks: Sequence[Slots]


@torch.no_grad()
def gather_statistics(a: Weights, b: Weights, data: Data, batch: int = 16, keep: Path | None = None) -> Statistics:
    """Tokens (n, T), or examples, through both endpoints; a and b canonical and balanced, on one device.

    Of lazy weights one block is in memory at a time, beside the residual streams of all data. keep: a directory for
    what is found out about each block, which may be larger than the block; by default it stays in memory.
    """
    spec, dtype = a.spec, work_dtype(a.spec)
    batches = [inputs_of(some) for some in data.split(batch)]
    left, right = Walk(a, batches), Walk(b, batches)
    stream = Covariance()
    names = ("q", "k", "v", "mixed") + (("hidden",) if spec.ffn_width else ())

    def visit(i: int) -> Slots:
        w, u = a.blocks[i], b.blocks[i]
        parts = {name: Covariance() for name in names}
        for j in range(len(batches)):
            seen_a: Slots = {}
            seen_b: Slots = {}
            left.advance(j, i, w, seen_a.__setitem__)
            right.advance(j, i, u, seen_b.__setitem__)
            for name in names:
                parts[name].add(seen_a[name], seen_b[name])
            for name in ("attn_in", "ffn_in"):
                stream.add(seen_a[name], seen_b[name])
        return {name: parts.pop(name).read(dtype, scaled=name == "hidden") for name in names}

    if keep is None:
        blocks: Sequence[Slots] = [visit(i) for i in range(spec.layers)]
    else:
        files = [keep / f"statistics-{i}.safetensors" for i in range(spec.layers)]
        for i, file in enumerate(files):
            save_tensor_file(visit(i), file, {})
        blocks = LazyBlocks(spec.layers, lambda i: _read(files[i]))
    return Statistics(stream.covariance, blocks)


def _read(file: Path) -> Slots:
    opened = TensorFile(file)
    return {name: opened.read(name) for name in opened.names}
