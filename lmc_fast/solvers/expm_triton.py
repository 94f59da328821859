"""The matrix exponential of float32 matrices on a GPU, one program for each matrix, forwards and in reverse.

The kernels run the table of taylor.py, as csrc/expm.h does: a program measures its matrix, chooses its polynomial and
runs it, so that a batch of mixed norms needs one launch and nothing is sorted into groups.

The terms A, P2, ... of a matrix lie in slots of its tape, N x N each. The first power to be squared replaces the last
product, on whose value no gradient depends; the others follow it.
"""

from functools import cache
from math import isfinite

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmc_fast.solvers.checks import require_expm_norm, require_exponential_fits, require_finite
from lmc_fast.solvers.expm_torch import one_norm, plan_for
from lmc_fast.solvers.taylor import SCHEMES, Row
from lmc_fast.solvers.triton_matrices import (
    DEPTH,
    all_finite,
    load_padded,
    load_transposed,
    options,
    padded,
    store,
    store_unpadded,
)

# The table as numbers: for each scheme the left rows, the right rows, the result, the bound, the number of products.
_PRODUCTS = max(len(scheme.left) for scheme in SCHEMES)
_TERMS = tl.constexpr(_PRODUCTS + 2)
_RIGHT = tl.constexpr(_PRODUCTS * (_PRODUCTS + 2))
_RESULT = tl.constexpr(2 * _PRODUCTS * (_PRODUCTS + 2))
_THETA = tl.constexpr(_RESULT.value + _PRODUCTS + 2)
_COUNT = tl.constexpr(_THETA.value + 1)
_SCHEME = tl.constexpr(_COUNT.value + 1)
_SCHEMES = tl.constexpr(len(SCHEMES))
_BASE_SLOTS = tl.constexpr(_PRODUCTS + 1)  # A and the products


@cache
def coefficients(device: torch.device) -> Tensor:
    def fill(row: Row) -> list[float]:
        return [float(value) for value in row] + [0.0] * (_PRODUCTS + 2 - len(row))

    numbers = []
    for scheme in SCHEMES:
        for side in (scheme.left, scheme.right):
            rows = [*side, *[()] * (_PRODUCTS - len(side))]
            numbers += [value for row in rows for value in fill(row)]
        numbers += [*fill(scheme.result), scheme.theta32, len(scheme.left)]
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def forward(X: Tensor, keep_tape: bool) -> tuple[Tensor, Tensor, Tensor]:  # (batch, n, n), float32, contiguous
    """exp(X), the tape (batch, slots, N, N), and the plans (batch, 2). Waits for the device, to check X and exp(X)."""
    batch, n, _ = X.shape
    norm = float(one_norm(X).max())
    if not isfinite(norm):
        require_finite(X, "expm")
    require_expm_norm(X, norm)
    N = padded(n)
    # Room for the most squarings that the largest norm allows, and one more: the kernel adds a column in another order.
    # Without a tape two powers take turns.
    powers = plan_for(norm, X.dtype)[1] + 1 if keep_tape else 2
    tape = X.new_empty(batch, _PRODUCTS + powers, N, N)
    E = torch.empty_like(X)
    plans = torch.empty(batch, 2, dtype=torch.int32, device=X.device)
    overflow = torch.empty(batch, dtype=torch.int32, device=X.device)
    with torch.cuda.device_of(X):
        forward_kernel[(batch,)](
            X,
            E,
            tape,
            plans,
            overflow,
            coefficients(X.device),
            n,
            tape.shape[1],
            keep_tape,
            N,
            DEPTH,
            **options(N, forward=True),
        )
    if bool(overflow.any()):
        require_exponential_fits(E)
    return E, tape, plans


