"""[α (n + bias_a) | β (n R + bias_b)] with n the gainless LayerNorm or RMSNorm of x: what a pair's readers read."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .runtime import factors, jit, mix, on, rows_of, stride, tl, triton, usable, vector
from .tiles import factor_pair

Mix = Tensor | tuple[float, float]  # lambda (0-d) for (α, β) = (1 - λ, λ), or (α, β)


@jit
def forward_kernel(
    left, plain, scales, x, bias, lam, alpha, D, left_row, plain_row, x_row, eps, RMS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    ok = i < D
    value = tl.load(x + row * x_row + i, mask=ok, other=0.0).to(tl.float32)
    if not RMS:
        value = tl.where(ok, value - tl.sum(value) / D, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(value * value) / D + eps)
    n = value * scale
    tl.store(scales + row, scale)
    tl.store(plain + row * plain_row + i, n.to(plain.dtype.element_ty), mask=ok)
    if left is not None:
        if bias is not None:
            n += tl.load(bias + i, mask=ok, other=0.0).to(tl.float32)
        alpha, _ = factor_pair(lam, alpha, 0.0)
        tl.store(left + row * left_row + i, (alpha * n).to(left.dtype.element_ty), mask=ok)


@jit
def gradient_kernel(
    dx, slopes, left, right, plain, scales, bias, lam, alpha_a, alpha_b, D, dx_row, left_row, right_row, plain_row,
    RMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """left: gradient of the left half; right: gradient of n R, times Rᵀ. slopes: λ's gradient, one number a row."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    ok = i < D
    of_a = tl.load(left + row * left_row + i, mask=ok, other=0.0).to(tl.float32)
    of_b = tl.load(right + row * right_row + i, mask=ok, other=0.0).to(tl.float32)
    n = tl.load(plain + row * plain_row + i, mask=ok, other=0.0).to(tl.float32)
    alpha_a, alpha_b = factor_pair(lam, alpha_a, alpha_b)
    if slopes is not None:
        slope = n * (of_b - of_a)
        if bias is not None:
            slope -= of_a * tl.load(bias + i, mask=ok, other=0.0).to(tl.float32)
        tl.store(slopes + row, tl.sum(slope))
    g = alpha_a * of_a + alpha_b * of_b
    through = g - n * (tl.sum(g * n) / D)
    if not RMS:
        through -= tl.sum(g) / D
    tl.store(dx + row * dx_row + i, (through * tl.load(scales + row)).to(dx.dtype.element_ty), mask=ok)


