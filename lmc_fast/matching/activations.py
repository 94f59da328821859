"""Cross-covariances between two endpoints, from one pass of calibration tokens through both in lock-step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..architectures import Spec
from ..checkpoints.weights import Weights
from ..engine.block import block, rope_table
from ..engine.model import embed


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
    hidden: Tensor  # FFN units


@dataclass
class Statistics:
    stream: Tensor  # (d, d) over the normalised residual stream at every norm
    blocks: list[BlockStatistics]


@torch.no_grad()
def gather_statistics(a: Weights, b: Weights, tokens: Tensor, batch: int = 16) -> Statistics:
    """tokens (n, T) through both endpoints; a and b canonical and balanced, on one device."""
    spec = a.spec
    stream = Covariance()
    names = ("q", "k", "v", "mixed", "hidden")
    parts = [{name: Covariance() for name in names} for _ in range(spec.layers)]
    rope = rope_table(spec, tokens.shape[1], a.ends["embed"].dtype, tokens.device)
    for ids in tokens.split(batch):
        x, y = embed(a, ids), embed(b, ids)
        for w, u, part in zip(a.blocks, b.blocks, parts, strict=True):
            seen_a: dict[str, Tensor] = {}
            seen_b: dict[str, Tensor] = {}
            x = block(spec, w, x, rope, seen_a.__setitem__)
            y = block(spec, u, y, rope, seen_b.__setitem__)
            for name in names:
                part[name].add(seen_a[name], seen_b[name])
            for name in ("attn_in", "ffn_in"):
                stream.add(seen_a[name], seen_b[name])
    return Statistics(stream.covariance, [_block_statistics(spec, part) for part in parts])


def _block_statistics(spec: Spec, part: dict[str, Covariance]) -> BlockStatistics:
    maps = {name: part[name].covariance for name in ("q", "k", "v", "mixed")}
    return BlockStatistics(**maps, hidden=part["hidden"].correlation)
