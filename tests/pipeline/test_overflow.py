"""Numbers that overflow are told, with their place; nothing is measured, published or written with NaN in it."""

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from lmc_fast import Curve, Difference, LmcError, Schedule, align, barrier, diagnose, heal, merge, open_pair, verify
from lmc_fast.cli import main
from lmc_fast.learning.learner import Learner

UP, DOWN = (f"gpt_neox.layers.0.mlp.dense_{name}." for name in ("h_to_4h", "4h_to_h"))


@pytest.fixture
def changed(make_checkpoint, tmp_path):
    """changed(name, seed, function) -> a checkpoint whose tensors `function` has changed in place."""

    def make(name, seed, function):
        shutil.copytree(make_checkpoint("neox", seed), tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        tensors = load_file(file)
        function(tensors)
        save_file(tensors, file, {"format": "pt"})
        return tmp_path / name

    return make


@pytest.fixture
def finite_ends(changed):
    """Each computes, but what lies between does not: 1e25 meets 1e25 only there."""

    def with_ffn(up, down):
        def change(tensors):
            for name, value in ((UP, up), (DOWN, down)):
                tensors[name + "weight"].fill_(value)
                tensors[name + "bias"].fill_(value if name == UP else 0.0)

        return change

    return changed("a", 1, with_ffn(1e25, 0.0)), changed("b", 2, with_ffn(0.0, 1e25))


def scaled(factor):
    def change(tensors):
        for t in tensors.values():
            t.copy_((t.double() * factor).clamp(-3e38, 3e38))

    return change


def test_a_curve_that_overflows_between_finite_ends_has_no_barrier(finite_ends, tokens, tmp_path, capsys):
    with pytest.raises(LmcError, match=r"the loss at lambda 0\.5 is nan"):
        barrier(open_pair(*finite_ends), tokens, points=3)
    np.save(tmp_path / "ids.npy", tokens.repeat(20, 1).numpy())
    command = [*map(str, finite_ends), "--data", str(tmp_path / "ids.npy"), "--block", "16"]
    for line in (
        ["barrier", *command, "--json", "--out", str(tmp_path / "c.json")],
        ["align", *command, "--val", command[3], "--method", "weight", "--out", str(tmp_path / "out")],
    ):
        assert main(line) == 2
        shown = capsys.readouterr()
        assert "is nan: numbers overflow" in shown.err and "barrier" not in shown.out
    assert not (tmp_path / "c.json").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("factor", [1e8, 1e15, 1e30, 1e45])
def test_huge_weights_are_refused_in_one_sentence(factor, changed, make_checkpoint, tokens, tmp_path):
    plain, huge = make_checkpoint("neox", 2), changed("huge", 1, scaled(factor))
    for ends, name in (((huge, plain), r"0 \(endpoint A"), ((plain, huge), r"0\.\d|1 \(endpoint B")):
        with pytest.raises(LmcError, match=f"the loss at lambda ({name})"):
            barrier(open_pair(*ends), tokens)
        with pytest.raises(LmcError, match="overflow"):
            align(open_pair(*ends), tokens, validation=tokens, steps=1, batch=1)
    with pytest.raises(LmcError, match="loss of the first checkpoint is nan"):
        verify(huge, plain, tokens)
    with pytest.raises(LmcError, match="not finite: numbers overflow"):
        diagnose(open_pair(plain, huge), tokens)
    with pytest.raises(LmcError, match="look for huge weights"):
        heal(plain, [huge, plain], tokens, tmp_path / "out", steps=1, batch=1)
    assert not list(tmp_path.glob("out*"))


def test_the_average_of_huge_numbers_is_finite(changed, tmp_path):
    merge(changed("plus", 1, scaled(1e45)), changed("minus", 1, scaled(-1e45)), tmp_path / "out")
    assert all(not t.any() for t in load_file(tmp_path / "out" / "model.safetensors").values())


def test_curves_and_differences_hold_finite_numbers_only(tmp_path):
    for losses, words in (
        ([1.0, np.nan, 1.0], r"0\.5 is nan"),
        ([1.0, 1.0, np.inf], r"1 \(endpoint B itself\) is inf"),
    ):
        with pytest.raises(LmcError, match=words):
            Curve([0.0, 0.5, 1.0], losses)
    Curve([0.0, 1.0], [1.0, 2.0]).save(tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["barrier"] == 0
    for numbers in ((0, 0, np.nan, 0), (0, 0, 0, np.inf), (0, np.nan, 0, 0), (np.inf, 0, 0, 0)):
        with pytest.raises(LmcError, match="huge or NaN weights"):
            Difference(*numbers)


@pytest.mark.parametrize("value", [1e3, 1e30, np.nan], ids=str)
def test_coordinates_that_overflow_stop_learning(value, make_checkpoint, tokens, monkeypatch):
    pair = open_pair(make_checkpoint("neox", 1), make_checkpoint("neox", 2))
    step = Learner.step

    def diverging(self):
        loss = step(self)
        for t in self.chart.tensors.values():
            t.data.fill_(value)
        return loss

    monkeypatch.setattr(Learner, "step", diverging)
    with pytest.raises(LmcError, match=r"after step 1, .*try a smaller --matrix-lr"):
        align(pair, tokens, validation=tokens, schedule=Schedule(steps=2, batch=1))
