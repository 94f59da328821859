"""On every family: what is computed from lazy weights is what is computed from loaded ones."""

import pytest
import torch
import zoo
from elements import KNOWN, random_element

from lmc_fast.checkpoints import LazyBlocks, Model, lazy
from lmc_fast.evaluation import difference
from lmc_fast.examples import Examples
from lmc_fast.matching import closed_form, evidence
from lmc_fast.matching.activations import gather_statistics
from lmc_fast.matching.balance import balance
from lmc_fast.matching.closed_form import Evidence, match
from lmc_fast.symmetry import canonicalize, check_legal
from lmc_fast.symmetry.elements import Wreath, dense
from lmc_fast.symmetry.storage import pack


@pytest.fixture(params=[None, 100], ids=["whole", "chunks"])
def chunked(request, monkeypatch):
    """Whether tables are read by runs of a few rows; eager results are then equal up to rounding only."""
    if request.param:
        monkeypatch.setattr(lazy, "CHUNK_ELEMENTS", request.param)
    return bool(request.param)


def apart(x, y):
    pairs = list(zip([x.ends, *x.blocks], [y.ends, *y.blocks], strict=True))
    assert all(a.keys() == b.keys() and all(a[n].dtype == b[n].dtype for n in a) for a, b in pairs)
    return max((a[name] - b[name]).abs().max().item() for a, b in pairs for name in a if a[name].numel())


@pytest.mark.parametrize("name", zoo.DISTINCT)
def test_canonical_form_and_transforms(name, checkpoint_of, chunked):
    model = Model(checkpoint_of(name))
    element = random_element(KNOWN[name], model.spec, 3)
    moved = [element.apply(canonicalize(w)) for w in (model.load(torch.float64), model.open_weights(torch.float64))]
    assert isinstance(moved[1].blocks, LazyBlocks) and not moved[1].ends.keys() & moved[1].tables.keys()
    assert apart(moved[0], moved[1].load()) <= (1e-12 if chunked else 0)


def pair_of(checkpoint_of, name, lazily):
    load = Model.open_weights if lazily else Model.load
    a, b = (canonicalize(load(Model(checkpoint_of(name, seed)), torch.float64)) for seed in (1, 2))
    return balance(a).apply(a), balance(b).apply(b)


def data_of(name):
    x = zoo.inputs(name)
    return Examples(x, torch.zeros(len(x), dtype=torch.long)) if x.is_floating_point() else x


@pytest.mark.parametrize("name", zoo.DISTINCT)
def test_matching(name, checkpoint_of, chunked, tmp_path):
    eager, opened = (pair_of(checkpoint_of, name, lazily) for lazily in (False, True))
    in_memory = gather_statistics(*eager, data_of(name), batch=2)
    on_disk = gather_statistics(*opened, data_of(name), batch=2, keep=tmp_path)
    assert torch.allclose(in_memory.stream, on_disk.stream, rtol=0, atol=1e-10)
    one = pack(match(*eager, Evidence(1, 0.3), in_memory), "x")
    two = pack(match(*opened, Evidence(1, 0.3), on_disk), "x")
    assert one.keys() == two.keys()
    for key, t in one.items():
        if chunked and t.is_floating_point():
            assert torch.allclose(t, two[key], rtol=0, atol=1e-6), key
        else:
            assert torch.equal(t, two[key]), key


@pytest.mark.parametrize("name", ["llama", "neox", "gpt2", "bert", "qwen2-moe", "olmo2"])
def test_matching_in_float32_finds_the_same(name, checkpoint_of, monkeypatch):
    """As wide models are matched: products in float32, sums in float64."""
    a, b = pair_of(checkpoint_of, name, True)
    statistics = gather_statistics(a, b, data_of(name))
    exact = match(a, b, Evidence(1, 0.3), statistics)
    monkeypatch.setattr(evidence, "WIDE", 1)
    a, b = a.to(torch.float32), b.to(torch.float32)
    narrow = gather_statistics(a, b, data_of(name))
    assert narrow.blocks[0]["q"].rows(0, 1).dtype == torch.float32 and narrow.stream.dtype == torch.float64
    found = match(a, b, Evidence(1, 0.3), narrow)
    assert dense(found.stream).matrix.dtype == torch.float64 == found.blocks[0]["vo"].matrix.dtype
    check_legal(found, a.spec)
    assert (dense(found.stream).matrix - dense(exact.stream).matrix).abs().max() < 1e-4
    for x, y in zip(found.blocks, exact.blocks, strict=True):
        assert x.keys() == y.keys()
        for space, g in x.items():
            assert not isinstance(g, Wreath) or torch.equal(g.places, y[space].places)


def test_rounds_are_limited(checkpoint_of, monkeypatch):
    a, b = pair_of(checkpoint_of, "gpt2", False)
    seen = []
    real = closed_form.match_block
    monkeypatch.setattr(closed_form, "match_block", lambda *args: seen.append(1) or real(*args))
    match(a, b, Evidence(1, 0), rounds=1)
    assert len(seen) == a.spec.layers


@pytest.mark.parametrize("name", [name for name in zoo.ZOO if name.startswith("clip")])
def test_features_are_compared_in_parts(name, checkpoint_of, expected_of):
    a, b = (Model(checkpoint_of(name, seed)).open_weights(torch.float64) for seed in (1, 2))
    found = difference(a, b, data_of(name), batch=1, rows=2)
    p, q = (expected_of(name, seed) for seed in (1, 2))
    assert found.max_log_probability == pytest.approx((p - q).abs().max().item(), rel=1e-9)
    assert found.kl == pytest.approx(((p - q).square().mean() / p.square().mean()).item(), rel=1e-9)
