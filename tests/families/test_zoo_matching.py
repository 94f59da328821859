"""Matching on every family: a planted transform is found again, and what is found is legal."""

import pytest
import torch
import zoo
from elements import KNOWN, random_element
from test_zoo_symmetries import canonical, changed, distance

from lmc_fast.examples import Examples
from lmc_fast.matching.activations import gather_statistics
from lmc_fast.matching.balance import balance
from lmc_fast.matching.closed_form import Evidence, match
from lmc_fast.symmetry import Transform, check_legal
from lmc_fast.symmetry.elements import Dense, Scale, Wreath


def balanced(weights):
    found = balance(weights)
    check_legal(found, weights.spec)
    return found.apply(weights)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_planted_element_is_found_from_the_weights(name, checkpoint_of):
    """B is A moved by a random element: matching must bring it back, up to what no weight shows."""
    a = balanced(canonical(checkpoint_of(name)))
    planted = random_element(KNOWN[name], a.spec, 11)
    b = balanced(_orthogonal(planted).apply(a))
    found = match(a, b, Evidence(1, 0))
    check_legal(found, a.spec)
    assert distance(found.apply(b), a) < 1e-5


def _orthogonal(element):
    """The element without its stretches, which balancing takes out anyway where it can."""
    blocks = [{space: _without_stretch(g) for space, g in block.items()} for block in element.blocks]
    return Transform(element.model, blocks)


def _without_stretch(g):
    if isinstance(g, Dense):
        u, _, vt = torch.linalg.svd(g.matrix)
        return Dense.orthogonal(u @ vt)
    return Wreath(g.places, Scale(g.inner.scale.sign())) if isinstance(g.inner, Scale) else g


@pytest.mark.parametrize("name", zoo.ZOO)
def test_matching_two_models_is_legal_and_brings_them_closer(name, checkpoint_of, expected_of):
    a, b = (balanced(canonical(checkpoint_of(name, seed))) for seed in (1, 2))
    x = zoo.inputs(name)
    data = Examples(x, torch.zeros(len(x), dtype=torch.long)) if x.is_floating_point() else x
    found = match(a, b, Evidence(1, 0.3), gather_statistics(a, b, data))
    check_legal(found, a.spec)
    moved = found.apply(b)
    assert changed(name, moved, expected_of(name, 2)) < 1e-12

    def gap(y):
        pairs = zip([a.ends, *a.blocks], [y.ends, *y.blocks], strict=True)
        return sum((p[k] - q[k]).square().sum().item() for p, q in pairs for k in p)

    assert gap(moved) < gap(b)
