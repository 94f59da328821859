"""Cayley map Q = (I - X/2)⁻¹ (I + X/2), with a backward pass of two matrix products."""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lmc_fast.solvers._checks import as_batch, is_skew, require_finite

_LAPACK_LEAF = 64
_CUDA_LEAF = 128


def cayley(X: Tensor) -> Tensor:  # (..., n, n) -> (..., n, n)
    """Q = (I - X/2)⁻¹ (I + X/2), float32 or float64, n ≥ 1. Skew X gives a rotation.

    Skew X, recognised exactly (X == -Xᵀ, as W - Wᵀ is), is inverted by blocks without pivoting: I - X/2 has a positive
    definite symmetric part, so no pivot can be small. Any other X goes through LU with partial pivoting.

    Gradient: dX = ¼ (I + Q)ᵀ dQ (I + Q)ᵀ, from Q alone. No double backward.

    Raises TypeError or ValueError for a wrong dtype or shape or a non-finite entry, torch.linalg.LinAlgError where
    I - X/2 is singular.
    """
    Q: Tensor = _Cayley.apply(as_batch(X, "cayley"))
    return Q.reshape(X.shape)


class _Cayley(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, X: Tensor) -> Tensor:  # (batch, n, n)
        Q = cayley_forward_torch(X)
        ctx.save_for_backward(Q)
        return Q

    @staticmethod
    @once_differentiable
    def backward(ctx, G: Tensor) -> Tensor:
        (Q,) = ctx.saved_tensors
        return cayley_backward_torch(Q, G)


def cayley_forward_torch(X: Tensor) -> Tensor:  # (batch, n, n)
    """The map in torch operations. Never the batched LU of the CPU: it is wrong with several threads."""
    if X.numel() == 0:
        return torch.empty_like(X)
    require_finite(X, "cayley")
    if is_skew(X):
        A = X.mul(-0.5)
        A.diagonal(dim1=-2, dim2=-1).add_(1)
        Q = inverse_unpivoted(A).mul_(2)
        Q.diagonal(dim1=-2, dim2=-1).sub_(1)
        return Q
    half = X / 2
    I = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)  # noqa: E741
    if X.is_cuda:
        return torch.linalg.solve(I - half, I + half)
    return torch.stack([torch.linalg.solve(I - h, I + h) for h in half])


def cayley_backward_torch(Q: Tensor, G: Tensor) -> Tensor:  # (batch, n, n) each
    """X̄ = ¼ (I + Q)ᵀ G (I + Q)ᵀ = ¼ (H + H Qᵀ) with H = G + Qᵀ G."""
    H = torch.baddbmm(G, Q.mT, G)
    return torch.baddbmm(H, H, Q.mT, beta=0.25, alpha=0.25)


def inverse_unpivoted(A: Tensor) -> Tensor:  # (batch, n, n)
    """A⁻¹ by halves, for A with positive definite symmetric part (then every Schur complement has one too)."""
    batch, n, _ = A.shape
    if A.is_cuda and n <= _CUDA_LEAF:
        return torch.linalg.inv(A)
    if n <= _LAPACK_LEAF and batch <= 8:
        return torch.stack([torch.linalg.inv(a) for a in A])
    if n == 1:
        return A.reciprocal()
    if n == 2:
        a, b, c, d = A.flatten(1).unbind(1)
        return torch.stack((d, -b, -c, a), 1).div_((a * d - b * c)[:, None]).view_as(A)
    h = n // 2
    B, C = A[:, :h, h:], A[:, h:, :h]
    inverse = torch.empty_like(A)
    Ai = inverse_unpivoted(A[:, :h, :h])
    T = Ai @ B
    S = inverse_unpivoted(torch.baddbmm(A[:, h:, h:], C, T, alpha=-1))
    U = S @ (C @ Ai)
    inverse[:, :h, :h] = torch.baddbmm(Ai, T, U)
    inverse[:, :h, h:] = torch.bmm(T, S).neg_()
    inverse[:, h:, :h] = U.neg_()
    inverse[:, h:, h:] = S
    return inverse
