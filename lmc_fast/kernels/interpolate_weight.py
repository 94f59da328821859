"""W(λ) = α A + β diag(scale) (B Rᵀ)[perm], one matrix at a time, and the reduction of dW to dR, dscale and dλ.

Without a permutation and a scale, and with numbers α and β, `torch.addmm(A, B, Rᵀ, beta=α, alpha=β)` is the same
product; into a buffer of its own it first copies A there (2 N K more elements moved). That copy is likely cheaper than
what a Triton product loses to cuBLAS, so `interpolate` calls addmm then. The kernels are for a scale or a permutation,
which addmm could only take from a scaled or permuted copy of B.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .runtime import bucket, factors, jit, launch_tiled, mix, on, precision, stride, tl, triton, usable, vector
from .tiles import accumulate, factor_pair, tile_of

Mix = Tensor | tuple[float, float]  # lambda (0-d) for (α, β) = (1 - λ, λ), or (α, β)


@jit
def forward_kernel(
    out, a, b, rotation, lam, alpha_a, alpha_b, perm, scale, N, K, D, out_n, out_k, a_n, a_k, b_n, b_k, r_row,
    rows_like,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, col = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(K, BLOCK_N), 8)
    n = row * BLOCK_M + tl.arange(0, BLOCK_M)
    k = col * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < N
    k_ok = k < K
    source = n
    if perm is not None:
        source = tl.load(perm + n, mask=n_ok, other=0)
    alpha_a, alpha_b = factor_pair(lam, alpha_a, alpha_b)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = accumulate(acc, b, b_n, b_k, rotation, r_row, 1, source, n_ok, k, k_ok, D, PRECISION, BLOCK_K)
    acc *= alpha_b
    if scale is not None:
        acc *= tl.load(scale + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
    ok = n_ok[:, None] & k_ok[None, :]
    n64, k64 = n.to(tl.int64)[:, None], k.to(tl.int64)[None, :]
    acc += alpha_a * tl.load(a + n64 * a_n + k64 * a_k, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + n64 * out_n + k64 * out_k, acc.to(out.dtype.element_ty), mask=ok)


@jit
def rotation_kernel(
    out, grad, b, perm, scale, N, K, D, out_row, g_n, g_k, b_n, b_k, rows_like,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (K, D) = gradᵀ diag(scale) b[perm]: nothing of grad's size is written."""
    row, col = tile_of(tl.program_id(0), tl.cdiv(K, BLOCK_M), tl.cdiv(D, BLOCK_N), 8)
    j = row * BLOCK_M + tl.arange(0, BLOCK_M)
    k = col * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.arange(0, BLOCK_K)
    j_ok = j < K
    k_ok = k < D
    j64, k64 = j.to(tl.int64)[:, None], k.to(tl.int64)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, N, BLOCK_K):
        n_ok = n < N - start
        here = (start + n).to(tl.int64)
        source = here
        if perm is not None:
            source = tl.load(perm + here, mask=n_ok, other=0).to(tl.int64)
        g = tl.load(grad + here[None, :] * g_n + j64 * g_k, mask=j_ok[:, None] & n_ok[None, :], other=0.0)
        if scale is not None:
            s = tl.load(scale + here, mask=n_ok, other=0.0).to(tl.float32)
            g = (g * s[None, :]).to(grad.dtype.element_ty)
        rows = tl.load(b + source[:, None] * b_n + k64 * b_k, mask=n_ok[:, None] & k_ok[None, :], other=0.0)
        acc = tl.dot(g, rows, acc, input_precision=PRECISION)
    tl.store(out + j64 * out_row + k64, acc, mask=j_ok[:, None] & k_ok[None, :])


