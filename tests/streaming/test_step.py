"""A step whose weights are streamed from disk computes the bits of one whose weights are in memory."""

import pytest
import torch

from lmc_fast.checkpoints import Model
from lmc_fast.engine.evaluate import evaluate
from lmc_fast.engine.passes import Item
from lmc_fast.engine.source import Resident, paired
from lmc_fast.learning.step import learn
from lmc_fast.streaming.packing import pieces
from lmc_fast.streaming.ring import Streamed
from lmc_fast.streaming.store import Store
from lmc_fast.symmetry import canonicalize
from lmc_fast.symmetry.charts import Chart

ROUTES = ("fused", "concat", "weight")


@pytest.fixture
def case(make_checkpoint, tmp_path):
    def make(variant, part_bytes=None):
        a, b = (canonicalize(Model(make_checkpoint(variant, seed)).load()) for seed in (1, 2))
        chart = Chart(a.spec, 2)
        generator = torch.Generator().manual_seed(7)
        for t in chart.tensors.values():
            t.data.copy_(0.1 * torch.randn(t.shape, generator=generator))
        tokens = torch.randint(40, (6, 20), generator=generator)
        items = [Item(part, t) for part, t in zip(tokens.split(2), (0.3, 0.3, 0.55), strict=True)]
        store = Store.create(tmp_path / "store", a.spec, pieces(a, b), part_bytes=part_bytes)
        return a, b, chart, items, store

    return make


@pytest.mark.parametrize("variant", ["neox", "gpt2-tied", "llama"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("divergence", [True, False])
def test_streamed_is_resident_bit_for_bit(variant, route, divergence, case):
    a, b, chart, items, store = case(variant, part_bytes=1 << 30)
    memory = Resident(*paired(a, b))
    expected, gradients = learn(memory, items, chart, divergence=divergence, route=route)
    scores = evaluate(memory, items, chart, route)
    with Streamed(store, buffers=2, poison=True) as source:
        for _ in range(2):  # the second pass starts with what the first one left in the slots
            loss, found = learn(source, items, chart, divergence=divergence, route=route)
            assert torch.equal(loss, expected)
            for name, gradient in gradients.items():
                assert torch.equal(found[name], gradient), name
            assert evaluate(source, items, chart, route) == scores


@pytest.mark.parametrize("divergence", [True, False])
def test_a_head_in_several_parts_changes_rounding_alone(divergence, case):
    a, b, chart, items, store = case("neox", part_bytes=2 * 24 * 4 * 16)
    assert store.head_parts > 1
    expected, gradients = learn(Resident(a, b), items, chart, divergence=divergence, route="fused")
    with Streamed(store, buffers=2, poison=True) as source:
        loss, found = learn(source, items, chart, divergence=divergence, route="fused")
    assert abs(loss - expected) < 1e-6
    for name, gradient in gradients.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name
