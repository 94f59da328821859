"""What every kernel is held to: as good as plain torch in the same dtype, within its own memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")


def values(seed: int) -> Callable[..., Tensor]:
    """values(seed)(*shape): normal numbers in float64, exact in every dtype that is tested."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator).bfloat16().to(DEVICE, torch.float64)


def among_nans(t: Tensor, extra: int = 5) -> Tensor:
    """The same matrix or vector as a strided view with NaN on every side: reading past an edge shows."""
    big = torch.full((t.shape[0] + 4, *(n + extra for n in t.shape[1:])), torch.nan, dtype=t.dtype, device=t.device)
    view = big[(slice(2, 2 + t.shape[0]), *(slice(2, 2 + n) for n in t.shape[1:]))]
    return view.copy_(t)


def outcome(
    function: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    constants: dict,
    dtype: torch.dtype,
    spread: bool = False,
) -> dict[str, Tensor]:
    """The output and the gradient to every input, computed in `dtype`; constants in floating point follow."""

    def cast(v: Tensor) -> Tensor:
        v = v.to(dtype)
        return among_nans(v) if spread and v.dim() == 2 else v

    leaves = {k: cast(v).detach().requires_grad_() for k, v in inputs.items()}
    fixed = {k: cast(v) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in constants.items()}
    out = function(**leaves, **fixed)
    up = values(99)(*out.shape).to(dtype)
    return {"out": out.detach(), **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), up), strict=True))}


def assert_as_good(ours: Tensor, plain: Tensor, truth: Tensor, name: str = "", size: float | None = None) -> None:
    """Error at most twice that of plain torch, or two units in the last place of the largest entry.

    size: for sums that cancel, the size of what is summed.
    """
    assert ours.dtype == plain.dtype and ours.shape == plain.shape, (name, ours.dtype, plain.dtype)
    if not truth.numel():
        return
    floor = 2 * torch.finfo(plain.dtype).eps * max(float(truth.abs().max()), size or 0.0)
    error, allowed = (float((t.double() - truth).abs().max()) for t in (ours, plain))
    assert error <= 2 * allowed + floor, f"{name}: error {error:.3g}, plain torch {allowed:.3g}, floor {floor:.3g}"


def compare(
    function: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: dict,
    constants: dict,
    dtype: torch.dtype,
    sizes: dict[str, float] | None = None,
) -> None:
    """`function` against `reference` in the same dtype and in float64: output and gradients."""
    ours = outcome(function, inputs, constants, dtype, spread=True)
    plain = outcome(reference, inputs, constants, dtype, spread=True)  # torch's CPU products round by layout too
    truth = outcome(reference, inputs, constants, torch.float64)
    for name in truth:
        assert_as_good(ours[name], plain[name], truth[name], name, (sizes or {}).get(name))
