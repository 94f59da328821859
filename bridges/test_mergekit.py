"""mergekit on aligned checkpoints of every family: the average that transformers makes of both, or the reason why not.

Run by `make bridges`, in an environment that has mergekit. docs/mergekit.md has the table that is held true here.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mergekit
import pytest
import torch
import transformers
import yaml
import zoo
from checkpoints_tiny import save_tokenizer
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file

import lmc_fast as lmc

ROOT = Path(__file__).resolve().parents[1]
EXACT = (
    *("llama", "mistral", "qwen2", "qwen2-tied-window", "qwen3", "gemma2", "gemma3", "phi", "phi3", "stablelm", "olmo"),
    *("olmo2", "gpt2", "gpt2-tied", "gptj", "opt", "opt-tied", "falcon-40b", "bloom", "mixtral", "olmoe", "qwen2-moe"),
    *("qwen3-moe", "deit", "clip-vision", "clip-text"),
)
LOST = {  # what mergekit leaves out of its result without a word
    "gemma": "lm_head.weight",
    "roberta": "lm_head.decoder.bias",
    "llama-tied-biased": "mlp.up_proj.bias",
    "vit": "vit.layers.0",
    "dinov2": "dinov2.encoder.layer.0.attention",
    "bert-pretraining": "bert.pooler",
}
REFUSED = {  # the tensor that it misses
    "neox": "attention.bias",
    "bert": "bert.pooler.dense.weight",
    "falcon-7b": "ln_attn",
    "falcon-rw": "ln_attn",
    "stablelm-parallel-biased": "post_attention_layernorm",
}
MENDED = ("gemma", "roberta", "llama-tied-biased", "neox", "bert")  # by docs/mergekit-0.1.5.patch
ROUNDING = 2**-22  # of the larger of two float32 numbers


@pytest.fixture
def aligned(tmp_path):
    """aligned(name, count) -> directories of aligned checkpoints, and what transformers loads of each."""

    def make(name, count=2):
        for i in range(count):
            zoo.write(name, tmp_path / name / f"in{i}", i + 1)
            save_tokenizer(tmp_path / name / f"in{i}")
        found = [tmp_path / name / "in0"]
        for i in range(1, count):
            pair = lmc.open_pair(tmp_path / name / "in0", tmp_path / name / f"in{i}")
            lmc.export(pair, lmc.align(pair, data_for(name), method="weight"), tmp_path / name / f"out{i}")
            found = [tmp_path / name / f"out{i}" / "a", *found[1:], tmp_path / name / f"out{i}" / "b"]
        return found

    return make


def data_for(name):
    x = zoo.inputs(name)
    if x.is_floating_point():
        return lmc.Examples(x.float(), torch.arange(3) % 5)
    return lmc.Examples(x, x) if name.startswith(("bert", "roberta")) else x


def loaded(directory):
    return {n: t.double() for n, t in zoo.stock(directory, torch.float32).state_dict().items()}


def loosely(directory):
    """(state dict, names that transformers does not find)."""
    config = transformers.AutoConfig.from_pretrained(directory)
    kind = getattr(transformers, config.architectures[0])
    model, info = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    return {n: t.double() for n, t in model.state_dict().items()}, sorted(info["missing_keys"])


def linear(places, weights=(0.5, 0.5)):
    models = [{"model": str(p), "parameters": {"weight": w}} for p, w in zip(places, weights, strict=True)]
    return {"merge_method": "linear", "models": models, "dtype": "float32"}


def merged(config, out):
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions())
    return out


def check_average(found, states, weights=(0.5, 0.5)):
    assert found.keys() == states[0].keys()
    for name, t in found.items():
        parts = [state[name] for state in states]
        wanted = sum(w * part for w, part in zip(weights, parts, strict=True))
        size = torch.stack(parts).abs().amax(0)
        assert ((t - wanted).abs() <= ROUNDING * size + 1e-30).all(), name


@pytest.mark.parametrize("name", EXACT)
def test_linear_is_the_average_of_transformers(name, aligned, tmp_path):
    places = aligned(name)
    check_average(loaded(merged(linear(places), tmp_path / "m")), [loaded(p) for p in places])


@pytest.mark.parametrize("name", LOST)
def test_what_it_leaves_out(name, aligned, tmp_path):
    places = aligned(name)
    found, missing = loosely(merged(linear(places), tmp_path / "m"))
    assert any(LOST[name] in key for key in missing), missing
    left = [{n: t for n, t in loaded(p).items() if n not in missing} for p in places]
    check_average({n: t for n, t in found.items() if n not in missing}, left)
    lmc.merge(*places, tmp_path / "ours")
    check_average(loaded(tmp_path / "ours"), [loaded(p) for p in places])


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_refuses(name, aligned, tmp_path):
    with pytest.raises(RuntimeError, match=REFUSED[name]):
        merged(linear(aligned(name)), tmp_path / "m")


def with_buffers(directory):
    """As Pythia on the hub is: with the buffers that transformers stored until 2023."""
    tensors = load_file(directory / "model.safetensors")
    for i in range(2):
        layer = f"gpt_neox.layers.{i}.attention"
        tensors[f"{layer}.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.bool).tril()
        tensors[f"{layer}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{layer}.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_neox_as_it_is_on_the_hub(tmp_path):
    for side, seed in (("a", 1), ("b", 2)):
        zoo.write("neox", tmp_path / side, seed)
        with_buffers(tmp_path / side)
    pair = lmc.open_pair(tmp_path / "a", tmp_path / "b")
    lmc.export(pair, lmc.align(pair, zoo.inputs("neox"), method="weight"), tmp_path / "out")
    places = [tmp_path / "out" / side for side in "ab"]
    found, missing = loosely(merged(linear(places), tmp_path / "m"))
    assert not missing
    check_average(found, [loosely(p)[0] for p in places])


def test_the_recipe_by_the_command(aligned, tmp_path, monkeypatch):
    places = aligned("llama")
    shutil.copytree(places[0].parent, tmp_path / "aligned")
    monkeypatch.chdir(tmp_path)
    command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(ROOT / "examples/mergekit_linear.yml"), "m"]
    subprocess.run(command, check=True, capture_output=True)
    check_average(loaded(tmp_path / "m"), [loaded(p) for p in places])


def test_what_merge_records_makes_mergekit_do_the_same(tmp_path):
    places = []
    for i in range(3):
        zoo.write("llama", tmp_path / f"m{i}", i + 1)
        places.append(tmp_path / f"m{i}")
    cases = {
        "three": lmc.merge(places, tmp_path / "three", weights=[0.5, 0.3, 0.2]),
        "task": lmc.merge(places[:2], tmp_path / "task", weights=[0.8, 0.4], base=places[2]),
        "blocks": lmc.merge(
            *places[:2], tmp_path / "blocks", 0.4, weights_by_block={"embed": 0.1, "1": 0.9, "head": 0.7}
        ),
    }
    for name, record in cases.items():
        ours = tmp_path / name
        theirs = merged(yaml.safe_load((ours / "mergekit_config.yml").read_text()), tmp_path / f"{name}-theirs")
        left, right = loaded(ours), loaded(theirs)
        for key, t in left.items():
            assert (t - right[key]).abs().max() <= 1e-6 * t.abs().max(), (name, key)
        assert record["version"] == lmc.__version__


def test_the_patch_mends_what_it_is_for(aligned, tmp_path):
    package = shutil.copytree(Path(mergekit.__file__).parent, tmp_path / "patched" / "mergekit")
    patch = ROOT / "docs" / "mergekit-0.1.5.patch"
    subprocess.run(["patch", "-p1", "--input", str(patch)], cwd=package.parent, check=True, capture_output=True)
    places = {name: aligned(name) for name in MENDED}
    jobs = {name: linear(ends) for name, ends in places.items()}
    program = """
import json, sys
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for name, job in json.loads(sys.argv[1]).items():
    run_merge(MergeConfiguration.model_validate(job), f"{sys.argv[2]}/{name}", MergeOptions())
"""
    command = [sys.executable, "-c", program, json.dumps(jobs), str(tmp_path / "mended")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(package.parent)})
    for name, ends in places.items():
        check_average(loaded(tmp_path / "mended" / name), [loaded(p) for p in ends])
