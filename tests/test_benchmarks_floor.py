"""The floor's chunked cross-entropy against torch's own, values and gradients."""

import importlib.util
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

if importlib.util.find_spec("benchmarks") is None:
    pytest.skip("benchmarks are not part of an installed package", allow_module_level=True)

from benchmarks.floor import cross_entropy, task_loss
from lmc_fast.checkpoints import Model
from lmc_fast.engine.model import logits


def problem(dtype=torch.float64, bias=True, tokens=37, width=11, vocab=53):
    g = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()

    target = torch.randint(vocab, (tokens,), generator=g)
    return make(tokens, width), make(vocab, width), make(vocab) if bias else None, target


@pytest.mark.parametrize("rows", [1, 5, 37, 100, None])
@pytest.mark.parametrize("bias", [True, False])
def test_cross_entropy_and_gradients(rows, bias, poisoned):
    x, w, b, target = problem(bias=bias)
    leaves = [t for t in (x, w, b) if t is not None]
    ours, expected = cross_entropy(x, w, b, target, rows), F.cross_entropy(F.linear(x, w, b), target)
    assert torch.allclose(ours, expected, rtol=1e-13)
    for mine, theirs in zip(
        torch.autograd.grad(3 * ours, leaves), torch.autograd.grad(3 * expected, leaves), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-14)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_the_loss_of_a_model_and_the_gradient_of_its_head(softcap, make_checkpoint):
    weights = Model(make_checkpoint("neox", 1)).load(torch.float64)
    weights.spec = replace(weights.spec, head_softcap=softcap)
    head = weights.ends["head"].requires_grad_()
    tokens = torch.randint(weights.spec.vocab, (3, 9), generator=torch.Generator().manual_seed(2))
    loss = task_loss(weights, tokens)
    expected = F.cross_entropy(logits(weights, tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert torch.allclose(loss, expected, rtol=1e-12)
    ours, theirs = (torch.autograd.grad(t, head)[0] for t in (loss, expected))
    assert torch.allclose(ours, theirs, atol=1e-14)


def test_only_what_is_asked_for_gets_a_gradient():
    x, w, _, target = problem()
    cross_entropy(x, w.detach(), None, target).backward()
    assert x.grad is not None and w.grad is None


def test_float32_is_as_exact_as_torch():
    x, w, b, target = problem()
    truth = F.cross_entropy(F.linear(x, w, b), target)
    single = [t.detach().float() for t in (x, w, b)]
    theirs = (F.cross_entropy(F.linear(*single), target).double() - truth).abs()
    assert (cross_entropy(*single, target).double() - truth).abs() <= 2 * theirs + 1e-7 * truth
