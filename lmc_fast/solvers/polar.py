"""General linear maps in polar form, M = Q(X) exp(H), together with their inverse."""

import torch
from torch import Tensor

from lmc_fast.solvers.cayley import cayley
from lmc_fast.solvers.checks import is_skew
from lmc_fast.solvers.expm import expm


def polar(
    X: Tensor,  # (..., n, n), skew
    H: Tensor,  # (..., n, n), symmetric
) -> tuple[Tensor, Tensor]:
    """The pair M = cayley(X) exp(H) and M⁻¹ = exp(-H) cayley(X)ᵀ.

    Every invertible matrix of positive determinant whose rotation has no eigenvalue -1 is such an M, uniquely. Both
    exponentials run as one batch, and the inverse costs no solve. The singular values of M are exp(eigenvalues of H).

    Args:
        X: skew matrices (..., n, n), float32 or float64.
        H: symmetric matrices (..., n, n), of the same dtype.

    Returns:
        M and M⁻¹ (..., n, n).

    Raises:
        TypeError: as `cayley` and `expm`.
        ValueError: X is not exactly skew (else cayley(X)ᵀ is not its inverse), the shapes differ, or as `expm`.
        OverflowError: as `expm`.

    >>> V, W = torch.randn(2, 8, 8, dtype=torch.float64)
    >>> M, back = lmc.polar(W - W.mT, 0.1 * (V + V.mT))
    >>> torch.allclose(M @ back, torch.eye(8, dtype=torch.float64))
    True
    """
    if X.shape != H.shape:
        raise ValueError(f"polar: X has shape {tuple(X.shape)}, H has {tuple(H.shape)}; they must agree")
    if not is_skew(X):
        raise ValueError("polar: X must be skew (X == -Xᵀ exactly); build it as W - W.mT")
    Q = cayley(X)
    grown, shrunk = expm(torch.stack((H, -H)))
    return Q @ grown, shrunk @ Q.mT
