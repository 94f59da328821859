"""The step, unit by unit, against plain autograd through the materialised line, for every family."""

import pytest
import torch
import torch.nn.functional as F
import zoo

from lmc_fast.checkpoints import Model, lerp
from lmc_fast.data import as_data
from lmc_fast.engine import passes
from lmc_fast.engine.evaluate import evaluate
from lmc_fast.engine.head import capped
from lmc_fast.engine.model import labels, prediction_rows
from lmc_fast.engine.passes import Item
from lmc_fast.engine.source import Resident, paired
from lmc_fast.examples import Examples
from lmc_fast.learning.step import learn
from lmc_fast.symmetry import canonicalize
from lmc_fast.symmetry.charts import Chart

POSITIONS = (0.3, 0.55)


def batch_of(name, model, seed):
    inputs, spec = zoo.inputs(name), model.spec
    generator = torch.Generator().manual_seed(seed)
    if spec.task == "causal":
        return torch.randint(spec.vocab, inputs.shape, generator=generator)
    if spec.task == "masked":
        target = torch.where(torch.rand(inputs.shape, generator=generator) < 0.3, inputs, -1)
        return Examples(inputs, target)
    if spec.task == "tags":
        target = torch.randint(spec.vocab, inputs.shape, generator=generator)
        return Examples(inputs, target.masked_fill(torch.rand(inputs.shape, generator=generator) < 0.3, -1))
    if spec.task == "features":
        return as_data(inputs.roll(seed, 0), model)
    return Examples(inputs.roll(seed, 0), torch.randint(spec.vocab, (len(inputs),), generator=generator))


def predictions(w, data):
    """Logits (n, V) wherever a batch asks for a prediction."""
    y = F.linear(prediction_rows(w, data), w.ends["head"], w.ends.get("head_bias"))
    return capped(y, w.spec.head_softcap)


def loss_of(w, data):
    y = predictions(w, data)
    return F.cross_entropy(y.to(torch.promote_types(y.dtype, torch.float32)), labels(data))


