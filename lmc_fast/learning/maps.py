"""A block's part of the relative transform while gradients are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from ..engine.passes import pull_back
from ..symmetry.charts import Chart
from ..symmetry.transform import BlockTransform


class MovingMaps:
    """A block's part of the relative transform: leaves for the block's graph, and their way back to the chart.

    gradients: by the chart's tensors; `finish` adds this block's.
    """

    def __init__(self, chart: Chart, i: int, dtype: torch.dtype, gradients: dict[str, Tensor]):
        self.i, self.gradients = i, gradients
        self.coordinates = {name: x.detach().requires_grad_() for name, x in chart.coordinates(i).items()}
        with torch.enable_grad():
            made = chart.block(i, self.coordinates)
        self.made: list[Tensor] = []
        self.tensors: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        for f in fields(BlockTransform):
            tensor = getattr(made, f.name)
            if tensor is not None and tensor.requires_grad:
                self.made.append(tensor)
                self.tensors.append(tensor.detach().to(dtype).requires_grad_())
                parts[f.name] = self.tensors[-1]
            elif tensor is not None:
                parts[f.name] = tensor  # permutations
        self.leaves = BlockTransform(**parts)
        self.sums: list[Tensor | None] = [None] * len(self.tensors)

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        for j, gradient in enumerate(gradients):
            if gradient is not None:
                old, gradient = self.sums[j], gradient.to(self.made[j].dtype)
                self.sums[j] = gradient if old is None else old + gradient

    def finish(self) -> None:
        """On to the chart's coordinates of this block."""
        found = pull_back(self.made, self.sums, list(self.coordinates.values()))
        for name, gradient in zip(self.coordinates, found, strict=True):
            if gradient is not None:
                self.gradients[name][:, self.i] += gradient
