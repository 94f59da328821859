"""A block's part of the relative transform while gradients are taken; a block whose graphs are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..symmetry.transform import BlockTransform
from .block import block
from .passes import pull_back
from .slots import Slots

if TYPE_CHECKING:
    from .step import Learning


class MovingMaps:
    """A block's part of the relative transform: leaves for the block's graph, and their way back to the chart."""

    def __init__(self, owner: Learning, i: int):
        assert owner.chart is not None
        self.owner, self.chart, self.i = owner, owner.chart, i
        self.coordinates = {name: x.detach().requires_grad_() for name, x in self.chart.coordinates(i).items()}
        with torch.enable_grad():
            made = self.chart.block(i, self.coordinates)
        self.made: list[Tensor] = []
        self.tensors: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        for f in fields(BlockTransform):
            tensor = getattr(made, f.name)
            if tensor is not None and tensor.requires_grad:
                self.made.append(tensor)
                self.tensors.append(tensor.detach().to(owner.source.sample.dtype).requires_grad_())
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
                self.owner.gradients[name][:, self.i] += gradient


class KeptBlock:
    """A block whose graphs are kept from forward to backward, where memory allows: nothing is computed twice."""

    def __init__(self, owner: Learning, i: int):
        self.owner, self.i, self.moving = owner, i, MovingMaps(owner, i)
        self.graphs: list[tuple[Tensor, Tensor]] = []

    def forward(self, a: Slots, b: Slots, position: float, x: Tensor) -> Tensor:
        owner = self.owner
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            line = owner.line(a, b, position, self.moving.leaves, once=True)
            y = block(owner.spec, line, x, owner.positions(x), self.i)
        self.graphs.append((x, y))
        return y.detach()

    def backward(self, slopes: list[Tensor | None]) -> list[Tensor | None]:
        out: list[Tensor | None] = []
        turns = self.owner.turns
        for slope in slopes:
            x, y = self.graphs.pop(0)
            dx, *rest = pull_back([y], [slope], [x, *turns, *self.moving.tensors])
            out.append(dx)
            self.owner.add_turn([rest.pop(0) for _ in turns])
            self.moving.add(rest)
        self.moving.finish()
        return out
