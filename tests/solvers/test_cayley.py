import pytest
import torch
from solvers.references import DTYPES, SIZES, assert_as_good_as, cayley_lu, cayley_mpmath, error, general, skew

from lmc_fast.solvers import cayley, cayley_torch

NORMS = (1e-8, 1e-3, 1.0, 30.0, 1e3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_skew_is_as_good_as_plain_torch(n, dtype):
    for norm in NORMS:
        X = skew(2, n, norm, dtype)
        if dtype == torch.float32:
            truth = cayley_lu(X.double())
        elif n <= 17:
            truth = torch.stack([cayley_mpmath(x) for x in X])
        else:
            continue
        assert_as_good_as(cayley(X), cayley_lu(X), truth)
        assert_as_good_as(cayley_torch.forward(X), cayley_lu(X), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_skew_gives_a_rotation(n, dtype):
    def defect(Q):
        return float((Q.double().mT @ Q.double() - torch.eye(n)).abs().max())

    for norm in NORMS:
        X = skew(2, n, norm, dtype)
        Q = cayley(X)
        assert defect(Q) < 2 * defect(cayley_lu(X)) + 20 * torch.finfo(dtype).eps
        assert (torch.linalg.det(Q[0].double()) - 1).abs() < 1e-3


@pytest.mark.parametrize("n", (2, 3, 17))
def test_general_matrices_against_mpmath(n):
    for norm in (1e-8, 1.0, 50.0):
        X = general(2, n, norm, torch.float64)
        assert_as_good_as(cayley(X), cayley_lu(X), torch.stack([cayley_mpmath(x) for x in X]))


@pytest.mark.parametrize("gap", (1e-3, 1e-8, 1e-12))
def test_nearly_singular(gap):
    """I - X/2 with a singular value of about `gap`."""
    W = general(1, 6, 1.0, torch.float64)[0]
    X = (W @ torch.diag(torch.tensor([2 - 2 * gap, 0.5, -1, 3, 0.1, -2], dtype=torch.float64)) @ torch.linalg.inv(W))[
        None
    ]
    truth = torch.stack([cayley_mpmath(x) for x in X])
    assert truth.abs().max() > 0.1 / gap
    assert_as_good_as(cayley(X), cayley_lu(X), truth)


def test_zero_pivot_needs_and_gets_pivoting():
    X = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]], dtype=torch.float64)  # I - X/2 has a zero diagonal
    assert error(cayley(X), cayley_mpmath(X[0])[None]) < 1e-15


def test_defective():
    X = (0.5 * torch.eye(5, dtype=torch.float64) + torch.diag(torch.ones(4, dtype=torch.float64), 1))[None]
    assert error(cayley(X), cayley_mpmath(X[0])[None]) < 1e-14


def test_singular_is_an_error():
    with pytest.raises(torch.linalg.LinAlgError):
        cayley(2 * torch.eye(3))


def test_almost_skew_is_not_taken_for_skew():
    X = skew(1, 64, 1.0, torch.float64)
    X[0, 5, 3] += 1e-3
    assert error(cayley(X), cayley_lu(X)) < 1e-14


@pytest.mark.parametrize("n", (1, 2, 3, 9, 17))
def test_gradcheck(n):
    W = general(2, n, 1.5, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(cayley, W, fast_mode=n > 9)
    assert torch.autograd.gradcheck(lambda W: cayley(W - W.mT), W, fast_mode=n > 9)


@pytest.mark.parametrize("n", (17, 64, 129))
def test_gradient_is_as_good_as_plain_torch(n):
    X = skew(2, n, 1.0, torch.float32)
    G = general(2, n, 1.0, torch.float32, seed=2)

    def gradient(f, dtype):
        leaf = X.to(dtype, copy=True).requires_grad_()
        f(leaf).backward(G.to(dtype))
        return leaf.grad

    truth = gradient(cayley_lu, torch.float64)
    assert_as_good_as(gradient(cayley, torch.float32), gradient(cayley_lu, torch.float32), truth)
    assert error(gradient(cayley, torch.float64), truth) < 1e-13
