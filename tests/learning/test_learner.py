"""Learning: gradients against plain autograd of a materialised stock model, resuming bit for bit, bad numbers."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from checkpoints_tiny import true_float64
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from lmc_fast.checkpoints import Model, Weights, lerp
from lmc_fast.engine.model import logits
from lmc_fast.engine.passes import Item
from lmc_fast.engine.source import Resident
from lmc_fast.learning.learner import Chunking, History, Learner, NonFiniteLoss
from lmc_fast.learning.muon import muon_step, orthogonalized
from lmc_fast.learning.schedule import AT_ONCE, Schedule
from lmc_fast.learning.step import learn
from lmc_fast.matching.balance import balance
from lmc_fast.symmetry import canonicalize, check_legal
from lmc_fast.symmetry.charts import MAX_STRETCH, Chart


def canonical(directory, dtype=torch.float64):
    weights = canonicalize(Model(directory).load(dtype))
    return balance(weights).apply(weights)


def randomize(chart, size, seed=0):
    g = torch.Generator().manual_seed(seed)
    for t in chart.tensors.values():
        t.data.copy_(size * torch.randn(t.shape, generator=g))


def random_chart(spec):
    chart = Chart(spec, 2, torch.float64)
    randomize(chart, 0.1)
    return chart


def learner(make_checkpoint, dtype=torch.float32, **options):
    a, b = (canonical(make_checkpoint("neox", seed), dtype) for seed in (1, 2))
    calibration = torch.randint(40, (9, 16), generator=torch.Generator().manual_seed(3))
    return Learner(Resident(a, b), calibration, Schedule(**({"steps": 8, "batch": 4, "warmup": 2} | options)))


@pytest.mark.parametrize("variant", ["neox", "neox-sequential", "gpt2", "llama"])
@pytest.mark.parametrize("sides", [1, 2])
def test_chart_elements_are_legal_and_zero_is_the_identity(variant, sides, make_checkpoint, tokens):
    weights = canonical(make_checkpoint(variant))
    chart = Chart(weights.spec, sides, torch.float64)
    assert (logits(chart.relative().apply(weights), tokens) - logits(weights, tokens)).abs().max() < 1e-12
    randomize(chart, 0.2)
    for element in [*chart.elements(), chart.relative()]:
        check_legal(element.map(torch.Tensor.detach), weights.spec, 1e-12)
    moved = chart.relative().apply(weights)
    assert (moved.blocks[0]["q"] - weights.blocks[0]["q"]).abs().max() > 0.05
    change = logits(moved, tokens).log_softmax(-1) - logits(weights, tokens).log_softmax(-1)
    assert change.abs().max() < 1e-9


@pytest.mark.parametrize("variant", ["neox", "neox-sequential", "gpt2", "llama"])
def test_gradients_are_those_of_the_materialised_stock_model(variant, make_checkpoint, tokens):
    """Both endpoints moved, interpolated and run by transformers; ours sees the relative transform alone."""
    model = Model(make_checkpoint(variant))
    a, b = (canonical(make_checkpoint(variant, seed)) for seed in (1, 2))
    chart = random_chart(a.spec)
    _, mine = learn(Resident(a, b), [Item(tokens, 0.37)], chart, divergence=False)

    stock = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float64)
    g_a, g_b = chart.elements()
    middle = lerp(g_a.apply(a), g_b.apply(b), 0.37)
    state = {}
    for name, entry, index in model.family.entries(middle.spec):
        slots = middle.ends if index is None else middle.blocks[index]
        stock_name = "lm_head.weight" if entry.slots == ("head",) else name
        state[stock_name] = entry.layout.join([slots[s] for s in entry.slots], middle.spec)
    with true_float64():
        out = functional_call(stock, state, kwargs={"input_ids": tokens[:, :-1]}, strict=False).logits
    leaves = list(chart.tensors.values())
    theirs = torch.autograd.grad(F.cross_entropy(out.flatten(0, 1), tokens[:, 1:].flatten()), leaves)
    for name, y in zip(chart.tensors, theirs, strict=True):
        x = mine[name]
        assert (x - y).abs().max() <= 1e-9 * y.abs().max(), name
        assert y.abs().max() > 0, name


def test_gradient_of_the_divergence_by_differences(make_checkpoint, tokens):
    a, b = (canonical(make_checkpoint("llama", seed)) for seed in (1, 2))
    chart = random_chart(a.spec)

    def value():
        return learn(Resident(a, b), [Item(tokens, 0.4)], chart)

    gradients = value()[1]
    for name, leaf in chart.tensors.items():
        direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1)).double()
        h = 1e-6
        with torch.no_grad():
            leaf += h * direction
            up = value()[0]
            leaf -= 2 * h * direction
            down = value()[0]
            leaf += h * direction
        slope = (gradients[name] * direction).sum()
        assert abs((up - down) / (2 * h) - slope) < 1e-6 * max(1, abs(slope)), name


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("taught", [(2, 1), (0, 3)])
def test_a_step_whose_sequences_have_one_teacher_each_is_the_sum_of_steps_with_one_teacher(
    taught, keep, make_checkpoint, tokens
):
    a, b = (canonical(make_checkpoint("llama", seed)) for seed in (1, 2))
    chart = random_chart(a.spec)
    loss, found = learn(Resident(a, b), [Item(tokens, 0.4, taught)], chart, keep=keep)
    parts = [
        (len(rows), *learn(Resident(a, b), [Item(rows, 0.4, (len(rows), 0)[:: 1 if k == 0 else -1])], chart))
        for k, rows in enumerate(tokens.split(taught))
        if len(rows)
    ]
    assert abs(loss - sum(n * x for n, x, _ in parts) / 3) < 1e-12
    for name, gradient in found.items():
        assert torch.allclose(gradient, sum(n * g[name] for n, _, g in parts) / 3, rtol=1e-9, atol=1e-12)


def test_teachers_of_all_steps_together_have_the_members_shares():
    """So that the mean of the gradients is that of the divergence from the mixture, up to what is not learned."""
    schedule = Schedule(batch=4, seed=3)
    for shares in ((0.65, 0.35), (0.5, 0.5), (0.2, 0.5, 0.3), (1.0, 0.0)):
        counts = torch.stack([schedule.teachers_of(i, shares).bincount(minlength=len(shares)) for i in range(2000)])
        assert torch.allclose(counts.double().mean(0) / 4, torch.tensor(shares).double(), atol=2e-3)
        assert all((counts[:, k] - 4 * share).abs().max() < 1.001 for k, share in enumerate(shares))
        assert torch.equal(schedule.teachers_of(7, shares), schedule.teachers_of(7, shares).sort()[0])


@pytest.mark.parametrize("groups", [None, (0, 0, 1)])
def test_a_step_between_many_models_is_the_mean_of_steps_at_its_places(groups, make_checkpoint):
    source = Resident(*(canonical(make_checkpoint("llama", seed)) for seed in (1, 2, 3)))
    data = torch.randint(40, (11, 8), generator=torch.Generator().manual_seed(3))
    schedule = Schedule(steps=8, batch=8, objective="endpoints")
    ours = Learner(source, data, schedule, Chunking(3), groups=groups)  # micro-batches that end elsewhere
    randomize(ours.chart, 0.1)
    loss, found = ours.gradients()
    places, size = ours.places(0), schedule.batch // AT_ONCE
    assert len(set(places)) == AT_ONCE and not set(places) & set(ours.places(1))
    parts = []
    for k, (place, rows) in enumerate(zip(places, data[schedule.rows(0, 11)].split(size), strict=True)):
        taught = tuple(schedule.teachers_of(k, place, size).bincount(minlength=3).tolist())
        parts.append(learn(source, [Item(rows, place, taught)], ours.chart))
    assert abs(loss - sum(x for x, _ in parts) / AT_ONCE) < 1e-12
    for name, gradient in found.items():
        assert torch.allclose(gradient, sum(g[name] for _, g in parts) / AT_ONCE, rtol=1e-9, atol=1e-12)


def test_gradients_of_both_sides_are_opposite_at_the_identity(make_checkpoint, tokens):
    a, b = (canonical(make_checkpoint("gpt2", seed)) for seed in (1, 2))
    _, gradients = learn(Resident(a, b), [Item(tokens, 0.5)], Chart(a.spec, 2, torch.float64))
    for g in gradients.values():
        assert torch.allclose(g[0], -g[1], atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"sides": 1}, {"objective": "text"}])
def test_learning_lowers_the_loss(options, make_checkpoint):
    ours = learner(make_checkpoint, steps=30, low=0.5, high=0.5, batch=9, **options)
    while ours.done < 30:
        ours.step()
    assert ours.history.loss[-1] < 0.9 * ours.history.loss[0]


def test_a_restored_learner_goes_on_bit_for_bit(make_checkpoint):
    straight, first, second = (learner(make_checkpoint) for _ in range(3))
    held_out = straight.tokens[:2]
    for _ in range(8):
        straight.step()
        if straight.done == 3:
            straight.validate(held_out, (3.0, 3.0))
    for _ in range(5):
        first.step()
        if first.done == 3:
            first.validate(held_out, (3.0, 3.0))
    state = {name: t.clone() for name, t in first.state().items()}
    second.restore(state, History(list(first.history.loss), dict(first.history.excess)))
    for _ in range(3):
        second.step()
    assert second.history == straight.history
    for name, t in straight.state().items():
        assert torch.equal(t, second.state()[name]), name


def test_the_best_validated_state_is_kept(make_checkpoint):
    ours = learner(make_checkpoint)
    ours.step()
    best = ours.chart.tensors["rotation"].detach().clone()
    ours.validate(ours.tokens[:2], (3.0, 3.0))
    ours.history.excess[ours.done] = -math.inf  # nothing can be better
    ours.chart.tensors["rotation"].data.fill_(0.1)
    ours.validate(ours.tokens[:2], (3.0, 3.0))
    assert torch.equal(ours.final_chart().tensors["rotation"], best.double())


def test_nan_is_reported_and_changes_nothing(make_checkpoint):
    ours = learner(make_checkpoint)
    ours.step()
    before = {name: t.clone() for name, t in ours.state().items()}
    ours.source.members[1].blocks[0]["up"][0, 0] = math.nan
    with pytest.raises(NonFiniteLoss, match="step 2"):
        ours.step()
    assert ours.done == 1
    for name, t in before.items():
        assert torch.equal(t, ours.state()[name]), name


def test_stretch_is_bounded(make_checkpoint):
    weights = canonical(make_checkpoint("neox"))
    chart = Chart(weights.spec, 2, torch.float64)
    randomize(chart, 3.0)
    turn = (chart.tensors["vo"] - chart.tensors["vo"].mT).clone()
    chart.clamp_()
    for element in chart.elements():
        for block in element.blocks:
            for m in (block["vo"].matrix, block["qk"].matrix):
                assert torch.linalg.svdvals(m).max() <= MAX_STRETCH * 1.000001
                assert torch.linalg.svdvals(m).min() >= 1 / (MAX_STRETCH * 1.000001)
    assert torch.allclose(chart.tensors["vo"] - chart.tensors["vo"].mT, turn)


def test_schedule_covers_every_block_once_an_epoch_and_the_whole_range():
    schedule = Schedule(steps=100, batch=4, low=0.2, high=0.6)
    seen = torch.cat([schedule.rows(step, 10) for step in range(5)])
    assert sorted(seen.tolist()) == sorted([*range(10), *range(10)])
    assert sorted(seen[:10].tolist()) == list(range(10))
    assert schedule.rows(3, 10).equal(Schedule(batch=4).rows(3, 10))
    positions = sorted(schedule.lam(step) for step in range(100))
    assert positions[0] >= 0.2 and positions[-1] <= 0.6
    assert max(y - x for x, y in pairwise(positions)) < 0.02
    assert schedule.rate(0) < schedule.rate(9) == 1 and math.isclose(schedule.rate(100), 0.02)


def test_muon_steps_are_nearly_orthogonal():
    x = torch.randn(4, 12, 12, generator=torch.Generator().manual_seed(0)).double()
    values = torch.linalg.svdvals(orthogonalized(x))
    assert values.min() > 0.3 and values.max() < 1.3
    assert (orthogonalized(torch.zeros(2, 3, 3)) == 0).all()
    leaf, momentum = torch.zeros(4, 12, 12).double(), torch.zeros(4, 12, 12).double()
    muon_step(leaf, x, momentum, 0.1)
    assert torch.equal(momentum, x)
    assert (leaf * x).sum() < 0 and 0.03 < torch.linalg.matrix_norm(leaf, 2).max() < 0.13


def test_learner_leaves_the_endpoints_alone(make_checkpoint):
    ours = learner(make_checkpoint)
    before = Weights(
        ours.source.members[1].spec, dict(ours.source.members[1].ends), [dict(x) for x in ours.source.members[1].blocks]
    ).map(torch.clone)
    ours.step()
    for x, y in zip(before.blocks, ours.source.members[1].blocks, strict=True):
        assert all(torch.equal(x[name], y[name]) for name in x)
