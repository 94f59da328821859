"""Cross-covariances between two endpoints, from one pass of calibration tokens through both in lock-step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures import Spec
from ..checkpoints.weights import Weights
from ..engine.attention import Positions
from ..engine.block import block
from ..engine.model import embed
from ..examples import Data, inputs_of


class Covariance:
    """Running centred cross-covariance of two streams of rows, in float64; `correlation` scales it by coordinate."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        """x (..., m), y (..., n): one row each per token."""
        x, y = x.flatten(0, -2), y.flatten(0, -2)
        new = [x.mT @ y, x.sum(0), y.sum(0), x.square().sum(0), y.square().sum(0)]
        self.sums = [n.double() if not self.sums else s + n for n, s in zip(new, self.sums or new, strict=True)]
        self.count += len(x)

    @property
    def covariance(self) -> Tensor:
        cross, x, y, _, _ = self.sums
        return cross / self.count - torch.outer(x, y) / self.count**2

    @property
    def correlation(self) -> Tensor:
        _, x, y, xx, yy = self.sums
        spread = lambda s, ss: (ss / self.count - (s / self.count) ** 2).clamp(min=1e-12).sqrt()  # noqa: E731
        return self.covariance / torch.outer(spread(x, xx), spread(y, yy))


@dataclass
class BlockStatistics:
    """What one block's activations say: matrices C between a part of A (rows) and of B (columns)."""

    q: Tensor
    k: Tensor
    v: Tensor
    mixed: Tensor  # attention output before the output projection
    hidden: Tensor | None  # FFN units, where there are any outside experts


@dataclass
class Statistics:
    stream: Tensor  # (d, d) over the normalised residual stream at every norm
    blocks: list[BlockStatistics]


@torch.no_grad()
def gather_statistics(a: Weights, b: Weights, data: Data, batch: int = 16) -> Statistics:
    """Tokens (n, T), or examples, through both endpoints; a and b canonical and balanced, on one device."""
    spec = a.spec
    stream = Covariance()
    names = ("q", "k", "v", "mixed") + (("hidden",) if spec.ffn_width else ())
    parts = [{name: Covariance() for name in names} for _ in range(spec.layers)]
    for some in data.split(batch):
        x, y = (embed(spec, w.ends, inputs_of(some)) for w in (a, b))
        positions = Positions.of(spec, x.shape[1], x.dtype, x.device)
        for i, (w, u, part) in enumerate(zip(a.blocks, b.blocks, parts, strict=True)):
            seen_a: dict[str, Tensor] = {}
            seen_b: dict[str, Tensor] = {}
            x = block(spec, w, x, positions, i, seen_a.__setitem__)
            y = block(spec, u, y, positions, i, seen_b.__setitem__)
            for name in names:
                part[name].add(seen_a[name], seen_b[name])
            for name in ("attn_in", "ffn_in"):
                stream.add(seen_a[name], seen_b[name])
    return Statistics(stream.covariance, [_block_statistics(spec, part) for part in parts])


def _block_statistics(spec: Spec, part: dict[str, Covariance]) -> BlockStatistics:
    maps = {name: part[name].covariance for name in ("q", "k", "v", "mixed")}
    return BlockStatistics(**maps, hidden=part["hidden"].correlation if spec.ffn_width else None)
