"""More than two models from files to one basin: every scheme, resumed, within a budget, through the command."""

import json

import pytest
import torch

import lmc_fast as lmc
from lmc_fast.checkpoints import Model
from lmc_fast.cli import main
from lmc_fast.engine.model import logits
from lmc_fast.errors import Cancelled
from lmc_fast.members import SCHEMES
from lmc_fast.pipeline.schemes import Below
from lmc_fast.symmetry import canonicalize, check_legal
from lmc_fast.symmetry.storage import pack

LEARN = {"steps": 3, "batch": 4, "warmup": 1}


@pytest.fixture
def four(make_checkpoint):
    return lmc.open_models([make_checkpoint("llama", seed) for seed in (1, 2, 3, 4)])


@pytest.fixture
def data():
    return torch.randint(40, (40, 12), generator=torch.Generator().manual_seed(3))


def tensors(alignment):
    return [t for g in alignment.members for _, t in sorted(pack(g, "x").items())]


def same(x, y):
    return all(torch.equal(a, b) for a, b in zip(tensors(x), tensors(y), strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_keeps_the_functions_and_brings_models_nearer(scheme, four, data):
    found = lmc.align(four, data, scheme=scheme, **LEARN)
    assert len(found.members) == 4 and found.info["scheme"] == scheme
    weights = [canonicalize(model.load(torch.float64)) for model in four.members]
    for g, w in zip(found.members, weights, strict=True):
        check_legal(g, four.spec)
        change = logits(g.apply(w), data[:, :-1]).log_softmax(-1) - logits(w, data[:, :-1]).log_softmax(-1)
        assert change.abs().max() < 1e-9
    apart, moved = ([b["up"] for b in w.blocks] for w in (weights[1], found.members[1].apply(weights[1])))
    base = found.members[0].apply(weights[0])
    assert sum((x["up"] - y).norm() for x, y in zip(base.blocks, moved, strict=True)) < sum(
        (x["up"] - y).norm() for x, y in zip(weights[0].blocks, apart, strict=True)
    )
    assert ("history" in found.info) == (scheme in ("joint", "hierarchical"))


def test_joint_learning_lowers_the_divergence_and_starts_from_levels(four, data):
    joint = lmc.align(four, data, scheme="joint", **(LEARN | {"steps": 12}))
    assert len(joint.info["history"]["loss"]) == 12
    levels = lmc.align(four, data, scheme="hierarchical", **LEARN)
    assert [level["members"] for level in levels.info["levels"]] == [["a", "b"], ["c", "d"], ["ab", "cd"]]
    started = lmc.align(four, data, scheme="joint", start="hierarchical", **LEARN)
    assert all(
        torch.equal(x, y)
        for g, h in zip(started.matched, levels.members, strict=True)
        for (_, x), (_, y) in zip(sorted(pack(g, "x").items()), sorted(pack(h, "x").items()), strict=True)
    )


def test_for_a_pair_every_learning_scheme_is_the_same(make_checkpoint, data):
    pair = lmc.open_models([make_checkpoint("llama", seed) for seed in (1, 2)])
    assert isinstance(pair, lmc.Pair)
    assert same(lmc.align(lmc.open_pair(*pair.homes), data, **LEARN), lmc.align(pair, data, **LEARN))
    assert same(lmc.align(pair, data, scheme="hierarchical", **LEARN), lmc.align(pair, data, **LEARN))
    assert lmc.align(pair, data, scheme="universe").info["method"] == "matching"


def test_an_odd_number_waits_for_the_next_level_and_averages_are_plain(make_checkpoint, data):
    three = lmc.open_models([make_checkpoint("neox", seed) for seed in (1, 2, 3)])
    found = lmc.align(three, data, scheme="hierarchical", **LEARN)
    assert [level["members"] for level in found.info["levels"]] == [["a", "b"], ["ab", "c"]]
    weights = [canonicalize(model.load(torch.float64)) for model in three.members]
    each = [g.apply(w) for g, w in zip(found.members, weights, strict=True)]
    mean, last = Below(found.members, (0, 1, 0)).averages(weights)
    for name, t in mean.blocks[0].items():
        assert torch.allclose(t, (each[0].blocks[0][name] + each[2].blocks[0][name]) / 2, atol=1e-12)
        assert torch.equal(last.blocks[0][name], each[1].blocks[0][name])
    assert torch.allclose(mean.load().ends["embed"], (each[0].ends["embed"] + each[2].ends["embed"]) / 2, atol=1e-12)


def test_a_level_begins_with_whole_averages_and_learns_all_elements(four, data):
    found = lmc.align(four, data, scheme="hierarchical", **LEARN)
    pairs = [lmc.align(lmc.Pair(*four.members[k : k + 2]), data, **LEARN) for k in (0, 2)]
    below = [g for pair in pairs for g in pair.members]
    any_weights = canonicalize(four.a.load(torch.float64))

    def moved(elements, k):
        return elements[k].compose(below[k].inverse()).apply(any_weights).blocks

    for one, two in ((0, 1), (2, 3)):
        for x, y in zip(moved(found.matched, one), moved(found.matched, two), strict=True):
            assert all(torch.allclose(x[name], y[name], atol=1e-4) for name in x)
        after = zip(moved(found.members, one), moved(found.members, two), strict=True)
        assert any(not torch.allclose(x["up"], y["up"], atol=1e-3) for x, y in after)
    assert len(found.info["levels"]) == 3 and not {"below", "groups"} & found.info.keys()


@pytest.mark.parametrize("how", [{"scheme": "hierarchical"}, {"start": "hierarchical"}, {}])
def test_what_is_interrupted_goes_on_to_the_same_bits(how, four, data, tmp_path):
    whole = lmc.align(four, data, **how, **LEARN)
    state = tmp_path / "state.safetensors"
    seen = []

    def told(at):
        seen.append(at.stage == "learning" and at.step == 2)

    with pytest.raises(Cancelled):  # in the second alignment of a level, or in the only one
        lmc.align(four, data, **how, **LEARN, state_file=state, progress=told, cancel=lambda: sum(seen) > bool(how))
    again = lmc.align(four, data, **how, **LEARN, state_file=state)
    assert same(again, whole)
    if how:
        with pytest.raises(lmc.LmcError, match="cannot resume"):
            lmc.align(four, data, **how, **(LEARN | {"steps": 4}), state_file=state)


def test_four_within_a_budget_are_streamed(four, data, tmp_path):
    meter = lmc.Meter()
    tight = lmc.align(four, data, memory=3 << 30, meter=meter, state_file=tmp_path / "s.safetensors", **LEARN)
    held = lmc.align(four, data, **LEARN)
    for x, y in zip(tight.matched, held.matched, strict=True):
        assert all(torch.allclose(pack(x, "")[name], t, atol=1e-6) for name, t in pack(y, "").items())
    first, other = (found.info["history"]["loss"] for found in (tight, held))
    assert first[0] == pytest.approx(other[0], rel=1e-4)  # later steps of such small models tell rounding apart
    plan = meter.to_json()["plan"]
    assert plan["job"]["members"] == 4 and plan["job"]["sides"] == 4


def test_a_plan_grows_by_one_members_weights_each(make_checkpoint):
    places = [make_checkpoint("llama", seed) for seed in (1, 2, 3, 4)]
    two, three, four = (lmc.plan(*places[:n], memory="6GiB", tokens=64, length=16) for n in (2, 3, 4))
    assert two.store_bytes < three.store_bytes < four.store_bytes
    assert abs(four.store_bytes - 2 * two.store_bytes) < 0.05 * four.store_bytes
    assert two.total < three.total < four.total


def test_the_command_aligns_four_and_its_average_is_merged(make_checkpoint, data, tmp_path, capsys):
    __import__("numpy").save(tmp_path / "t.npy", data.numpy())
    places = [str(make_checkpoint("llama", seed)) for seed in (1, 2, 3)]
    out, common = tmp_path / "out", ["--data", str(tmp_path / "t.npy"), "--length", "12"]
    assert main(["align", *places, *common, "--steps", "2", "--batch", "4", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"merge {out}/a {out}/b {out}/c" in shown and "ensemble" in shown
    report = json.loads((out / "report.json").read_text())
    assert [member["name"] for member in report["members"]] == ["a", "b", "c"]
    assert [curve["name"] for curve in report["curves"]] == ["naive", "matched", "learned"]
    written = [str(out / name) for name in "abc"]
    assert main(["merge", *written, "--out", str(tmp_path / "merged")]) == 0
    assert Model(tmp_path / "merged").spec.layers == 2
    assert main(["barrier", *places, *common, "--points", "3", "--alignment", str(out / "alignment.safetensors")]) == 0
    assert main(["barrier", *places[:2], *common, "--alignment", str(out / "alignment.safetensors")]) == 2
    assert "3 models, not of 2" in capsys.readouterr().err
