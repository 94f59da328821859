"""Inputs with targets: labelled images and text with masked tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_DIGESTED = 1 << 20  # numbers at a time


@dataclass(frozen=True)
class Examples:
    """n inputs and their targets. Behaves like a tensor of n rows where data is counted, picked, split and moved.

    Attributes:
        inputs: images (n, c, size, size) float, or token ids (n, T) int64.
        targets: classes of images or texts (n,) int64; of masked or tagged text (n, T) int64, -1 wherever nothing is to
            be predicted.

    >>> images, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    >>> len(lmc.Examples(images, labels)[2:5])
    3
    """

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: slice | Tensor) -> Examples:
        return Examples(self.inputs[rows], self.targets[rows])

    def split(self, size: int) -> list[Examples]:
        """Cuts the data into parts.

        Args:
            size: inputs in each part; the last may have fewer.

        Returns:
            The parts, views of the same memory.
        """
        return [Examples(x, y) for x, y in zip(self.inputs.split(size), self.targets.split(size), strict=True)]

    def to(self, device: torch.device | str) -> Examples:
        """The same on another device.

        Args:
            device: where to; on the device that it is on, nothing is copied.

        Returns:
            The data there.
        """
        return Examples(self.inputs.to(device), self.targets.to(device))

    @property
    def device(self) -> torch.device:
        """Where the inputs are."""
        return self.inputs.device

    @property
    def shape(self) -> torch.Size:
        """(n, predictions to each at most)."""
        return self.targets.shape if self.targets.dim() == 2 else torch.Size((len(self), 1))

    def numel(self) -> int:
        """How many predictions are asked for.

        Returns:
            The number of targets that are not -1.
        """
        return int((self.targets >= 0).sum())


def digest(data: Data) -> str:
    """SHA-256 of every number."""
    found = hashlib.sha256()
    for t in (data.inputs, data.targets) if isinstance(data, Examples) else (data,):
        found.update(f"{t.dtype} {tuple(t.shape)}".encode())
        for rows in t.split(max(1, _DIGESTED // max(1, t[:1].numel()))):
            found.update(rows.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


Data = Tensor | Examples  # tokens (n, T) int64, or examples


def inputs_of(data: Data) -> Tensor:
    """What a model reads of a batch."""
    return data.inputs if isinstance(data, Examples) else data
