"""The engine's gradients through the Triton operations, against plain torch operations in float32 and float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from kernels.checks import DEVICE, values

from lmc_fast.checkpoints import Model
from lmc_fast.checkpoints.weights import Weights
from lmc_fast.engine.evaluate import evaluate
from lmc_fast.engine.head import HeadInputs, HeadLoss, VocabChunk
from lmc_fast.engine.passes import Item
from lmc_fast.engine.source import Resident, paired
from lmc_fast.implementations import backends
from lmc_fast.kernels import dual_gemm, enabled, head_maps, interpolate_weight, runtime, softmax_loss
from lmc_fast.kernels.routes import interpolated
from lmc_fast.learning.step import learn
from lmc_fast.symmetry import canonicalize
from lmc_fast.symmetry.charts import Chart

LAUNCHERS = {
    "dual_gemm": (dual_gemm, "forward"),
    "head_maps": (head_maps, "forward"),
    "softmax_loss": (softmax_loss, "on"),
    "interpolate_weight": (interpolate_weight, "forward"),
}
FLOOR = 8 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch) -> None:
    """The interpreter's time goes by programs; the operations' own tests have many."""
    monkeypatch.setattr(runtime, "TINY", runtime.Tile(64, 64, 32, 4, 1))
    monkeypatch.setattr(softmax_loss, "INTERPRETED", False)


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
        ends = [Weights(replace(w.spec, layers=1), w.ends, w.blocks[:1]) for w in ends]
        a, b = (w.to(torch.float32).to(dtype, DEVICE) for w in ends)
        chart = Chart(a.spec, 2, dtype, DEVICE)
        generator = torch.Generator().manual_seed(7)
        for t in chart.tensors.values():
            t.data.copy_(0.1 * torch.randn(t.shape, generator=generator))
        tokens = torch.randint(a.spec.vocab, (2, 1, 4), generator=generator).to(DEVICE)
        items = [Item(data, 0.3) for data in tokens]  # they share a visit's interpolated weights
        return Resident(*paired(a, b)), items, chart

    return make


def gradients(case_of, name: str, dtype: torch.dtype, **options) -> dict[str, torch.Tensor]:
    loss, found = learn(*case_of(name, dtype), **options)
    return {"loss": loss} | found


EXPECTED = {  # what runs by route, beside the loss
    ("neox", "fused"): {"dual_gemm", "head_maps"},
    ("neox", "concat"): {"head_maps"},
    ("neox", "weight"): set(),
    ("llama", "fused"): {"dual_gemm", "head_maps"},
    ("llama", "concat"): {"head_maps"},
    ("llama", "weight"): {"interpolate_weight"},
    ("neox-sequential", "weight"): {"interpolate_weight"},
}


@pytest.mark.parametrize("name, route", EXPECTED)
@pytest.mark.parametrize("divergence", [True, False], ids=["divergence", "text"])
@pytest.mark.parametrize("keep", [False, True], ids=["recomputed", "kept"])
def test_gradients(name, route, divergence, keep, case_of, launched, monkeypatch):
    options = {"divergence": divergence, "keep": keep, "route": route}
    expected = EXPECTED[name, route] | {"softmax_loss"}
    if (name, route, keep) == ("llama", "concat", False):
        expected.add("dual_gemm")  # the forward pass without gradients: scaled units, whose gradient would cost more
    ours = gradients(case_of, name, torch.float32, **options)
    assert {n for n, count in launched.items() if count} == expected
    monkeypatch.setenv(enabled.SWITCH, "0")
    seen = dict(launched)
    plain = gradients(case_of, name, torch.float32, **options)
    truth = gradients(case_of, name, torch.float64, **options)
    assert launched == seen, "LMC_FAST_KERNELS=0 turns all of them off"
    for key, exact in truth.items():
        assert_near(ours[key], plain[key], exact, key)


def assert_near(ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, name: str = "") -> None:
    error, allowed = (float((t.double() - exact).norm()) for t in (ours, plain))
    assert error <= 2 * allowed + FLOOR * float(exact.norm()), f"{name}: {error:.3g}, plain torch {allowed:.3g}"


@pytest.mark.parametrize("route", ["fused", "weight"])
def test_evaluation(route, case_of, launched, monkeypatch):
    def scores(dtype):
        source, items, chart = case_of("llama", dtype)
        return evaluate(source, [Item(items[0].data, t) for t in (0.0, 0.4, 1.0)], chart, route)

    ours = scores(torch.float32)
    assert launched["softmax_loss"]
    monkeypatch.setenv(enabled.SWITCH, "0")
    plain, exact = scores(torch.float32), scores(torch.float64)
    assert_near(*(torch.tensor([s.loss for s in some], dtype=torch.float64) for some in (ours, plain, exact)))
    assert [s.accuracy for s in ours] == [s.accuracy for s in exact]


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("sizes", [[13], [5, 8]], ids=str)
@pytest.mark.parametrize("teachers, learns", [(0, False), (0, True), (1, True), (2, True)])
def test_head_in_chunks_and_runs(softcap, sizes, teachers, learns, launched, monkeypatch):
    draw = values(1)
    xs, ws, bias, taught = [draw(5, 6), draw(5, 6)], [draw(13, 6), draw(13, 6)], draw(13), [draw(5, 6), draw(5, 6)]
    target = None if teachers else torch.randint(13, (5,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    shares = [[], [1.0], [0.7, 0.3]][teachers]

    def found(dtype):
        def cast(t):
            return t.to(dtype)

        pupils = [(s, HeadInputs([cast(t)], [1.0])) for s, t in zip(shares, taught, strict=False)]
        student = HeadInputs([cast(x) for x in xs], [0.6, 0.4])
        h = HeadLoss(student, target, pupils, softcap=softcap, learn=learns, elements=3 * 13)
        cuts = [slice(sum(sizes[:k]), sum(sizes[: k + 1])) for k in range(len(sizes))]
        for apply in [HeadLoss.whole] if len(sizes) == 1 else [HeadLoss.scan, HeadLoss.add]:
            for cut in cuts:
                own = [VocabChunk([cast(w[cut])], cast(bias[cut]), cut.start) for w in ws[:teachers]]
                apply(h, VocabChunk([cast(w[cut]) for w in ws], cast(bias[cut]), cut.start), own)
        return [h.loss.view(1), *h.gradients], h

    ours, head = found(torch.float32)
    assert launched["softmax_loss"] and len(ours) == (3 if learns else 1)
    monkeypatch.setenv(enabled.SWITCH, "0")
    (plain, _), (exact, same) = found(torch.float32), found(torch.float64)
    for some in zip(ours, plain, exact, strict=True):
        assert_near(*some)
    if target is not None and not learns:
        assert torch.equal(head.guess, same.guess)


@pytest.fixture
def fresh():
    """As if no device had been tried, and nothing warned about."""
    for known in (enabled.obstacle, enabled.fall_back):
        known.cache_clear()
    yield
    for known in (enabled.obstacle, enabled.fall_back):
        known.cache_clear()


def test_kernels_that_fail_warn_once_and_torch_takes_over(fresh, case_of, launched, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no C compiler\nand more")

    options = {"route": "fused", "keep": True}
    with monkeypatch.context() as patch:
        patch.setattr(softmax_loss, "row_statistics", fails)
        with pytest.warns(RuntimeWarning, match=r"RuntimeError: no C compiler\).*LMC_FAST_KERNELS=0") as seen:
            ours = gradients(case_of, "neox", torch.float32, **options)
    assert [w.category for w in seen].count(RuntimeWarning) == 1 and not any(launched.values())
    monkeypatch.setenv(enabled.SWITCH, "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = gradients(case_of, "neox", torch.float32, **options)
    for key, t in plain.items():
        assert torch.equal(ours[key], t), key


def test_switch(fresh, monkeypatch):
    x = torch.ones(2, device=DEVICE)
    assert all(enabled.engaged(name, x) for name in enabled.OPERATIONS)
    monkeypatch.delenv(enabled.SWITCH)
    assert enabled.wanted(torch.device("cpu")) == ()
    here = enabled.MEASURED.get(torch.cuda.get_device_capability(), ()) if DEVICE == "cuda" else ()
    assert enabled.wanted() == here and "not shown to be faster" in backends().without_kernels
    monkeypatch.setenv(enabled.SWITCH, "1")
    assert not enabled.engaged("softmax_loss", x.double())
    monkeypatch.setenv(enabled.SWITCH, "interpolate_weight, dual_gemm")
    assert [name for name in enabled.OPERATIONS if enabled.engaged(name, x)] == ["interpolate_weight", "dual_gemm"]
    monkeypatch.setenv(enabled.SWITCH, "interpolate_weight,fast")
    with pytest.raises(ValueError, match='names "fast"; it takes 0, 1, or'):
        enabled.engaged("interpolate_weight", x)


def test_what_a_gpu_has_shown_is_on_there(monkeypatch):
    monkeypatch.delenv(enabled.SWITCH, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for found, expected in (((9, 0), ("softmax_loss", "head_maps")), ((8, 0), ())):
        enabled.capability.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=found: found)
        assert enabled.wanted(torch.device("cuda")) == expected and enabled.wanted(torch.device("cpu")) == ()
    enabled.capability.cache_clear()


@pytest.mark.skipif(DEVICE == "cuda", reason="GPUs round bfloat16 rightly")
def test_bfloat16_is_not_interpreted(fresh):
    with pytest.warns(RuntimeWarning, match="bfloat16"):
        assert not enabled.engaged("interpolate_weight", torch.ones(2, dtype=torch.bfloat16))


def test_nothing_scaled_is_kept_for_backward():
    """The graph of an interpolated matrix holds A, B and the factors alone."""
    draw = values(2)
    a, b, scale, rotation = draw(9, 6).float(), draw(9, 6).float(), draw(9).float(), draw(6, 6).float()
    factors = [scale.requires_grad_(), rotation.requires_grad_()]
    w = interpolated(a, b, 0.3, *factors)
    assert {t.data_ptr() for t in w.grad_fn.saved_tensors if t is not None} <= {t.data_ptr() for t in (a, b, *factors)}
