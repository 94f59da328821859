"""Models of different sizes are grown to one, where nobody asks for it and where somebody does."""

import json

import numpy as np
import pytest
import torch
from checkpoints_tiny import VOCAB
from transformers import LlamaConfig, LlamaForCausalLM

import lmc_fast as lmc
from lmc_fast import LmcError
from lmc_fast.checkpoints import Model
from lmc_fast.cli import main
from lmc_fast.matching.placement import similarity, stream_kernels
from lmc_fast.symmetry.growth import place_by, place_evenly

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
QUICK = {"steps": 2, "batch": 4}


def write(directory, seed, layers=3, **sizes):
    """A tiny Llama in whose stream something happens from block to block."""
    torch.manual_seed(seed)
    sizes = SIZES | {"num_hidden_layers": layers, "intermediate_size": 40, "head_dim": 8} | sizes
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=32, initializer_range=0.3, **sizes)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def case(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("a", 1)
    write("b", 2, 4, hidden_size=32)
    np.save("text.npy", np.random.default_rng(0).integers(0, VOCAB, 1600))
    return lmc.read_data("text.npy", Model("a"), 16)


def without_block(source, out, block):
    """The same model, less one block."""
    model = LlamaForCausalLM.from_pretrained(source)
    del model.model.layers[block]
    model.config.num_hidden_layers -= 1
    model.save_pretrained(out)


@pytest.mark.parametrize("block", [0, 2, 3])
def test_a_missing_block_is_found_by_the_streams(case, block):
    without_block("b", "short", block)
    found = lmc.inspect("short", "b", data="text.npy")
    assert f"empty blocks, counted from 0, are {block} (placed by the similarity" in found.grown[0]
    assert "placed evenly, without data" in lmc.inspect("short", "b").grown[0]


def test_similarity_of_streams_is_that_of_their_geometry(case):
    weights = Model("b").load(torch.float64)
    turn = torch.linalg.qr(torch.randn(32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    kernels = stream_kernels(weights, case[:8])
    assert torch.allclose(similarity(kernels, kernels).diagonal(), torch.ones(5, dtype=torch.float64))
    weights.ends["embed"] = weights.ends["embed"] @ turn
    assert torch.allclose(similarity(kernels[:1], stream_kernels(weights, case[:8])[:1]), torch.ones(1, 1).double())


def test_places_keep_the_order(case):
    small, large = Model("a").spec, Model("b").spec
    assert place_evenly(small, small) == (0, 1, 2)
    alike = torch.zeros(4, 5, dtype=torch.float64)
    alike[0, 1] = alike[1, 2] = 1  # our embedding is like their first block's output, and so on
    assert place_by(alike, small, large) == (1, 2, 3)
    alike[2, 4] = 5
    assert place_by(alike, small, large) == (1, 2, 3)
    alike = torch.zeros(4, 5, dtype=torch.float64)
    alike[3, 3] = 1
    assert place_by(alike, small, large) == (0, 1, 2)


def test_a_run_grows_and_remembers(case, tmp_path):
    pair = lmc.open_pair("a", "b")
    assert pair.a.spec == pair.b.spec
    report = lmc.run(pair, case, "out", method="dual", **QUICK)
    grown, other = report["grown"]
    assert other is None and grown["sizes"]["width"] == 32 and len(grown["places"]) == 3
    assert "similarity" in grown["chosen"]
    assert all(proof["by"].startswith("transformers") and proof["kl"] < 1e-6 for proof in report["proof"].values())
    written = json.loads((tmp_path / "out/a/config.json").read_text())
    assert (written["hidden_size"], written["num_hidden_layers"]) == (32, 4)
    alignment = lmc.Alignment.load("out/alignment.safetensors", pair.spec)
    again = lmc.barrier(lmc.open_pair("a", "b"), case, alignment)
    of_the_written = lmc.barrier(lmc.open_pair("out/a", "out/b"), case)
    assert again.losses == pytest.approx(of_the_written.losses, abs=1e-4)
    lmc.export(lmc.open_pair("a", "b"), alignment, "exported")
    assert lmc.verify("exported/a", "out/a")[1] and lmc.verify("a", "exported/a")[1]
    with pytest.raises(LmcError, match="had another size when this was made"):
        lmc.export(lmc.open_pair("b", "b"), alignment, "of_another")


def test_a_run_within_a_budget_goes_on_where_it_stopped(case, tmp_path):
    pair, state = lmc.open_pair("b", "a"), tmp_path / "state.safetensors"
    whole = lmc.align(pair, case, memory=4 << 30, **QUICK)
    seen = []

    def stop():
        return bool(seen) and (seen[-1].stage, seen[-1].step) == ("learning", 1)

    with pytest.raises(lmc.Cancelled):
        lmc.align(pair, case, memory=4 << 30, state_file=state, progress=seen.append, cancel=stop, **QUICK)
    resumed = lmc.align(pair, case, memory=4 << 30, state_file=state, **QUICK)
    assert resumed.info["grown"] == whole.info["grown"]
    assert resumed.info["history"]["loss"] == whole.info["history"]["loss"]


def test_smaller_in_one_thing_and_larger_in_another(case):
    write("wide", 3, 2, hidden_size=40)
    pair = lmc.open_pair("b", "wide")
    assert (pair.spec.width, pair.spec.layers) == (40, 4) and pair.spec == pair.b.spec
    assert lmc.align(pair, case, method="weight").info["grown"][0]["sizes"]["width"] == 40


def test_three_of_different_shapes(case, tmp_path):
    write("shallow", 3, 2, hidden_size=32)
    models = lmc.open_models(["a", "shallow", "b"])
    assert [model.spec.width for model in models.members] == [32] * 3
    found = lmc.align(models, case, **QUICK)
    lmc.export(models, found, "out", torch.float32)
    for source, name in (("a", "a"), ("shallow", "b"), ("b", "c")):
        expected, moved = (
            LlamaForCausalLM.from_pretrained(place)(case[:4]).logits for place in (source, f"out/{name}")
        )
        assert (expected.log_softmax(-1) - moved.log_softmax(-1)).abs().max() < 1e-4, name
    assert len(lmc.barrier(lmc.open_models([f"out/{name}" for name in "abc"]), case[:8], points=3).edges) == 3


def test_grow_writes_a_stock_model(case, tmp_path, capsys):
    assert main(["grow", "a", "--like", "b", "--data", "text.npy", "--length", "16", "--out", "wide"]) == 0
    assert "blocks 3 to 4, width 24 to 32" in capsys.readouterr().out
    assert LlamaForCausalLM.from_pretrained("wide").config.hidden_size == 32
    assert lmc.verify("a", "wide")[1]
    assert lmc.grow("a", "b").spec == Model("b").spec


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["grow", "b", "--like", "a", "--out", "x"], "is no smaller than"),
        (["grow", "a", "--like", "other", "--out", "x"], "RoPE turns each dimension"),
        (["grow", "a", "--like", "b", "--out", "a"], "a is"),
        (["merge", "a", "b", "--out", "x"], "align writes both in one size"),
        (["align", "a", "other", "--data", "text.npy", "--out", "x"], "RoPE turns each dimension"),
    ],
)
def test_refusals(case, tmp_path, capsys, command, sentence):
    write("other", 4, head_dim=16)
    before = {path.name for path in tmp_path.iterdir()}
    assert main(command) == 2
    assert sentence in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == before
