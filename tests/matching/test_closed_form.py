"""Procrustes, balancing and matching, against scipy, brute force and planted answers."""

import logging

import numpy as np
import pytest
import scipy.linalg
import torch
from random_elements import random_element

from lmc_fast.checkpoints import Model
from lmc_fast.matching import closed_form
from lmc_fast.matching.activations import Covariance, gather_statistics
from lmc_fast.matching.balance import balance
from lmc_fast.matching.closed_form import Evidence, match
from lmc_fast.matching.procrustes import (
    nearest_orthogonal,
    nearest_rotary,
    nearest_rotation_fixing_ones,
    rotary_score,
)
from lmc_fast.symmetry import Transform, canonicalize, check_legal
from lmc_fast.symmetry.elements import Dense, units
from lmc_fast.symmetry.groups import unit_scale_signs

EVIDENCE = {"weights": Evidence(1, 0), "activations": Evidence(0, 1), "both": Evidence(1, 0.3)}


def canonical(directory):
    weights = canonicalize(Model(directory).load(torch.float64))
    return balance(weights).apply(weights)


def orthogonal_element(spec):
    planted = random_element(spec, 11)
    for block in planted.blocks:
        places, inner = block["units"].places, block["units"].inner
        block["units"] = units(places, inner.scale.sign() if unit_scale_signs(spec) == "any" else None)
        block["vo"] = Dense.orthogonal(nearest_orthogonal(block["vo"].matrix))
        block["qk"] = Dense.orthogonal(nearest_rotary(block["qk"].matrix, spec.rope.rotary_dim))
    return planted


def distance(x, y):
    pairs = zip([x.ends, *x.blocks], [y.ends, *y.blocks], strict=True)
    return max((a[name] - b[name]).abs().max().item() for a, b in pairs for name in a)


def test_orthogonal_fit_is_scipys():
    a, b = np.random.default_rng(0).normal(size=(2, 30, 7))
    ours = nearest_orthogonal(torch.from_numpy(a.T @ b))
    assert np.allclose(ours.numpy(), scipy.linalg.orthogonal_procrustes(a, b)[0], atol=1e-12)


def test_fit_fixing_ones_is_the_fit_inside_the_complement():
    x = torch.randn(9, 9, generator=torch.Generator().manual_seed(1)).double()
    basis = torch.linalg.qr(torch.cat([torch.ones(9, 1), torch.eye(9)[:, 1:]], 1).double())[0]
    inner = torch.eye(9, dtype=torch.float64)
    inner[1:, 1:] = nearest_orthogonal(basis[:, 1:].T @ x @ basis[:, 1:])
    assert torch.allclose(nearest_rotation_fixing_ones(x), basis @ inner @ basis.T, atol=1e-12)


@pytest.mark.parametrize("rotary", [0, 2, 6])
def test_rotary_fit_is_best_among_many(rotary):
    x = torch.randn(5, 6, 6, generator=torch.Generator().manual_seed(2)).double()
    best = nearest_rotary(x, rotary)
    reached = (best * x).sum((-1, -2))
    assert torch.allclose(reached, rotary_score(x, rotary), atol=1e-12)
    assert torch.allclose(best @ best.mT, torch.eye(6).double().expand(5, 6, 6), atol=1e-12)
    generator = torch.Generator().manual_seed(3)
    for _ in range(200):
        near = nearest_rotary(x + torch.randn(5, 6, 6, generator=generator).double(), rotary)
        assert ((near * x).sum((-1, -2)) <= reached + 1e-12).all()


def test_covariance_in_parts_is_numpys():
    x, y = np.random.default_rng(4).normal(size=(2, 50, 6)).astype(np.float32)
    y = y[:, :4] + 3
    running = Covariance()
    for rows in (slice(0, 7), slice(7, 50)):
        running.add(torch.from_numpy(x[None, rows]), torch.from_numpy(y[None, rows]))
    joint = np.cov(x.T, y.T, bias=True)[:6, 6:]
    assert np.allclose(running.covariance.numpy(), joint, atol=1e-5)
    assert np.allclose(running.correlation.numpy(), np.corrcoef(x.T, y.T)[:6, 6:], atol=1e-5)


