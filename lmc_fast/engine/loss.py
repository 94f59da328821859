"""Linear head and cross-entropy in chunks of tokens, so that the full logits never exist."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # logits held at a time: 64 MiB in float32


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed together with the loss, chunk by chunk, and scaled in backward (as in Liger-Kernel)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rows: int) -> Tensor:
        wanted = ctx.needs_input_grad
        dx = torch.empty_like(x) if wanted[0] else None
        dweight = torch.zeros_like(weight) if wanted[1] else None
        dbias = torch.zeros_like(bias) if bias is not None and wanted[2] else None
        loss = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for start in range(0, len(x), rows):
            part, label = x[start : start + rows], target[start : start + rows, None]
            logits = F.linear(part, weight, bias).to(loss.dtype)
            log_z = logits.logsumexp(dim=1, keepdim=True)
            loss += (log_z - logits.gather(1, label)).sum() / len(x)
            if not any(wanted[:3]):
                continue
            slope = (logits - log_z).exp_().scatter_add_(1, label, torch.full_like(log_z, -1.0))
            slope = slope.div_(len(x)).to(x.dtype)
            if dx is not None:
                torch.mm(slope, weight, out=dx[start : start + rows])
            if dweight is not None:
                dweight.addmm_(slope.mT, part)
            if dbias is not None:
                dbias += slope.sum(0)
        ctx.gradients = dx, dweight, dbias
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = grad_outputs
        return (*(None if g is None else g * slope.to(g.dtype) for g in ctx.gradients), None, None)


def cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rows: int | None = None) -> Tensor:
    """Mean over tokens of -log softmax(x Wᵀ + b)[target], in at least float32.

    x (T, d), weight (V, d), bias (V,) or None, target (T,) int64; `rows` tokens are processed at a time (default: as
    many as keep the logits within CHUNK_ELEMENTS). Differentiable once in x, weight and bias.
    """
    rows = rows or max(1, CHUNK_ELEMENTS // len(weight))
    return _LinearCrossEntropy.apply(x, weight, bias, target, rows)
