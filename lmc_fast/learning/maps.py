"""A block's part of the relative transforms while gradients are taken."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..engine.passes import pull_back
from ..symmetry.charts import Chart


class MovingMaps:
    """A block's part of the relative transforms: leaves for the block's graph, and their way back to the chart.

    leaves: one {space: element} for every model but the first. gradients: by the chart's tensors; `finish` adds this
    block's.
    """

    def __init__(self, chart: Chart, i: int, dtype: torch.dtype, gradients: dict[str, Tensor]):
        self.i, self.gradients = i, gradients
        self.coordinates = {name: x.detach().requires_grad_() for name, x in chart.coordinates(i).items()}
        with torch.enable_grad():
            made = chart.blocks(i, self.coordinates)
        self.made: list[Tensor] = []
        self.tensors: list[Tensor] = []

        def leaf(t: Tensor) -> Tensor:
            if not t.requires_grad:
                return t
            self.made.append(t)
            self.tensors.append(t.detach().to(dtype).requires_grad_())
            return self.tensors[-1]

        self.leaves = [{space: g.map(leaf) for space, g in elements.items()} for elements in made]
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
