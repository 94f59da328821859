"""lmc-fast demo, on models smaller than those that it brings; and that it brings them."""

import json
import shutil

import numpy as np
import pytest
from checkpoints_tiny import VOCAB
from transformers import AutoModelForCausalLM

from lmc_fast.cli import demo, main


@pytest.fixture
def tiny(make_checkpoint, tmp_path, monkeypatch):
    place = tmp_path / "demo_pair"
    for name, seed in (("a", 1), ("b", 2)):
        shutil.copytree(make_checkpoint("neox", seed), place / name)
    for number, split in enumerate(("train", "val", "test")):
        np.save(place / f"{split}.npy", np.random.default_rng(number).integers(VOCAB, size=640, dtype=np.uint16))
    monkeypatch.setattr(demo, "PLACES", (tmp_path / "nowhere", place))
    return place


def test_the_demo_aligns_merges_and_says_what_came_out(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out), "--steps", "2"]) == 0
    said = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    curves = {curve["name"]: curve["losses"] for curve in report["curves"]}
    for loss in (curves["learned"][0], curves["learned"][-1], curves["naive"][1], curves["learned"][5]):
        assert f"{loss:.2f}" in said
    assert (out / "curve.png").is_file() and str(out / "curve.png") in said
    merged = AutoModelForCausalLM.from_pretrained(out / "merged")
    assert all(parameter.isfinite().all() for parameter in merged.parameters())
    capsys.readouterr()
    assert main(["demo", "--out", str(out), "--steps", "2"]) == 2
    assert capsys.readouterr().err.startswith("lmc-fast: error: ")


def test_a_demo_that_was_stopped_before_its_merge_goes_on(tiny, tmp_path, capsys, monkeypatch):
    words = ["demo", "--out", str(tmp_path / "out"), "--steps", "2", "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(demo, "merge", lambda *_: exec("raise KeyboardInterrupt"))
        assert main(words[:-1]) == 130
    assert main([*words, "--steps", "3"]) == 2 and "not what this demo with 3 steps began" in capsys.readouterr().err
    for _ in range(2):  # the second time nothing is left to do
        assert main(words) == 0 and "after alignment it loses" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")


def test_the_demo_prints_one_document(tiny, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "out"), "--steps", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["merged"]["out"] == str(tmp_path / "out" / "merged") and len(found["curves"]) == 3


def test_the_pair_is_found_or_its_absence_told(tmp_path, monkeypatch, capsys):
    pair = demo.demo_pair()
    assert {"a", "b", "train.npy", "val.npy", "test.npy", "LICENSE-PYTHON.txt"} <= {
        file.name for file in pair.iterdir()
    }
    monkeypatch.setattr(demo, "PLACES", (tmp_path / "nowhere",))
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert f"{tmp_path / 'nowhere'} is not there" in capsys.readouterr().err
