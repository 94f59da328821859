"""The Cayley map of skew float32 matrices on a GPU, one program for each matrix.

Block Gauss-Jordan without pivoting, as in csrc/cayley.h: one launch reads X and writes Q, where the batched formulation
of cayley_torch.py is a chain of some thirty operations. The backward pass is its two products in one launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmc_fast.solvers.triton_matrices import (
    DEPTH,
    all_finite,
    identity,
    load_padded,
    load_transposed,
    options,
    padded,
    store,
    store_unpadded,
)

_LARGE_ROW = tl.constexpr(64.0)  # squared norm of a row of X beyond which a Newton step follows


def forward(X: Tensor) -> Tensor | None:  # (batch, n, n), float32, contiguous
    """The map; None where a matrix is not skew or not finite. Waits for the device, to know."""
    batch, n, _ = X.shape
    N = padded(n)
    Q, work = torch.empty_like(X), X.new_empty(batch, N, N)
    refused = torch.empty(batch, dtype=torch.int32, device=X.device)
    with torch.cuda.device_of(X):
        forward_kernel[(batch,)](X, Q, work, refused, n, N, DEPTH, **options(N, forward=True))
    return None if bool(refused.any()) else Q


def backward(Q: Tensor, G: Tensor) -> Tensor:  # (batch, n, n) each, float32, contiguous
    """X̄ = Wᵀ G Wᵀ with W = ½ (I + Q)."""
    batch, n, _ = Q.shape
    N = padded(n)
    X_bar = torch.empty_like(Q)
    with torch.cuda.device_of(Q):
        backward_kernel[(batch,)](Q, G, X_bar, n, N, DEPTH, **options(N, forward=False))
    return X_bar


@triton.jit
def forward_kernel(X, Q, work, refused, n, N: tl.constexpr, B: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    X += program * n * n
    Q += program * n * n
    work += program * N * N
    i = tl.arange(0, N)
    b = tl.arange(0, B)
    x = load_padded(X, n, N)
    # An infinity makes its pair's sum infinite or NaN: not 0.
    not_skew = tl.sum(tl.sum((x + load_transposed(X, n, N) != 0).to(tl.int32), 1), 0) > 0
    large = tl.max(tl.sum(x * x, 1), 0) > _LARGE_ROW

    # S <- (I - X/2)^-1 in place. Scratch holds the coming block row and column of it.
    S = identity(N) - 0.5 * x
    store(work, S, N)
    for k in range(0, N, B):
        tl.debug_barrier()
        block_row = k + b
        D = tl.load(work + block_row[:, None] * N + block_row[None, :])
        row = tl.load(work + block_row[:, None] * N + i[None, :])
        column = tl.load(work + i[:, None] * N + block_row[None, :])
        for j in range(B):
            pivot_row = tl.sum(tl.where(b[:, None] == j, D, 0.0), 0)
            pivot_column = tl.sum(tl.where(b[None, :] == j, D, 0.0), 1)
            pivot = tl.sum(tl.where(b == j, pivot_column, 0.0), 0)
            scaled = tl.where(b == j, 1.0, pivot_row) / pivot
            D = tl.where(b[None, :] == j, 0.0, D) - pivot_column[:, None] * scaled[None, :]
            D = tl.where(b[:, None] == j, scaled[None, :], D)
        # The block column becomes that of the identity, so that the update writes the inverse in its place; -I in the
        # block's own rows of the left factor puts R there.
        own = i // B == k // B
        row = tl.where(i[None, :] == block_row[:, None], 1.0, tl.where(own[None, :], 0.0, row))
        column = tl.where(i[:, None] == block_row[None, :], -1.0, tl.where(own[:, None], 0.0, column))
        R = tl.dot(D, row, input_precision="ieee")
        S = tl.where(own[:, None] | own[None, :], 0.0, S)
        S = tl.dot(-column, R, S, input_precision="ieee")
        tl.debug_barrier()
        coming = i // B == k // B + 1
        tl.store(work + i[:, None] * N + i[None, :], S, mask=coming[:, None] | coming[None, :])

    if large:
        # One Newton step, S <- S (2 I - (I - X/2) S): without pivots the error grows with X.
        store(work, S, N)
        correction = 2 * identity(N) - S
        tl.debug_barrier()
        for k in range(0, N, B):
            left = tl.load(X + i[:, None] * n + k + b[None, :], mask=(i[:, None] < n) & (k + b[None, :] < n), other=0.0)
            right = tl.load(work + (k + b[:, None]) * N + i[None, :])
            correction = tl.dot(0.5 * left, right, correction, input_precision="ieee")
        store_unpadded(Q, correction, n, N)
        tl.debug_barrier()
        S = tl.zeros((N, N), tl.float32)
        for k in range(0, N, B):
            left = tl.load(work + i[:, None] * N + k + b[None, :])
            right = tl.load(
                Q + (k + b[:, None]) * n + i[None, :], mask=(k + b[:, None] < n) & (i[None, :] < n), other=0.0
            )
            S = tl.dot(left, right, S, input_precision="ieee")
        tl.debug_barrier()

    # Q = 2 S - I. Near 1, a diagonal entry of that carries the rounding of numbers near 2; S = I + S X/2 gives it
    # without.
    q = 2 * S
    terms = q * load_padded(X, n, N)
    diagonal = tl.where(tl.sum(tl.abs(terms), 1) < 2, 1 - 0.5 * tl.sum(terms, 1), tl.sum(q * identity(N), 1) - 1)
    q = tl.where(i[:, None] == i[None, :], diagonal[:, None], q)
    q = tl.where((i[:, None] < n) & (i[None, :] < n), q, 0.0)
    store_unpadded(Q, q, n, N)
    tl.store(refused + program, (not_skew | (all_finite(q) == 0)).to(tl.int32))


@triton.jit
def backward_kernel(Q, G, X_bar, n, N: tl.constexpr, B: tl.constexpr):
    """In terms of E = ½ (Q - I)ᵀ each product is a correction to what it is added to: H = G + E G, X̄ = H + H E."""
    program = tl.program_id(0).to(tl.int64)
    Q += program * n * n
    G += program * n * n
    X_bar += program * n * n
    i = tl.arange(0, N)
    b = tl.arange(0, B)
    H = load_padded(G, n, N)
    for k in range(0, N, B):
        rows = k + b[:, None]
        here = (rows < n) & (i[None, :] < n)
        q = tl.load(Q + rows * n + i[None, :], mask=here, other=0.0)
        E = 0.5 * tl.where(rows == i[None, :], q - 1, q)
        g = tl.load(G + rows * n + i[None, :], mask=here, other=0.0)
        H = tl.dot(tl.trans(E), g, H, input_precision="ieee")
    store_unpadded(X_bar, H, n, N)
    tl.debug_barrier()
    for k in range(0, N, B):
        columns = k + b[None, :]
        here = (columns < n) & (i[:, None] < n)
        q = tl.load(Q + i[:, None] * n + columns, mask=here, other=0.0)
        E = 0.5 * tl.where(columns == i[:, None], q - 1, q)
        h = tl.load(X_bar + i[:, None] * n + columns, mask=here, other=0.0)
        H = tl.dot(h, tl.trans(E), H, input_precision="ieee")
    tl.debug_barrier()
    store_unpadded(X_bar, H, n, N)
