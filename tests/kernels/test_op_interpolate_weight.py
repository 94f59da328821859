import pytest
import torch
from kernels.checks import DEVICE, DTYPES, compare, values

from lmc_fast.kernels.interpolate_weight import interpolate, reference

pytestmark = pytest.mark.usefixtures("guarded")


def case(N=37, K=24, D=24, lam=0.3, perm=True, scale=True, seed=0):
    draw = values(seed)
    inputs = {"rotation": draw(K, D) / 4}
    constants = {"a": draw(N, K), "b": draw(N, D)}
    if isinstance(lam, tuple):
        constants["lam"] = lam
    else:
        inputs["lam"] = torch.tensor(lam, dtype=torch.float64, device=DEVICE)
    if scale:
        inputs["scale"] = draw(N)
    if perm:
        constants["perm"] = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return inputs, constants, {"lam": 2 * (N * K) ** 0.5}


def check(dtype=torch.float32, function=interpolate, **options):
    inputs, constants, sizes = case(**options)
    compare(function, reference, inputs, constants, dtype, sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, (0.7, 0.3)])
def test_factors(lam, dtype):
    check(dtype, lam=lam)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lam", [0.3, (0.7, 0.3)])
@pytest.mark.parametrize("perm, scale", [(False, False), (True, False), (False, True)])
def test_without(perm, scale, lam, dtype):
    check(dtype, lam=lam, perm=perm, scale=scale)


@pytest.mark.parametrize("shape", [(1, 1, 1), (16, 16, 16), (5, 33, 2), (50, 3, 17), (0, 4, 4)])
def test_shapes(shape):
    check(N=shape[0], K=shape[1], D=shape[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_writer_is_the_transpose(dtype):
    def writer(a, b, **given):
        return interpolate(a.mT.contiguous().mT, b.mT.contiguous().mT, **given)

    check(dtype, function=writer)


def test_errors():
    m = values(1)(6, 4).float()
    with pytest.raises(ValueError, match="do not fit"):
        interpolate(m, m, m, (1, 1))
    with pytest.raises(ValueError, match="each of the 6"):
        interpolate(m, m, m[:4], (1, 1), scale=m[0])
    with pytest.raises(ValueError, match="no gradient"):
        interpolate(m.requires_grad_(), m, m.detach()[:4], (1, 1), scale=m.detach()[:, 0])