def backward(tape: Tensor, plans: Tensor, G: Tensor) -> Tensor:  # G (batch, n, n), float32, contiguous
    """X̄ for the gradient G of exp(X)."""
    batch, n, _ = G.shape
    N = tape.shape[-1]
    X_bar = torch.empty_like(G)
    bars = G.new_empty(batch, _PRODUCTS + 1, N, N)
    with torch.cuda.device_of(G):
        backward_kernel[(batch,)](
            tape, plans, G, X_bar, bars, coefficients(G.device), n, tape.shape[1], N, DEPTH, **options(N, forward=False)
        )
    return X_bar


@triton.jit
def combine(row, terms, count, r, c, N: tl.constexpr):
    """Σ row[t] P[t] at the entries (r, c) of the terms, P[0] being the identity."""
    out = tl.where(r == c, tl.load(row), 0.0)
    for t in range(1, count):
        weight = tl.load(row + t)
        if weight != 0:
            out += weight * tl.load(terms + (t - 1) * N * N + r * N + c)
    return out


@triton.jit
def product(left, right, terms, count, N: tl.constexpr, K: tl.constexpr):
    """(Σ left[t] P[t]) (Σ right[t] P[t])"""
    i = tl.arange(0, N)
    b = tl.arange(0, K)
    out = tl.zeros((N, N), tl.float32)
    for k in range(0, N, K):
        L = combine(left, terms, count, i[:, None], k + b[None, :], N)
        R = combine(right, terms, count, k + b[:, None], i[None, :], N)
        out = tl.dot(L, R, out, input_precision="ieee")
    return out


@triton.jit
def square(P, N: tl.constexpr, K: tl.constexpr):
    i = tl.arange(0, N)
    b = tl.arange(0, K)
    out = tl.zeros((N, N), tl.float32)
    for k in range(0, N, K):
        L = tl.load(P + i[:, None] * N + k + b[None, :])
        R = tl.load(P + (k + b[:, None]) * N + i[None, :])
        out = tl.dot(L, R, out, input_precision="ieee")
    return out


