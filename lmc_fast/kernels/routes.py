"""The interpolated linear layer y = x [(1 - λ) A + λ L B Rᵀ]ᵀ + bias, without a transformed model.

Three ways, one contract (T tokens, weights (N, K), square case K = d):

    fused     rotate the activations: z = x R, then y = (1-λ) x Aᵀ + λ (z Bᵀ) Lᵀ by two GEMMs that share an accumulator
    concat    the same as one GEMM, [(1-λ) x | λ z] [A | B]ᵀ, where A and B lie side by side and L does nothing
    weight    one transient matrix W = (1-λ) A + λ L B Rᵀ, then a plain GEMM; backward makes W again and contracts
              dW at once into the gradients of R, L and λ

The first two cost 2 T N K forward and backward each, and T d² for the rotation; the last T N K forward, 2 T N K
backward, and 3 N K d whatever T is. kernels.dispatch picks. Where kernels.enabled has them on, Triton operations do
what lies between the products: docs/kernels.md.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .enabled import engaged, fall_back

ROUTES = ("fused", "concat", "weight")
Lambda = float | Tensor  # lambda; a 0-d tensor where its gradient is wanted
Rope = tuple[Tensor, Tensor]  # cos, sin (positions, rotary / 2)


def product(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    lam: Lambda,
    *,
    left: Tensor | None = None,
    right: Tensor | None = None,
    bias: Tensor | None = None,
    turned: Tensor | None = None,
    route: str,
) -> Tensor:
    """y = x [(1 - λ) A + λ L B Rᵀ]ᵀ + bias along one of ROUTES; everything else as in interp_linear."""
    if route == "weight":
        y = _Transient.apply(x, a, b, lam, left, right)
        return y if bias is None else y + bias
    z = turned if turned is not None else apply_right(x, right)
    if route == "fused":
        return _two_products(x, z, a, b, lam, left, bias)
    if route != "concat":
        raise ValueError(f"route {route!r} is unknown; choose one of {', '.join(ROUTES)}")
    both = side_by_side(a, b)
    if both is None or left is not None:
        raise ValueError("the concat route needs A and B side by side in memory, and no L")
    return F.linear(torch.cat([(1 - lam) * x, lam * z], dim=-1), both, bias)


def _two_products(
    x: Tensor, z: Tensor, a: Tensor, b: Tensor, lam: Lambda, left: Tensor | None, bias: Tensor | None
) -> Tensor:
    shape = (*x.shape[:-1], len(a))
    x, z = x.flatten(0, -2), z.flatten(0, -2)
    y = _two_products_by_kernels(x, z, a, b, lam, left, bias)
    if y is not None:
        return y.view(shape)
    if isinstance(lam, Tensor):
        y = (1 - lam) * (x @ a.mT) + lam * apply_left(z @ b.mT, left)
        y = y if bias is None else y + bias
    elif left is None:
        y = _scaled_product(x, a, 1 - lam, bias).addmm_(z, b.mT, alpha=lam)
    else:
        y = torch.add(_scaled_product(x, a, 1 - lam, bias), apply_left(z @ b.mT, left), alpha=lam)
    return y.view(shape)


def _two_products_by_kernels(
    x: Tensor, z: Tensor, a: Tensor, b: Tensor, lam: Lambda, left: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """None where no Triton operation serves this L, or none is on."""
    if left is not None and left.dim() == 3:
        return mapped_heads(x, z, a, b, lam, left, bias, len(a) // left.shape[1], None)
    # the gradient of a scale takes z Bᵀ, which dual_gemm does not keep, or a third product
    learned = left is not None and left.requires_grad and torch.is_grad_enabled()
    if learned or _is_dense(left) or a.stride(-1) != 1 or b.stride(-1) != 1:
        return None
    perm, scale = _permutation_or_scale(left)
    if not engaged("dual_gemm", x, z, a, b, bias, scale):
        return None
    from .dual_gemm import dual_linear

    return dual_linear(x, a.detach(), z, b.detach(), _factors(lam), bias, perm, scale)


def mapped_heads(
    x: Tensor,  # (T, K)
    z: Tensor,  # (T, K)
    a: Tensor,  # (N, K)
    b: Tensor,  # (N, K)
    lam: Lambda,
    maps: Tensor | None,  # (G, e, e)
    bias: Tensor | None,  # (N,)
    heads: int,
    rope: Rope | None,
) -> Tensor | None:
    """Two products, then one pass that maps B's heads, mixes, adds the bias and applies RoPE: (T, N).

    None where kernels.head_maps is off or cannot take these tensors.
    """
    if not engaged("head_maps", x, z, a, b, maps, bias):
        return None
    from .head_maps import fits, head_maps

    width = len(a) // heads
    if maps is not None and not fits(width, x):
        fall_back(f"maps of heads with {width} channels ({x.dtype}) do not fit this GPU's shared memory")
        return None
    return head_maps(x @ a.mT, z @ b.mT, _factors(lam), maps, bias, rope, heads)


def _factors(lam: Lambda) -> Tensor | tuple[float, float]:
    """lambda as the Triton operations take it."""
    return lam if isinstance(lam, Tensor) else (1 - lam, lam)


def _permutation_or_scale(factor: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if factor is None:
        return None, None
    return (factor, None) if factor.dtype == torch.int64 else (None, factor)


def _scaled_product(x: Tensor, a: Tensor, share: float, bias: Tensor | None) -> Tensor:
    if bias is None:  # beta 0: what is added is not read
        return torch.addmm(x.new_zeros(1), x, a.mT, beta=0, alpha=share)
    return torch.addmm(bias, x, a.mT, alpha=share)


def interpolated(a: Tensor, b: Tensor, lam: Lambda, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
    """W = (1 - λ) A + λ L B Rᵀ (N, K), differentiable; the last dense factor and the sum are one GEMM."""
    dense_left, dense_right = _is_dense(left), _is_dense(right)
    by_kernel = _interpolated_by_kernel(a, b, lam, left, right)
    if by_kernel is not None:
        return by_kernel
    if isinstance(lam, Tensor):
        return (1 - lam) * a + lam * _rows(left, _rows(right, b.mT).mT)
    if dense_right:
        return torch.addmm(a, _rows(left, b), right.mT, beta=1 - lam, alpha=lam)  # type: ignore[union-attr]
    moved = b if right is None else _rows(right, b.mT).mT
    if dense_left:
        return torch.addmm(a, left, moved, beta=1 - lam, alpha=lam)  # type: ignore[arg-type]
    return torch.lerp(a, _rows(left, moved), lam)


def _interpolated_by_kernel(
    a: Tensor, b: Tensor, lam: Lambda, left: Tensor | None, right: Tensor | None
) -> Tensor | None:
    """One factor dense, the other a scale or a permutation: no scaled or permuted copy of B. None for other factors,
    for those that one GEMM serves as well, or where kernels.interpolate_weight is off."""
    dense, other = (left, right) if _is_dense(left) else (right, left)
    if dense is None or not _is_dense(dense) or (other is not None and other.dim() != 1):
        return None
    perm, scale = _permutation_or_scale(other)
    if (other is None and not isinstance(lam, Tensor)) or not engaged("interpolate_weight", a, b, dense, scale):
        return None
    from .interpolate_weight import interpolate

    a, b, factors = a.detach(), b.detach(), _factors(lam)
    if dense is right:
        return interpolate(a, b, dense, factors, perm, scale)
    return interpolate(a.mT, b.mT, dense, factors, perm, scale).mT


def apply_right(x: Tensor, right: Tensor | None) -> Tensor:
    """x R for x (..., K), R as in `interp_linear`."""
    if right is None:
        return x
    if right.dim() == 1:
        return x[..., torch.argsort(right)] if right.dtype == torch.int64 else x * right
    if right.dim() == 2:
        return x @ right
    return _by_heads(x, right)


def apply_left(y: Tensor, left: Tensor | None) -> Tensor:
    """y Lᵀ for y (..., N), L as in `interp_linear`."""
    if left is None:
        return y
    if left.dim() == 1:
        return y[..., left] if left.dtype == torch.int64 else y * left
    return y @ left.mT if left.dim() == 2 else _by_heads(y, left.mT)


def _by_heads(x: Tensor, maps: Tensor) -> Tensor:
    """Every head of x (..., n) times its group's map (G, e, e)."""
    groups, e, _ = maps.shape
    heads = x.reshape(-1, groups, x.shape[-1] // (groups * e), e).permute(1, 0, 2, 3)  # (G, T, r, e)
    return (heads.flatten(1, 2) @ maps).view(heads.shape).permute(1, 0, 2, 3).reshape(x.shape)


def _rows(factor: Tensor | None, w: Tensor) -> Tensor:
    """L w for w (N, K)."""
    if factor is None:
        return w
    if factor.dim() == 1:
        return w[factor] if factor.dtype == torch.int64 else w * factor[:, None]
    if factor.dim() == 2:
        return factor @ w
    groups, e, _ = factor.shape
    return (factor[:, None] @ w.reshape(groups, -1, e, w.shape[1])).view(w.shape)


def _is_dense(factor: Tensor | None) -> bool:
    return factor is not None and factor.dim() == 2


def side_by_side(a: Tensor, b: Tensor) -> Tensor | None:
    """[A | B] (N, 2K) as a view, where both are halves of the same rows; else None."""
    rows, columns = a.shape
    together = (
        a.stride() == b.stride() == (2 * columns, 1) and b.data_ptr() == a.data_ptr() + columns * a.element_size()
    )
    return a.as_strided((rows, 2 * columns), (2 * columns, 1)) if together else None


class _Transient(torch.autograd.Function):
    """x Wᵀ; W lives for one GEMM, in forward and again in backward, and dW is contracted at once."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, lam: Lambda, left: Tensor | None, right: Tensor | None
    ) -> Tensor:
        moving = lam if isinstance(lam, Tensor) else None
        ctx.lam = lam
        ctx.save_for_backward(x, a, b, moving, left, right)
        return x @ interpolated(a, b, lam, left, right).mT

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        x, a, b, *saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        parameters = [None if p is None else p.detach() for p in saved]
        wanted = [p.requires_grad_() for p, need in zip(parameters, needed, strict=True) if p is not None and need]
        with torch.enable_grad():
            lam = ctx.lam if parameters[0] is None else parameters[0]
            w = interpolated(a, b, lam, parameters[1], parameters[2])
        dx = dy @ w.detach() if ctx.needs_input_grad[0] else None
        found: list[Tensor] = []
        if wanted:
            dw = dy.flatten(0, -2).mT @ x.flatten(0, -2)
            found = list(torch.autograd.grad(w, wanted, dw))
        return dx, None, None, *(found.pop(0) if need else None for need in needed)
