"""Matrix exponential by Taylor polynomials and squaring, with a reverse-mode backward pass.

torch differentiates matrix_exp through the exponential of a 2n x 2n block; here the polynomial and the squarings are
differentiated as the straight-line program they are: two products for each product of the forward pass.
"""

from math import ceil, log2

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from lmc_fast.solvers._checks import as_batch, require_finite
from lmc_fast.solvers.taylor import SCHEMES, Row, Scheme

Plan = tuple[int, int]  # (index into SCHEMES, number of squarings)


def expm(X: Tensor) -> Tensor:  # (..., n, n) -> (..., n, n)
    """exp(X), float32 or float64, n ≥ 1. Each matrix gets its own polynomial degree and number of squarings.

    Scaling follows ‖X‖₁, or √‖X²‖₁ where that is smaller and X is exactly skew or symmetric (both bound the spectral
    norm of a normal matrix). Gradient: reverse mode. No double backward.

    Raises TypeError or ValueError for a wrong dtype or shape, a non-finite entry, or ‖X‖₁ > 1/ε (no digit would be
    right); OverflowError where exp(X) does not fit the dtype.
    """
    E: Tensor = _Expm.apply(as_batch(X, "expm"))
    return E.reshape(X.shape)


class _Expm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, X: Tensor) -> Tensor:  # (batch, n, n)
        E = torch.empty_like(X)
        ctx.groups = []  # type: ignore[attr-defined]
        saved: list[Tensor] = []
        for plan, members in group_by_plan(X):
            A = X if members is None else X[members]
            result, tape = expm_forward_torch(A, plan)
            if members is None:
                E = result
            else:
                E[members] = result
            ctx.groups.append((plan, members, len(tape)))  # type: ignore[attr-defined]
            saved += tape
        if not bool(torch.isfinite(E).all()):
            raise OverflowError(f"expm: exp(X) does not fit {X.dtype}; its largest eigenvalue is too large")
        ctx.save_for_backward(*saved)
        return E

    @staticmethod
    @once_differentiable
    def backward(ctx, G: Tensor) -> Tensor:
        saved = list(ctx.saved_tensors)
        grad = torch.empty_like(G)
        for plan, members, length in ctx.groups:
            tape, saved = saved[:length], saved[length:]
            if members is None:
                return expm_backward_torch(tape, G, plan)
            grad[members] = expm_backward_torch(tape, G[members], plan)
        return grad


def group_by_plan(X: Tensor) -> list[tuple[Plan, Tensor | None]]:  # (batch, n, n)
    """Matrices that share degree and squarings; the index is None where all of them do."""
    if X.numel() == 0:
        return []
    require_finite(X, "expm")
    norm = one_norm(X)
    normal = ((-X.mT == X).flatten(1).all(1)) | ((X.mT == X).flatten(1).all(1))
    limit = 1 / torch.finfo(X.dtype).eps
    worst = float(norm.max())
    if worst > limit:
        raise ValueError(f"expm: ‖X‖₁ = {worst:.1e} exceeds 1/ε = {limit:.1e}: no digit of the result would be right")
    if bool(normal.any()):
        norm = torch.where(normal, torch.minimum(norm, one_norm(X @ X).sqrt()), norm)
    plans = [plan_for(value, X.dtype) for value in norm.tolist()]
    distinct = sorted(set(plans))
    if len(distinct) == 1:
        return [(distinct[0], None)]
    of = {plan: [i for i, other in enumerate(plans) if other == plan] for plan in distinct}
    return [(plan, torch.tensor(of[plan], device=X.device)) for plan in distinct]


def plan_for(norm: float, dtype: torch.dtype) -> Plan:
    """The cheapest polynomial whose bound covers `norm`, else the largest one after enough halvings."""
    for index, scheme in enumerate(SCHEMES):
        if norm <= scheme.theta(dtype):
            return index, 0
    return len(SCHEMES) - 1, max(0, ceil(log2(norm / SCHEMES[-1].theta(dtype))))


def one_norm(X: Tensor) -> Tensor:  # (batch, n, n) -> (batch,)
    return X.abs().sum(-2).amax(-1)


def expm_forward_torch(X: Tensor, plan: Plan) -> tuple[Tensor, list[Tensor]]:
    """exp(X) and the tape: A = X/2ˢ, the products P2..., then the matrices that were squared."""
    scheme, squarings = SCHEMES[plan[0]], plan[1]
    tape = [X * 2.0**-squarings if squarings else X]
    for left, right in zip(scheme.left, scheme.right, strict=True):
        L = combine(left, tape)
        tape.append(torch.bmm(L, L if left == right else combine(right, tape)))
    E = combine(scheme.result, tape)
    tape.pop()  # the last product is linear in the result: nothing to remember
    for _ in range(squarings):
        tape.append(E)
        E = torch.bmm(E, E)
    return E, tape


def expm_backward_torch(tape: list[Tensor], G: Tensor, plan: Plan) -> Tensor:
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
