"""Y = act(α X Aᵀ + β (Z B[perm]ᵀ) diag(scale) + bias): two products in one accumulator, and its input gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .activations import ACTIVATIONS, activate, activation_gradient
from .runtime import bucket, factors, jit, launch_tiled, mix, precision, rows_of, stride, tl, triton, usable, vector
from .tiles import accumulate, factor_pair, tile_of

Mix = Tensor | tuple[float, float]  # lambda (0-d) for (α, β) = (1 - λ, λ), or (α, β)


@jit
def forward_kernel(
    y, pre, x, a, z, b, lam, alpha_a, alpha_b, bias, perm, scale, T, N, K, K2, y_row, pre_row, x_row, a_row, z_row,
    b_row, rows_like,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, col = tile_of(tl.program_id(0), tl.cdiv(T, BLOCK_M), tl.cdiv(N, BLOCK_N), 8)
    t = row * BLOCK_M + tl.arange(0, BLOCK_M)
    n = col * BLOCK_N + tl.arange(0, BLOCK_N)
    t_ok = t < T
    n_ok = n < N
    source = n
    if perm is not None:
        source = tl.load(perm + n, mask=n_ok, other=0)
    alpha_a, alpha_b = factor_pair(lam, alpha_a, alpha_b)
    # (β/α s) S_B + S_A, times α at the end: both products share one accumulator. At α = 0 any tiny number will do.
    alpha_a = tl.where(tl.abs(alpha_a) < 1e-20, 1e-20, alpha_a)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = accumulate(acc, z, z_row, 1, b, b_row, 1, t, t_ok, source, n_ok, K2, PRECISION, BLOCK_K)
    acc *= alpha_b / alpha_a
    if scale is not None:
        acc *= tl.load(scale + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    acc = accumulate(acc, x, x_row, 1, a, a_row, 1, t, t_ok, n, n_ok, K, PRECISION, BLOCK_K)
    acc *= alpha_a
    if bias is not None:
        acc += tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)[None, :]
    ok = t_ok[:, None] & n_ok[None, :]
    if pre is not None:
        tl.store(pre + t.to(tl.int64)[:, None] * pre_row + n[None, :], acc.to(pre.dtype.element_ty), mask=ok)
    acc = activate(acc, ACTIVATION)
    tl.store(y + t.to(tl.int64)[:, None] * y_row + n[None, :], acc.to(y.dtype.element_ty), mask=ok)


@jit
def _gradient_tile(
    out, grad, weight, value, perm, scale, alpha, sign, partial, row, col, T, N, K, out_row, grad_row, weight_row,
    value_row,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of α (grad diag(scale)) @ weight[perm], and ± <that tile / α, value> for λ's gradient."""
    t = row * BLOCK_M + tl.arange(0, BLOCK_M)
    k = col * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.arange(0, BLOCK_K)
    t_ok = t < T
    k_ok = k < K
    grad_at = grad + t.to(tl.int64)[:, None] * grad_row + n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, N, BLOCK_K):
        n_ok = n < N - start
        source = start + n
        if perm is not None:
            source = tl.load(perm + start + n, mask=n_ok, other=0)
        grad_tile = tl.load(grad_at, mask=t_ok[:, None] & n_ok[None, :], other=0.0)
        if scale is not None:
            s = tl.load(scale + start + n, mask=n_ok, other=0.0).to(tl.float32)
            grad_tile = (grad_tile * s[None, :]).to(grad.dtype.element_ty)
        weight_at = weight + source.to(tl.int64)[:, None] * weight_row + k[None, :]
        weight_tile = tl.load(weight_at, mask=n_ok[:, None] & k_ok[None, :], other=0.0)
        acc = tl.dot(grad_tile, weight_tile, acc, input_precision=PRECISION)
        grad_at += BLOCK_K
    ok = t_ok[:, None] & k_ok[None, :]
    tl.store(out + t.to(tl.int64)[:, None] * out_row + k[None, :], (acc * alpha).to(out.dtype.element_ty), mask=ok)
    if partial is not None:
        read = tl.load(value + t.to(tl.int64)[:, None] * value_row + k[None, :], mask=ok, other=0.0)
        tl.store(partial + tl.program_id(0), sign * tl.sum(acc * read.to(tl.float32)))


