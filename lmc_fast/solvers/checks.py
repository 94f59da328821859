"""What every solver checks at its front door, and the errors it raises there."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def as_batch(X: Tensor, name: str) -> Tensor:  # (..., n, n) -> (batch, n, n), contiguous
    """X as one contiguous batch, or an error that says what is wrong with its dtype or shape."""
    if not isinstance(X, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(X).__name__}")
    if X.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 or float64, got {X.dtype}; convert with .float()")
    if X.dim() < 2 or X.shape[-1] != X.shape[-2]:
        raise ValueError(f"{name}: expected square matrices (..., n, n), got shape {tuple(X.shape)}")
    batch = X.contiguous()
    # Each reshape is a node of the graph, which costs as much as a small matrix.
    return batch if X.dim() == 3 else batch.reshape(X.shape[:-2].numel(), *X.shape[-2:])


def require_finite(X: Tensor, name: str, what: str = "X") -> None:  # (batch, n, n)
    """Raise ValueError naming the first matrix with an infinity or a NaN. On a GPU this waits for the device."""
    if not bool(torch.isfinite(X).all()):
        bad = int((~torch.isfinite(X)).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"{name}: {what} has a non-finite entry (matrix {bad} of {X.shape[0]})")


def require_expm_norm(X: Tensor, norm: float) -> None:
    """Raise ValueError where ‖X‖₁ is so large that rounding X alone changes every digit of exp(X)."""
    limit = 1 / torch.finfo(X.dtype).eps
    if norm > limit:
        raise ValueError(f"expm: ‖X‖₁ = {norm:.1e} exceeds 1/ε = {limit:.1e}: no digit of exp(X) would be right")


def require_exponential_fits(E: Tensor) -> None:
    """Raise OverflowError where an exponential went to infinity."""
    if not bool(torch.isfinite(E).all()):
        raise OverflowError(f"expm: exp(X) does not fit {E.dtype}: an eigenvalue of X is too large")


def is_skew(X: Tensor) -> bool:  # (..., n, n)
    """True where X == -Xᵀ to the last bit, as W - Wᵀ is."""
    return bool((-X.mT == X).all())


def on_cpu(X: Tensor) -> bool:
    """Whether the C++ solvers can read X: real memory, not empty."""
    return X.device.type == "cpu" and X.numel() > 0


def suffix(X: Tensor) -> str:
    """The dtype in the names of the C++ functions."""
    return "float32" if X.dtype == torch.float32 else "float64"


def once_differentiable(backward: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A backward pass whose result, differentiated again, raises. torch's own decorator lets that gradient vanish where
    the output gradient does not require one, as that of a plain sum."""

    def run(ctx: Any, G: Tensor) -> Tensor:
        with torch.no_grad():
            grad = backward(ctx, G)
        if not torch.is_grad_enabled():
            return grad
        refused: Tensor = _NoDoubleBackward.apply(grad, G, *ctx.saved_tensors)
        return refused

    return run


class _NoDoubleBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, *depends_on: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> Tensor:
        raise RuntimeError("cayley and expm have no double backward: their gradient cannot be differentiated again")
