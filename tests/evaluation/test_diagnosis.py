"""A diagnosis against transformers' own hidden states and losses, and what it says of faults that were planted."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from checkpoints_tiny import write_lines
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lmc_fast as lmc
from lmc_fast.cli import main
from lmc_fast.evaluation.advice import advise


def stock(paths, lam):
    model, other = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64) for path in paths)
    with torch.no_grad():
        for x, y in zip(model.parameters(), other.parameters(), strict=True):
            x.copy_(torch.lerp(x, y, lam))
    return model


@pytest.fixture
def near(make_checkpoint, tmp_path):
    """A Llama whose norms have gain 1, and another close to it but for the FFN of block 1: its units' order."""
    a = tmp_path / "a"
    model = AutoModelForCausalLM.from_pretrained(make_checkpoint("llama", 1))
    for weight in model.parameters():
        if weight.dim() == 1:
            weight.data.fill_(1.0)
    model.save_pretrained(a)
    generator = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        weight.data += 0.01 * (weight.dim() > 1) * torch.randn(weight.shape, generator=generator)
    order = torch.randperm(40, generator=generator)
    ffn = model.model.layers[1].mlp
    for linear in (ffn.gate_proj, ffn.up_proj):
        linear.weight.data = linear.weight.data[order]
    ffn.down_proj.weight.data = ffn.down_proj.weight.data[:, order]
    model.save_pretrained(tmp_path / "b")
    return a, tmp_path / "b"


def test_features_and_losses_are_those_of_transformers(near, tokens):
    found = lmc.diagnose(lmc.open_pair(*near), tokens)
    models = [stock(near, lam) for lam in (0.0, 1.0, 0.5)]
    with torch.no_grad():
        outs = [model(input_ids=tokens[:, :-1], output_hidden_states=True) for model in models]
        logs = [out.logits.log_softmax(-1).flatten(0, 1) for out in outs]
    wanted = tokens[:, 1:].flatten()
    losses = [F.nll_loss(x, wanted).item() for x in logs]
    ensemble = F.nll_loss(torch.logaddexp(logs[0], logs[1]) - math.log(2), wanted).item()
    for name, value in zip(("a", "b", "middle", "ensemble"), (*losses, ensemble), strict=True):
        assert found.losses[name] == pytest.approx(value, abs=1e-5)
    best = min(F.cross_entropy(outs[2].logits.flatten(0, 1) / 2 ** (i / 10), wanted).item() for i in range(-10, 11))
    assert found.losses["calibrated"] == pytest.approx(best, abs=1e-5)
    a, b, m = (out.hidden_states[1].flatten(0, 1) for out in outs)
    a, b, m = (x - x.mean(0) for x in (a, b, m))
    block = found.blocks[0]
    assert block.cosine == pytest.approx(F.cosine_similarity(m.flatten(), (a + b).flatten(), dim=0).item(), abs=1e-5)
    assert block.distance == pytest.approx(((m - (a + b) / 2).norm() / ((a + b) / 2).norm()).item(), abs=1e-4)
    assert block.variance == pytest.approx((2 * m.norm() ** 2 / (a.norm() ** 2 + b.norm() ** 2)).item(), abs=1e-4)
    assert block.share_a + block.share_b == pytest.approx(1, abs=0.05)


def test_a_permuted_ffn_is_found_and_an_alignment_repairs_it(near, tokens):
    pair = lmc.open_pair(*near)
    found = lmc.diagnose(pair, tokens)
    assert found.blocks[1].own > 5 * abs(found.blocks[0].own) and found.parts["ffn"] > found.parts["attention"]
    assert found.blocks[1].unmatched["units"] > 20 and found.blocks[0].unmatched["units"] == 0
    deeper = replace(found, blocks=[found.blocks[0], found.blocks[1], found.blocks[0]])
    text = " ".join(advise(deeper, pair.spec, aligned=False))
    assert "block 1 carries" in text and "units there have no partner" in text and "align" in text
    assert "averaged alone, the FFN costs most" in text
    alignment = lmc.align(pair, tokens, method="weight")
    after = lmc.diagnose(pair, tokens, alignment)
    assert after.excess < found.excess / 10 and after.blocks[1].unmatched["units"] == 0
    assert after.blocks[1].matched["units"] > 0.95 > after.blocks[1].matched_before["units"]
    assert after.blocks[1].moved["units"] > 0.9 and after.blocks[0].moved["units"] == 0
    assert after.losses["b"] == pytest.approx(found.losses["b"], abs=1e-4)
    assert after.advice[-1].endswith("nothing to repair") or after.excess > 0.01


@pytest.mark.parametrize("variant", ["neox", "gpt2-tied"])
def test_every_family_is_diagnosed(variant, make_checkpoint, tokens):
    found = lmc.diagnose(lmc.open_pair(*(make_checkpoint(variant, seed) for seed in (1, 2))), tokens, sequences=2)
    assert len(found.blocks) == 2 and found.advice and {"units", "heads"} == found.blocks[0].matched.keys()
    assert all(math.isfinite(value) for value in found.losses.values())


def test_the_command_prints_writes_and_refuses(near, make_checkpoint, tmp_path, capsys):
    a, b = make_checkpoint("llama", 1), make_checkpoint("llama", 2)
    text = write_lines(tmp_path / "text.txt", 400)
    out = [tmp_path / "d.json", tmp_path / "d.png"]
    command = ["diagnose", str(a), str(b), "--data", str(text), "--length", "16"]
    assert main([*command, "--out", *map(str, out)]) == 0
    shown = capsys.readouterr().out
    assert "block" in shown and "\n- " in shown and out[1].stat().st_size > 10_000
    assert main([*command, "--out", *map(str, out), "--json"]) == 0  # over its own files
    assert json.loads(capsys.readouterr().out) == json.loads(out[0].read_text())
    (tmp_path / "other.json").write_text("{}")
    assert main([*command, "--out", str(tmp_path / "other.json")]) == 2
    assert "no diagnosis that lmc-fast wrote" in capsys.readouterr().err
    broken = tmp_path / "a" / "model.safetensors"
    tensors = load_file(broken)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(tensors, broken, {"format": "pt"})
    assert main(["diagnose", str(near[0]), str(near[1]), "--data", str(text)]) == 2
