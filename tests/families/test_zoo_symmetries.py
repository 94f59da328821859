"""The group of every family: derived as known, its elements keep the function, what is illegal is refused."""

import pytest
import torch
import zoo
from elements import KNOWN, Random, random_element

from lmc_fast import LmcError
from lmc_fast.checkpoints import Model, export, lerp
from lmc_fast.engine.model import logits
from lmc_fast.symmetry import Transform, canonicalize, check_legal, legal_groups
from lmc_fast.symmetry.charts import Chart
from lmc_fast.symmetry.elements import Dense, Scale, Wreath, orthogonal
from lmc_fast.symmetry.groups import heads_move, query_key_maps, residual_group, unit_scale_signs, value_maps
from lmc_fast.symmetry.storage import pack, unpack


def canonical(directory):
    return canonicalize(Model(directory).load(torch.float64))


def changed(name, weights, expected):
    """Largest change of what must not change, relative to its size."""
    expected = zoo.outcome(name, expected)
    found = zoo.outcome(name, logits(weights, zoo.inputs(name)))
    return ((found - expected).abs().max() / expected.abs().max()).item()


def distance(x, y):
    pairs = zip([x.ends, *x.blocks], [y.ends, *y.blocks], strict=True)
    return max((a[key] - b[key]).abs().max().item() for a, b in pairs for key in a)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_group_follows_from_the_features(name, checkpoint_of):
    spec, known = Model(checkpoint_of(name)).spec, KNOWN[name]
    residual = {"any": "orthogonal", "ones": "orthogonal, fixing the ones vector", "signed": "signed permutation"}
    residual["fixed"] = "identity"
    assert residual_group(spec) == residual.get(known.residual, "permutation")
    assert query_key_maps(spec) == {"rope": "general"}.get(known.qk, known.qk)
    assert value_maps(spec) == {"gl": "general"}.get(known.vo, known.vo)
    assert heads_move(spec) == known.heads
    assert unit_scale_signs(spec) == known.scale
    assert all(group.what and group.why for group in legal_groups(spec))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_canonical_form_and_random_elements_keep_the_function(name, checkpoint_of, expected_of):
    weights = canonical(checkpoint_of(name))
    assert changed(name, weights, expected_of(name)) < 1e-12
    assert distance(canonicalize(weights), weights) < 1e-12
    for seed in (1, 2):
        element = random_element(KNOWN[name], weights.spec, seed)
        check_legal(element, weights.spec)
        moved = element.apply(weights)
        assert distance(moved, weights) > 0.1
        assert changed(name, moved, expected_of(name)) < 1e-12


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_moved_model_is_a_stock_model(name, checkpoint_of, expected_of, tmp_path):
    model = Model(checkpoint_of(name))
    moved = random_element(KNOWN[name], model.spec, 3).apply(canonical(model.path))
    export(moved, model, tmp_path / "out", torch.float64)
    found = zoo.outcome(name, zoo.reference(tmp_path / "out", zoo.inputs(name)))
    expected = zoo.outcome(name, expected_of(name))
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.parametrize("name", zoo.ZOO)
def test_group_laws_gauge_and_storage(name, checkpoint_of):
    a, b = canonical(checkpoint_of(name, 1)), canonical(checkpoint_of(name, 2))
    f, g = (random_element(KNOWN[name], a.spec, seed) for seed in (4, 5))
    assert distance(g.compose(f).apply(a), g.apply(f.apply(a))) < 1e-12
    assert distance(g.inverse().apply(g.apply(a)), a) < 1e-12
    check_legal(g.inverse().compose(f), a.spec)
    again = unpack(pack(g, "x"), "x", a.spec.layers)
    assert distance(again.apply(a), g.apply(a)) == 0
    x = zoo.inputs(name)
    both = zoo.outcome(name, logits(lerp(f.apply(a), g.apply(b), 0.3), x))
    one = zoo.outcome(name, logits(lerp(a, f.inverse().compose(g).apply(b), 0.3), x))
    assert (both - one).abs().max() < 1e-12 * both.abs().max()


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_chart_has_legal_elements_only(name, checkpoint_of, expected_of):
    weights = canonical(checkpoint_of(name))
    chart = Chart(weights.spec, 2, torch.float64)
    generator = torch.Generator().manual_seed(1)
    for leaf in chart.tensors.values():
        leaf.data = torch.randn(leaf.shape, generator=generator, dtype=torch.float64) * 0.2
    assert ("rotation" in chart.tensors) == (KNOWN[name].residual in ("any", "ones"))
    element = chart.relative().map(torch.Tensor.detach)
    check_legal(element, weights.spec)
    assert changed(name, element.apply(weights), expected_of(name)) < 1e-12


def _first_block(element, **spaces):
    return Transform(element.model, [element.blocks[0] | spaces, *element.blocks[1:]])


def _with_map(element, space, maps):
    return _first_block(element, **{space: Dense.of(maps)})


def _illegal(name, spec, element):
    """(what, a broken element, whether it must change the function visibly) for everything this family forbids."""
    known, draw = KNOWN[name], Random(7)
    groups, e, rotary = spec.attention.kv_heads, spec.attention.head_dim, spec.rope.rotary_dim

    def each(make):
        return torch.stack([make() for _ in range(groups)])

    for kind in ("any", "ones", "signed", "plain"):
        all_kinds = ("any", "ones", "signed", "plain")
        wider = {"any": (), "ones": ("any", "signed"), "signed": ("any", "ones"), "plain": ("any", "ones", "signed")}
        wider["fixed"] = all_kinds
        if kind in wider[known.residual]:
            stream = orthogonal(draw.residual(kind, spec.width))
            yield f"residual {kind}", Transform(element.model | {"stream": stream}, element.blocks)
    if known.qk != "rope":
        general = each(lambda: draw.query_key("rope", e, rotary))
        yield "general query/key map", _with_map(element, "qk", general)
    if known.qk == "signs" and rotary:
        yield "quarter turns", _with_map(element, "qk", each(lambda: draw.query_key("turns", e, rotary)))
        lone = torch.eye(e, dtype=torch.float64).repeat(groups, 1, 1)
        lone[:, 0, 0] = -1
        yield "sign of one coordinate of a pair", _with_map(element, "qk", lone)
    if known.qk != "turns" and rotary:
        yield "map that mixes rotary planes", _with_map(element, "qk", each(lambda: draw.general(e)))
    if known.vo == "signed":
        yield "general value map", _with_map(element, "vo", each(lambda: draw.general(e)))
    if not known.heads and groups > 1:
        yield "heads under ALiBi", _first_block(element, heads=Wreath(torch.arange(groups).roll(1)))
    if known.scale == "none" and spec.ffn.width:
        yield "scaled units", _first_block(element, units=Scale(draw.scales(spec.ffn.width) + 1))
    if known.scale == "none" and spec.ffn.experts.count:
        shape = spec.ffn.experts.count, spec.ffn.experts.width
        yield "scaled units of experts", _first_block(element, expert_units=Scale(draw.scales(*shape) + 1))
    if known.scale == "positive":
        yield "negative scale", _first_block(element, units=Scale(-draw.scales(spec.ffn.width)))


@pytest.mark.parametrize("name", zoo.ZOO)
def test_illegal_elements_are_refused_and_would_change_the_function(name, checkpoint_of, expected_of):
    weights = canonical(checkpoint_of(name))
    element = random_element(KNOWN[name], weights.spec, 6)
    for what, broken in _illegal(name, weights.spec, element):
        with pytest.raises(LmcError):
            check_legal(broken, weights.spec)
        assert changed(name, broken.apply(weights), expected_of(name)) > 1e-4, what
