"""The Triton kernels under the interpreter, on CPU tensors. Run by test_triton.py in a process of its own."""

from importlib import import_module

import numpy as np
import pytest
import torch
import triton
from solvers.references import assert_as_good_as, cayley_lu, error, expm_scipy, general, skew

from lmc_fast.solvers import cayley, cayley_triton, expm, expm_torch, expm_triton
from lmc_fast.solvers.taylor import SCHEMES
from lmc_fast.solvers.triton_matrices import DEPTH, options, padded


def version(module) -> tuple[int, ...]:
    return tuple(map(int, module.__version__.split(".")[:2]))


OLD_INTERPRETER = version(triton) < (3, 7) and version(np) >= (2, 4)
pytestmark = pytest.mark.skipif(OLD_INTERPRETER, reason="triton 3.6 cannot interpret range(loaded number) on numpy 2.4")

SIZES = (1, 3, 16, 33, 64)
F32 = torch.float32


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Uninitialised memory is NaN, or -1."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        make = getattr(owner, name)

        def filled(*a, make=make, **k):
            out = make(*a, **k)
            return out.fill_(float("nan") if out.is_floating_point() else -1)

        monkeypatch.setattr(owner, name, filled)


@pytest.fixture
def through_the_front_door(monkeypatch):
    for name in ("cayley", "expm"):
        module = import_module(f"lmc_fast.solvers.{name}")  # the attribute of that name is the function
        monkeypatch.setattr(module, "triton_takes", lambda X: X.dtype == F32)


def defect(Q):
    return float((Q.double().mT @ Q.double() - torch.eye(Q.shape[-1])).abs().max())


def gradient(f, X, G):
    leaf = X.clone().requires_grad_()
    f(leaf).backward(G)
    return leaf.grad


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("norm", (1e-8, 1.0, 1e3))
def test_cayley(n, norm):
    X, G = skew(2, n, norm, F32), general(2, n, 1.0, F32, seed=2)
    Q = cayley_triton.forward(X)
    assert_as_good_as(Q, cayley_lu(X), cayley_lu(X.double()))
    assert defect(Q) < 2 * defect(cayley_lu(X)) + 2e-6
    truth = gradient(cayley_lu, X.double(), G.double())
    assert_as_good_as(cayley_triton.backward(Q, G), gradient(cayley_lu, X, G), truth)


@pytest.mark.parametrize("n", (3, 20))
def test_cayley_leaves_what_is_not_skew_or_not_finite_to_others(n):
    X = skew(3, n, 1.0, F32)
    for i, j, value in ((2, 1, 7.0), (1, 1, 1e-6), (0, 2, float("nan")), (2, 0, float("inf"))):
        bad = X.clone()
        bad[1, i, j] = value
        assert cayley_triton.forward(bad) is None
    bad[1, 0, 2] = -bad[1, 2, 0]
    assert cayley_triton.forward(bad) is None
    assert cayley_triton.forward(X) is not None


@pytest.mark.parametrize("n", SIZES)
def test_expm(n):
    for kind, norm in ((skew, 1e-8), (skew, 0.3), (skew, 1.0), (skew, 30.0), (general, 1.0), (general, 5.0)):
        X, G = kind(2, n, norm, F32), general(2, n, 1.0, F32, seed=2)
        E, tape, plans = expm_triton.forward(X, keep_tape=True)
        assert_as_good_as(E, torch.linalg.matrix_exp(X), expm_scipy(X), norm)
        assert torch.equal(E, expm_triton.forward(X, keep_tape=False)[0])
        truth = gradient(torch.linalg.matrix_exp, X.double(), G.double())
        plain = gradient(torch.linalg.matrix_exp, X, G)
        assert_as_good_as(expm_triton.backward(tape, plans, G), plain, truth, norm)


def test_every_polynomial_and_several_squarings_in_one_batch():
    norms = [scale * scheme.theta32 for scheme in SCHEMES for scale in (0.6, 0.999, 1.001)] + [9.0, 40.0]
    W = general(len(norms), 9, 1.0, torch.float64)
    X = (W / expm_torch.one_norm(W)[:, None, None] * torch.tensor(norms)[:, None, None]).float()
    G = general(len(norms), 9, 1.0, F32, seed=3)
    E, tape, plans = expm_triton.forward(X, keep_tape=True)
    grad = expm_triton.backward(tape, plans, G)
    assert {scheme for scheme, _ in plans.tolist()} == set(range(len(SCHEMES)))
    assert plans[:, 1].max() >= 4
    truth = gradient(torch.linalg.matrix_exp, X.double(), G.double())
    for i, norm in enumerate(norms):
        assert tuple(plans[i].tolist()) == expm_torch.plan_for(float(expm_torch.one_norm(X[i])), F32)
        assert error(E[i], expm_scipy(X[i][None])[0]) < 1e-6 * max(1, norm)
        assert error(grad[i], truth[i]) < 1e-6 * max(1, norm)
        assert torch.equal(E[i], expm_triton.forward(X[i : i + 1], keep_tape=False)[0][0])