@triton.jit
def forward_kernel(
    X, E, tape, plans, overflow, table, n, slots, keep_tape: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    X += program * n * n
    E += program * n * n
    tape += program * slots * N * N
    i = tl.arange(0, N)
    a = load_padded(X, n, N)
    transposed = load_transposed(X, n, N)
    skew = tl.sum(tl.sum((a + transposed != 0).to(tl.int32), 1), 0) == 0
    symmetric = tl.sum(tl.sum((a != transposed).to(tl.int32), 1), 0) == 0
    norm = tl.max(tl.sum(tl.abs(a), 0), 0)
    store(tape, a, N)
    tl.debug_barrier()
    a2 = square(tape, N, K)
    store(tape + N * N, a2, N)
    if skew | symmetric:
        # A normal matrix: ‖A²‖^½ bounds its spectral norm. Each eigenvalue of a skew one counts twice in ‖A²‖_F.
        frobenius = tl.sqrt(tl.sum(tl.sum(a2 * a2, 1), 0) * tl.where(skew, 0.5, 1.0))
        norm = tl.minimum(norm, tl.sqrt(tl.minimum(tl.max(tl.sum(tl.abs(a2), 0), 0), frobenius)))

    scheme = 0
    for s in range(_SCHEMES - 1):
        scheme += (norm > tl.load(table + s * _SCHEME + _THETA)).to(tl.int32)
    largest = tl.load(table + (_SCHEMES - 1) * _SCHEME + _THETA)
    squarings = 0
    scale = 1.0
    for _ in range(32):  # ‖X‖₁ ≤ 1/ε needs fewer
        more = norm * scale > largest
        squarings += more.to(tl.int32)
        scale = tl.where(more, 0.5 * scale, scale)
    tl.store(plans + 2 * program, scheme)
    tl.store(plans + 2 * program + 1, squarings)

    table += scheme * _SCHEME
    products = tl.load(table + _COUNT).to(tl.int32)
    tl.debug_barrier()
    store(tape, load_padded(X, n, N) * scale, N)
    at = tape + N * N + i[:, None] * N + i[None, :]
    tl.store(at, tl.load(at) * (scale * scale))
    for k in range(1, products):
        tl.debug_barrier()
        out = product(table + k * _TERMS, table + _RIGHT + k * _TERMS, tape, k + 2, N, K)
        store(tape + (k + 1) * N * N, out, N)
    tl.debug_barrier()
    e = combine(table + _RESULT, tape, products + 2, i[:, None], i[None, :], N)
    for s in range(squarings):
        if keep_tape:
            P = tape + (products + s) * N * N
        else:
            P = tape + (products + s % 2) * N * N
        tl.debug_barrier()
        store(P, e, N)
        tl.debug_barrier()
        e = square(P, N, K)
    e = tl.where((i[:, None] < n) & (i[None, :] < n), e, 0.0)
    store_unpadded(E, e, n, N)
    tl.store(overflow + program, (all_finite(e) == 0).to(tl.int32))


@triton.jit
def scatter(row, value, bars, count, N: tl.constexpr):
    """bars[t] += row[t] value, the transpose of `combine`."""
    i = tl.arange(0, N)
    for t in range(1, count):
        weight = tl.load(row + t)
        if weight != 0:
            bar = bars + (t - 1) * N * N + i[:, None] * N + i[None, :]
            tl.store(bar, tl.load(bar) + weight * value)


@triton.jit
def backward_kernel(tape, plans, G, X_bar, bars, table, n, slots, N: tl.constexpr, K: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    tape += program * slots * N * N
    bars += program * _BASE_SLOTS * N * N
    i = tl.arange(0, N)
    b = tl.arange(0, K)
    squarings = tl.load(plans + 2 * program + 1)
    table += tl.load(plans + 2 * program) * _SCHEME
    products = tl.load(table + _COUNT).to(tl.int32)

    # A squaring P² gives P̄ = Ḡ Pᵀ + Pᵀ Ḡ.
    g = load_padded(G + program * n * n, n, N)
    scale = 1.0
    for s in range(squarings):
        scale *= 0.5
        P = tape + (products + squarings - 1 - s) * N * N
        tl.debug_barrier()
        store(bars, g, N)
        tl.debug_barrier()
        g = tl.zeros((N, N), tl.float32)
        for k in range(0, N, K):
            L = tl.load(bars + i[:, None] * N + k + b[None, :])
            R = tl.load(P + i[None, :] * N + k + b[:, None])
            g = tl.dot(L, R, g, input_precision="ieee")
        for k in range(0, N, K):
            L = tl.load(P + (k + b[None, :]) * N + i[:, None])
            R = tl.load(bars + (k + b[:, None]) * N + i[None, :])
            g = tl.dot(L, R, g, input_precision="ieee")
    tl.debug_barrier()
    for t in range(1, products + 2):
        store(bars + (t - 1) * N * N, g * tl.load(table + _RESULT + t), N)

    # A product C = L R gives L̄ = C̄ Rᵀ and R̄ = Lᵀ C̄.
    for j in range(products):
        k = products - 1 - j
        left = table + k * _TERMS
        right = left + _RIGHT
        C = bars + (k + 1) * N * N
        tl.debug_barrier()
        bar = tl.zeros((N, N), tl.float32)
        for d in range(0, N, K):
            c = tl.load(C + i[:, None] * N + d + b[None, :])
            R = combine(right, tape, k + 2, i[None, :], d + b[:, None], N)
            bar = tl.dot(c, R, bar, input_precision="ieee")
        scatter(left, bar, bars, k + 2, N)
        bar = tl.zeros((N, N), tl.float32)
        for d in range(0, N, K):
            L = combine(left, tape, k + 2, d + b[None, :], i[:, None], N)
            c = tl.load(C + (d + b[:, None]) * N + i[None, :])
            bar = tl.dot(L, c, bar, input_precision="ieee")
        tl.debug_barrier()
        scatter(right, bar, bars, k + 2, N)
    tl.debug_barrier()
    a = tl.load(bars + i[:, None] * N + i[None, :])
    store_unpadded(X_bar + program * n * n, a * scale, n, N)
