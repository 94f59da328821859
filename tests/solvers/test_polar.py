import pytest
import torch
from solvers.references import general, skew

from lmc_fast.solvers import polar


@pytest.mark.parametrize("n", (2, 17, 64))
def test_the_pair_is_inverse_and_has_the_given_singular_values(n):
    X, H = skew(3, n, 1.5, torch.float64), general(3, n, 2.0, torch.float64)
    H = H + H.mT
    M, inverse = polar(X, H)
    eye = torch.eye(n, dtype=torch.float64)
    assert (M @ inverse - eye).abs().max() < 1e-11
    assert (inverse @ M - eye).abs().max() < 1e-11
    for m, h in zip(M, H, strict=True):
        assert torch.allclose(torch.linalg.svdvals(m).log().sort()[0], torch.linalg.eigvalsh(h), atol=1e-9)
        assert torch.linalg.det(m) > 0


def test_gradcheck():
    W = general(2, 4, 1.0, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda W: polar(W - W.mT, W + W.mT), W)


def test_refuses_what_has_no_such_inverse():
    with pytest.raises(ValueError, match="skew"):
        polar(torch.ones(2, 3, 3), torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match="agree"):
        polar(torch.zeros(2, 3, 3), torch.zeros(3, 3))