@jit
def gradient_kernel(
    dx, dz, grad, x, a, z, b, lam, alpha_a, alpha_b, perm, scale, partial, T, N, K, K2, dx_row, dz_row, grad_row,
    x_row, a_row, z_row, b_row, rows_like,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Columns of tiles: first those of dX, then those of dZ. They share `grad` in L2, and fill one wave together."""
    of_x = tl.cdiv(K, BLOCK_N)
    row, col = tile_of(tl.program_id(0), tl.cdiv(T, BLOCK_M), of_x + tl.cdiv(K2, BLOCK_N), 8)
    alpha_a, alpha_b = factor_pair(lam, alpha_a, alpha_b)
    if col < of_x:
        _gradient_tile(
            dx, grad, a, x, None, None, alpha_a, -1.0, partial, row, col, T, N, K, dx_row, grad_row, a_row, x_row,
            PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _gradient_tile(
            dz, grad, b, z, perm, scale, alpha_b, 1.0, partial, row, col - of_x, T, N, K2, dz_row, grad_row, b_row,
            z_row, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def forward(
    x: Tensor,  # (T, K)
    a: Tensor,  # (N, K), adjacent columns
    z: Tensor,  # (T, K2)
    b: Tensor,  # (N, K2), adjacent columns
    lam: Mix,
    bias: Tensor | None = None,  # (N,)
    perm: Tensor | None = None,  # (N,) int: row n of the second product is B's row perm[n]
    scale: Tensor | None = None,  # (N,)
    activation: str = "none",
    out: Tensor | None = None,  # (T, N), adjacent columns
    keep_pre: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Launch: (Y (T, N) in x's dtype, what went into the activation or None)."""
    x, z = rows_of(x), rows_of(z)
    y = torch.empty(len(x), len(a), dtype=x.dtype, device=x.device) if out is None else out
    pre = torch.empty(y.shape, dtype=y.dtype, device=y.device) if keep_pre else None
    if y.numel() == 0:
        return y, pre
    share, alpha_a, alpha_b = mix(lam, x.device)
    launch_tiled(
        forward_kernel,
        lambda m: (triton.cdiv(len(x), m["BLOCK_M"]) * triton.cdiv(len(a), m["BLOCK_N"]),),
        x,
        ("N", "K", "K2", "rows_like"),
        largest=128 * 256 if activation == "none" else 128 * 128,
        y=y, pre=pre, x=x, a=a, z=z, b=b, lam=share, alpha_a=alpha_a, alpha_b=alpha_b, bias=vector(bias),
        perm=vector(perm), scale=vector(scale), T=len(x), N=len(a), K=x.shape[1], K2=z.shape[1], y_row=stride(y),
        pre_row=stride(pre), x_row=stride(x), a_row=stride(a), z_row=stride(z), b_row=stride(b),
        rows_like=bucket(len(x)), ACTIVATION=activation, PRECISION=precision(x.dtype),
    )  # fmt: skip
    return y, pre


def input_gradients(
    grad: Tensor,  # (T, N)
    a: Tensor,  # (N, K)
    b: Tensor,  # (N, K2)
    lam: Mix,
    perm: Tensor | None = None,
    scale: Tensor | None = None,
    read: tuple[Tensor, Tensor] | None = None,  # X (T, K) and Z (T, K2), for λ's gradient
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Launch: dX = α grad A, dZ = β (grad diag(scale)) B[perm]; λ's gradient <dZ/β, Z> - <dX/α, X> (no division)."""
    grad = rows_of(grad)
    T, N, K, K2 = len(grad), len(a), a.shape[1], b.shape[1]
    dx, dz = (torch.empty(T, k, dtype=grad.dtype, device=grad.device) for k in (K, K2))
    x, z = (None, None) if read is None else map(rows_of, read)
    # one number for each program; the smallest tiles make the most programs
    most = triton.cdiv(T, 16) * (triton.cdiv(K, 16) + triton.cdiv(K2, 16))
    partial = None if read is None else torch.zeros(most, dtype=torch.float32, device=grad.device)
    share, alpha_a, alpha_b = mix(lam, grad.device)
    if T and K + K2:
        launch_tiled(
            gradient_kernel,
            lambda m: (triton.cdiv(T, m["BLOCK_M"]) * sum(triton.cdiv(k, m["BLOCK_N"]) for k in (K, K2)),),
            grad,
            ("N", "K", "K2", "rows_like"),
            zeroed=() if partial is None else ("partial",),
            dx=dx, dz=dz, grad=grad, x=x, a=a, z=z, b=b, lam=share, alpha_a=alpha_a, alpha_b=alpha_b,
            perm=vector(perm), scale=vector(scale), partial=partial, T=T, N=N, K=K, K2=K2, dx_row=stride(dx),
            dz_row=stride(dz), grad_row=stride(grad), x_row=stride(x), a_row=stride(a), z_row=stride(z),
            b_row=stride(b), rows_like=bucket(T), PRECISION=precision(grad.dtype),
        )  # fmt: skip
    return dx, dz, None if partial is None else partial.sum()


class _DualLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, z: Tensor, b: Tensor, lam: Mix, bias: Tensor | None, perm: Tensor | None,
        scale: Tensor | None, activation: str,
    ) -> Tensor:  # fmt: skip
        keep = activation != "none" and any(ctx.needs_input_grad)
        y, pre = forward(x, a, z, b, lam, bias, perm, scale, activation, keep_pre=keep)
        moves = ctx.needs_input_grad[4]
        scales = ctx.needs_input_grad[7]
        ctx.plain, share = (lam, None) if isinstance(lam, tuple) else (None, lam)
        ctx.activation, ctx.bias_dtype = activation, None if bias is None else bias.dtype
        kept = (x if moves else None, a, z if moves or scales else None, b, share, perm, scale, pre)
        ctx.save_for_backward(*kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, a, z, b, share, perm, scale, pre = ctx.saved_tensors
        lam = share if ctx.plain is None else ctx.plain
        wanted = ctx.needs_input_grad
        grad = rows_of(grads[0])
        if pre is not None:
            grad = activation_gradient(grad, pre, ctx.activation)
        dx = dz = dlam = dscale = dbias = None
        if wanted[0] or wanted[2] or wanted[4]:
            dx, dz, dlam = input_gradients(grad, a, b, lam, perm, scale, (x, z) if wanted[4] else None)
        if dlam is not None:
            dlam = dlam.to(share.dtype).view_as(share)
        if wanted[5]:
            dbias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        if wanted[7]:
            rows = b if perm is None else b[perm]
            dscale = ((grad.mT @ z).float() * rows).sum(1) * factors(lam)[1]
            dscale = dscale.to(scale.dtype)
        return dx, None, dz, None, dlam, dbias, None, dscale, None


def reference(
    x: Tensor, a: Tensor, z: Tensor, b: Tensor, lam: Mix, bias: Tensor | None = None, perm: Tensor | None = None,
    scale: Tensor | None = None, activation: str = "none",
) -> Tensor:  # fmt: skip
    """The same in plain torch operations, differentiable."""
    alpha_a, alpha_b = factors(lam)
    second = F.linear(z, b if perm is None else b[perm])
    if scale is not None:
        second = second * scale.to(second.dtype)
    y = alpha_a * F.linear(x, a) + alpha_b * second
    y = y if bias is None else y + bias.to(y.dtype)
    return ACTIVATIONS[activation](y).to(x.dtype)


def dual_linear(
    x: Tensor,  # (T, K)
    a: Tensor,  # (N, K)
    z: Tensor,  # (T, K2)
    b: Tensor,  # (N, K2)
    lam: Mix,
    bias: Tensor | None = None,  # (N,)
    perm: Tensor | None = None,  # (N,) int
    scale: Tensor | None = None,  # (N,)
    activation: str = "none",
) -> Tensor:
    """act(α x aᵀ + β (z b[perm]ᵀ) diag(scale) + bias), (T, N) in x's dtype; α, β = 1 - λ, λ, or the pair in `lam`.

    Differentiable in x, z, lam, bias and scale, once; the weights are frozen. x, z, a and b share one dtype: float16,
    bfloat16 or float32, summed in float32. a and b need adjacent columns but may be views (t[:, 0] and t[:, 1] of one
    (N, 2, K) tensor). Where `usable` says no, `reference` runs. Raises ValueError for shapes, strides, an unknown
    activation, or weights that want a gradient.
    """
    if x.shape[-1] != a.shape[-1] or z.shape[-1] != b.shape[-1] or len(a) != len(b) or len(x) != len(z):
        raise ValueError(
            f"x {tuple(x.shape)}, a {tuple(a.shape)}, z {tuple(z.shape)}, b {tuple(b.shape)} do not fit: "
            "they are (T, K), (N, K), (T, K2), (N, K2)"
        )
    if any(v is not None and v.shape != (len(a),) for v in (bias, perm, scale)):
        raise ValueError(f"bias, perm and scale have one entry for each of the {len(a)} rows of a")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
    if not usable(x, a, z, b, bias, scale):
        return reference(x, a, z, b, lam, bias, perm, scale, activation)
    if a.requires_grad or b.requires_grad:
        raise ValueError("dual_linear has no gradient for its weights; detach them, or use `reference`")
    if a.stride(1) != 1 or b.stride(1) != 1:
        raise ValueError("the columns of a and b must be adjacent in memory; call .contiguous() once")
    return _DualLinear.apply(x, a, z, b, lam, bias, perm, scale, activation)
