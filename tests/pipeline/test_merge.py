"""merge takes every pair that align takes, and writes the average of what transformers makes of both."""

import hashlib
import json
import shutil

import pytest
import torch
import yaml
from checkpoints_tiny import edit_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lmc_fast as lmc
from lmc_fast.architectures import FAMILIES
from lmc_fast.cli import main
from lmc_fast.pipeline.shares import is_behind


def as_on_the_hub(t):
    bare = {name.removeprefix("transformer."): value for name, value in t.items()}
    return bare | {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(2)}


def redundant_head(t):
    return t | {"lm_head.weight": t["transformer.wte.weight"].clone()}


def only_head(t):
    return t | {"lm_head.weight": t.pop("transformer.wte.weight")}


def other_head(t):
    return t | {"lm_head.weight": t["transformer.wte.weight"].flip(0)}


def padded(t):
    return t | {"transformer.wte.weight": torch.cat([t["transformer.wte.weight"], torch.ones(4, 24)])}


@pytest.fixture
def changed(make_checkpoint, tmp_path):
    def change(seed, function, **config):
        directory = shutil.copytree(make_checkpoint("gpt2-tied", seed), tmp_path / str(seed))
        tensors = function(load_file(directory / "model.safetensors"))
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        edit_config(directory, **config)
        return directory

    return change


