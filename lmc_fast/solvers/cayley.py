"""Cayley map Q = (I - X/2)⁻¹ (I + X/2), with a backward pass of two matrix products."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lmc_fast.implementations import extension, triton_takes
from lmc_fast.solvers import cayley_torch, pairs
from lmc_fast.solvers.checks import as_batch, on_cpu, once_differentiable, suffix


def cayley(X: Tensor) -> Tensor:  # (..., n, n) -> (..., n, n)
    """Q = (I - X/2)⁻¹ (I + X/2). Skew X gives a rotation.

    Skew X, recognised exactly (X == -Xᵀ, as W - Wᵀ is), is inverted by blocks without pivoting: I - X/2 has a positive
    definite symmetric part, so no pivot can be small. Any other X goes through LU with partial pivoting; n = 2 has a
    closed form. Gradient: dX = ¼ (I + Q)ᵀ dQ (I + Q)ᵀ, from Q alone; no double backward.

    Args:
        X: square matrices (..., n, n), float32 or float64, n ≥ 1.

    Returns:
        Q (..., n, n), of the same dtype and device.

    Raises:
        TypeError: X is no tensor, or of another dtype.
        ValueError: X is not square, or has an entry that is not finite.
        torch.linalg.LinAlgError: I - X/2 is singular.

    >>> W = torch.randn(5, 8, 8)
    >>> Q = lmc.cayley(W - W.mT)  # five rotations
    >>> torch.allclose(Q @ Q.mT, torch.eye(8), atol=1e-5)
    True
    """
    Q: Tensor = _Cayley.apply(as_batch(X, "cayley"))  # type: ignore[no-untyped-call]
    return Q if X.dim() == 3 else Q.reshape(X.shape)


class _Cayley(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, X: Tensor) -> Tensor:  # (batch, n, n)
        if X.shape[-1] == 2:
            ctx.save_for_backward(X)
            return pairs.cayley(X)
        Q = _forward_triton(X) if triton_takes(X) else _forward_native(X)
        if Q is None:
            Q = cayley_torch.forward(X)
        ctx.save_for_backward(Q)
        return Q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> Tensor:
        (saved,) = ctx.saved_tensors
        if saved.shape[-1] == 2:
            return pairs.cayley_backward(saved, G)
        return _backward(saved, G.contiguous())


def _backward(Q: Tensor, G: Tensor) -> Tensor:  # (batch, n, n) each
    if triton_takes(Q):
        from lmc_fast.solvers import cayley_triton

        return cayley_triton.backward(Q, G)
    native = extension() if on_cpu(Q) else None
    if native is None:
        return cayley_torch.backward(Q, G)
    X_bar = torch.empty_like(Q)
    run = getattr(native, f"cayley_backward_{suffix(Q)}")
    run(Q.data_ptr(), G.data_ptr(), X_bar.data_ptr(), *Q.shape[:2], torch.get_num_threads())
    return X_bar


def _forward_triton(X: Tensor) -> Tensor | None:  # (batch, n, n)
    """The GPU kernel; None as for the C++ map."""
    from lmc_fast.solvers import cayley_triton

    return cayley_triton.forward(X)


def _forward_native(X: Tensor) -> Tensor | None:  # (batch, n, n)
    """The C++ map; None without it, and where a matrix is not skew or not finite, which the torch route deals with."""
    native = extension() if on_cpu(X) else None
    if native is None:
        return None
    Q = torch.empty_like(X)
    run = getattr(native, f"cayley_forward_{suffix(X)}")
    _, status = run(X.data_ptr(), Q.data_ptr(), *X.shape[:2], torch.get_num_threads())
    return Q if status == 0 else None
