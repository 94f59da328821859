"""Healing is distillation: its loss is that of transformers, its controls are honest, a kill changes no bits."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from checkpoints_tiny import VOCAB, write_lines
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lmc_fast as lmc
from lmc_fast.cli import main
from lmc_fast.learning.healing import Healer
from lmc_fast.learning.schedule import Schedule


@pytest.fixture
def models(make_checkpoint, tmp_path):
    """(average, a, b) of untied models."""
    a, b = (make_checkpoint("llama", seed) for seed in (1, 2))
    lmc.merge(a, b, tmp_path / "average")
    return tmp_path / "average", a, b


@pytest.fixture
def text(tmp_path):
    return write_lines(tmp_path / "text.txt", 3000)


def test_a_model_that_changes_during_the_work_is_noticed(models, tokens, tmp_path):
    def change(_):
        (models[0] / "config.json").write_text((models[0] / "config.json").read_text() + " ")

    with pytest.raises(lmc.LmcError, match="was changed while it was in use"):
        lmc.heal(models[0], models[1:], tokens, tmp_path / "out", steps=1, batch=2, start="average", progress=change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("who", [(0, 1), (1,)])
def test_a_step_is_that_of_transformers_and_torch(models, who, tokens):
    rows = torch.cat([tokens] * 2)[:4]
    student, *teachers = (lmc.Model(path).load(torch.float32) for path in models)
    schedule = Schedule(steps=8, batch=4)
    healer = Healer(student, teachers, [(rows, who)], schedule, rate=1e-3, micro_batch=3)
    stock, *others = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in models)
    optimizer = torch.optim.AdamW(stock.parameters(), lr=1e-3 * schedule.rate(0), betas=(0.9, 0.95), weight_decay=0.0)
    with torch.no_grad():
        aim = torch.stack([others[k](input_ids=rows[:, :-1]).logits.softmax(-1) for k in who]).mean(0)
    loss = F.kl_div(stock(input_ids=rows[:, :-1]).logits.log_softmax(-1), aim, reduction="sum") / (4 * 19)
    loss.backward()
    optimizer.step()
    assert healer.step() == pytest.approx(loss.item(), rel=1e-5)
    moved = healer.leaves["blocks.1.up"], stock.model.layers[1].mlp.up_proj.weight
    big = stock.model.layers[1].mlp.up_proj.weight.grad.abs() > 1e-6  # else the sign of a gradient is rounding
    assert big.float().mean() > 0.9 and torch.allclose(moved[0][big], moved[1][big], atol=2e-6)


def test_controls_choice_and_what_is_written(models, text, tmp_path, capsys):
    average, a, b = map(str, models)
    command = ["heal", average, "--from", a, b, "--data", str(text), "--length", "16", "--steps", "20", "--json"]
    assert main([*command, "--out", str(tmp_path / "out"), "--batch", "4"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["trials"].keys() == report["controls"].keys() == {"average", "a", "b"}
    assert report["started_from"] == min(report["trials"], key=report["trials"].get)
    losses = report["losses"]
    assert report["loss_after"] == min(losses.values()) == losses[str(report["written_step"])]
    assert losses["0"] == report["controls"][report["started_from"]]
    healed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    held = lmc.read_tokens(text, lmc.Model(a), 16)
    from lmc_fast.data import split_validation

    rows = split_validation(held)[1]
    with torch.no_grad():
        out = healed(input_ids=rows[:, :-1]).logits
    loss = F.cross_entropy(out.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert loss == pytest.approx(report["loss_after"], abs=1e-4)
    assert lmc.verify(tmp_path / "out", tmp_path / "out")[1] and not (tmp_path / "out.partial").exists()


def test_each_teaches_its_own_data_and_gets_nearer(models, text, tmp_path):
    blocks = lmc.read_tokens(text, lmc.Model(models[0]), 16)
    data = {"a": blocks[:90], "b": blocks[90:]}
    how = {"steps": 30, "batch": 8, "start": "average", "rate": 3e-3}
    report = lmc.heal(models[0], models[1:], data, tmp_path / "out", **how)
    assert report["started_from"] == "average" and not report["trials"]
    healed = lmc.verify(models[1], tmp_path / "out", blocks[:90])[0].kl
    assert healed < 0.8 * lmc.verify(models[1], models[0], blocks[:90])[0].kl


@pytest.mark.parametrize("stage, at", [("trying", 1), ("healing", 5)])
def test_a_killed_run_ends_at_the_same_bits(stage, at, models, text, tmp_path):
    blocks = lmc.read_tokens(text, lmc.Model(models[0]), 16)
    how = {"steps": 12, "batch": 4}
    expected = lmc.heal(models[0], models[1:], blocks, tmp_path / "whole", **how)

    def stop(progress):
        if (progress.stage, progress.step) == (stage, at if stage == "healing" else 0) and "from b" not in seen:
            seen.append("from b" if progress.note == "from b" or stage == "healing" else progress.note)
            if seen[-1] == "from b":
                raise KeyboardInterrupt

    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        lmc.heal(models[0], models[1:], blocks, tmp_path / "out", progress=stop, **how)
    assert not (tmp_path / "out").exists()
    with pytest.raises(lmc.LmcError, match="seed is not what the run began with"):
        lmc.heal(models[0], models[1:], blocks, tmp_path / "out", resume=True, seed=3, **how)
    found = lmc.heal(models[0], models[1:], blocks, tmp_path / "out", resume=True, **how)
    assert found == expected
    x, y = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def test_refusals(models, text, tmp_path, make_checkpoint, capsys):
    blocks = lmc.read_tokens(text, lmc.Model(models[0]), 16)
    out = tmp_path / "out"

    def refused(words, merged=models[0], endpoints=models[1:], data=blocks, **how):
        with pytest.raises(lmc.LmcError, match=words):
            lmc.heal(merged, endpoints, data, out, **how)
        assert not out.exists()

    refused("a mixture has 2 to 26 endpoints, not 1", endpoints=models[1:2])
    refused("'c' is unknown; choose one of average, a, b", start="c")
    refused("data of 'z'", data={"z": blocks})
    refused("there is no data for b", data={"a": blocks})
    refused("rate must be", rate=math.nan)
    refused("steps must be", steps=-1)
    refused("give at least one", steps=0)
    refused("a batch of 1000000000 is more than all", batch=10**9)
    refused("architectures differ", endpoints=[models[1], make_checkpoint("neox", 1)])
    refused("outside the vocabulary", data=blocks + VOCAB)
    refused("nothing to resume", resume=True)
    command = ["heal", str(models[0]), "--from", *map(str, models[1:]), "--out", str(out)]
    assert main([*command, "--data", str(text), f"a={text}"]) == 2
    assert "--data takes one file, or NAME=FILE" in capsys.readouterr().err