def _shape(width: int) -> dict[str, int]:
    """One row a program: about 16 numbers for each thread."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 32)}


def norm_into(
    x: Tensor,  # (T, d)
    eps: float,
    rms: bool,
    lam: Mix = (1.0, 1.0),
    bias: Tensor | None = None,  # (d,)
    left: Tensor | None = None,  # (T, d), adjacent columns: gets α (n + bias)
) -> tuple[Tensor, Tensor]:
    """Launch: (n (T, d) in x's dtype, 1 / spread of each row (T,) float32), in one pass over x."""
    x = rows_of(x)
    plain = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scales = torch.empty(len(x), dtype=torch.float32, device=x.device)
    share, alpha, _ = mix(lam, x.device)
    if x.numel():
        with on(x):
            forward_kernel[(len(x),)](
                left, plain, scales, x, vector(bias), share, alpha, x.shape[1], stride(left), stride(plain), stride(x),
                eps, rms, **_shape(x.shape[1]),
            )  # fmt: skip
    return plain, scales


def norm_gradient(
    left: Tensor,  # (T, d): gradient of the left half
    right: Tensor,  # (T, d): gradient of n R, times Rᵀ
    plain: Tensor,  # (T, d): n
    scales: Tensor,  # (T,)
    rms: bool,
    lam: Mix,
    bias: Tensor | None,
    slopes: bool,
) -> tuple[Tensor, Tensor | None]:
    """Launch: (dx (T, d), each row's part of <right, n> - <left, n + bias> (T,) float32 if `slopes`)."""
    left, right = rows_of(left), rows_of(right)
    dx = torch.empty(plain.shape, dtype=plain.dtype, device=plain.device)
    parts = torch.empty(len(plain), dtype=torch.float32, device=plain.device) if slopes else None
    share, alpha_a, alpha_b = mix(lam, plain.device)
    if plain.numel():
        with on(plain):
            gradient_kernel[(len(plain),)](
                dx, parts, left, right, plain, scales, vector(bias), share, alpha_a, alpha_b, plain.shape[1],
                stride(dx), stride(left), stride(right), stride(plain), rms, **_shape(plain.shape[1]),
            )  # fmt: skip
    return dx, parts


class _NormConcat(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rotation: Tensor, lam: Mix, bias_a: Tensor | None, bias_b: Tensor | None, eps: float,
        rms: bool,
    ) -> Tensor:  # fmt: skip
        width = x.shape[1]
        out = torch.empty(len(x), 2 * width, dtype=x.dtype, device=x.device)
        plain, scales = norm_into(x, eps, rms, lam, bias_a, out[:, :width])
        _, share = factors(lam)
        torch.mm(plain, (rotation * share).to(x.dtype), out=out[:, width:])
        if bias_b is not None:
            out[:, width:] += (bias_b * share).to(x.dtype)
        ctx.plain, given = (lam, None) if isinstance(lam, tuple) else (None, lam)
        ctx.rms = rms
        ctx.save_for_backward(plain, scales, rotation, given, bias_a, bias_b)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plain, scales, rotation, given, bias_a, bias_b = ctx.saved_tensors
        lam = given if ctx.plain is None else ctx.plain
        wanted = ctx.needs_input_grad
        width = plain.shape[1]
        grad = rows_of(grads[0])
        left, right = grad[:, :width], grad[:, width:]
        alpha_a, alpha_b = factors(lam)
        back = right @ rotation.to(plain.dtype).mT
        dx, slopes = norm_gradient(left, back, plain, scales, ctx.rms, lam, bias_a, wanted[2])
        drotation = dlam = dbias_a = dbias_b = None
        if wanted[1]:
            drotation = (plain.mT @ right).to(rotation.dtype) * alpha_b
        if slopes is not None:
            slope = slopes.sum()
            if bias_b is not None:
                slope = slope + right.sum(0, dtype=torch.float32) @ bias_b.float()
            dlam = slope.to(given.dtype).view_as(given)
        if wanted[3]:
            dbias_a = (left.sum(0, dtype=torch.float32) * alpha_a).to(bias_a.dtype)
        if wanted[4]:
            dbias_b = (right.sum(0, dtype=torch.float32) * alpha_b).to(bias_b.dtype)
        return dx, drotation, dlam, dbias_a, dbias_b, None, None


def reference(
    x: Tensor, rotation: Tensor, lam: Mix, bias_a: Tensor | None = None, bias_b: Tensor | None = None,
    eps: float = 1e-5, rms: bool = False,
) -> Tensor:  # fmt: skip
    """The same in plain torch operations, differentiable."""
    width = x.shape[-1:]
    n = F.rms_norm(x, width, None, eps) if rms else F.layer_norm(x, width, None, None, eps)
    left, right = n, n @ rotation.to(n.dtype)
    left = left if bias_a is None else left + bias_a.to(n.dtype)
    right = right if bias_b is None else right + bias_b.to(n.dtype)
    alpha_a, alpha_b = factors(lam)
    return torch.cat([alpha_a * left, alpha_b * right], dim=-1).to(x.dtype)


def norm_concat(
    x: Tensor,  # (T, d)
    rotation: Tensor,  # (d, d)
    lam: Mix,
    bias_a: Tensor | None = None,  # (d,)
    bias_b: Tensor | None = None,  # (d,)
    eps: float = 1e-5,
    rms: bool = False,
) -> Tensor:
    """[α (n + bias_a) | β (n R + bias_b)], (T, 2d) in x's dtype; n: gainless LayerNorm, or RMSNorm, of x's rows.

    Times a pair stored as (N, 2d) it gives the interpolated readers in one product. α, β = 1 - λ, λ, or the pair in
    `lam`. Differentiable in everything but eps, once. x is float16, bfloat16 or float32; the rotation and biases may be
    wider and are rounded once. Keeps n, not x, for backward. Where `usable` says no, `reference` runs. Raises
    ValueError for shapes.
    """
    width = x.shape[-1]
    if x.dim() != 2 or rotation.shape != (width, width):
        raise ValueError(f"x is (T, d) and the rotation (d, d), not {tuple(x.shape)} and {tuple(rotation.shape)}")
    if any(b is not None and b.shape != (width,) for b in (bias_a, bias_b)):
        raise ValueError(f"a bias has one entry for each of the {width} columns of x")
    if not usable(x, rotation, bias_a, bias_b):
        return reference(x, rotation, lam, bias_a, bias_b, eps, rms)
    return _NormConcat.apply(x, rotation, lam, bias_a, bias_b, eps, rms)
