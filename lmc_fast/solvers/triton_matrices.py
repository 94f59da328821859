"""What the Triton kernels of the solvers share: padded matrices, scratch, launch options.

A kernel gives each program one matrix, padded with zeros to N x N, N a power of two. Scratch matrices lie in global
memory, which the first-level cache holds, N numbers a row; a barrier stands between what one thread writes and another
reads. Products are summed in float32 (`input_precision="ieee"`), 16 columns at a time: the operands of one step then
fit in registers.
"""

from typing import Any

import triton
import triton.language as tl

DEPTH = 16
"""Columns of the left factor that one step of a product takes; the block of the Cayley map."""


def padded(n: int) -> int:
    """The smallest power of two ≥ n that a product takes."""
    size: int = max(16, triton.next_power_of_2(n))
    return size


def options(N: int, forward: bool) -> dict[str, Any]:
    """How to compile for N x N: 128 registers a thread, so that 16 warps share a multiprocessor, and enough warps that
    nothing spills. The forward kernels hold more."""
    return {"num_warps": 16 if forward and N == 64 else N // 8, "num_stages": 1, "maxnreg": 128}


@triton.jit
def load_padded(A, n, N: tl.constexpr):
    """The n x n matrix at A as (N, N), zero beyond."""
    i = tl.arange(0, N)
    inside = (i[:, None] < n) & (i[None, :] < n)
    return tl.load(A + i[:, None] * n + i[None, :], mask=inside, other=0.0)


@triton.jit
def load_transposed(A, n, N: tl.constexpr):
    """Its transpose as (N, N), zero beyond."""
    i = tl.arange(0, N)
    inside = (i[:, None] < n) & (i[None, :] < n)
    return tl.load(A + i[None, :] * n + i[:, None], mask=inside, other=0.0)


@triton.jit
def store_unpadded(A, value, n, N: tl.constexpr):
    i = tl.arange(0, N)
    inside = (i[:, None] < n) & (i[None, :] < n)
    tl.store(A + i[:, None] * n + i[None, :], value, mask=inside)


@triton.jit
def store(A, value, N: tl.constexpr):
    """Into scratch."""
    i = tl.arange(0, N)
    tl.store(A + i[:, None] * N + i[None, :], value)


@triton.jit
def identity(N: tl.constexpr):
    i = tl.arange(0, N)
    return (i[:, None] == i[None, :]).to(tl.float32)


@triton.jit
def all_finite(value):
    """Whether no entry is infinite or NaN."""
    bad = tl.where(tl.abs(value) <= 3.4028234663852886e38, 0, 1)
    return tl.sum(tl.sum(bad, 1), 0) == 0
