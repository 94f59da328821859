"""A run that goes on is the run that was interrupted, and its state is a good one."""

import math
import os
import shutil

import pytest
import torch
from checkpoints_tiny import edit_config, write_lines
from safetensors.torch import load_file, save_file

import lmc_fast as lmc
from lmc_fast.checkpoints.identity import Identity
from lmc_fast.data import read_data, split_validation
from lmc_fast.errors import LmcError
from lmc_fast.learning import learner
from lmc_fast.pipeline.align import align
from lmc_fast.pipeline.run import run
from lmc_fast.symmetry.storage import load_tensors, pack

FAST = {"steps": 8, "batch": 2}


@pytest.fixture
def inputs(make_checkpoint, tmp_path):
    """Copies of two checkpoints that may be changed, and data."""
    for seed, name in enumerate("ab", 1):
        shutil.copytree(make_checkpoint("neox", seed), tmp_path / name)
    return tmp_path / "a", tmp_path / "b", read(tmp_path, tmp_path / "a", 3000)


def read(directory, model, count):
    text = write_lines(directory / "text.txt", count)
    return split_validation(read_data(text, lmc.open_pair(model, model).a, 16))


def scale(directory, factor, only=""):
    file = directory / "model.safetensors"
    tensors = {name: t * factor if only in name else t for name, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


def numbers(alignment):
    return [t for side in (alignment.a, alignment.b) for _, t in sorted(pack(side, "x").items())]


def interrupted_at(step, action=None):
    def progress(at):
        if at.step == step and at.stage == "learning":
            if action:
                action()
            else:
                raise KeyboardInterrupt

    return progress


def test_another_model_other_data_or_options_are_refused(inputs, make_checkpoint, tmp_path):
    a, b, (tokens, validation) = inputs
    state = tmp_path / "state.safetensors"
    how = {"state_file": state, "validation": validation, **FAST}
    pair = lmc.open_pair(a, b)
    expected = align(pair, tokens, validation=validation, **FAST)
    with pytest.raises(KeyboardInterrupt):
        align(pair, tokens, progress=interrupted_at(3), **how)
    kept = state.read_bytes()
    other = tokens.flip(0)

    def refused(words, a=a, b=b, tokens=tokens, **changes):
        with pytest.raises(LmcError, match=f"cannot resume: {words}"):
            align(lmc.open_pair(a, b), tokens, **(how | changes))
        assert state.read_bytes() == kept

    refused("A and B have changed places", b, a)
    llamas = [make_checkpoint("llama", seed) for seed in (1, 2)]
    refused("config.json of A", *llamas)
    refused("what --data and --length give", tokens=other)
    refused("what --val and --length give", validation=None)
    refused("what --val and --length give", validation=validation.flip(1))
    refused("activations was 0.3", activations=0.5)
    refused("seed was 0", seed=3)
    refused("method was dual", method="one-sided")
    refused("method was dual", method="weight")
    for directory, name in ((a, "A"), (b, "B")):
        shutil.copytree(directory, tmp_path / "kept")
        scale(directory, 1.3, "layers.1.mlp")
        refused(f"model.safetensors of {name}")
        shutil.rmtree(directory)
        shutil.copytree(tmp_path / "kept", directory)
        edit_config(directory, bos_token_id=5)
        refused(f"config.json of {name}")
        shutil.rmtree(directory)
        (tmp_path / "kept").rename(directory)
    found = align(lmc.open_pair(a, b), tokens, **how)
    assert all(torch.equal(x, y) for x, y in zip(numbers(found), numbers(expected), strict=True))
    assert found.info["history"] == expected.info["history"]


@pytest.mark.parametrize("how", ["written", "replaced", "removed"])
def test_a_model_that_changes_during_the_run_is_noticed(how, inputs, tmp_path):
    a, b, (tokens, validation) = inputs
    shutil.copytree(a, tmp_path / "kept")

    def change():
        if how == "written":
            scale(a, 1.01, "layers.1.mlp.dense_h_to_4h.bias")
        elif how == "removed":
            (a / "model.safetensors").unlink()
        else:
            scale(tmp_path / "kept", 1.01)
            (tmp_path / "kept" / "model.safetensors").rename(a / "model.safetensors")

    out = tmp_path / "out"
    words = "cannot be read any more" if how == "removed" else "model.safetensors was changed"
    with pytest.raises(LmcError, match=words):
        run(lmc.open_pair(a, b), tokens, out, validation=validation, progress=interrupted_at(4, change), **FAST)
    assert not out.exists() and (tmp_path / "out.partial" / "state.safetensors").exists()


def test_a_model_that_is_only_touched_is_the_same(inputs, tmp_path):
    a, b, (tokens, validation) = inputs
    touch = interrupted_at(4, (a / "model.safetensors").touch)
    run(lmc.open_pair(a, b), tokens, tmp_path / "out", validation=validation, progress=touch, **FAST)
    assert (tmp_path / "out" / "report.json").exists()


def test_files_are_told_apart(tmp_path):
    file = tmp_path / "x"

    def digest_of(content):
        file.write_bytes(content)
        return Identity([file]).digests()["x"]

    assert digest_of(b"abc") == digest_of(b"abc") != digest_of(b"abd")
    with open(file, "wb") as large:
        large.truncate(200 << 20)
    identity = Identity([file])
    first = identity.digests()
    for place in (100, 199 << 20):
        with open(file, "r+b") as large:
            large.seek((place // (4 << 20)) * (4 << 20) + (1 << 20 if place > 1000 else 0))
            large.write(b"y")
        assert Identity([file]).digests() != first
        with pytest.raises(LmcError, match="was changed"):
            identity.require_unchanged()
    shutil.copy2(file, tmp_path / "y")
    identity = Identity([file])
    (tmp_path / "y").rename(file)  # the same content under another number
    identity.require_unchanged()
    file.unlink()
    with pytest.raises(LmcError, match="cannot be read"):
        identity.require_unchanged()


def test_after_a_bad_update_the_last_good_state_goes_on(inputs, tmp_path, monkeypatch):
    """What is kept is a state whose next loss was finite, so that smaller rates lead on from it."""
    a, b, (tokens, validation) = inputs
    pair, state = lmc.open_pair(a, b), tmp_path / "state.safetensors"
    how = {"state_file": state, "validation": validation, **FAST}
    monkeypatch.setattr("lmc_fast.pipeline.align.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("lmc_fast.pipeline.align.SAVE_SHARE", 0.0)
    real = learner.muon_step
    calls: list[int] = []
    bad = 0

    def spoilt(tensor, gradient, momentum, rate):
        real(tensor, gradient, momentum, rate)
        if len(calls) >= bad:
            momentum.mul_(math.nan)
            tensor.data.mul_(math.nan)
        calls.append(1)

    for last in (0, 9, 2 * FAST["steps"] - 1):
        calls.clear()
        bad = last
        with monkeypatch.context() as patch, pytest.raises(LmcError, match="last good state is kept"):
            patch.setattr(learner, "muon_step", spoilt)
            align(pair, tokens, **how)
        saved, metadata = load_tensors(state)
        assert all(t.isfinite().all() for t in saved.values())
        assert len(metadata.get("history", {"loss": []})["loss"]) < FAST["steps"]
        found = align(pair, tokens, **how)
        assert len(found.info["history"]["loss"]) == FAST["steps"]
        state.unlink()


def test_an_update_that_is_broken_off_is_not_saved(inputs, tmp_path, monkeypatch):
    a, b, (tokens, validation) = inputs
    pair, state = lmc.open_pair(a, b), tmp_path / "state.safetensors"
    how = {"validation": validation, **FAST}
    expected = align(pair, tokens, **how)
    real, calls = learner.muon_step, []

    def broken_off(*arguments):
        real(*arguments)
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(learner, "muon_step", broken_off)
        align(pair, tokens, state_file=state, **how)
    found = align(pair, tokens, state_file=state, **how)
    assert all(torch.equal(x, y) for x, y in zip(numbers(found), numbers(expected), strict=True))


def test_leftovers_of_a_finished_run_are_removed(inputs, tmp_path):
    a, b, (tokens, validation) = inputs
    pair, out = lmc.open_pair(a, b), tmp_path / "out"
    how = {"validation": validation, **FAST}
    rename, child = os.rename, os.fork()

    def killed_after(source, target):
        rename(source, target)
        if target == out:
            os._exit(9)

    if child == 0:
        os.rename = killed_after
        run(pair, tokens, out, **how)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert out.exists() and (tmp_path / "out.partial" / "lock").exists()
    assert run(pair, tokens, out, resume=True, **how)["proof"]
    assert not (tmp_path / "out.partial").exists()
