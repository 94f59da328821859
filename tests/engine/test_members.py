"""More than two members, against plain autograd through the materialised average; streamed as in memory."""

import pytest
import torch
import torch.nn.functional as F

from lmc_fast.checkpoints import Model, Weights
from lmc_fast.engine.evaluate import evaluate
from lmc_fast.engine.model import logits
from lmc_fast.engine.passes import Item
from lmc_fast.engine.source import Resident, paired
from lmc_fast.errors import LmcError
from lmc_fast.kernels.many import mixed, mixed_linear
from lmc_fast.learning.step import learn
from lmc_fast.places import centroid, corner, shares_of, spread
from lmc_fast.streaming.packing import pieces
from lmc_fast.streaming.ring import Streamed
from lmc_fast.streaming.store import Store
from lmc_fast.symmetry import canonicalize
from lmc_fast.symmetry.charts import Chart

PLACES = ((0.5, 0.2, 0.3), (0.5, 0.2, 0.3), (0.1, 0.6, 0.3))  # the first two share their weights


def members_of(make_checkpoint, variant, dtype=torch.float64, count=3):
    return [canonicalize(Model(make_checkpoint(variant, 1 + k)).load(dtype)) for k in range(count)]


def random_chart(spec, sides, dtype=torch.float64, members=3):
    chart = Chart(spec, sides, dtype, members=members)
    generator = torch.Generator().manual_seed(7)
    for t in chart.tensors.values():
        t.data.copy_(0.1 * torch.randn(t.shape, generator=generator))
    return chart


def averaged(weights, shares):
    def mix(slots):
        return {name: sum(s * w[name] for s, w in zip(shares, slots, strict=True)) for name in slots[0]}

    blocks = [mix(slots) for slots in zip(*(w.blocks for w in weights), strict=True)]
    return Weights(weights[0].spec, mix([w.ends for w in weights]), blocks)


def materialised(weights, chart, items, divergence):
    total, count = 0.0, 0
    for data, shares in items:
        moved = [weights[0], *(g.apply(w) for g, w in zip(chart.relatives(), weights[1:], strict=True))]
        inputs, answers = data[:, :-1], data[:, 1:].flatten()
        student = logits(averaged(moved, shares), inputs).flatten(0, 1).log_softmax(1)
        if divergence:
            aim = sum(s * logits(w, inputs).flatten(0, 1).softmax(1) for s, w in zip(shares, weights, strict=True))
            loss = F.kl_div(student, aim, reduction="sum")
        else:
            loss = F.nll_loss(student, answers, reduction="sum")
        total, count = total + loss, count + len(answers)
    loss = total / count
    return loss, dict(zip(chart.tensors, torch.autograd.grad(loss, list(chart.tensors.values())), strict=True))


@pytest.mark.parametrize("variant, sides", [("neox", 3), ("llama", 3), ("gpt2", 2)])
def test_the_step_between_three_is_that_of_the_materialised_average(variant, sides, make_checkpoint):
    weights = members_of(make_checkpoint, variant)
    chart = random_chart(weights[0].spec, sides)
    tokens = torch.randint(40, (6, 12), generator=torch.Generator().manual_seed(2)).split(2)
    items = list(zip(tokens, PLACES, strict=True))
    for divergence in (True, False):
        expected, gradients = materialised(weights, chart, items, divergence)
        for route in ("fused", "weight"):
            for keep in (True, False):
                some = [Item(*item) for item in items]
                loss, found = learn(
                    Resident(*paired(*weights)), some, chart, divergence=divergence, route=route, keep=keep
                )
                assert abs(loss - expected) < 1e-10
                for name, gradient in gradients.items():
                    assert (found[name] - gradient).abs().max() <= 1e-9 * gradient.abs().max(), (name, route, keep)


def test_the_line_between_averages(make_checkpoint, tokens):
    weights = members_of(make_checkpoint, "llama")
    two = evaluate(Resident(averaged(weights[:2], (0.5, 0.5)), weights[2]), [Item(tokens, 0.3)])
    three = evaluate(Resident(*weights), [Item(tokens, spread(0.3, (0, 0, 1)))])
    assert spread(0.3, (0, 0, 1)) == (0.35, 0.35, 0.3) and three[0].loss == pytest.approx(two[0].loss, abs=1e-10)


