import pytest
import torch
from kernels.checks import DEVICE, DTYPES, assert_as_good, compare, values

from lmc_fast.kernels import norm_concat as module
from lmc_fast.kernels.norm_concat import norm_concat, reference

pytestmark = pytest.mark.usefixtures("guarded")


def case(T=13, d=40, lam=0.3, biases=True, seed=0):
    draw = values(seed)
    inputs = {"x": 3 * draw(T, d) + 1, "rotation": torch.linalg.qr(draw(d, d))[0].bfloat16().double()}
    constants = {}
    if isinstance(lam, tuple):
        constants["lam"] = lam
    else:
        inputs["lam"] = torch.tensor(lam, dtype=torch.float64, device=DEVICE)
    if biases:
        inputs |= {"bias_a": draw(d), "bias_b": draw(d)}
    return inputs, constants, {"lam": (T * d) ** 0.5 * 3}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, (1.0, 1.0)])
def test_against_torch(lam, rms, dtype):
    inputs, constants, sizes = case(lam=lam)
    compare(norm_concat, reference, inputs, constants | {"rms": rms, "eps": 1e-3}, dtype, sizes)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("shape", [(1, 2), (3, 16), (2, 1030), (0, 8), (7, 33)])
def test_shapes_without_biases(shape, rms):
    inputs, constants, sizes = case(*shape, biases=False)
    compare(norm_concat, reference, inputs, constants | {"rms": rms}, torch.float32, sizes)


def test_one_bias_and_a_stream_far_from_zero():
    inputs, constants, sizes = case()
    inputs["x"] = inputs["x"] + 100
    for absent in ("bias_a", "bias_b"):
        some = {k: v for k, v in inputs.items() if k != absent}
        compare(norm_concat, reference, some, constants, torch.float32, sizes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_alone_beside_a_neighbour(dtype):
    x = values(1)(5, 24).to(dtype)
    buffer = torch.full((5, 48), 7.0, dtype=dtype, device=DEVICE)
    plain, scales = module.norm_into(x, 1e-5, False, (0.5, 0.0), left=buffer[:, :24])
    truth = torch.nn.functional.layer_norm(x.double(), (24,))
    same = torch.nn.functional.layer_norm(x, (24,))
    assert_as_good(plain, same, truth)
    assert_as_good(buffer[:, :24], same / 2, truth / 2)
    assert (buffer[:, 24:] == 7).all()
    torch.testing.assert_close(scales.double(), (x.double().var(1, correction=0) + 1e-5).rsqrt(), rtol=1e-5, atol=0)


def test_errors():
    x = values(2)(5, 24).float()
    with pytest.raises(ValueError, match="rotation"):
        norm_concat(x, x, (1, 1))
    with pytest.raises(ValueError, match="bias"):
        norm_concat(x, torch.eye(24, device=DEVICE), (1, 1), bias_a=x[:, 0])
