"""The interpolated linear layer against the formula in float64, by every route, for every kind of L and R."""

import pytest
import torch

from lmc_fast.kernels.interp_linear import interp_linear
from lmc_fast.kernels.routes import ROUTES, interpolated, side_by_side

T, HEADS, E = 7, 6, 4
N = K = HEADS * E
KINDS = ("none", "dense", "blocks", "scale", "permutation")


def factor(kind, generator, size=N):
    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if kind == "none":
        return None, torch.eye(size, dtype=torch.float64)
    if kind == "dense":
        m = random(size, size)
        return m, m
    if kind == "blocks":  # two groups, three neighbouring heads each
        m = random(2, E, E)
        return m, torch.block_diag(*(m[h // 3] for h in range(HEADS)))
    if kind == "scale":
        s = random(size)
        return s, torch.diag(s)
    p = torch.randperm(size, generator=generator)
    return p, torch.eye(size, dtype=torch.float64)[p]


def case(seed=0):
    g = torch.Generator().manual_seed(seed)
    both = torch.randn(N, 2, K, generator=g, dtype=torch.float64)
    x = torch.randn(2, T, K, generator=g, dtype=torch.float64)
    bias = torch.randn(N, generator=g, dtype=torch.float64)
    return g, x, both[:, 0], both[:, 1], bias


@pytest.mark.parametrize("left", KINDS)
@pytest.mark.parametrize("right", KINDS)
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_all_paths_compute_the_formula(left, right, lam):
    g, x, a, b, bias = case()
    (l_given, l_dense), (r_given, r_dense) = factor(left, g), factor(right, g)
    w = (1 - lam) * a + lam * l_dense @ b @ r_dense.mT
    assert (interpolated(a, b, lam, l_given, r_given) - w).abs().max() < 1e-12
    for route in ROUTES:
        if route == "concat" and left != "none":
            with pytest.raises(ValueError, match="concat"):
                interp_linear(x, a, b, lam, left=l_given, right=r_given, route=route)
            continue
        for some in (None, bias):
            y = interp_linear(x, a, b, lam, left=l_given, right=r_given, bias=some, route=route)
            assert (y - (x @ w.mT + (0 if some is None else some))).abs().max() < 1e-12


@pytest.mark.parametrize("left", ["none", "dense", "blocks", "scale"])
@pytest.mark.parametrize("right", ["none", "dense", "blocks", "scale"])
@pytest.mark.parametrize("moving", [False, True], ids=["lambda fixed", "lambda learned"])
@pytest.mark.parametrize("route", ROUTES)
def test_gradients(left, right, moving, route):
    if route == "concat" and left != "none":
        pytest.skip("concat has no L")
    g, x, a, b, bias = case(1)
    leaves = [x, bias]
    lam = torch.tensor(0.3, dtype=torch.float64) if moving else 0.3
    l_given, r_given = factor(left, g)[0], factor(right, g)[0]
    leaves += [t for t in (l_given, r_given, lam) if isinstance(t, torch.Tensor)]
    for t in leaves:
        t.requires_grad_()

    def apply(*_):
        return interp_linear(x, a, b, lam, left=l_given, right=r_given, bias=bias, route=route)

    assert torch.autograd.gradcheck(apply, leaves, atol=1e-7)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_a_plain_product(route, dtype):
    """Error at most twice that of torch's own product with the same interpolated matrix in the same dtype."""
    g, x, a, b, _ = case(2)
    r = torch.linalg.qr(torch.randn(K, K, generator=g, dtype=torch.float64)).Q
    both = torch.stack([a, b], 1).to(dtype)
    x, r = x.to(dtype), r.to(dtype)
    a, b = both[:, 0], both[:, 1]
    exact = x.double() @ (0.6 * a.double() + 0.4 * b.double() @ r.double().mT).mT
    plain = x @ (0.6 * a + 0.4 * (b @ r.mT)).mT
    ours = interp_linear(x, a, b, 0.4, right=r, route=route)
    assert (ours - exact).norm() <= 2 * (plain - exact).norm() + 1e-12


def test_side_by_side():
    both = torch.randn(5, 2, 3)
    assert torch.equal(side_by_side(both[:, 0], both[:, 1]), both.view(5, 6))
    assert side_by_side(both[:, 1], both[:, 0]) is None
    assert side_by_side(both[:, 0].contiguous(), both[:, 1].contiguous()) is None


def test_unknown_path():
    _, x, a, b, _ = case()
    with pytest.raises(ValueError, match="unknown"):
        interp_linear(x, a, b, 0.5, route="quantum")


def test_nothing_transformed_outlives_the_transient_path():
    """Between forward and backward the graph holds x, A, B and the factors, and no interpolated matrix."""
    g, x, a, b, _ = case()
    r = factor("dense", g)[0].requires_grad_()
    y = interp_linear(x, a, b, 0.5, right=r, route="weight")
    held = {t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None}
    assert held == {x.data_ptr(), a.data_ptr(), b.data_ptr(), r.data_ptr()}
