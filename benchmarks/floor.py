"""The loss of an ordinary training step of one model, which the benchmarks of a step compare with.

The head works in chunks of tokens, so that the full logits never exist.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmc_fast.checkpoints import Weights
from lmc_fast.engine.head import CHUNK_ELEMENTS, capped
from lmc_fast.engine.model import labels, prediction_rows
from lmc_fast.examples import Data


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed together with the loss, chunk by chunk, and scaled in backward (as in Liger-Kernel)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rows: int, softcap: float
    ) -> Tensor:
        wanted = ctx.needs_input_grad
        dx = torch.empty_like(x) if wanted[0] else None
        dweight = torch.zeros_like(weight) if wanted[1] else None
        dbias = torch.zeros_like(bias) if bias is not None and wanted[2] else None
        total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        for start in range(0, len(x), rows):
            chunk = slice(start, start + rows)
            logits = capped(F.linear(x[chunk], weight, bias).to(total.dtype), softcap)
            log_p, label = logits.log_softmax(1), target[chunk, None]
            total -= log_p.gather(1, label).sum() / len(x)
            slope = log_p.exp_().scatter_add_(1, label, log_p.new_full(label.shape, -1.0))
            if softcap:
                slope *= 1 - (logits / softcap).square()
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


def task_loss(weights: Weights, data: Data) -> Tensor:
    """Mean cross-entropy in nats of a batch's predictions; differentiable."""
    w, cap = weights.ends, weights.spec.head_softcap
    return cross_entropy(prediction_rows(weights, data), w["head"], w.get("head_bias"), labels(data), softcap=cap)


def cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, rows: int | None = None, softcap: float = 0.0
) -> Tensor:
    """Mean over tokens of -log softmax(x Wᵀ + b)[target], in at least float32.

    x (T, d), weight (V, d), bias (V,) or None, target (T,) int64; `rows` tokens are processed at a time (default: as
    many as keep the logits within CHUNK_ELEMENTS). softcap: c of `capped`. Differentiable once in x, weight and bias.
    """
    rows = rows or max(1, CHUNK_ELEMENTS // len(weight))
    return _LinearCrossEntropy.apply(x, weight, bias, target, rows, softcap)
