"""Distances between features, of models that predict nothing: what is learned from, and what a barrier measures."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .head import HeadLoss, VocabChunk


def distances(found: Tensor, members: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """(n,) float64: squared distances of features (n, k) from the mixture of the members', over their squares."""
    each = [features.double() for features in members]
    mixture = torch.stack([share * features for share, features in zip(shares, each, strict=True)]).sum(0)
    squares = torch.stack([s * features.square().sum(1) for s, features in zip(shares, each, strict=True)]).sum(0)
    return (found.double() - mixture).square().sum(1) / squares.clamp(min=torch.finfo(torch.float64).tiny)


class FeatureLoss(HeadLoss):
    """As HeadLoss, of features: squared distances from the teachers', a mean over channels of what the head reads.

    One pass is enough, however many chunks there are.
    """

    def scan(self, chunk: VocabChunk, teachers: list[VocabChunk]) -> None:
        pass

    def whole(self, chunk: VocabChunk, teachers: list[VocabChunk]) -> None:
        self.add(chunk, teachers)

    def add(self, chunk: VocabChunk, teachers: list[VocabChunk]) -> None:
        size = self.student.inputs[0].shape[1]
        for rows in self._row_slices(chunk):
            gap = self.student.logits(chunk.weights, chunk.bias, rows, self.softcap)
            for i, share, teacher, own in self._taught(rows):
                gap.sub_(teacher.logits(teachers[i].weights, teachers[i].bias, own, self.softcap), alpha=share)
            self._loss += gap.square().sum(dtype=torch.float64) / size
            self._pull(chunk, rows, gap.mul_(2 / size).to(chunk.weights[0].dtype))
