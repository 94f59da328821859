"""What the command does, as functions: run, and export with its proof."""

import json

import pytest
import torch
from checkpoints_tiny import write_lines
from safetensors.torch import load_file, save_file

import lmc_fast as lmc
from lmc_fast.cli import main
from lmc_fast.errors import LmcError
from lmc_fast.pipeline import export as export_module

FAST = {"steps": 3, "batch": 2}


@pytest.fixture
def pair(make_checkpoint):
    return lmc.open_pair(make_checkpoint("neox", 1), make_checkpoint("neox", 2))


@pytest.fixture
def text(tmp_path):
    return write_lines(tmp_path / "text.txt", 3000)


def damage(monkeypatch, endpoint: str) -> None:
    """One endpoint reaches the disk with one weight off by a little."""
    write = export_module.export_endpoint

    def broken(model, transform, directory, *how):
        write(model, transform, directory, *how)
        if directory.name == endpoint:
            file = directory / "model.safetensors"
            tensors = load_file(file)
            tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.weight"][0, 0] += 0.05
            save_file(tensors, file, {"format": "pt"})

    monkeypatch.setattr(export_module, "export_endpoint", broken)


def test_run_does_what_the_command_does(pair, text, tmp_path):
    blocks = lmc.read_tokens(text, pair.a, 16)
    seen = []
    report = lmc.run(pair, blocks, tmp_path / "one", progress=seen.append, **FAST)
    command = ["align", pair.a.source, pair.b.source, "--data", str(text), "--out", str(tmp_path / "two"), "--quiet"]
    assert main([*command, "--steps", "3", "--batch", "2", "--block", "16"]) == 0
    assert json.loads((tmp_path / "one" / "report.json").read_text()) == json.loads(json.dumps(report))
    other = json.loads((tmp_path / "two" / "report.json").read_text())
    assert {**other, "costs": 0} == {**json.loads(json.dumps(report)), "costs": 0}
    assert [stage["name"] for stage in report["costs"]["stages"]][-3:] == ["measuring", "writing", "verifying"]
    names = [{f.name for f in (tmp_path / d).iterdir()} for d in ("one", "two")]
    assert names[0] == names[1] >= {"a", "b", "alignment.safetensors", "report.json", "curve.png", "learning.png"}
    for endpoint in "ab":
        x, y = (load_file(tmp_path / d / endpoint / "model.safetensors") for d in ("one", "two"))
        assert all(torch.equal(x[name], y[name]) for name in x)
    stages = [(at.stage, at.step, at.steps) for at in seen]
    assert list(dict.fromkeys(s for s in stages if s[0] == "learning")) == [("learning", i, 3) for i in range(4)]
    units = 3 * (pair.spec.layers + 1)  # of three curves: blocks, and the head in one part
    assert [s for s in stages if s[0] == "measuring"][1:] == [("measuring", i, units) for i in range(units)]


@pytest.mark.parametrize("endpoint", ["a", "b"])
def test_what_does_not_keep_its_function_is_not_published(endpoint, pair, text, tmp_path, monkeypatch):
    blocks = lmc.read_tokens(text, pair.a, 16)
    alignment = lmc.align(pair, blocks, method="weight")
    damage(monkeypatch, endpoint)
    source = getattr(pair, endpoint).source
    for tokens in (None, blocks):
        with pytest.raises(LmcError, match="does not keep its function") as error:
            lmc.export(pair, alignment, tmp_path / "out", tokens=tokens)
        assert source in str(error.value)
    with pytest.raises(LmcError, match="does not keep its function"):
        lmc.run(pair, blocks, tmp_path / "out", method="weight")
    assert [f.name for f in tmp_path.iterdir()] == ["text.txt"]


def test_a_run_whose_proof_fails_keeps_what_it_learned(pair, text, tmp_path, monkeypatch):
    blocks = lmc.read_tokens(text, pair.a, 16)
    with monkeypatch.context() as patch:
        damage(patch, "b")
        with pytest.raises(LmcError, match="does not keep its function"):
            lmc.run(pair, blocks, tmp_path / "out", **FAST)
    assert (tmp_path / "out.partial" / "state.safetensors").exists() and not (tmp_path / "out").exists()
    assert lmc.run(pair, blocks, tmp_path / "out", resume=True, **FAST)["proof"]["b"]["kl"] < 1e-8


def test_export_tells_how_far_the_endpoints_are(pair, text, tmp_path):
    alignment = lmc.align(pair, lmc.read_tokens(text, pair.a, 16), method="weight")
    proof = lmc.export(pair, alignment, tmp_path / "out")
    assert set(proof) == {"a", "b"} and all(0 <= found.kl < 1e-8 for found in proof.values())


def test_an_alignment_of_another_pair_is_refused(pair, text, make_checkpoint, tmp_path):
    alignment = lmc.align(pair, lmc.read_tokens(text, pair.a, 16), method="weight")
    other = lmc.open_pair(make_checkpoint("llama", 1), make_checkpoint("llama", 2))
    with pytest.raises(LmcError):
        lmc.export(other, alignment, tmp_path / "out")
    assert not (tmp_path / "out").exists()
