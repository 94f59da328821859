"""The engine's gradients through the Triton operations, against plain torch operations in float32 and float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import pytest
import torch
from kernels.checks import DEVICE

from lmc_fast.checkpoints import Model
from lmc_fast.engine.head import HeadLoss, Part, Reading
from lmc_fast.engine.source import Resident, paired
from lmc_fast.engine.step import Item, evaluate, learn
from lmc_fast.kernels import dual_gemm, head_maps, softmax_loss, switch, transient
from lmc_fast.symmetry import canonicalize
from lmc_fast.symmetry.charts import Chart

LAUNCHERS = {
    "dual_gemm": (dual_gemm, "forward"),
    "head_maps": (head_maps, "forward"),
    "softmax_loss": (softmax_loss, "on"),
    "transient": (transient, "forward"),
}
FLOOR = 4 * torch.finfo(torch.float32).eps


@pytest.fixture
def launched(monkeypatch) -> dict[str, int]:
    """How often each operation was launched."""
    counts = dict.fromkeys(LAUNCHERS, 0)

    def watch(name: str, module, function: str) -> None:
        real = getattr(module, function)

        def counting(*args, **kwargs):
            counts[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, function, counting)

    for name, (module, function) in LAUNCHERS.items():
        watch(name, module, function)
    return counts


@pytest.fixture(scope="module")
def case_of(make_checkpoint) -> Callable[[str, torch.dtype], tuple[Resident, list[Item], Chart]]:
    """case_of(variant, dtype) -> arguments of `learn`, the same numbers in every dtype."""

    @cache
    def make(name: str, dtype: torch.dtype) -> tuple[Resident, list[Item], Chart]:
        ends = [canonicalize(Model(make_checkpoint(name, seed)).load(torch.float64)) for seed in (1, 2)]
        a, b = (w.to(torch.float32).to(dtype, DEVICE) for w in ends)
        chart = Chart(a.spec, 2, dtype, DEVICE)
        generator = torch.Generator().manual_seed(7)
        for t in chart.tensors.values():
            t.data.copy_(0.1 * torch.randn(t.shape, generator=generator))
        tokens = torch.randint(a.spec.vocab, (3, 1, 6), generator=generator).to(DEVICE)
        items = [Item(data, t) for data, t in zip(tokens, (0.3, 0.3, 0.6), strict=True)]
        return Resident(*paired(a, b)), items, chart

    return make


def gradients(case_of, name: str, dtype: torch.dtype, **options) -> dict[str, torch.Tensor]:
    loss, found = learn(*case_of(name, dtype), **options)
    return {"loss": loss} | found


EXPECTED = {  # what runs by path, beside the loss
    ("neox", "fused"): {"dual_gemm", "head_maps"},
    ("neox", "concat"): {"head_maps"},
    ("neox", "weight"): set(),
    ("llama", "fused"): {"dual_gemm", "head_maps"},
    ("llama", "concat"): {"head_maps"},
    ("llama", "weight"): {"transient"},
    ("neox-sequential", "weight"): {"transient"},
}


@pytest.mark.parametrize("name, path", EXPECTED)
@pytest.mark.parametrize("divergence", [True, False], ids=["divergence", "text"])
@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
def test_gradients(name, path, divergence, keep, case_of, launched, monkeypatch):
    options = {"divergence": divergence, "keep": keep, "path": path}
    ours = gradients(case_of, name, torch.float32, **options)
    assert {n for n, count in launched.items() if count} == EXPECTED[name, path] | {"softmax_loss"}
    monkeypatch.setenv(switch.SWITCH, "0")
    seen = dict(launched)
    plain = gradients(case_of, name, torch.float32, **options)
    truth = gradients(case_of, name, torch.float64, **options)
    assert launched == seen, "LMC_FAST_KERNELS=0 turns all of them off"
    for key, exact in truth.items():
        error, allowed = (float((t[key].double() - exact).norm()) for t in (ours, plain))
        assert error <= 2 * allowed + FLOOR * float(exact.norm()), f"{key}: {error:.3g}, plain torch {allowed:.3g}"
