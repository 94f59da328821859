"""The Cayley map in torch operations: for GPUs, for X that is not skew, and without the C++ extension."""

import torch
from torch import Tensor

from lmc_fast.solvers.checks import is_skew, require_finite

_LAPACK_LEAF = 64
_CUDA_LEAF = 128
_LARGE_ROW = 64.0  # squared norm of a row of X


def forward(X: Tensor) -> Tensor:  # (batch, n, n)
    """The map in torch operations. Never the batched LU of the CPU: it is wrong with several threads."""
    if X.numel() == 0:
        return torch.empty_like(X)
    require_finite(X, "cayley")
    if is_skew(X):
        A = X.mul(-0.5)
        A.diagonal(dim1=-2, dim2=-1).add_(1)
        Q = inverse_unpivoted(A)
        large = X.square().sum(-1).amax(-1) > _LARGE_ROW
        if bool(large.any()):
            # Without pivots the error grows with ‖X‖. A Newton step takes it back to what rounding the residual leaves.
            S = Q[large]
            Q[large] = S @ (2 * torch.eye(X.shape[-1], dtype=X.dtype, device=X.device) - (S - X[large] @ S / 2))
        Q.mul_(2)
        # Near 1, the diagonal of 2 S - I carries the rounding of numbers near 2; S = I + S X/2 gives it without.
        terms = Q * X
        diagonal = Q.diagonal(dim1=-2, dim2=-1)
        diagonal.copy_(torch.where(terms.abs().sum(-1) < 2, 1 - terms.sum(-1) / 2, diagonal - 1))
        return Q
    half = X / 2
    I = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)  # noqa: E741
    if X.is_cuda:
        return torch.linalg.solve(I - half, I + half)
    return torch.stack([torch.linalg.solve(I - h, I + h) for h in half])


def backward(Q: Tensor, G: Tensor) -> Tensor:  # (batch, n, n) each
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