def test_the_tape_is_long_enough_at_every_bound():
    """The host counts squarings from its own sum of a column, the kernel from another."""
    theta = torch.tensor(SCHEMES[-1].theta32)
    for power in (1, 2, 5):
        for steps in range(-2, 3):
            norm = theta * 2**power
            for _ in range(abs(steps)):
                norm = torch.nextafter(norm, torch.tensor(torch.inf if steps > 0 else 0.0))
            X = torch.zeros(1, 3, 3)
            X[0, 0, 1] = norm
            _, tape, plans = expm_triton.forward(X, keep_tape=True)
            assert len(SCHEMES[-1].left) + int(plans[0, 1]) <= tape.shape[1]


@pytest.mark.parametrize("n", (3, 16, 31))
def test_nothing_is_written_outside(n):
    batch, guard, N = 2, 64, padded(n)
    X, G = skew(batch, n, 40.0, F32), general(batch, n, 1.0, F32)

    def guarded(*shape):
        whole = torch.full((torch.Size(shape).numel() + 2 * guard,), 7.0)
        return whole, whole[guard:-guard].view(shape)

    buffers = [guarded(batch, n, n) for _ in range(4)]
    work, tape, bars = guarded(batch, N, N), guarded(batch, 12, N, N), guarded(batch, 6, N, N)
    (_, Q), (_, cayley_bar), (_, E), (_, expm_bar) = buffers
    flags, plans = torch.zeros(batch, dtype=torch.int32), torch.zeros(batch, 2, dtype=torch.int32)
    table = expm_triton.coefficients(X.device)
    forward, reverse = options(N, forward=True), options(N, forward=False)
    cayley_triton.forward_kernel[(batch,)](X, Q, work[1], flags, n, N, DEPTH, **forward)
    cayley_triton.backward_kernel[(batch,)](Q, G, cayley_bar, n, N, DEPTH, **reverse)
    expm_triton.forward_kernel[(batch,)](X, E, tape[1], plans, flags, table, n, 12, True, N, DEPTH, **forward)
    expm_triton.backward_kernel[(batch,)](tape[1], plans, G, expm_bar, bars[1], table, n, 12, N, DEPTH, **reverse)
    for whole, inside in (*buffers, work, tape, bars):
        assert (whole[:guard] == 7).all() and (whole[-guard:] == 7).all()
        assert not (inside == 7).all()
    assert torch.equal(Q, cayley_triton.forward(X))


@pytest.mark.usefixtures("through_the_front_door")
def test_front_door():
    X, G = skew(6, 10, 2.0, F32), general(6, 10, 1.0, F32)
    for f, kernels, plain in ((cayley, cayley_triton, cayley_lu), (expm, expm_triton, torch.linalg.matrix_exp)):
        direct = kernels.forward(X) if f is cayley else kernels.forward(X, keep_tape=False)[0]
        assert torch.equal(f(X.view(2, 3, 10, 10)), direct.view(2, 3, 10, 10))
        assert torch.equal(f(X.mT), f(X.mT.contiguous()))
        grad = gradient(f, X.view(2, 3, 10, 10), G.view(2, 3, 10, 10)).view_as(X)
        assert error(grad, gradient(plain, X.double(), G.double())) < 1e-6
        expanded = torch.ones(()).expand(6, 10, 10)  # an output gradient without memory of its own
        assert error(gradient(f, X, expanded), gradient(plain, X.double(), expanded.double())) < 1e-6
        with pytest.raises(ValueError, match=r"non-finite.*matrix 2 of 3"):
            f(torch.stack((X[0], X[1], X[2] * float("nan"))))
        leaf = X.clone().requires_grad_()
        (first,) = torch.autograd.grad(f(leaf).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="no double backward"):
            first.sum().backward()
    W = general(3, 10, 1.0, F32)
    assert error(cayley(W), cayley_lu(W.double())) < 1e-6
    assert error(gradient(cayley, W, G[:3]), gradient(cayley_lu, W.double(), G[:3].double())) < 1e-6
    with pytest.raises(OverflowError, match="does not fit"):
        expm(torch.eye(3) * 100)
    with pytest.raises(ValueError, match="no digit"):
        expm(torch.eye(3) * 1e9)