def test_places_and_losses_between_three(make_checkpoint, tokens):
    weights = members_of(make_checkpoint, "llama")
    chart = random_chart(weights[0].spec, 3)
    moved = [weights[0], *(g.apply(w) for g, w in zip(chart.relatives(), weights[1:], strict=True))]
    places = [corner(k, 3) for k in range(3)] + [centroid(3), (0.0, 0.25, 0.75), (0.5, 0.0, 0.5)]
    scores = evaluate(Resident(*weights), [Item(tokens, place) for place in places], chart)
    ordered = sorted(places, key=lambda place: place[1:])
    for place, score in zip(ordered, scores, strict=True):
        out = logits(averaged(moved, place), tokens[:, :-1]).flatten(0, 1)
        assert abs(F.cross_entropy(out, tokens[:, 1:].flatten()) - score.loss) < 1e-10, place
    assert shares_of(0.25) == (0.75, 0.25) and corner(1, 2) == 1.0 and shares_of(centroid(2)) == (0.5, 0.5)


def test_three_streamed_are_three_in_memory_bit_for_bit(make_checkpoint, tmp_path):
    weights = members_of(make_checkpoint, "neox", torch.float32)
    spec = weights[0].spec
    chart = random_chart(spec, 3, torch.float32)
    tokens = torch.randint(40, (6, 12), generator=torch.Generator().manual_seed(2)).split(2)
    items = [Item(*item) for item in zip(tokens, PLACES, strict=True)]
    store = Store.create(tmp_path / "store", spec, pieces(*weights), part_bytes=1 << 30, members=3)
    memory = Resident(*paired(*weights))
    for route in ("fused", "weight"):
        loss, gradients = learn(memory, items, chart, route=route)
        with Streamed(store, buffers=2, poison=True) as source:
            streamed, found = learn(source, items, chart, route=route)
            assert evaluate(source, items, chart, route) == evaluate(memory, items, chart, route)
        assert torch.equal(loss, streamed) and all(torch.equal(found[name], t) for name, t in gradients.items())
    assert Store.open(tmp_path / "store", spec).members == 3
    with pytest.raises(LmcError, match="3 models, expected 2"):
        Store.create(tmp_path / "short", spec, list(pieces(*weights))[1:])


def test_layers_between_many_by_every_kind_of_factor():
    generator = torch.Generator().manual_seed(0)
    x, members = torch.randn(5, 6, generator=generator).double(), torch.randn(4, 8, 6, generator=generator).double()
    dense, wide = (torch.randn(n, n, generator=generator).double().requires_grad_() for n in (6, 8))
    blocks = torch.randn(2, 4, 4, generator=generator).double().requires_grad_()
    scale, order = torch.rand(6, generator=generator).double().requires_grad_(), torch.randperm(8, generator=generator)
    factors = [(blocks, dense), (wide, scale), (order, None)]
    shares, bias = (0.4, 0.3, 0.2, 0.1), torch.randn(8, generator=generator).double()
    moved = [
        members[0],
        torch.block_diag(*blocks) @ members[1] @ dense.mT,
        wide @ (members[2] * scale),
        members[3][order],
    ]
    w = sum(s * m for s, m in zip(shares, moved, strict=True))
    leaves = [dense, wide, blocks, scale]
    expected = torch.autograd.grad((x @ w.mT + bias).square().sum(), leaves)
    assert torch.allclose(mixed(list(members), shares, factors), w, atol=1e-12)
    for route in ("fused", "weight"):
        y = mixed_linear(x, list(members), shares, factors, bias, route=route)
        assert torch.allclose(y, x @ w.mT + bias, atol=1e-12)
        for a, b in zip(torch.autograd.grad(y.square().sum(), leaves), expected, strict=True):
            assert torch.allclose(a, b, atol=1e-10), route
