"""The interpolated layer and matrix with the Triton operations on, against those without and float64."""

import pytest
import torch
from kernels.checks import DEVICE, assert_as_good, values

from lmc_fast.kernels import dual_gemm, enabled, head_maps, interpolate_weight
from lmc_fast.kernels.interp_linear import interp_linear
from lmc_fast.kernels.routes import interpolated

WIDTH = 24
KINDS = ("none", "dense", "blocks", "scale", "permutation")


def factor(kind, draw):
    if kind == "permutation":
        return torch.randperm(WIDTH, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    shape = {"none": None, "dense": (WIDTH, WIDTH), "blocks": (2, 4, 4), "scale": (WIDTH,)}[kind]
    return None if shape is None else draw(*shape) / 3


@pytest.fixture
def launched(monkeypatch):
    seen = []
    for module in (dual_gemm, head_maps, interpolate_weight):
        real = module.forward

        def counting(*args, real=real, module=module, **kwargs):
            seen.append(module.__name__.rsplit(".", 1)[1])
            return real(*args, **kwargs)

        monkeypatch.setattr(module, "forward", counting)
    return seen


def outcomes(dtype, left, right, learned, function):
    """The result, and its gradients to all floating-point factors and lambda where it is learned."""
    draw = values(5)
    both = draw(WIDTH, 2, WIDTH).to(dtype)
    given = {
        "x": draw(2, 3, WIDTH),
        "left": factor(left, draw),
        "right": factor(right, draw),
        "bias": draw(WIDTH),
        "lam": torch.tensor(0.3, dtype=torch.float64, device=DEVICE) if learned else 0.3,
    }
    for name, t in given.items():
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            given[name] = t.to(dtype).requires_grad_()
    out, used = function(both[:, 0], both[:, 1], given)
    leaves = [t for name in used if isinstance(t := given[name], torch.Tensor) and t.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, values(6)(*out.shape).to(dtype))]


def check(monkeypatch, *case):
    ours = outcomes(torch.float32, *case)
    monkeypatch.setenv(enabled.SWITCH, "0")
    for some in zip(ours, outcomes(torch.float32, *case), outcomes(torch.float64, *case), strict=True):
        assert_as_good(*some, size=WIDTH**0.5)


LAYERS = {"none": "dual_gemm", "permutation": "dual_gemm", "blocks": "head_maps", "scale": None, "dense": None}


@pytest.mark.parametrize("learned", [False, True], ids=["lambda fixed", "lambda learned"])
@pytest.mark.parametrize("left", KINDS)
def test_two_products(left, learned, monkeypatch, launched):
    def layer(a, b, given):
        y = interp_linear(given["x"], a, b, given["lam"], route="fused", **{k: given[k] for k in rest})
        return y, ("x", "lam", *rest)

    rest = ("left", "right", "bias")
    check(monkeypatch, left, "dense", learned, layer)
    assert launched == ([LAYERS[left]] if LAYERS[left] else [])


@pytest.mark.parametrize("left, right", [("scale", "dense"), ("dense", "scale"), ("none", "dense"), ("dense", "none")])
def test_two_products_without_gradients(left, right, monkeypatch, launched):
    """Nothing to learn: then a scale is the epilogue's business too."""
    draw = values(7)
    x, a, b = draw(5, WIDTH), draw(WIDTH, WIDTH), draw(WIDTH, WIDTH)
    factors = {"left": factor(left, draw), "right": factor(right, draw)}

    def layer(dtype):
        cast = {k: None if t is None else t.to(dtype) for k, t in factors.items()}
        return interp_linear(x.to(dtype), a.to(dtype), b.to(dtype), 0.3, route="fused", **cast)

    ours = layer(torch.float32)
    monkeypatch.setenv(enabled.SWITCH, "0")
    assert_as_good(ours, layer(torch.float32), layer(torch.float64))
    assert launched == ([] if left == "dense" else ["dual_gemm"])


@pytest.mark.parametrize("learned", [False, True], ids=["lambda fixed", "lambda learned"])
@pytest.mark.parametrize("left, right", [(k, "dense") for k in KINDS] + [("dense", k) for k in KINDS[:1] + KINDS[2:]])
def test_matrix(left, right, learned, monkeypatch, launched):
    def matrix(a, b, given):
        return interpolated(a, b, given["lam"], given["left"], given["right"]), ("lam", "left", "right")

    check(monkeypatch, left, right, learned, matrix)
    kernel = {left, right} <= {"dense", "scale", "permutation"} and left != right
    kernel |= "none" in (left, right) and learned  # with a fixed lambda that is one GEMM of torch
    assert launched == ["interpolate_weight"] * kernel


@pytest.mark.parametrize("left", ["dense", "scale"])
def test_layer_by_a_transient_matrix(left, monkeypatch, launched):
    def layer(a, b, given):
        y = interp_linear(given["x"], a, b, given["lam"], route="weight", **{k: given[k] for k in rest})
        return y, ("x", *rest)

    rest = ("left", "right", "bias")
    check(monkeypatch, left, "scale" if left == "dense" else "dense", False, layer)
    assert launched == ["interpolate_weight"] * 2  # in forward and again in backward
