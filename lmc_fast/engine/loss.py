"""Losses of a linear head in chunks of tokens, so that the full logits never exist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # logits held at a time: 64 MiB in float32

# Given log-probabilities (n, V) of some rows: their summed loss, and its gradient with respect to the logits.
_RowLoss = Callable[[slice, Tensor], tuple[Tensor, Tensor]]


class _LinearLoss(torch.autograd.Function):
    """Gradients are computed together with the loss, chunk by chunk, and scaled in backward (as in Liger-Kernel)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, row_loss: _RowLoss, rows: int, softcap: float
    ) -> Tensor:
        wanted = ctx.needs_input_grad
        dx = torch.empty_like(x) if wanted[0] else None
        dweight = torch.zeros_like(weight) if wanted[1] else None
        dbias = torch.zeros_like(bias) if bias is not None and wanted[2] else None
        total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for start in range(0, len(x), rows):
            chunk = slice(start, start + rows)
            logits = capped(F.linear(x[chunk], weight, bias).to(total.dtype), softcap)
            loss, slope = row_loss(chunk, logits.log_softmax(1))
            total += loss / len(x)
            if softcap:
                slope = slope * (1 - (logits / softcap).square())
            slope = slope.div_(len(x)).to(x.dtype)
            if dx is not None:
                torch.mm(slope, weight, out=dx[chunk])
            if dweight is not None:
                dweight.addmm_(slope.mT, x[chunk])
            if dbias is not None:
                dbias += slope.sum(0)
        ctx.gradients = dx, dweight, dbias
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = grad_outputs
        return (*(None if g is None else g * slope.to(g.dtype) for g in ctx.gradients), None, None, None)


def capped(logits: Tensor, softcap: float) -> Tensor:
    """c tanh(logits / c), or the logits where c is 0."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _rows(weight: Tensor, rows: int | None) -> int:
    return rows or max(1, CHUNK_ELEMENTS // len(weight))


def cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rows: int | None = None, softcap: float = 0.0
) -> Tensor:
    """Mean over tokens of -log softmax(x Wᵀ + b)[target], in at least float32.

    x (T, d), weight (V, d), bias (V,) or None, target (T,) int64; `rows` tokens are processed at a time (default: as
    many as keep the logits within CHUNK_ELEMENTS). softcap: c of `capped`. Differentiable once in x, weight and bias.
    """

    def row_loss(chunk: slice, log_p: Tensor) -> tuple[Tensor, Tensor]:
        label = target[chunk, None]
        loss = -log_p.gather(1, label).sum()
        return loss, log_p.exp_().scatter_add_(1, label, log_p.new_full(label.shape, -1.0))

    return _LinearLoss.apply(x, weight, bias, row_loss, _rows(weight, rows), softcap)


@dataclass(frozen=True)
class Teacher:
    """A fixed model's part of a target distribution: `share` of softmax(hidden Wᵀ + b)."""

    share: float
    hidden: Tensor  # (T, d)
    weight: Tensor  # (V, d)
    bias: Tensor | None = None


def divergence(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teachers: list[Teacher],
    rows: int | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Mean over tokens of KL(Σ shares of teachers ‖ softmax(x Wᵀ + b)); shapes and gradients as in cross_entropy."""

    def row_loss(chunk: slice, log_p: Tensor) -> tuple[Tensor, Tensor]:
        target = torch.zeros_like(log_p)
        for t in teachers:
            logits = capped(F.linear(t.hidden[chunk], t.weight, t.bias).to(log_p.dtype), softcap)
            target.add_(logits.softmax(1), alpha=t.share)
        loss = torch.xlogy(target, target).sum() - (target * log_p).sum()
        return loss, log_p.exp_().sub_(target)

    return _LinearLoss.apply(x, weight, bias, row_loss, _rows(weight, rows), softcap)
