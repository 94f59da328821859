"""Losses of a chunk of logits, whose slopes take the logits' place: one launch, two reads and one write a chunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .runtime import INTERPRETED, jit, on, stride, tl, triton, usable

Teachers = Sequence[tuple[Tensor, float]]  # (logits (rows, V), share), one or two


@jit
def _capped(v, cap, CAPPED: tl.constexpr):
    """cap tanh(v / cap)"""
    if CAPPED:
        v = cap * (2.0 * tl.sigmoid(2.0 * v / cap) - 1.0)
    return v


@jit
def _log_sum(at, V, cap, label, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """(log Σ exp of a row, its entry `label`, or 0 where the row has no such entry), in one read."""
    top = tl.full((), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    picked = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        v = _capped(tl.load(at + i, mask=i < V, other=0.0).to(tl.float32), cap, CAPPED)
        picked = tl.where(i == label, v, picked)
        v = tl.where(i < V, v, -float("inf"))
        higher = tl.maximum(top, tl.max(v))
        total = total * tl.exp(top - higher) + tl.exp(v - higher)
        top = higher
    return top + tl.log(tl.sum(total)), tl.sum(picked)


@jit
def _leave(at, i, ok, v, slope, scale, cap, CAPPED: tl.constexpr):
    """Write scale * slope, through the cap, where the logits were."""
    if CAPPED:
        slope *= 1.0 - (v / cap) * (v / cap)
    tl.store(at + i, (scale * slope).to(at.dtype.element_ty), mask=ok)


@jit
def cross_entropy_kernel(
    logits, target, losses, log_sums, V, row_stride, first, scale, cap,
    GIVEN: tl.constexpr, WRITE: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at = logits + row.to(tl.int64) * row_stride
    label = -1
    if target is not None:
        label = tl.load(target + row).to(tl.int32) - first
        label = tl.where((label >= 0) & (label < V), label, -1)
    if GIVEN:
        log_sum = tl.load(log_sums + row)
    else:
        log_sum, picked = _log_sum(at, V, cap, label, CAPPED, BLOCK)
        tl.store(log_sums + row, log_sum)
        tl.store(losses + row, picked)
    if WRITE:
        for start in range(0, V, BLOCK):
            i = start + tl.arange(0, BLOCK)
            v = _capped(tl.load(at + i, mask=i < V, other=0.0).to(tl.float32), cap, CAPPED)
            slope = tl.exp(v - log_sum) - tl.where(i == label, 1.0, 0.0)
            _leave(at, i, i < V, v, slope, scale, cap, CAPPED)


@jit
def divergence_kernel(
    logits, one, two, losses, log_sums, share_one, share_two, V, row_stride, one_row, two_row, scale, cap, rows,
    GIVEN: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """log_sums (2 or 3, rows): of the logits and the teachers."""
    row = tl.program_id(0)
    row64 = row.to(tl.int64)
    at = logits + row64 * row_stride
    one_at = one + row64 * one_row
    if GIVEN:
        log_sum, log_one = tl.load(log_sums + row), tl.load(log_sums + rows + row)
    else:
        log_sum, _ = _log_sum(at, V, cap, -1, CAPPED, BLOCK)
        log_one, _ = _log_sum(one_at, V, cap, -1, CAPPED, BLOCK)
        tl.store(log_sums + row, log_sum)
        tl.store(log_sums + rows + row, log_one)
    if two is not None:
        two_at = two + row64 * two_row
        if GIVEN:
            log_two = tl.load(log_sums + 2 * rows + row)
        else:
            log_two, _ = _log_sum(two_at, V, cap, -1, CAPPED, BLOCK)
            tl.store(log_sums + 2 * rows + row, log_two)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        ok = i < V
        v = _capped(tl.load(at + i, mask=ok, other=0.0).to(tl.float32), cap, CAPPED)
        teacher = _capped(tl.load(one_at + i, mask=ok, other=0.0).to(tl.float32), cap, CAPPED)
        wanted = share_one * tl.exp(teacher - log_one)
        if two is not None:
            teacher = _capped(tl.load(two_at + i, mask=ok, other=0.0).to(tl.float32), cap, CAPPED)
            wanted += share_two * tl.exp(teacher - log_two)
        positive = ok & (wanted > 0)
        total += tl.where(positive, wanted * (tl.log(tl.where(positive, wanted, 1.0)) - (v - log_sum)), 0.0)
        _leave(at, i, ok, v, tl.exp(v - log_sum) - wanted, scale, cap, CAPPED)
    tl.store(losses + row, tl.sum(total))


def block_of(width: int) -> dict[str, int]:
    block = 16 if INTERPRETED else min(triton.next_power_of_2(width), 4096)
    return {"BLOCK": block, "num_warps": max(block // 256, 4)}


def _check(logits: Tensor, others: Sequence[Tensor] = ()) -> None:
    if logits.dim() != 2 or any(t.shape != logits.shape for t in others):
        raise ValueError(f"logits are (rows, V), all of one shape, not {[tuple(t.shape) for t in (logits, *others)]}")
    if any(t.stride(1) != 1 for t in (logits, *others) if t.shape[1] > 1):
        raise ValueError("the columns of the logits must be adjacent in memory")


def _cross_entropy(
    logits: Tensor, target: Tensor | None, log_sums: Tensor | None, write: bool, scale: float, first: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch: (log-sums, logits at the targets); the latter unset where the log-sums were given."""
    rows, width = logits.shape
    given = log_sums is not None
    picked = torch.empty(rows, dtype=torch.float32, device=logits.device)
    sums = torch.empty(rows, dtype=torch.float32, device=logits.device) if log_sums is None else log_sums.contiguous()
    if rows:
        with on(logits):
            cross_entropy_kernel[(rows,)](
                logits, None if target is None else target.contiguous(), picked, sums, width, stride(logits), first,
                scale, softcap, given, write, softcap != 0, **block_of(width),
            )  # fmt: skip
    return sums, picked