@pytest.mark.parametrize("variant", ["neox", "gpt2", "llama"])
def test_balance_equalises_both_sides_of_every_head(variant, make_checkpoint):
    weights = canonicalize(Model(make_checkpoint(variant)).load(torch.float64))
    spec = weights.spec
    element = balance(weights)
    check_legal(element, spec)
    for block in element.apply(weights).blocks:
        v = block["v"].view(spec.attention.kv_heads, spec.attention.head_dim, -1)
        o = block["o"].view(-1, spec.attention.kv_heads, spec.attention.queries_per_group, spec.attention.head_dim)
        outer = torch.einsum("dgre,dgrf->gef", o, o)
        assert torch.allclose(v @ v.mT, outer, rtol=1e-5, atol=1e-7 * outer.abs().max().item())
        if spec.ffn.gated:
            assert torch.allclose(block["up"].norm(dim=1), block["down"].norm(dim=0), rtol=1e-5)


@pytest.mark.parametrize("evidence", EVIDENCE)
@pytest.mark.parametrize("variant", ["neox", "neox-sequential", "gpt2", "llama"])
def test_a_planted_transform_is_found(variant, evidence, make_checkpoint, tokens):
    """B = g·A for an orthogonal g: matching must undo it, up to what the evidence can see."""
    a = canonical(make_checkpoint(variant))
    b = orthogonal_element(a.spec).apply(a)
    statistics = gather_statistics(a, b, torch.randint(40, (64, 20), generator=torch.Generator().manual_seed(1)))
    found = match(a, b, EVIDENCE[evidence], statistics)
    check_legal(found, a.spec)
    assert distance(found.apply(b), a) < 1e-6


def test_rounds_end_when_there_is_nothing_to_gain(make_checkpoint, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "lmc_fast")
    a, b = (canonical(make_checkpoint("llama", seed)) for seed in (1, 2))

    def last(x, y, rounds=50):
        caplog.clear()
        found = match(x, y, Evidence(1, 0), rounds=rounds)
        return found, caplog.messages[-1]

    planted = orthogonal_element(a.spec).apply(a)  # the tables tell the stream's element before any block does
    assert last(a, planted)[1] == "matched in 1 round: the residual stream's map stays as it is"
    found, limited = last(a, b)[0], last(a, b, 1)[1]
    assert limited == "matched in 1 round: as many as allowed (1)"
    monkeypatch.setattr(closed_form, "GAIN", 1.0)
    assert "matched in 2 rounds: the last one improved the fit by " in last(a, b)[1]
    monkeypatch.setattr(closed_form, "GAIN", 0.0)
    monkeypatch.setattr(closed_form, "STILL", 0.0)
    best, until = last(a, b)
    assert until.endswith("no assignment changed any more")
    assert gap(a, found.apply(b)) < 1.01 * gap(a, best.apply(b)) < gap(a, b)


def test_matching_a_model_with_itself_is_the_identity(make_checkpoint):
    a = canonical(make_checkpoint("llama"))
    assert distance(match(a, a, Evidence(1, 0)).apply(a), a) < 1e-9
    assert distance(Transform.identity(a.spec).apply(a), a) == 0


def gap(a, b):
    pairs = zip(a.blocks, b.blocks, strict=True)
    return sum((x[n] - y[n]).square().sum() for x, y in pairs for n in ("q", "k", "v", "o", "up", "down"))


@pytest.mark.parametrize("name", ["gpt2_shakespeare", "neox_mixed"])
def test_trained_pairs_get_much_closer(name, shared_pair):
    directory = shared_pair(name)
    a, b = canonical(directory / "a"), canonical(directory / "b")
    found = match(a, b, Evidence(1, 0))
    assert gap(a, found.apply(b)) < 0.75 * gap(a, b)
