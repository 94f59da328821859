"""Cayley map and exponential of 2 x 2 matrices (the planes that RoPE turns) in closed form, on any device.

Element-wise over the batch, in float64 whatever the input: one rounding at the end is all that float32 sees.
"""

import torch
from torch import Tensor

from lmc_fast.solvers.checks import require_expm_norm, require_exponential_fits, require_finite


def cayley(X: Tensor) -> Tensor:  # (batch, 2, 2)
    """With H = X/2: ((1 - det H) I + H - adj H) / det(I - H). Raises as `lmc_fast.cayley`. Skew X gives a rotation."""
    rows = _rows(X) / 2
    a, b, c, d = rows
    product = a * d - b * c
    Q = _matrix(1 - product + (a - d), 2 * b, 2 * c, 1 - product - (a - d)) / _determinant(rows)[:, None, None]
    if not bool(torch.isfinite(Q).all()):
        require_finite(X, "cayley")
        if bool((_determinant(rows) == 0).any()):
            raise torch.linalg.LinAlgError("cayley: I - X/2 is singular")
        raise OverflowError("cayley: the square of an entry of X does not fit float64")
    return Q.to(X.dtype)


def cayley_backward(X: Tensor, G: Tensor) -> Tensor:  # (batch, 2, 2) each
    """X̄ = Sᵀ G Sᵀ with S = (I - X/2)⁻¹, from X: near -I, S from Q would cancel."""
    rows = _rows(X) / 2
    a, b, c, d = rows
    S_transposed = _matrix(1 - d, c, b, 1 - a) / _determinant(rows)[:, None, None]
    return _product(_product(S_transposed, G.double()), S_transposed).to(X.dtype)


def expm(X: Tensor) -> Tensor:  # (batch, 2, 2)
    """exp(m I + Y) = c I + s Y for Y of trace 0, Y² = Δ I. Raises as `lmc_fast.expm`."""
    m, p, b, c, square = _parts(X)
    norm = float(X.abs().sum(-2).max()) if len(X) else 0.0
    if not norm <= torch.finfo(X.dtype).max:
        require_finite(X, "expm")
    require_expm_norm(X, norm)
    cosh, sinh = _cosh_sinh(m, square)
    E = _matrix(cosh + sinh * p, sinh * b, sinh * c, cosh - sinh * p).to(X.dtype)
    require_exponential_fits(E)
    return E


def expm_backward(X: Tensor, G: Tensor) -> Tensor:  # (batch, 2, 2) each
    """X̄ through m, Y and Δ, on which cosh √Δ and sinh √Δ / √Δ depend smoothly."""
    m, p, b, c, square = _parts(X)
    cosh, sinh = _cosh_sinh(m, square)
    g11, g12, g21, g22 = _rows(G)
    trace, along = g11 + g22, p * (g11 - g22) + b * g12 + c * g21  # gradients of c and s
    square_bar = trace * sinh / 2 + along * _sinh_slope(m, square, cosh, sinh)
    m_bar = trace * cosh + along * sinh
    p_bar = sinh * (g11 - g22) + 2 * square_bar * p
    b_bar, c_bar = sinh * g12 + square_bar * c, sinh * g21 + square_bar * b
    return _matrix((m_bar + p_bar) / 2, b_bar, c_bar, (m_bar - p_bar) / 2).to(X.dtype)


def _rows(X: Tensor) -> Tensor:  # (batch, 2, 2) -> (4, batch), float64, each entry's batch contiguous
    return X.double().flatten(1).T.contiguous()


def _matrix(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:  # (batch,) each -> (batch, 2, 2)
    return torch.stack((a, b, c, d), 1).unflatten(1, (2, 2))


def _product(A: Tensor, B: Tensor) -> Tensor:  # (batch, 2, 2) each
    return (A[:, :, :, None] * B[:, None]).sum(2)


def _determinant(half: Tensor) -> Tensor:  # (4, batch), H -> det(I - H)
    a, b, c, d = half
    return (1 - a) * (1 - d) - b * c


def _parts(X: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """m, p, b, c, Δ of X = m I + Y, Y = [[p, b], [c, -p]], Y² = Δ I."""
    a, b, c, d = _rows(X)
    p = (a - d) / 2
    return (a + d) / 2, p, b, c, p * p + b * c


def _cosh_sinh(m: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """eᵐ cosh √Δ and eᵐ sinh √Δ / √Δ; for Δ < 0 eᵐ cos √-Δ and eᵐ sin √-Δ / √-Δ. No intermediate overflows."""
    root = square.abs().sqrt()
    safe = torch.where(root == 0, 1.0, root)
    real = square > 0
    grown = torch.exp(torch.where(real, m + root, m))
    less = -torch.expm1(-2 * root)  # 1 - e^(-2 √Δ)
    cosh = grown * torch.where(real, 1 - less / 2, torch.cos(root))
    sinh = grown * torch.where(real, less / 2, torch.sin(root)) / safe
    return cosh, torch.where(root == 0, grown, sinh)


def _sinh_slope(m: Tensor, square: Tensor, cosh: Tensor, sinh: Tensor) -> Tensor:
    """The derivative of eᵐ sinh √Δ / √Δ in Δ: (cosh - sinh) / 2Δ, near 0 its series Σ k Δᵏ⁻¹ / (2k + 1)!."""
    near = square.abs() < 1
    small = torch.where(near, square, 0.0)
    series = torch.zeros_like(small)
    for k in range(10, 0, -1):
        series = series * small + _SLOPES[k]
    return torch.where(near, m.exp() * series, (cosh - sinh) / (2 * torch.where(near, 1.0, square)))


_SLOPES = {k: k / float(torch.arange(1, 2 * k + 2, dtype=torch.float64).prod()) for k in range(1, 11)}
