"""Test matrices and the references that the solvers are held against."""

from __future__ import annotations

import mpmath
import numpy as np
import scipy.linalg
import torch
from torch import Tensor

SIZES = (2, 3, 17, 64, 127, 128, 129, 256)
DTYPES = (torch.float32, torch.float64)


def _spectral_norm(X: Tensor) -> float:
    """Of the largest of a batch; never 0."""
    return max(float(np.linalg.norm(X[:1].numpy(), 2, axis=(1, 2)).max()), 1e-300)


def skew(batch: int, n: int, norm: float, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Skew matrices, the first of spectral norm `norm`, the others about that."""
    W = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    X = W - W.mT
    L = torch.tril(X * (norm / _spectral_norm(X)), -1).to(dtype)
    return L - L.mT


def general(batch: int, n: int, norm: float, dtype: torch.dtype, seed: int = 1) -> Tensor:
    W = torch.randn(batch, n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (W * (norm / _spectral_norm(W))).to(dtype)


def cayley_lu(X: Tensor) -> Tensor:
    """Plain torch, one matrix after the other: batched LU on several threads is wrong."""
    eye = torch.eye(X.shape[-1], dtype=X.dtype)
    return torch.stack([torch.linalg.solve(eye - x / 2, eye + x / 2) for x in X])


def expm_scipy(X: Tensor) -> Tensor:
    return torch.from_numpy(np.stack([scipy.linalg.expm(x) for x in X.double().numpy()]))


def expm_mpmath(x: Tensor) -> Tensor:  # (n, n)
    with mpmath.workdps(50):
        return _from_mpmath(mpmath.expm(mpmath.matrix(x.tolist()), method="taylor"))


def cayley_mpmath(x: Tensor) -> Tensor:  # (n, n)
    with mpmath.workdps(50):
        half = mpmath.matrix(x.tolist()) / 2
        eye = mpmath.eye(x.shape[0])
        return _from_mpmath((eye - half) ** -1 * (eye + half))


def _from_mpmath(matrix: mpmath.matrix) -> Tensor:
    return torch.tensor([[float(value) for value in row] for row in matrix.tolist()], dtype=torch.float64)


def error(value: Tensor, truth: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((value.detach().double() - truth).abs().max() / truth.abs().max())


def assert_as_good_as(ours: Tensor, plain: Tensor, truth: Tensor, condition: float = 0.0) -> None:
    """Our error is at most twice that of plain torch in the same dtype, and a few roundings, more by `condition`."""
    floor = (4 + 2 * condition) * torch.finfo(ours.dtype).eps
    mine, theirs = error(ours, truth), error(plain, truth)
    assert mine <= 2 * theirs + floor, f"error {mine:.1e}, plain torch {theirs:.1e}"
