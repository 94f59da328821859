"""Learned matching: descend the loss along the straight line, in coordinates of the symmetry group."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checkpoints.weights import Weights, lerp
from ..engine.model import next_token_loss
from ..errors import LmcError
from ..symmetry.charts import Chart

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Schedule:
    """How to learn. Defaults are what benchmarks/learning.py found best on two trained pairs."""

    steps: int = 1000
    batch: int = 16  # token blocks per step
    sides: int = 2  # 2: dual, 1: B alone
    low: float = 0.3  # lambda is drawn from [low, high]
    high: float = 0.7
    rotation_lr: float = 4e-3
    map_lr: float = 1e-2
    warmup: int = 10
    final: float = 0.02  # the cosine's last learning rate, as a share
    seed: int = 0

    def rate(self, step: int) -> float:
        """Share of the learning rate at a step: linear warm-up, then cosine."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2

    def position(self, step: int) -> float:
        """Lambda of a step: a golden-ratio sequence, which covers [low, high] evenly at every length."""
        return self.low + (self.high - self.low) * ((0.5 + (step + self.seed) * _GOLDEN) % 1)

    def rows(self, step: int, count: int) -> Tensor:
        """Which of `count` token blocks a step reads: every epoch a new permutation, determined by seed and step."""
        first, chosen = step * self.batch, []
        for i in range(first, first + self.batch):
            if not chosen or i % count == 0:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + i // count)
                order = torch.randperm(count, generator=generator)
            chosen.append(int(order[i % count]))
        return torch.tensor(chosen)
