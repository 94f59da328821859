"""merge takes every pair that align takes, and writes the average of what transformers makes of both."""

import shutil

import pytest
import torch
from checkpoints_tiny import edit_config
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lmc_fast as lmc


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
