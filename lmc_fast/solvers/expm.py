"""Matrix exponential by Taylor polynomials and squaring, with a reverse-mode backward pass.

torch differentiates matrix_exp through the exponential of a 2n x 2n block; here the polynomial and the squarings are
differentiated as the straight-line program they are: two products for each product of the forward pass.
"""

from functools import cache
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmc_fast.implementations import extension, triton_takes
from lmc_fast.solvers import expm_torch, pairs
from lmc_fast.solvers.checks import (
    as_batch,
    on_cpu,
    once_differentiable,
    require_expm_norm,
    require_exponential_fits,
    require_finite,
    suffix,
)
from lmc_fast.solvers.taylor import SCHEMES


def expm(X: Tensor) -> Tensor:  # (..., n, n) -> (..., n, n)
    """exp(X). Each matrix gets its own polynomial degree and number of squarings.

    Scaling follows ‖X‖₁; where X is exactly skew or symmetric, a closer bound of its spectral norm from X² and X³. n =
    2 has a closed form. Gradient: reverse mode over the saved products; no double backward.

    Args:
        X: square matrices (..., n, n), float32 or float64, n ≥ 1.

    Returns:
        exp(X) (..., n, n), of the same dtype and device.

    Raises:
        TypeError: X is no tensor, or of another dtype.
        ValueError: X is not square, has an entry that is not finite, or ‖X‖₁ > 1/ε: no digit would be right.
        OverflowError: exp(X) does not fit the dtype.

    >>> X = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    >>> lmc.expm(X)
    tensor([[1., 1.],
            [0., 1.]])
    """
    E: Tensor = _Expm.apply(as_batch(X, "expm"))  # type: ignore[no-untyped-call]
    return E.reshape(X.shape)


class _Expm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, X: Tensor) -> Tensor:  # (batch, n, n)
        saved: list[Tensor] = []
        if X.shape[-1] == 2:
            E, ctx.reverse = pairs.expm(X), pairs.expm_backward
        elif triton_takes(X):
            from lmc_fast.solvers import expm_triton

            E, *saved = expm_triton.forward(X, keep_tape=ctx.needs_input_grad[0])
            ctx.reverse = lambda X, tape, plans, G: expm_triton.backward(tape, plans, G)
        elif on_cpu(X) and extension() is not None:
            E, tape = _forward_native(X, keep_tape=ctx.needs_input_grad[0])
            ctx.reverse = lambda X, G: _backward_native(X, tape, G)
        else:
            E, groups, saved = expm_torch.forward_batch(X)
            ctx.reverse = lambda X, *tapes_and_G: expm_torch.backward_batch(
                groups, list(tapes_and_G[:-1]), tapes_and_G[-1]
            )
        ctx.save_for_backward(X, *saved)  # X always: through it a double backward finds its way to the error
        return E

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> Tensor:
        X_bar: Tensor = ctx.reverse(*ctx.saved_tensors, G.contiguous())
        return X_bar


class _Tape(NamedTuple):
    """What the C++ forward pass leaves for the backward pass."""

    products: Any  # _C.Buffer, or None
    squarings: int  # each matrix has room for this many
    plans: Tensor  # (batch, 2), int32: each matrix's scheme and squarings


@cache
def _solver() -> Any:
    """The C++ solver, told the polynomials."""
    native = extension()
    assert native is not None
    solver = native.Expm()
    for s in SCHEMES:
        rows = [[list(map(float, row)) for row in side] for side in (s.left, s.right)]
        solver.add(s.theta32, s.theta64, *rows, list(map(float, s.result)))
    return solver


def _forward_native(X: Tensor, keep_tape: bool) -> tuple[Tensor, _Tape]:  # (batch, n, n)
    native = extension()
    assert native is not None
    batch, n, _ = X.shape
    E = torch.empty_like(X)
    tape = _Tape(None, 0, torch.empty(batch, 2, dtype=torch.int32))
    if keep_tape:
        # Room for the most squarings that the largest ‖X‖₁ allows. What a matrix does not use is never touched.
        norm = getattr(native, f"one_norm_{suffix(X)}")(X.data_ptr(), batch, n, torch.get_num_threads())
        if isfinite(norm):
            require_expm_norm(X, norm)
            squarings = expm_torch.plan_for(norm, X.dtype)[1]
            products = getattr(_solver(), f"tape_{suffix(X)}")(batch, n, squarings)
            tape = tape._replace(products=products, squarings=squarings)
    run = getattr(_solver(), f"forward_{suffix(X)}")
    _, status = run(
        X.data_ptr(), E.data_ptr(), batch, n, tape.products, tape.squarings, tape.plans.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    if status:
        require_finite(X, "expm")
        require_expm_norm(X, float(expm_torch.one_norm(X).max()))
        require_exponential_fits(E)
    return E, tape


def _backward_native(X: Tensor, tape: _Tape, G: Tensor) -> Tensor:  # (batch, n, n)
    X_bar = torch.empty_like(X)
    run = getattr(_solver(), f"backward_{suffix(X)}")
    run(
        X.data_ptr(), tape.products, tape.squarings, tape.plans.data_ptr(), G.data_ptr(), X_bar.data_ptr(),
        *X.shape[:2], torch.get_num_threads(),
    )  # fmt: skip
    return X_bar
