"""The matrix exponential in torch operations: the formulation for GPUs and without the C++ extension."""

import torch
from torch import Tensor

from lmc_fast.solvers.checks import require_expm_norm, require_exponential_fits, require_finite
from lmc_fast.solvers.taylor import SCHEMES, Row, Scheme

Plan = tuple[int, int]  # (index into SCHEMES, number of squarings)


Group = tuple[Plan, Tensor | None, int]  # matrices of one plan (None: all), and the length of their tape


def forward_batch(X: Tensor) -> tuple[Tensor, list[Group], list[Tensor]]:  # (batch, n, n)
    """exp(X), and the tapes of the groups of matrices that share a plan, one after the other."""
    if X.numel() == 0:
        return torch.empty_like(X), [], []
    square = X @ X
    plans = plans_for(X, square)
    E = torch.empty_like(X)
    groups: list[Group] = []
    tapes: list[Tensor] = []
    for plan in sorted(set(plans)):
        if len(set(plans)) == 1:
            members = None
            E, tape = forward(X, square, plan)
        else:
            members = torch.tensor([i for i, other in enumerate(plans) if other == plan], device=X.device)
            E[members], tape = forward(X[members], square[members], plan)
        groups.append((plan, members, len(tape)))
        tapes += tape
    require_exponential_fits(E)
    return E, groups, tapes


def backward_batch(groups: list[Group], tapes: list[Tensor], G: Tensor) -> Tensor:  # (batch, n, n)
    X_bar = torch.empty_like(G)
    for plan, members, length in groups:
        tape, tapes = tapes[:length], tapes[length:]
        if members is None:
            return backward(tape, G, plan)
        X_bar[members] = backward(tape, G[members], plan)
    return X_bar


def plans_for(X: Tensor, square: Tensor) -> list[Plan]:  # (batch, n, n) each
    """The plan of each matrix. A skew or symmetric one is normal: ‖X²‖^½ bounds its spectral norm, in any norm.

    Each eigenvalue of a skew matrix counts twice in the Frobenius norm.
    """
    require_finite(X, "expm")
    norm = one_norm(X)
    require_expm_norm(X, float(norm.max()))
    skew, symmetric = ((sign * X.mT == X).flatten(1).all(1) for sign in (-1, 1))
    frobenius = torch.linalg.matrix_norm(square) * torch.where(skew, 0.5**0.5, 1.0)
    bound = torch.minimum(one_norm(square), frobenius).sqrt()
    norm = torch.where(skew | symmetric, torch.minimum(norm, bound), norm)
    return [plan_for(value, X.dtype) for value in norm.tolist()]


def plan_for(norm: float, dtype: torch.dtype) -> Plan:
    """The cheapest polynomial whose bound covers `norm`, else the largest one after enough halvings."""
    for index, scheme in enumerate(SCHEMES):
        if norm <= scheme.theta(dtype):
            return index, 0
    squarings = 0
    while norm > SCHEMES[-1].theta(dtype):  # exact, as the kernels count: the length of the tape depends on it
        norm, squarings = norm / 2, squarings + 1
    return len(SCHEMES) - 1, squarings


def one_norm(X: Tensor) -> Tensor:  # (batch, n, n) -> (batch,)
    return X.abs().sum(-2).amax(-1)


def forward(X: Tensor, square: Tensor, plan: Plan) -> tuple[Tensor, list[Tensor]]:  # (batch, n, n)
    """exp(X) and the tape: A = X/2ˢ, the products P2..., then the matrices that were squared. `square` is X²."""
    scheme, squarings = SCHEMES[plan[0]], plan[1]
    tape = [X * 2.0**-squarings, square * 4.0**-squarings] if squarings else [X, square]
    for left, right in zip(scheme.left[1:], scheme.right[1:], strict=True):
        L = combine(left, tape)
        tape.append(torch.bmm(L, L if left == right else combine(right, tape)))
    E = combine(scheme.result, tape)
    tape.pop()  # the last product is linear in the result: nothing to remember
    for _ in range(squarings):
        tape.append(E)
        E = torch.bmm(E, E)
    return E, tape


def backward(tape: list[Tensor], G: Tensor, plan: Plan) -> Tensor:
    """Reverse mode: a squaring P² gives Ḡ Pᵀ + Pᵀ Ḡ, a product C = L R gives L̄ = C̄ Rᵀ and R̄ = Lᵀ C̄."""
    scheme: Scheme = SCHEMES[plan[0]]
    squarings = plan[1]
    for P in reversed(tape[len(tape) - squarings :]):
        G = torch.baddbmm(torch.bmm(P.mT, G), G, P.mT)
    bars: list[Tensor | None] = [None] * (len(scheme.left) + 1)
    scatter(scheme.result, G, bars)
    for k in reversed(range(len(scheme.left))):
        C = bars[k + 1]
        assert C is not None
        left, right = scheme.left[k], scheme.right[k]
        L = combine(left, tape)
        R = L if left == right else combine(right, tape)
        if left == right:
            scatter(left, torch.baddbmm(torch.bmm(L.mT, C), C, L.mT), bars)
        else:
            scatter(left, torch.bmm(C, R.mT), bars)
            scatter(right, torch.bmm(L.mT, C), bars)
    A_bar = bars[0]
    assert A_bar is not None
    return A_bar * 2.0**-squarings if squarings else A_bar


def combine(row: Row, terms: list[Tensor]) -> Tensor:
    """row[0] I + Σ row[i] terms[i - 1]; a lone term with coefficient 1 is returned as it is."""
    used = [(c, terms[i]) for i, c in enumerate(row[1:]) if c]
    (first, term), *rest = used
    if not rest and first == 1 and not row[0]:
        return term
    out = term * first
    for c, term in rest:
        out.add_(term, alpha=c)
    if row[0]:
        out.diagonal(dim1=-2, dim2=-1).add_(row[0])
    return out


def scatter(row: Row, bar: Tensor, bars: list[Tensor | None]) -> None:
    """The transpose of `combine`: bars[i - 1] += row[i] bar."""
    for i, c in enumerate(row[1:]):
        if c:
            held = bars[i]
            if held is None:
                bars[i] = bar * c
            else:
                held.add_(bar, alpha=c)
