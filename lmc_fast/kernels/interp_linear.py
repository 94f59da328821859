"""The interpolated linear layer y = x [(1 - λ) A + λ L B Rᵀ]ᵀ + bias, without a transformed model."""

from __future__ import annotations

from torch import Tensor

from .dispatch import choose
from .routes import Lambda, product, side_by_side


def interp_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    lam: Lambda,
    *,
    left: Tensor | None = None,
    right: Tensor | None = None,
    bias: Tensor | None = None,
    turned: Tensor | None = None,
    route: str | None = None,
) -> Tensor:
    """y = x [(1 - λ) A + λ L B Rᵀ]ᵀ + bias. Differentiable once in x, left, right, bias and lam; not in a, b.

    L and R are each None (identity), (n, n) dense, (G, e, e) blocks that repeat over n / (G e) neighbouring heads each,
    (n,) a scale, or (n,) int64 a permutation p, which takes row (column) p[i] of B to i.

    Args:
        x: (..., K).
        a: A (N, K).
        b: B (N, K).
        lam: λ, a number or a tensor of no dimensions.
        left: L, with n = N.
        right: R, with n = K.
        bias: (N,).
        turned: x R, where a caller has it already.
        route: "fused", "concat" or "weight", see kernels.dispatch; None: the one that should be fastest here.

    Returns:
        y (..., N), in the dtype of x.

    Raises:
        ValueError: the route is unknown, or "concat" where A and B do not lie side by side or L is there.

    >>> x, a, b = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5, 8)
    >>> y = lmc.interp_linear(x, a, b, 0.25)
    >>> torch.allclose(y, x @ (0.75 * a + 0.25 * b).T, atol=1e-5)
    True
    """
    if route is None:
        route = choose(x.numel() // x.shape[-1], a.shape[1], a.dtype, a.device).route
        route = "fused" if route == "concat" and (left is not None or side_by_side(a, b) is None) else route
    return product(x, a, b, lam, left=left, right=right, bias=bias, turned=turned, route=route)
