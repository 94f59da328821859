"""The comparison of two functions, in one pass over the vocabulary, against the definition."""

import pytest
import torch
from live import LiveBytes

from lmc_fast.checkpoints import Model, Weights, lazy
from lmc_fast.engine.model import labels, logits
from lmc_fast.evaluation import difference, function
from lmc_fast.symmetry import canonicalize


def by_definition(a, b, tokens):
    p, q = (logits(w, tokens[:, :-1]).flatten(0, 1).double().log_softmax(-1) for w in (a, b))
    right = labels(tokens)[:, None]
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    return (p - q).abs().max().item(), kl, -p.gather(1, right).mean().item(), -q.gather(1, right).mean().item()


@pytest.mark.parametrize("variant", ["neox", "gpt2-tied", "llama"])
@pytest.mark.parametrize("lazily", [False, True])
def test_in_chunks_it_is_the_definition(variant, lazily, make_checkpoint, tokens, monkeypatch):
    monkeypatch.setattr(function, "ROWS", 11)
    models = [Model(make_checkpoint(variant, seed)) for seed in (1, 2)]
    expected = by_definition(*(m.load(torch.float64) for m in models), tokens)
    a, b = (m.open_weights(torch.float64) if lazily else m.load(torch.float64) for m in models)
    found = difference(a, b, tokens, batch=2, rows=4, logits=11 * 7)
    assert [found.max_log_probability, found.kl, found.loss_a, found.loss_b] == pytest.approx(expected, rel=1e-11)


def test_a_shift_of_all_logits_is_no_difference(make_checkpoint, tokens, monkeypatch):
    monkeypatch.setattr(function, "CHUNK_ELEMENTS", 24 * 7)
    a = Model(make_checkpoint("neox")).load(torch.float64)
    b = Weights(a.spec, a.ends | {"head": a.ends["head"] + 30 * torch.randn(24, dtype=torch.float64)}, a.blocks)
    found = difference(a, b, tokens)
    assert abs(found.kl) < 1e-12 and found.max_log_probability < 1e-11
    assert found.loss_a == pytest.approx(found.loss_b, abs=1e-12)
    assert difference(a, canonicalize(a), tokens).max_log_probability < 1e-11


def test_logits_of_all_tokens_and_the_whole_vocabulary_never_exist(make_checkpoint, monkeypatch):
    monkeypatch.setattr(function, "CHUNK_ELEMENTS", 24 * 4)
    monkeypatch.setattr(function, "ROWS", 64)
    model = Model(make_checkpoint("llama"))
    tokens = torch.randint(40, (64, 20), generator=torch.Generator().manual_seed(1))
    hidden = 64 * 19 * 24 * 4
    with LiveBytes() as live:
        difference(model.open_weights(), model.open_weights(), tokens, batch=2)
    assert live.peak < 5 * hidden < 64 * 19 * 40 * 8 * 2
    with LiveBytes() as fewer:
        difference(model.open_weights(), model.open_weights(), tokens, batch=2, rows=4)
    assert fewer.peak < live.peak / 3


def test_narrow_models_do_not_make_long_runs(make_checkpoint, tokens, monkeypatch):
    """With 11 rows at a time the vocabulary comes in runs, though its table fits into one."""
    seen = []
    chunks = lazy.Table.chunks
    monkeypatch.setattr(lazy.Table, "chunks", lambda self, size=None: seen.append(size) or chunks(self, size))
    a = Model(make_checkpoint("neox")).open_weights()
    difference(a, a, tokens, logits=1000)
    rows = tokens[:, 1:].numel()
    assert set(seen) == {max(1, 1000 // min(rows, function.ROWS))}