def state(directory):
    """Weights as transformers loads them, with an untied head."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    return {name: t[:40] if t.shape[0] == 44 else t for name, t in model.state_dict().items()}


def fold(tensors):
    """scale_attn_by_inverse_layer_idx, in the queries."""
    for i in range(2):
        for kind in ("weight", "bias"):
            tensors[f"transformer.h.{i}.attn.c_attn.{kind}"][..., :24] /= i + 1
    return tensors


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("function", [as_on_the_hub, redundant_head, only_head, other_head, padded])
def test_it_is_the_average_of_what_transformers_loads(function, swap, changed, tmp_path):
    ends = [changed(1, function, **({"vocab_size": 44} if function is padded else {})), changed(2, dict)]
    ends = ends[::-1] if swap else ends
    lmc.merge(*ends, tmp_path / "out", weight=0.25)
    found, (left, right) = state(tmp_path / "out"), map(state, ends)
    assert found.keys() == left.keys()
    for name, t in found.items():
        expected = torch.lerp(left[name], right[name], 0.25)
        assert (t - expected).abs().max() <= 1e-7 * expected.abs().max(), name
    tied = torch.equal(found["lm_head.weight"], found["transformer.wte.weight"])
    assert tied == (function is not other_head)
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == (not tied)


@pytest.mark.parametrize("swap", [False, True])
def test_options_that_one_of_both_folds_into_its_weights(swap, changed, tmp_path):
    ends = [changed(1, dict, scale_attn_by_inverse_layer_idx=True), changed(2, dict)]
    states = [fold(state(ends[0])), state(ends[1])]
    ends, states = (ends[::-1], states[::-1]) if swap else (ends, states)
    lmc.merge(*ends, tmp_path / "out")
    found = state(tmp_path / "out")
    assert not AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.scale_attn_by_inverse_layer_idx
    for name, t in found.items():
        assert (t - (states[0][name] + states[1][name]) / 2).abs().max() < 1e-6, name


def test_of_two_equal_models_it_is_that_model(make_checkpoint, tmp_path):
    one = make_checkpoint("llama")
    lmc.merge(one, one, tmp_path / "out", weight=0.3)
    before, after = (load_file(d / "model.safetensors") for d in (one, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(t, after[name]) for name, t in before.items())


@pytest.fixture
def three(make_checkpoint):
    return [make_checkpoint("llama", seed) for seed in (1, 2, 3)]


def loaded(directory):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return {name: t.double() for name, t in model.state_dict().items()}


def all_close(found, wanted, tolerance=1e-7):
    assert found.keys() == wanted.keys()
    return all((t - wanted[name]).abs().max() <= tolerance * wanted[name].abs().max() for name, t in found.items())


def total(states, weights):
    return {name: sum(w * s[name] for w, s in zip(weights, states, strict=True)) for name in states[0]}


def test_several_models_weights_divided_by_their_sum_and_provenance(three, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["merge", *map(str, three), "--weights", "2", "1", "1", "--out", str(out), "--shard-size", "8KB"]
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert all_close(loaded(out), total([loaded(d) for d in three], (0.5, 0.25, 0.25)))
    assert record["weights"] == [0.5, 0.25, 0.25] and "sum to 4" in record["notes"][0]
    assert record["dtype"] == "float32" and record["version"] == lmc.__version__ and record["base"] is None
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 3 and all(file.stat().st_size < 12_000 for file in shards)
    card = (out / "README.md").read_text()
    for directory, member in zip(three, record["models"], strict=True):
        digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
        assert member["sha256"]["model.safetensors"] == digest
        assert digest in card and str(directory) in card
    said = yaml.safe_load((out / "mergekit_config.yml").read_text())
    assert said["merge_method"] == "linear" and [m["parameters"]["weight"] for m in said["models"]] == [0.5, 0.25, 0.25]
    assert yaml.safe_load(card.split("---\n")[1])["tags"] == ["merge", "lmc-fast"]
    equal = lmc.merge([three[1]] * 3, tmp_path / "equal")
    same = load_file(tmp_path / "equal" / "model.safetensors")
    assert all(torch.equal(t, same[n]) for n, t in load_file(three[1] / "model.safetensors").items())
    assert equal["weights"] == [1 / 3] * 3 and not equal["notes"]


def test_task_arithmetic_and_extrapolation(three, tmp_path):
    a, b, base = map(loaded, three)
    lmc.merge(three[:2], tmp_path / "task", weights=[0.8, 0.7], base=three[2])
    assert all_close(loaded(tmp_path / "task"), total((a, b, base), (0.8, 0.7, -0.5)), 3e-7)
    lmc.merge([three[0]], tmp_path / "one", weights=[1], base=three[2])
    assert all_close(loaded(tmp_path / "one"), a, 3e-7)
    lmc.merge(*three[:2], tmp_path / "beyond", 1.5, extrapolate=True)
    assert all_close(loaded(tmp_path / "beyond"), total((a, b), (-0.5, 1.5)), 3e-7)


def test_other_weights_for_some_blocks(three, tmp_path):
    file = tmp_path / "blocks.json"
    file.write_text(json.dumps({"embed": [1, 0, 0], "1": [0, 0, 1], "head": [0, 2, 0]}))
    assert main(["merge", *map(str, three), "--weights-by-block", str(file), "--out", str(tmp_path / "out")]) == 0
    found, (a, b, c) = loaded(tmp_path / "out"), map(loaded, three)
    mean = total((a, b, c), [1 / 3] * 3)
    wanted = {name: c[name] if ".layers.1." in name else mean[name] for name in a}
    wanted |= {"model.embed_tokens.weight": a["model.embed_tokens.weight"]}
    wanted |= {name: b[name] for name in ("model.norm.weight", "lm_head.weight")}
    assert all_close(found, wanted)
    lmc.merge(*three[:2], tmp_path / "two", weights_by_block={"0-1": 1.0})
    found = loaded(tmp_path / "two")
    assert all(torch.equal(found[name], b[name]) for name in b if ".layers." in name)


def test_every_slot_outside_the_blocks_is_before_or_behind_them():
    before = {"embed", "positions", "types", "patch", "cls", "distill", "mask", "embed_norm"}
    before |= {"relative", "relative_norm"}
    behind = {"final_norm", "head", "head_transform", "head_norm", "pooler", "relation"}
    for family in FAMILIES.values():
        for entry in family.ends:
            name = entry.slots[0].removesuffix("_bias")
            assert name in (behind if is_behind(name) else before), (family.name, name)


def test_dtypes(make_checkpoint, tmp_path, capsys):
    ends = [make_checkpoint("neox", 1, torch.float16), make_checkpoint("neox", 2)]
    assert main(["merge", *map(str, ends), "--out", str(tmp_path / "own")]) == 0
    said = capsys.readouterr().out
    assert "in float16" in said and f"{ends[1]} in float32" in said and "--dtype" in said
    assert {t.dtype for t in load_file(tmp_path / "own" / "model.safetensors").values()} == {torch.float16}
    record = lmc.merge(*ends, tmp_path / "wide", dtype=torch.float32)
    states = [AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32).state_dict() for d in ends]
    assert record["dtype"] == "float32" and not record["notes"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    assert model.dtype == torch.float32 and model.config.dtype == torch.float32
    assert all_close(model.state_dict(), total(states, (0.5, 0.5)))


def test_the_card_tells_the_barrier_that_a_report_beside_the_models_tells(make_checkpoint, tokens, tmp_path):
    pair = lmc.open_pair(make_checkpoint("neox", 1), make_checkpoint("neox", 2))
    report = lmc.run(pair, tokens, tmp_path / "out", method="weight", test=tokens)
    record = lmc.merge(tmp_path / "out" / "a", tmp_path / "out" / "b", tmp_path / "m")
    curve = report["curves"][-1]
    assert record["barrier"] == {
        "nats": curve["barrier"], "unit": "nats", "at": curve["at"], "between": ["a", "b"], "curve": "matched"
    }  # fmt: skip
    assert f"{curve['barrier']:.4f} nats" in (tmp_path / "m" / "README.md").read_text()
    for damage in ("[]", '{"members": 3}', '{"members": [{"name": "a"}], "curves": [{"barrier": "x", "at": []}]}', "{"):
        (tmp_path / "out" / "report.json").write_text(damage)
        record = lmc.merge(tmp_path / "out" / "a", tmp_path / "out" / "b", tmp_path / f"m{len(damage)}")
        assert record["barrier"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": [1, 2, 3]}, "weights has 3 numbers for 2 models"),
        ({"weights": [2, -1]}, "extrapolate"),
        ({"weights": [1, -1], "extrapolate": True}, "sum to 0"),
        ({"weights": [1, float("nan")]}, "2 finite numbers"),
        ({"weights": "12"}, "2 finite numbers"),
        ({"weights": [1e308, 1e308]}, "larger than any that make sense"),
        ({"weights_by_block": {"\u0661": 0.5}}, "nothing that a model has"),
        ({"weight": 0.5, "weights": [1, 1]}, "both given"),
        ({"weight": 1.5}, "weight 1.5"),
        ({"base": 0}, "say how much"),
        ({"base": 0, "weight": 0.5}, "share of B"),
        ({"base": 0, "weights": [1.5, 0]}, "extrapolate"),
        ({"weights_by_block": {"5": 0.5}}, "blocks are 0 to 1"),
        ({"weights_by_block": {"0-1": 0.5, "1": 0.4}}, "says twice what block 1"),
        ({"weights_by_block": {"middle": 0.5}}, "'middle'"),
        ({"weights_by_block": {"0": [1]}}, "weights of 0 has 1 numbers"),
        ({"weights_by_block": {}}, "no object|not an object"),
        ({"weights_by_block": [1]}, "not an object"),
        ({"weights_by_block": "nowhere.json"}, "nowhere.json is missing"),
        ({"shard_bytes": 0}, "shard_bytes"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words, three, tmp_path):
    if "base" in options:
        options = options | {"base": three[2]}
    with pytest.raises(lmc.LmcError, match=words):
        lmc.merge(*three[:2], tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_weights_that_a_file_says_twice_are_refused(three, tmp_path):
    (tmp_path / "w.json").write_text('{"0": 0.2, "1": 0.5, "0": 0.8}')
    with pytest.raises(lmc.LmcError, match=r"w.json is not valid JSON \('0' is said twice\)"):
        lmc.merge(*three[:2], tmp_path / "out", weights_by_block=tmp_path / "w.json")


def test_models_that_do_not_fit_and_too_few_of_them(three, make_checkpoint, tmp_path, capsys):
    with pytest.raises(lmc.LmcError, match=r"neox.* cannot be merged: their architectures differ"):
        lmc.merge([*three, make_checkpoint("neox")], tmp_path / "out")
    with pytest.raises(lmc.LmcError, match="takes two models at least"):
        lmc.merge(three[:1], tmp_path / "out")
    command = ["merge", *map(str, three), "--out", str(tmp_path / "out")]
    for more, words in ((["--weight", "0.5"], "--weights"), (["--shard-size", "big"], "shard size 'big'")):
        assert main([*command, *more]) == 2
        assert words in capsys.readouterr().err
    tied = [make_checkpoint("gpt2-tied", seed) for seed in (1, 2)]
    with pytest.raises(lmc.LmcError, match="the head is the embedding"):
        lmc.merge(*tied, tmp_path / "out", weights_by_block={"embed": 0.2})
    assert not list(tmp_path.iterdir())


def test_several_models_of_which_one_folds_an_option(make_checkpoint, changed, tmp_path):
    ends = [make_checkpoint("gpt2-tied", 3), changed(1, dict, scale_attn_by_inverse_layer_idx=True), changed(2, dict)]
    lmc.merge(ends, tmp_path / "out", weights=[0.5, 0.25, 0.25], dtype=torch.float64)
    states = [state(ends[0]), fold(state(ends[1])), state(ends[2])]
    assert all_close(state(tmp_path / "out"), total(states, (0.5, 0.25, 0.25)))
