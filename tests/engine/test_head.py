"""The chunked loss behind an interpolated head: any number of chunks and runs gives what plain torch gives."""

import pytest
import torch
import torch.nn.functional as F

from lmc_fast.engine.head import HeadInputs, HeadLoss, VocabChunk

ROWS, VOCAB, WIDTH = 11, 13, 5
SHARES = [0.7, 0.3]


def case(softcap):
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    xs, ws, bias = [random(ROWS, WIDTH) for _ in range(2)], [random(VOCAB, WIDTH) for _ in range(2)], random(VOCAB)
    taught = [random(ROWS, WIDTH) for _ in range(2)]
    target = torch.randint(VOCAB, (ROWS,), generator=g)

    def cap(x):
        return softcap * torch.tanh(x / softcap) if softcap else x

    return xs, ws, bias, taught, target, cap


def runs(sizes):
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("elements", [1, 3 * VOCAB, 10**6])
@pytest.mark.parametrize("sizes", [[VOCAB], [6, 7], [1, 5, 7]])
@pytest.mark.parametrize("objective", ["text", "teachers"])
def test_loss_and_gradients(softcap, elements, sizes, objective):
    xs, ws, bias, taught, target, cap = case(softcap)
    leaves = [x.clone().requires_grad_() for x in xs]
    logits = cap(sum(s * x @ w.mT for s, x, w in zip(SHARES, leaves, ws, strict=True)) + bias)
    aim = sum(s * cap(t @ w.mT + bias).softmax(1) for s, t, w in zip(SHARES, taught, ws, strict=True))
    if objective == "text":
        expected = F.cross_entropy(logits, target, reduction="sum")
    else:
        expected = F.kl_div(logits.log_softmax(1), aim, reduction="sum")
    gradients = torch.autograd.grad(expected, leaves)

    teachers = [(s, HeadInputs([t], [1.0])) for s, t in zip(SHARES, taught, strict=True)]
    options = {"softcap": softcap, "learn": True, "elements": elements}
    if objective == "text":
        h = HeadLoss(HeadInputs(xs, SHARES), target, **options)
    else:
        h = HeadLoss(HeadInputs(xs, SHARES), None, teachers, **options)

    def part(some):
        own = [VocabChunk([w[some]], bias[some], some.start) for w in ws]
        return VocabChunk([w[some] for w in ws], bias[some], some.start), own if objective == "teachers" else []

    for apply in [HeadLoss.whole] if len(sizes) == 1 else [HeadLoss.scan, HeadLoss.add]:
        for some in runs(sizes):
            apply(h, *part(some))
    assert abs(h.loss - expected.detach()) < 1e-10
    for got, wanted in zip(h.gradients, gradients, strict=True):
        assert (got - wanted).abs().max() < 1e-10


@pytest.mark.parametrize("elements", [1, 3 * VOCAB, 10**6])
@pytest.mark.parametrize("sizes", [[VOCAB], [6, 7]])
@pytest.mark.parametrize("first", [0, 4, ROWS])
def test_every_row_may_have_a_teacher_of_its_own(elements, sizes, first):
    """The first rows are taught by one member, the others by the other; each member predicts its rows alone."""
    xs, ws, bias, taught, _, _ = case(0.0)
    leaves = [x.clone().requires_grad_() for x in xs]
    logits = sum(s * x @ w.mT for s, x, w in zip(SHARES, leaves, ws, strict=True)) + bias
    aims = [(t @ w.mT + bias).softmax(1) for t, w in zip(taught, ws, strict=True)]
    expected = F.kl_div(logits.log_softmax(1), torch.cat([aims[0][:first], aims[1][first:]]), reduction="sum")
    gradients = torch.autograd.grad(expected, leaves)
    teachers = [(1.0, HeadInputs([t], [1.0])) for t in (taught[0][:first], taught[1][first:])]
    h = HeadLoss(HeadInputs(xs, SHARES), None, teachers, starts=[0, first], learn=True, elements=elements)
    for apply in [HeadLoss.whole] if len(sizes) == 1 else [HeadLoss.scan, HeadLoss.add]:
        for some in runs(sizes):
            own = [VocabChunk([w[some]], bias[some], some.start) for w in ws]
            apply(h, VocabChunk([w[some] for w in ws], bias[some], some.start), own)
    assert abs(h.loss - expected.detach()) < 1e-10
    for got, wanted in zip(h.gradients, gradients, strict=True):
        assert (got - wanted).abs().max() < 1e-10


def test_divergence_from_itself_is_zero():
    xs, ws, bias, *_ = case(0.0)
    h = HeadLoss(HeadInputs(xs[:1], [1.0]), None, [(1.0, HeadInputs(xs[:1], [1.0]))], learn=True)
    h.whole(VocabChunk(ws[:1], bias), [VocabChunk(ws[:1], bias)])
    assert abs(h.loss) < 1e-13 and h.gradients[0].abs().max() < 1e-14


@pytest.mark.parametrize("sizes", [[VOCAB], [6, 7], [1, 5, 7]])
def test_one_scan_gives_loss_and_guesses(sizes):
    xs, ws, bias, _, target, _ = case(0.0)
    logits = sum(s * x @ w.mT for s, x, w in zip(SHARES, xs, ws, strict=True)) + bias
    h = HeadLoss(HeadInputs(xs, SHARES), target, elements=2 * VOCAB)
    for some in runs(sizes):
        h.scan(VocabChunk([w[some] for w in ws], bias[some], some.start), [])
    assert abs(h.loss - F.cross_entropy(logits, target, reduction="sum")) < 1e-10
    assert torch.equal(h.guess, logits.argmax(1))
    assert h.right == int((logits.argmax(1) == target).sum())


def test_runs_of_vocabulary_agree_with_one_run_in_float32(poisoned):
    """Nothing uninitialised is read, and the normaliser of many runs is as exact as that of one."""
    xs, ws, bias, _, target, _ = case(0.0)
    exact = F.cross_entropy(sum(s * x @ w.mT for s, x, w in zip(SHARES, xs, ws, strict=True)) + bias, target)
    xs, ws, bias = [x.float() for x in xs], [w.float() for w in ws], bias.float()
    plain = F.cross_entropy(sum(s * x @ w.mT for s, x, w in zip(SHARES, xs, ws, strict=True)) + bias, target)
    h = HeadLoss(HeadInputs(xs, SHARES), target, elements=VOCAB)
    for some in runs([4, 4, 5]):
        h.scan(VocabChunk([w[some] for w in ws], bias[some], some.start), [])
    assert abs(h.loss / ROWS - exact) <= 2 * abs(plain - exact) + 1e-7
