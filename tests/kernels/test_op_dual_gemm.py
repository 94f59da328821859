import pytest
import torch
from kernels.checks import DEVICE, DTYPES, compare, values

from lmc_fast.kernels import dual_gemm
from lmc_fast.kernels.dual_gemm import dual_linear, reference

pytestmark = pytest.mark.usefixtures("guarded")


def case(T=33, K=40, K2=24, N=37, lam=0.3, bias=True, perm=True, scale=True, seed=0):
    draw = values(seed)
    inputs = {"x": draw(T, K), "z": draw(T, K2)}
    constants = {"a": draw(N, K) / 4, "b": draw(N, K2) / 4}
    if isinstance(lam, tuple):
        constants["lam"] = lam
    else:
        inputs["lam"] = torch.tensor(lam, dtype=torch.float64, device=DEVICE)
    if bias:
        inputs["bias"] = draw(N)
    if scale:
        inputs["scale"] = draw(N)
    if perm:
        constants["perm"] = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    sizes = {"lam": (T * N) ** 0.5 * K}
    return inputs, constants, sizes


def check(inputs, constants, sizes, dtype, **options):
    compare(dual_linear, reference, inputs, constants | options, dtype, sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", dual_gemm.ACTIVATIONS)
def test_activations(activation, dtype):
    check(*case(T=19, N=24), dtype, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, -0.25, (1.0, 1.0), (0.0, 2.0)])
def test_factors(lam, dtype):
    check(*case(lam=lam), dtype)


SHAPES = [(1, 1, 1, 1), (1, 16, 16, 16), (17, 3, 50, 5), (16, 32, 16, 48), (0, 4, 4, 4), (33, 16, 17, 31)]


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    check(*case(*shape), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extras", [{}, {"bias": True}, {"perm": True}, {"scale": True}, {"perm": True, "scale": True}])
def test_extras(extras, dtype):
    check(*case(**({"bias": False, "perm": False, "scale": False} | extras)), dtype)


def test_weights_stored_side_by_side():
    draw = values(3)
    pair = draw(24, 2, 16).float()
    x, z, lam = draw(9, 16).float(), draw(9, 16).float(), torch.tensor(0.6, device=DEVICE)
    ours = dual_linear(x, pair[:, 0], z, pair[:, 1], lam)
    torch.testing.assert_close(ours, reference(x, pair[:, 0].contiguous(), z, pair[:, 1].contiguous(), lam))


def test_activations_with_distant_columns():
    draw = values(4)
    x, z, a, b = draw(16, 9).float().mT, draw(16, 9).float().mT, draw(8, 16).float(), draw(8, 16).float()
    torch.testing.assert_close(dual_linear(x, a, z, b, (0.5, 0.5)), reference(x, a, z, b, (0.5, 0.5)))


def test_an_expanded_gradient():
    draw = values(5)
    x, z, a, b = draw(9, 16).float().requires_grad_(), draw(9, 16).float(), draw(8, 16).float(), draw(8, 16).float()
    (ours,) = torch.autograd.grad(dual_linear(x, a, z, b, (0.5, 0.5)).sum(), x)
    torch.testing.assert_close(ours, (0.5 * a.sum(0)).expand(9, -1))


def test_output_buffer_of_the_caller():
    draw = values(6)
    x, z, a, b = (draw(*s).float() for s in ((9, 16), (9, 8), (20, 16), (20, 8)))
    buffer = torch.full((9, 50), 7.0, device=DEVICE)
    y, pre = dual_gemm.forward(x, a, z, b, (0.5, 0.5), out=buffer[:, 10:30], activation="silu", keep_pre=True)
    torch.testing.assert_close(y, reference(x, a, z, b, (0.5, 0.5), activation="silu"))
    torch.testing.assert_close(pre, reference(x, a, z, b, (0.5, 0.5)))
    assert (buffer[:, :10] == 7).all() and (buffer[:, 30:] == 7).all()


def test_errors():
    draw = values(7)
    x, z, a, b = (draw(*s).float() for s in ((9, 16), (9, 8), (20, 16), (20, 8)))
    with pytest.raises(ValueError, match="do not fit"):
        dual_linear(x, b, z, a, (1, 1))
    with pytest.raises(ValueError, match="one entry for each of the 20"):
        dual_linear(x, a, z, b, (1, 1), bias=x[0])
    with pytest.raises(ValueError, match="tanh"):
        dual_linear(x, a, z, b, (1, 1), activation="tanh")
    with pytest.raises(ValueError, match="no gradient for its weights"):
        dual_linear(x, a.requires_grad_(), z, b, (1, 1))
    with pytest.raises(ValueError, match="adjacent"):
        dual_linear(x, a.detach().mT.contiguous().mT, z, b, (1, 1))
    with pytest.raises(ValueError, match="one number"):
        dual_linear(x, a.detach(), z, b, torch.ones(2))
