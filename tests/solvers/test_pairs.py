"""2 x 2: closed forms against mpmath, and against a derivative that mpmath takes."""

import mpmath
import pytest
import torch
from solvers.references import DTYPES, cayley_mpmath, error, expm_mpmath, general, skew

from lmc_fast.solvers import cayley, expm, pairs

NORMS = (1e-8, 1e-4, 0.3, 1.0, 3.0, 30.0, 1e3)
MAPS = {"cayley": (cayley, cayley_mpmath), "expm": (expm, expm_mpmath)}
DEFECTIVE = (
    [[0.0, 1e3], [0.0, 0.0]],
    [[2.5, 0.0], [1e-8, 2.5]],
    [[0.0, 1e-8], [0.0, 0.0]],
    [[1.0, 1.0], [-1.0, -1.0]],
    [[500.0, 500.0], [-500.0, -500.0]],
    [[4.0, -1.0], [1.0, 2.0]],
)


def derivative(reference, x, g):  # (2, 2) each
    """The gradient of <g, f(x)> from the block matrix f([[x, e], [0, x]]), whose corner is f's derivative along e."""
    grad = torch.zeros(2, 2, dtype=torch.float64)
    for i in range(2):
        for j in range(2):
            block = torch.zeros(4, 4, dtype=torch.float64)
            block[:2, :2] = block[2:, 2:] = x
            block[i, 2 + j] = 1
            grad[i, j] = (reference(block)[:2, 2:] * g).sum()
    return grad


def check(name, X, room):
    """Value and gradient of each matrix within `room` roundings of its largest entry."""
    f, reference = MAPS[name]
    eps = torch.finfo(X.dtype).eps
    G = general(len(X), 2, 1.0, X.dtype, seed=5)
    leaf = X.clone().requires_grad_()
    Y = f(leaf)
    Y.backward(G)
    assert Y.dtype == leaf.grad.dtype == X.dtype
    for x, g, y, grad in zip(X, G, Y, leaf.grad, strict=True):
        assert error(y, reference(x.double())) < room * eps
        assert error(grad, derivative(reference, x.double(), g.double())) < room * eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", MAPS)
def test_skew(name, norm, dtype):
    X = skew(4, 2, norm, dtype)
    # An angle that is rounded moves its rotation by ε ‖X‖, but these angles are given; float32 works in float64.
    check(name, X, 1 if dtype == torch.float32 else 16 + (norm if name == "expm" else 0))
    Q = MAPS[name][0](X)
    assert (Q.mT @ Q - torch.eye(2)).abs().max() < 4 * torch.finfo(dtype).eps
    assert torch.equal(Q[:, 0, 0], Q[:, 1, 1]) and torch.equal(Q[:, 0, 1], -Q[:, 1, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", MAPS)
def test_general(name, norm, dtype):
    W = general(6, 2, norm, dtype)
    if name == "expm" and norm > 3:  # shifted, so that its exponential neither overflows nor vanishes
        largest = torch.linalg.eigvals(W.double()).real.amax(-1)
        W = W - (largest - 1).to(dtype)[:, None, None] * torch.eye(2, dtype=dtype)
    check(name, W, 1 if dtype == torch.float32 else 40 * max(1, norm))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("X", DEFECTIVE)
@pytest.mark.parametrize("name", MAPS)
def test_defective(name, X, dtype):
    check(name, torch.tensor([X], dtype=dtype), 1 if dtype == torch.float32 else 16)


@pytest.mark.parametrize("name", MAPS)
def test_on_both_sides_of_every_branch(name):
    """Δ = p² + b c about 0 and about ±1, where the formulas change."""
    squares = torch.tensor([s * d for s in (1, -1) for d in (1e-300, 1e-20, 1e-9, 0.999, 1.0, 1.001)])
    X = torch.zeros(len(squares), 2, 2, dtype=torch.float64)
    X[:, 0, 1], X[:, 1, 0], X[:, 0, 0], X[:, 1, 1] = 1.0, squares, 0.25, 0.25
    check(name, X, 16)
    check(name, torch.zeros(1, 2, 2, dtype=torch.float64), 4)


@pytest.mark.parametrize("name", MAPS)
def test_gradcheck(name):
    W = general(4, 2, 1.5, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(MAPS[name][0], W)


@pytest.mark.parametrize("gap", (1e-3, 1e-8, 1e-12))
def test_nearly_singular(gap):
    X = torch.tensor([[[2 - gap, 1.0], [0.0, -1.0]], [[0.0, 2.0], [2 - gap, 0.0]]], dtype=torch.float64)
    for x, q in zip(X, cayley(X), strict=True):
        assert error(q, cayley_mpmath(x)) < 1e-15 / gap


def test_far_apart_eigenvalues_do_not_overflow_between():
    X = torch.tensor([[[-2000.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, -2000.0]]], dtype=torch.float64)
    assert error(expm(X)[0], expm_mpmath(X[0])) < 1e-12
    assert torch.equal(expm(X)[1], torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)))


def test_what_cannot_be_right_is_refused():
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        cayley(torch.tensor([[[0.0, 2.0], [2.0, 0.0]]]))
    with pytest.raises(OverflowError, match="does not fit"):
        cayley(torch.tensor([[0.0, 1e200], [-1e200, 0.0]], dtype=torch.float64))
    with pytest.raises(OverflowError, match="does not fit"):
        expm(torch.eye(2) * 100)
    with pytest.raises(ValueError, match="no digit"):
        expm(torch.eye(2) * 1e9)


def test_a_result_does_not_depend_on_its_batch():
    X, G = general(67, 2, 2.0, torch.float64), general(67, 2, 1.0, torch.float64, seed=3)
    for forward, backward in ((pairs.cayley, pairs.cayley_backward), (pairs.expm, pairs.expm_backward)):
        for part in (slice(0, 1), slice(3, 10), slice(60, 67)):
            assert torch.equal(forward(X)[part], forward(X[part]))
            assert torch.equal(backward(X, G)[part], backward(X[part], G[part]))


def test_mpmath_agrees_with_the_series():
    """The reference of this file, against a formula that is not a matrix function."""
    with mpmath.workdps(30):
        E = expm_mpmath(torch.tensor([[0.0, -3.0], [3.0, 0.0]], dtype=torch.float64))
        assert float(E[0, 0]) == pytest.approx(float(mpmath.cos(3)), abs=1e-16)
        assert float(E[1, 0]) == pytest.approx(float(mpmath.sin(3)), abs=1e-16)
