"""Rounding X alone moves exp(X) by ε ‖X‖, relative to it: that is the floor of the comparisons at large norms."""

import pytest
import torch
from solvers.references import SIZES, assert_as_good_as, error, expm_mpmath, expm_scipy, general, skew

from lmc_fast.solvers import expm, expm_torch
from lmc_fast.solvers.taylor import SCHEMES


def symmetric(batch, n, norm, dtype):
    W = general(batch, n, norm, dtype)
    return (W + W.mT) / 2


@pytest.mark.parametrize("n", SIZES)
def test_float32_is_as_good_as_plain_torch(n):
    cases = [(skew, 1e-8), (skew, 1.0), (skew, 1e3), (symmetric, 1.0), (general, 1.0)]
    if n <= 64:
        cases += [(skew, 1e-3), (skew, 0.3), (skew, 30.0), (symmetric, 1e-8), (symmetric, 20.0), (general, 5.0)]
    for kind, norm in cases:
        X = kind(1, n, norm, torch.float32)
        truth, plain = expm_scipy(X), torch.linalg.matrix_exp(X)
        assert_as_good_as(expm(X), plain, truth, norm)
        assert_as_good_as(expm_torch.forward_batch(X)[0], plain, truth, norm)


@pytest.mark.parametrize("n", (2, 3, 17))
def test_float64_against_mpmath(n):
    for kind, norms in ((skew, (1e-8, 1e-3, 1.0, 30.0, 1e3)), (symmetric, (1.0, 100.0)), (general, (1e-8, 1.0, 30.0))):
        for norm in norms:
            X = kind(1, n, norm, torch.float64)
            assert_as_good_as(expm(X), torch.linalg.matrix_exp(X), expm_mpmath(X[0])[None], norm)


@pytest.mark.parametrize("n", SIZES)
def test_float64_against_scipy(n):
    for kind, norm in ((skew, 1.0), (skew, 50.0), (general, 3.0)):
        X = kind(1, n, norm, torch.float64)
        assert error(expm(X), expm_scipy(X)) < 1e-13


@pytest.mark.parametrize(
    "X",
    (
        [[0.0, 1e3], [0.0, 0.0]],
        [[1.0, 1e3], [0.0, 1.0]],
        [[-2.0, 1.0, 0.0], [0.0, -2.0, 1.0], [0.0, 0.0, -2.0]],
        [[0.0, 1e-8, 0.0], [0.0, 0.0, 1e8], [0.0, 0.0, 0.0]],
    ),
)
def test_defective(X):
    X = torch.tensor([X], dtype=torch.float64)
    assert_as_good_as(expm(X), torch.linalg.matrix_exp(X), expm_mpmath(X[0])[None])


def test_every_polynomial_and_several_squarings_in_one_batch():
    norms = [scale * scheme.theta64 for scheme in SCHEMES for scale in (0.6, 0.999)] + [3.0, 9.0, 40.0]
    W = general(len(norms), 9, 1.0, torch.float64)
    X = W / W.abs().sum(-2).amax(-1)[:, None, None] * torch.tensor(norms, dtype=torch.float64)[:, None, None]
    assert error(expm(X), expm_scipy(X)) < 1e-13
    for x, alone in zip(X, expm(X), strict=True):
        assert torch.equal(expm(x), alone), "a matrix's result depends on its batch"
    leaf = X.clone().requires_grad_()
    G = general(len(norms), 9, 1.0, torch.float64, seed=3)
    expm(leaf).backward(G)
    plain = X.clone().requires_grad_()
    torch.linalg.matrix_exp(plain).backward(G)
    for mine, truth in zip(leaf.grad, plain.grad, strict=True):
        assert error(mine, truth) < 1e-12


@pytest.mark.parametrize("n", (1, 2, 3, 9))
@pytest.mark.parametrize("norm", (1e-9, 1e-4, 0.04, 0.25, 1.0, 6.0))
def test_gradcheck(n, norm):
    """One norm for each degree, and one with squarings."""
    W = general(2, n, norm, torch.float64).requires_grad_()
    scaled = W.detach().clone().div_(norm).requires_grad_()
    assert torch.autograd.gradcheck(lambda W: expm(norm * W), scaled, fast_mode=n > 3)
    assert torch.autograd.gradcheck(lambda W: expm(norm * (W - W.mT)), scaled, fast_mode=n > 3)


@pytest.mark.parametrize("n", (17, 64, 129))
@pytest.mark.parametrize("norm", (0.3, 1.0, 30.0))
def test_gradient_is_as_good_as_plain_torch(n, norm):
    X = skew(1, n, norm, torch.float32)
    G = general(1, n, 1.0, torch.float32, seed=2)

    def gradient(f, dtype):
        leaf = X.to(dtype, copy=True).requires_grad_()
        f(leaf).backward(G.to(dtype))
        return leaf.grad

    truth = gradient(torch.linalg.matrix_exp, torch.float64)
    assert_as_good_as(gradient(expm, torch.float32), gradient(torch.linalg.matrix_exp, torch.float32), truth, norm)
    assert error(gradient(expm, torch.float64), truth) < 1e-12


def test_what_cannot_be_right_is_refused():
    with pytest.raises(OverflowError, match="does not fit"):
        expm(torch.eye(3) * 100)
    with pytest.raises(ValueError, match="no digit"):
        expm(torch.eye(3) * 1e9)