def materialised(a, b, chart, items, text):
    """Mean over all predictions, through one interpolated model per item."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for data, lam in items:
        w = lerp(a, chart.relative().apply(b), lam)
        if text:
            loss = loss_of(w, data)
        else:
            student, one, two = (predictions(m, data) for m in (w, a, b))
        if not text and w.spec.task == "features":
            gap = student - (1 - lam) * one - lam * two
            loss = gap.square().sum(1).mean() / prediction_rows(w, data).shape[1]
        elif not text:
            aim = (1 - lam) * one.softmax(1) + lam * two.softmax(1)
            loss = F.kl_div(student.log_softmax(1), aim, reduction="batchmean")
        n = len(labels(data))
        total, count = total + loss * n, count + n
    loss = total / count
    return loss, dict(zip(chart.tensors, torch.autograd.grad(loss, list(chart.tensors.values())), strict=True))


@pytest.fixture
def case(checkpoint_of):
    def make(name):
        a, b = (canonicalize(Model(checkpoint_of(name, seed)).load(torch.float64)) for seed in (1, 2))
        chart = Chart(a.spec, 2, torch.float64)
        generator = torch.Generator().manual_seed(7)
        for t in chart.tensors.values():
            t.data.copy_(0.1 * torch.randn(t.shape, generator=generator))
        data = [batch_of(name, Model(checkpoint_of(name)), seed) for seed in range(3)]
        # the first two share a lambda, and so their interpolated weights
        return a, b, chart, list(zip(data, (POSITIONS[0], POSITIONS[0], POSITIONS[1]), strict=True))

    return make


@pytest.mark.parametrize("name", zoo.DISTINCT)
def test_gradients(name, case):
    a, b, chart, items = case(name)
    if a.spec.task == "features":
        pytest.skip("features are no text")
    loss, gradients = materialised(a, b, chart, items, text=True)
    source = Resident(*paired(a, b))
    for route in ("fused", "concat", "weight"):
        for keep in (False, True):
            got, found = learn(source, [Item(*i) for i in items], chart, divergence=False, keep=keep, route=route)
            assert abs(got.item() - loss.item()) <= 1e-12 * loss.abs().item()
            for key, expected in gradients.items():
                error = (found[key] - expected).abs().max()
                assert error <= 1e-10 * expected.abs().max() + 1e-14, (key, route, keep)


@pytest.mark.parametrize("name", zoo.DISTINCT)
def test_divergence_from_the_endpoints(name, case):
    a, b, chart, items = case(name)
    loss, gradients = materialised(a, b, chart, items, text=False)
    got, found = learn(Resident(a, b), [Item(*i) for i in items], chart)
    assert abs(got.item() - loss.item()) <= 1e-11 * loss.abs().item()
    for key, expected in gradients.items():
        assert (found[key] - expected).abs().max() <= 1e-9 * expected.abs().max() + 1e-14, key


@pytest.mark.parametrize("name", ["neox", "gptj", "gemma2"])
@pytest.mark.parametrize("runs", [1, 3])
def test_a_head_that_is_interpolated_as_weights(name, runs, case, monkeypatch):
    """As it is for many tokens: a gradient through the rows, whole or in several runs."""
    a, b, chart, items = case(name)
    monkeypatch.setattr(passes, "WHOLE_HEAD", {True: 0, False: 0})
    source = Resident(a, b)
    source.head_runs = [(k * a.spec.vocab // runs, (k + 1) * a.spec.vocab // runs) for k in range(runs)]
    source.head_parts = runs
    for text in (True, False):
        loss, gradients = materialised(a, b, chart, items, text)
        got, found = learn(source, [Item(*i) for i in items], chart, divergence=not text, route="weight")
        assert abs(got.item() - loss.item()) <= 1e-11 * loss.abs().item()
        for key, expected in gradients.items():
            assert (found[key] - expected).abs().max() <= 1e-9 * expected.abs().max() + 1e-14, key
    data, point = items[0]
    (score,) = evaluate(source, [Item(data, point)], chart, route="weight")
    with torch.no_grad():
        expected = loss_of(lerp(a, chart.relative().apply(b), point), data).item()
    assert abs(score.loss - expected) <= 1e-12 * abs(expected)


@pytest.mark.parametrize("name", zoo.DISTINCT)
def test_evaluation(name, case):
    a, b, chart, items = case(name)
    data = items[0][0]
    with torch.no_grad():
        moved = chart.relative().apply(b)
    points = (0.0, 0.4, 1.0)
    for source, some in ((Resident(a, b), chart), (Resident(a, moved), None)):
        scores = evaluate(source, [Item(data, t) for t in points], some)
        for t, score in zip(points, scores, strict=True):
            line = lerp(a, moved, t)
            if a.spec.task == "features":
                y, one, two = (predictions(w, data) for w in (line, a, moved))
                squares = (1 - t) * one.square().sum(1) + t * two.square().sum(1)
                expected = ((y - torch.lerp(one, two, t)).square().sum(1) / squares).mean().item()
                assert abs(score.loss - expected) <= 1e-12 * max(1, abs(expected))
                assert (expected > 1e-3) == (t == 0.4)
                continue
            expected = loss_of(line, data).item()
            assert abs(score.loss - expected) <= 1e-12 * abs(expected)


@pytest.mark.parametrize("name", ["neox", "llama"])
@pytest.mark.parametrize("route", ["fused", "weight"])
def test_weights_in_bfloat16_and_a_chart_in_float32(name, route, case):
    """As on a GPU: no further from float64 than autograd through the line rounded to bfloat16."""
    a, b, chart, items = case(name)
    exact, gradients = materialised(a, b, chart, items, text=True)
    rounded = [w.to(torch.bfloat16) for w in (a, b)]
    narrow = Chart(a.spec, 2)
    for key, t in narrow.tensors.items():
        t.data.copy_(chart.tensors[key].detach())
    total, count = 0.0, 0
    for data, lam in items:
        left, right = (w.to(torch.float32) for w in rounded)
        line = lerp(left, narrow.relative().apply(right), lam)
        n = len(labels(data))
        total, count = total + loss_of(line.to(torch.bfloat16), data).double() * n, count + n
    plain = torch.autograd.grad(total / count, list(narrow.tensors.values()))
    got, found = learn(Resident(*rounded), [Item(*i) for i in items], narrow, divergence=False, route=route)
    assert abs(got - exact) <= 2 * abs(total / count - exact) + 2e-2 * abs(exact)
    for (key, expected), reference in zip(gradients.items(), plain, strict=True):
        assert found[key].dtype == torch.float32
        error, allowed = ((x.double() - expected).norm() for x in (found[key], reference))
        assert error <= 2 * allowed + 1e-2 * expected.norm(), key
