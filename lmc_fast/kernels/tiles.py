"""Pieces that several kernels share: order of tiles, one accumulated product, the two factors."""

from __future__ import annotations

from .runtime import jit, tl


@jit
def tile_of(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Walk down GROUP rows of tiles before the next column, so that concurrent programs share operands in L2."""
    band = GROUP * tiles_n
    first = (pid // band) * GROUP
    height = min(tiles_m - first, GROUP)
    inside = pid % band
    return first + inside % height, inside // height


@jit
def factor_pair(lam, alpha_a, alpha_b):
    """(1 - lambda, lambda) of a 0-d tensor, or the two numbers given."""
    if lam is not None:
        share = tl.load(lam).to(tl.float32)
        alpha_a = 1.0 - share
        alpha_b = share
    return alpha_a, alpha_b


@jit
def accumulate(
    acc, left, left_row, left_k, right, right_row, right_k, rows, row_ok, cols, col_ok, K,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + left[rows] @ right[cols]ᵀ; *_row and *_k are strides, rows and cols may be gathered."""
    k = tl.arange(0, BLOCK_K)
    left_at = left + rows.to(tl.int64)[:, None] * left_row + k.to(tl.int64)[None, :] * left_k
    right_at = right + cols.to(tl.int64)[None, :] * right_row + k.to(tl.int64)[:, None] * right_k
    for start in range(0, K, BLOCK_K):
        inside = k < K - start
        left_tile = tl.load(left_at, mask=row_ok[:, None] & inside[None, :], other=0.0)
        right_tile = tl.load(right_at, mask=inside[:, None] & col_ok[None, :], other=0.0)
        acc = tl.dot(left_tile, right_tile, acc, input_precision=PRECISION)
        left_at += BLOCK_K * left_k
        right_at += BLOCK_K * right_k
    return acc
