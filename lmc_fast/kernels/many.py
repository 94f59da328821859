"""Linear layers between more than two models: y = Σ s_i L_i (x R_i) W_iᵀ + bias; the first model has no L and no R.

As kernels.routes does it for two: on the activations by one product for each model, or by one transient matrix. Models
without a share are left out. Plain torch operations: two models have kernels of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .routes import apply_left, apply_right

Factors = Sequence[tuple[Tensor | None, Tensor | None]]  # (L, R) of every model but the first, as interp_linear's


def blend(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Σ share · tensor."""
    if len(tensors) == 2:
        return torch.lerp(tensors[0], tensors[1], shares[1])
    (first, share), *rest = ((t, share) for t, share in zip(tensors, shares, strict=True) if share)
    total = first * share
    for t, share in rest:
        total = torch.add(total, t, alpha=share)
    return total


def mixed(members: Sequence[Tensor], shares: Sequence[float], factors: Factors) -> Tensor:
    """Σ s_i L_i W_i R_iᵀ (N, K), differentiable in the factors."""
    total = members[0] * shares[0]
    for w, share, (left, right) in zip(members[1:], shares[1:], factors, strict=True):
        if not share:
            continue
        if right is not None and right.dim() == 2:  # the last dense factor and the sum are one GEMM
            total = torch.addmm(total, apply_left(w.mT, left).mT, right.mT, alpha=share)
        elif left is not None and left.dim() == 2:
            total = torch.addmm(total, left, apply_left(w, right), alpha=share)
        else:
            total = torch.add(total, apply_left(apply_left(w, right).mT, left).mT, alpha=share)
    return total


def mixed_linear(
    x: Tensor,  # (..., K)
    members: Sequence[Tensor],  # (N, K) each
    shares: Sequence[float],
    factors: Factors,
    bias: Tensor | None = None,  # (N,)
    turned: Sequence[Tensor] | None = None,  # x R_i of every model but the first, where a caller has them already
    *,
    route: str,
) -> Tensor:
    """The layer of x: (..., N). route: "weight" makes one transient matrix, any other works on the activations."""
    if route == "weight":
        flat = [t for pair in factors for t in pair]
        y = _Transient.apply(x, tuple(members), tuple(shares), *flat)
        return y if bias is None else y + bias
    inputs = turned or [apply_right(x, right) for _, right in factors]
    flat_x = x.flatten(0, -2)
    start = flat_x.new_zeros(1) if bias is None else bias
    y = torch.addmm(start, flat_x, members[0].mT, beta=0 if bias is None else 1, alpha=shares[0])
    for z, w, share, (left, _) in zip(inputs, members[1:], shares[1:], factors, strict=True):
        if not share:
            continue
        if left is None:
            y = y.addmm_(z.flatten(0, -2), w.mT, alpha=share)
        else:
            y = torch.add(y, apply_left(z.flatten(0, -2) @ w.mT, left), alpha=share)
    return y.view(*x.shape[:-1], -1)


class _Transient(torch.autograd.Function):
    """x Wᵀ; W lives for one GEMM, in forward and again in backward, and dW is contracted at once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, members: tuple[Tensor, ...], shares: tuple[float, ...], *flat: Tensor | None
    ) -> Tensor:
        ctx.members, ctx.shares = members, shares
        ctx.save_for_backward(x, *flat)
        return x @ mixed(members, shares, _paired(flat)).mT

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        flat = [None if t is None else t.detach() for t in saved]
        wanted = [t.requires_grad_() for t, need in zip(flat, needed, strict=True) if t is not None and need]
        with torch.enable_grad():
            w = mixed(ctx.members, ctx.shares, _paired(flat))
        dx = dy @ w.detach() if ctx.needs_input_grad[0] else None
        found: list[Tensor | None] = []
        if wanted:
            dw = dy.flatten(0, -2).mT @ x.flatten(0, -2)
            found = list(torch.autograd.grad(w, wanted, dw, allow_unused=True))
        return dx, None, None, *(found.pop(0) if need else None for need in needed)


def _paired(flat: Sequence[Tensor | None]) -> Factors:
    return list(zip(flat[::2], flat[1::2], strict=True))