def row_statistics(
    logits: Tensor,  # (rows, V)
    target: Tensor | None = None,  # (rows,) int
    first: int = 0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(log Σ exp of each row, the logit at target - first or 0 where that column is not here), (rows,) in float32.

    For a head that comes in runs of columns: logaddexp over the runs, the sum of the picked logits; then
    `cross_entropy_` with these log-sums in the second visit.
    """
    _check(logits)
    if usable(logits):
        return _cross_entropy(logits, target, None, False, 0.0, first, softcap)
    v = _reference_capped(logits, softcap)
    if target is None:
        return v.logsumexp(1), v.new_zeros(len(v))
    label = target - first
    here = (label >= 0) & (label < v.shape[1])
    picked = v.gather(1, label.clamp(0, v.shape[1] - 1)[:, None])[:, 0]
    return v.logsumexp(1), torch.where(here, picked, 0.0)


def cross_entropy_(
    logits: Tensor,  # (rows, V)
    target: Tensor,  # (rows,) int
    scale: float = 1.0,
    first: int = 0,
    log_sums: Tensor | None = None,  # (rows,)
    softcap: float = 0.0,
) -> Tensor:
    """-log softmax(logits)[target] of each row (rows,); in the logits' place: `scale` times its gradient to them.

    With log_sums (of the whole row, where the logits are a run of its columns from `first`) only the gradient is
    computed and the result is empty. logits: float16, bfloat16 or float32, computed in float32; softcap: c of
    c tanh(l / c), 0 for none. Where `usable` says no, `reference` runs. Raises ValueError for shapes and strides.
    """
    _check(logits)
    if not usable(logits):
        loss, slope = reference(logits, target, scale, first, log_sums, softcap)
        logits.copy_(slope)
        return loss
    sums, picked = _cross_entropy(logits, target, log_sums, True, scale, first, softcap)
    return sums - picked if log_sums is None else sums.new_empty(0)


def divergence_(
    logits: Tensor,  # (rows, V)
    teachers: Teachers,
    scale: float = 1.0,
    log_sums: Tensor | None = None,  # (1 + teachers, rows)
    softcap: float = 0.0,
) -> Tensor:
    """KL(Σ shares of softmax(teachers) ‖ softmax(logits)) of each row (rows,).

    In the logits' place: `scale` times its gradient to them. With log_sums (of the logits, then of each teacher, over
    whole rows) the tensors may be a run of columns; the runs' results add up. Types, softcap, fallback and errors as in
    `cross_entropy_`.
    """
    _check(logits, [t for t, _ in teachers])
    if len(teachers) not in (1, 2):
        raise ValueError(f"one or two teachers, not {len(teachers)}")
    if not usable(logits, *(t for t, _ in teachers)):
        loss, slope = reference_divergence(logits, teachers, scale, log_sums, softcap)
        logits.copy_(slope)
        return loss
    rows, width = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    given = log_sums is not None
    if log_sums is None:
        log_sums = torch.empty(1 + len(teachers), rows, dtype=torch.float32, device=logits.device)
    (one, share_one), (two, share_two) = (*teachers, (None, 0.0))[:2]
    if rows:
        with on(logits):
            divergence_kernel[(rows,)](
                logits, one, two, losses, log_sums.contiguous(), share_one, share_two, width, stride(logits),
                stride(one), stride(two), scale, softcap, rows, given, softcap != 0, **block_of(width),
            )  # fmt: skip
    return losses


def _reference_capped(logits: Tensor, softcap: float) -> Tensor:
    v = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return softcap * torch.tanh(v / softcap) if softcap else v


def reference(
    logits: Tensor, target: Tensor, scale: float = 1.0, first: int = 0, log_sums: Tensor | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(loss, slope in the logits' dtype) of `cross_entropy_` in plain torch operations."""
    v = _reference_capped(logits, softcap)
    sums = v.logsumexp(1) if log_sums is None else log_sums
    hit = torch.arange(v.shape[1], device=v.device) == (target - first)[:, None]
    slope = (v - sums[:, None]).exp() - hit.to(v.dtype)
    slope = slope * (1 - (v / softcap).square()) if softcap else slope
    loss = sums - torch.where(hit, v, 0.0).sum(1) if log_sums is None else v.new_empty(0)
    return loss, (scale * slope).to(logits.dtype)


def reference_divergence(
    logits: Tensor, teachers: Teachers, scale: float = 1.0, log_sums: Tensor | None = None, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(loss, slope in the logits' dtype) of `divergence_` in plain torch operations."""
    caps = [_reference_capped(t, softcap) for t in (logits, *(t for t, _ in teachers))]
    sums = [v.logsumexp(1) for v in caps] if log_sums is None else log_sums
    student, *others = (v - s[:, None] for v, s in zip(caps, sums, strict=True))
    wanted = sum((share * t.exp() for (_, share), t in zip(teachers, others, strict=True)), torch.zeros_like(student))
    loss = torch.where(wanted > 0, torch.xlogy(wanted, wanted) - wanted * student, 0.0).sum(1)
    slope = student.exp() - wanted
    slope = slope * (1 - (caps[0] / softcap).square()) if softcap else slope
    return loss, (scale * slope).to(logits.dtype)
