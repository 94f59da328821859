"""Matching of many models: planted elements are found, what is climbed never falls, and is what the weights say."""

from itertools import combinations, pairwise

import pytest
import torch
from random_elements import random_element

from lmc_fast.checkpoints import Model
from lmc_fast.matching.activations import gather_statistics
from lmc_fast.matching.balance import balance
from lmc_fast.matching.closed_form import Evidence
from lmc_fast.matching.procrustes import nearest_orthogonal, nearest_rotary
from lmc_fast.matching.universe import match_all
from lmc_fast.symmetry import canonicalize, check_legal
from lmc_fast.symmetry.elements import Dense, units
from lmc_fast.symmetry.groups import unit_scale_signs


def canonical(directory):
    weights = canonicalize(Model(directory).load(torch.float64))
    return balance(weights).apply(weights)


def orthogonal_element(spec, seed):
    planted = random_element(spec, seed)
    for block in planted.blocks:
        places, inner = block["units"].places, block["units"].inner
        block["units"] = units(places, inner.scale.sign() if unit_scale_signs(spec) == "any" else None)
        block["vo"] = Dense.orthogonal(nearest_orthogonal(block["vo"].matrix))
        block["qk"] = Dense.orthogonal(nearest_rotary(block["qk"].matrix, spec.rope.rotary_dim))
    return planted


def statistics_of(members):
    tokens = torch.randint(40, (48, 20), generator=torch.Generator().manual_seed(1))
    pairs = combinations(range(len(members)), 2)
    return {(i, j): gather_statistics(members[i], members[j], tokens) for i, j in pairs}


def agreement(members):
    """Σ over pairs of what their weights agree, but for the biases of norms that were folded."""
    total = 0.0
    for x, y in combinations(members, 2):
        for a, b in zip([x.ends, *x.blocks], [y.ends, *y.blocks], strict=True):
            total += sum((a[n] * b[n]).sum().item() for n in a if "norm" not in n)
    return total


@pytest.mark.parametrize("activations", [0.0, 0.3])
@pytest.mark.parametrize("variant", ["neox", "gpt2", "llama"])
def test_planted_elements_of_many_are_found(variant, activations, make_checkpoint):
    a = canonical(make_checkpoint(variant))
    members = [a, *(orthogonal_element(a.spec, seed).apply(a) for seed in (11, 12, 13))]
    found = match_all(members, Evidence(1, activations), statistics_of(members) if activations else None)
    moved = [g.apply(w) for g, w in zip(found, members, strict=True)]
    for g in found:
        check_legal(g, a.spec)
    for other in moved[1:]:
        pairs = zip([moved[0].ends, *moved[0].blocks], [other.ends, *other.blocks], strict=True)
        assert max((x[n] - y[n]).abs().max().item() for x, y in pairs for n in x) < 1e-6


@pytest.mark.parametrize("activations", [0.0, 0.3])
@pytest.mark.parametrize("variant", ["neox", "gpt2", "llama"])
def test_what_is_climbed_never_falls(variant, activations, make_checkpoint):
    members = [canonical(make_checkpoint(variant, seed)) for seed in (1, 2, 3, 4)]
    statistics = statistics_of(members) if activations else None
    reached = []
    found = match_all(members, Evidence(1, activations), statistics, gained=reached.append)
    assert len(reached) > 1
    for before, after in pairwise(reached):
        assert after >= before - 1e-9 * abs(before)
    moved = [g.apply(w) for g, w in zip(found, members, strict=True)]
    first = match_all(members, Evidence(1, activations), statistics, rounds=1)
    assert agreement(moved) > agreement(members)
    if not activations:
        assert agreement(moved) == pytest.approx(reached[-1], rel=1e-6)
        assert agreement([g.apply(w) for g, w in zip(first, members, strict=True)]) == pytest.approx(
            reached[0], rel=1e-6
        )
    for g in found:
        check_legal(g, members[0].spec)
