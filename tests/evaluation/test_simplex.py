"""Losses between more than two models: against plain averages, and against the mixture of their predictions."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import lmc_fast as lmc
from lmc_fast.checkpoints import Weights
from lmc_fast.cli import main
from lmc_fast.engine.ensemble import ensemble_loss
from lmc_fast.engine.model import logits
from lmc_fast.engine.source import Resident
from lmc_fast.evaluation.curve import is_own
from lmc_fast.evaluation.simplex import Simplex
from lmc_fast.places import inside, simplex_places


@pytest.fixture
def three(make_checkpoint):
    return [make_checkpoint("llama", seed) for seed in (1, 2, 3)]


def average(weights, shares):
    def mix(slots):
        return {name: sum(s * w[name] for s, w in zip(shares, slots, strict=True)) for name in slots[0]}

    blocks = [mix(slots) for slots in zip(*(w.blocks for w in weights), strict=True)]
    return Weights(weights[0].spec, mix([w.ends for w in weights]), blocks)


def test_losses_are_those_of_averages_and_of_the_mixture(three, tokens):
    models = lmc.open_models(three)
    found = lmc.barrier(models, tokens, points=5)
    weights = [model.load() for model in models.members]
    for place in ((1.0, 0.0, 0.0), (0.0, 0.5, 0.5), (0.25, 0.25, 0.5), (1 / 3, 1 / 3, 1 / 3)):
        out = logits(average(weights, place), tokens[:, :-1]).flatten(0, 1)
        assert abs(F.cross_entropy(out, tokens[:, 1:].flatten()).item() - found.at_place(place)) < 1e-5, place
    shared = sum(logits(w, tokens[:, :-1]).flatten(0, 1).softmax(1) for w in weights) / 3
    assert abs(F.nll_loss(shared.log(), tokens[:, 1:].flatten()).item() - found.ensemble) < 1e-5
    assert [curve.name for curve in found.edges] == ["a-b", "a-c", "b-c"]
    line = lmc.barrier(lmc.open_pair(*three[1:]), tokens, points=5)
    assert found.edges[2].losses == pytest.approx(line.losses, abs=1e-5)
    ends = sum(found.corners) / 3
    assert found.centroid == pytest.approx(found.at_place((1 / 3,) * 3) - ends)
    assert found.barrier == max(found.excess) and found.excess[found.places.index(found.at)] == found.barrier


@pytest.mark.parametrize("variant", ["gpt2", "neox"])
def test_the_ensemble_of_parts_of_the_head_is_that_of_all(variant, make_checkpoint, tokens):
    models = lmc.open_models([make_checkpoint(variant, seed) for seed in (1, 2, 3)])
    weights = [model.load(torch.float64) for model in models.members]
    whole = ensemble_loss(Resident(*weights), tokens)
    parts = Resident(*weights)
    parts.head_runs, parts.head_parts = [(0, 17), (17, weights[0].spec.vocab)], 2
    for rows in (1, 3, None):  # whose streams are held at a time
        assert ensemble_loss(parts, tokens, batch=1, rows=rows, logits=100) == pytest.approx(whole, abs=1e-12)
    assert ensemble_loss(parts, tokens, [1.0, 0.0, 0.0]) == pytest.approx(
        F.cross_entropy(logits(weights[0], tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).item(), abs=1e-12
    )


def test_places_cover_edges_and_the_inside_evenly():
    three, four = simplex_places(3), simplex_places(4)
    assert len(three) == 67 and len(set(three)) == 67  # 66 of the grid, and the centroid
    assert len(four) == 4 + 6 * 9 + 66 + 1
    for place in (*three, *four):
        assert math.isclose(sum(place), 1) and min(place) >= 0
    means = [sum(inside(k, 4)[i] for k in range(400)) / 400 for i in range(4)]
    assert max(abs(mean - 1 / 4) for mean in means) < 0.01


def test_the_command_writes_a_triangle_and_its_numbers(three, tmp_path, capsys):
    torch.manual_seed(0)
    text = tmp_path / "text.npy"
    __import__("numpy").save(text, torch.randint(40, (64,)).numpy())
    files = [tmp_path / "t.json", tmp_path / "t.png"]
    command = ["barrier", *map(str, three), "--data", str(text), "--length", "16", "--points", "3", "--out"]
    assert main([*command, *map(str, files)]) == 0
    shown = capsys.readouterr().out
    assert "a-c  barrier" in shown and "ensemble" in shown and "the average of all" in shown
    saved = json.loads(files[0].read_text())
    assert saved["names"] == ["a", "b", "c"] and saved["edges"].keys() == {"a-b", "a-c", "b-c"}
    assert all(map(is_own, files))
    assert main([*command, *map(str, files)]) == 0  # its own are overwritten


def test_more_than_three_are_drawn_by_their_edges(tmp_path):
    places = simplex_places(4, 3)
    found = Simplex(list("abcd"), places, [1 + max(place) for place in places], 0.5)
    found.plot(tmp_path / "four.png")
    assert is_own(tmp_path / "four.png") and len(found.edges) == 6


def test_the_odd_one_is_named(three, make_checkpoint, tmp_path, capsys):
    other = make_checkpoint("gpt2", 1)
    for order in ([three[0], other, three[1]], [three[0], three[1], other], [other, *three[:2]]):
        with pytest.raises(lmc.LmcError, match=f"^{other} cannot be aligned with .*architectures differ"):
            lmc.open_models(order)
    again = tmp_path / "again"
    again.symlink_to(three[1])
    with pytest.raises(lmc.LmcError, match=f"^{three[1]} and {again} are the same model; give each once"):
        lmc.open_models([three[0], three[1], again])
    assert lmc.inspect(three[0], three[1], more=[again]).match is False
    with pytest.raises(lmc.LmcError, match=f"^{three[1]} is given twice; give each once"):
        lmc.open_models([three[1], three[0], three[1]])
    with pytest.raises(lmc.LmcError, match="1 models make no alignment"):
        lmc.open_models(three[:1])
    with pytest.raises(lmc.LmcError, match="2 models, not of 3"):
        lmc.barrier(
            lmc.open_models(three),
            torch.zeros(1, 8, dtype=torch.long),
            lmc.Alignment(*[lmc.Transform.identity(lmc.open_models(three).spec)] * 2),
        )