@jit
def scale_kernel(
    partial, grad, b, rotation, perm, N, K, D, g_n, g_k, b_n, b_k, r_row, rows_like,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partial (column tiles, N): rows of (grad R) * b[perm] summed over one tile; the product is never stored."""
    row, col = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_M), tl.cdiv(D, BLOCK_N), 8)
    n = row * BLOCK_M + tl.arange(0, BLOCK_M)
    k = col * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < N
    k_ok = k < D
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc = accumulate(acc, grad, g_n, g_k, rotation, 1, r_row, n, n_ok, k, k_ok, K, PRECISION, BLOCK_K)
    source = n
    if perm is not None:
        source = tl.load(perm + n, mask=n_ok, other=0)
    at = b + source.to(tl.int64)[:, None] * b_n + k.to(tl.int64)[None, :] * b_k
    acc *= tl.load(at, mask=n_ok[:, None] & k_ok[None, :], other=0.0).to(tl.float32)
    tl.store(partial + col.to(tl.int64) * N + n, tl.sum(acc, 1), mask=n_ok)


@jit
def inner_kernel(partial, left, right, N, K, l_n, l_k, r_n, r_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """partial[i]: <left, right> over BLOCK_M rows."""
    n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n64 = n.to(tl.int64)[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_N):
        k = (start + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
        ok = (n < N)[:, None] & (k < K)
        one = tl.load(left + n64 * l_n + k * l_k, mask=ok, other=0.0).to(tl.float32)
        total += one * tl.load(right + n64 * r_n + k * r_k, mask=ok, other=0.0).to(tl.float32)
    tl.store(partial + tl.program_id(0), tl.sum(total))


def forward(
    a: Tensor, b: Tensor, rotation: Tensor, lam: Mix, perm: Tensor | None, scale: Tensor | None, out: Tensor
) -> None:
    """Launch into `out`; arguments as in `interpolate`, the rotation in b's dtype."""
    N, K, D = len(a), a.shape[1], b.shape[1]
    rotation = rotation.contiguous()
    share, alpha_a, alpha_b = mix(lam, a.device)
    launch_tiled(
        forward_kernel,
        lambda m: (triton.cdiv(N, m["BLOCK_M"]) * triton.cdiv(K, m["BLOCK_N"]),),
        a,
        ("N", "K", "D"),
        out=out, a=a, b=b, rotation=rotation, lam=share, alpha_a=alpha_a, alpha_b=alpha_b, perm=vector(perm),
        scale=vector(scale), N=N, K=K, D=D, out_n=stride(out), out_k=stride(out, 1), a_n=stride(a),
        a_k=stride(a, 1), b_n=stride(b), b_k=stride(b, 1), r_row=stride(rotation), rows_like=bucket(N),
        PRECISION=precision(a.dtype),
    )  # fmt: skip


def rotation_gradient(grad: Tensor, b: Tensor, perm: Tensor | None, scale: Tensor | None) -> Tensor:
    """Launch: gradᵀ diag(scale) b[perm], (K, D) in float32; times β it is dR."""
    N, K, D = len(grad), grad.shape[1], b.shape[1]
    out = torch.empty(K, D, dtype=torch.float32, device=grad.device)
    launch_tiled(
        rotation_kernel,
        lambda m: (triton.cdiv(K, m["BLOCK_M"]) * triton.cdiv(D, m["BLOCK_N"]),),
        grad,
        ("N", "K", "D"),
        out=out, grad=grad, b=b, perm=vector(perm), scale=vector(scale), N=N, K=K, D=D, out_row=stride(out),
        g_n=stride(grad), g_k=stride(grad, 1), b_n=stride(b), b_k=stride(b, 1), rows_like=bucket(N),
        PRECISION=precision(grad.dtype),
        largest=128 * 128,
    )  # fmt: skip
    return out


def scale_gradient(grad: Tensor, b: Tensor, rotation: Tensor, perm: Tensor | None) -> Tensor:
    """Launch: the row sums of grad * (b Rᵀ)[perm], (N,) in float32; times β they are dscale."""
    N, K, D = len(grad), grad.shape[1], b.shape[1]
    rotation = rotation.contiguous()
    partial = torch.zeros(triton.cdiv(D, 16), N, dtype=torch.float32, device=grad.device)
    launch_tiled(
        scale_kernel,
        lambda m: (triton.cdiv(N, m["BLOCK_M"]) * triton.cdiv(D, m["BLOCK_N"]),),
        grad,
        ("N", "K", "D"),
        partial=partial, grad=grad, b=b, rotation=rotation, perm=vector(perm), N=N, K=K, D=D, g_n=stride(grad),
        g_k=stride(grad, 1), b_n=stride(b), b_k=stride(b, 1), r_row=stride(rotation), rows_like=bucket(N),
        PRECISION=precision(grad.dtype),
        zeroed=("partial",),
        largest=128 * 128,
    )  # fmt: skip
    return partial.sum(0)


def inner(left: Tensor, right: Tensor) -> Tensor:
    """Launch: <left, right> of two matrices in float32, with no product stored."""
    partial = torch.empty(triton.cdiv(len(left), 16), dtype=torch.float32, device=left.device)
    with on(left):
        inner_kernel[(len(partial),)](
            partial, left, right, *left.shape, *left.stride(), *right.stride(), BLOCK_M=16, BLOCK_N=128
        )
    return partial.sum()


class _Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, rotation: Tensor, lam: Mix, perm: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        rounded = rotation.to(b.dtype)
        turned = a.stride(0) == 1 and a.shape[1] > 1  # a writer's transposed view: W comes as it lies
        shape = a.shape[::-1] if turned else a.shape
        out = torch.empty(shape, dtype=a.dtype, device=a.device)
        out = out.mT if turned else out
        forward(a, b, rounded, lam, perm, scale, out)
        ctx.plain, share = (lam, None) if isinstance(lam, tuple) else (None, lam)
        ctx.dtype = rotation.dtype
        ctx.save_for_backward(a, b, rounded, share, perm, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, rotation, share, perm, scale = ctx.saved_tensors
        (grad,) = grads
        _, factor = factors(share if ctx.plain is None else ctx.plain)
        of_rotation, of_lam, _, of_scale = ctx.needs_input_grad[2:]
        drotation = dlam = dscale = None
        if of_rotation or of_lam:
            whole = rotation_gradient(grad, b, perm, scale)
            drotation = (whole * factor).to(ctx.dtype) if of_rotation else None
            if of_lam:
                dlam = (inner(whole, rotation) - inner(grad, a)).to(share.dtype).view_as(share)
        if of_scale:
            dscale = (scale_gradient(grad, b, rotation, perm) * factor).to(scale.dtype)
        return None, None, drotation, dlam, None, dscale


def reference(
    a: Tensor, b: Tensor, rotation: Tensor, lam: Mix, perm: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """The same in plain torch operations, differentiable."""
    alpha_a, alpha_b = factors(lam)
    moved = (b if perm is None else b[perm]) @ rotation.to(b.dtype).mT
    if scale is not None:
        moved = moved * scale.to(moved.dtype)[:, None]
    return (alpha_a * a + alpha_b * moved).to(a.dtype)


def interpolate(
    a: Tensor,  # (N, K)
    b: Tensor,  # (N, D)
    rotation: Tensor,  # (K, D)
    lam: Mix,
    perm: Tensor | None = None,  # (N,) int
    scale: Tensor | None = None,  # (N,)
) -> Tensor:
    """α a + β diag(scale) (b Rᵀ)[perm], (N, K) in a's dtype; α, β = 1 - λ, λ, or the pair in `lam`.

    A writer, R W diag(s) with its units in the columns, is the transpose of this: give the transposed views. Strides
    are free. Differentiable in rotation, lam and scale, once; a and b are frozen. a and b share float16, bfloat16 or
    float32; the rotation may be wider and is rounded once. Where `usable` says no, `reference` runs. Raises ValueError
    for shapes and weights that want a gradient.
    """
    if len(a) != len(b) or rotation.shape != (a.shape[1], b.shape[1]):
        raise ValueError(
            f"a {tuple(a.shape)}, b {tuple(b.shape)} and rotation {tuple(rotation.shape)} do not fit: "
            "they are (N, K), (N, D), (K, D)"
        )
    if any(v is not None and v.shape != (len(a),) for v in (perm, scale)):
        raise ValueError(f"perm and scale have one entry for each of the {len(a)} rows")
    if perm is None and scale is None and isinstance(lam, tuple):
        return torch.addmm(a, b, rotation.to(b.dtype).mT, beta=lam[0], alpha=lam[1])
    if not usable(a, b, rotation, scale) or not a.numel() * b.numel():
        return reference(a, b, rotation, lam, perm, scale)
    if a.requires_grad or b.requires_grad:
        raise ValueError("interpolate has no gradient for its weights; detach them, or use `reference`")
    return _Interpolate.apply(a, b, rotation, lam, perm, scale)
