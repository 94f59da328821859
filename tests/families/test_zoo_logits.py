"""Every family of the zoo against transformers: logits, tensors, dtypes."""

import json

import pytest
import torch
import zoo
from safetensors.torch import load_file

from lmc_fast.architectures import FAMILIES
from lmc_fast.checkpoints import Model, export
from lmc_fast.engine.model import logits


@pytest.mark.parametrize("name", zoo.ZOO)
def test_logits_equal_transformers_in_float64(name, checkpoint_of, expected_of, poisoned):
    ours = logits(Model(checkpoint_of(name)).load(torch.float64), zoo.inputs(name))
    expected = expected_of(name)
    assert ours.dtype == expected.dtype == torch.float64
    assert (ours - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("name", zoo.ZOO)
def test_logits_in_float32_are_close(name, checkpoint_of, expected_of):
    x, expected = zoo.inputs(name), expected_of(name)
    ours = logits(Model(checkpoint_of(name)).load(torch.float32), x.float() if x.is_floating_point() else x)
    assert (ours.double() - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_load_and_export_is_the_identity_on_every_tensor(name, dtype, checkpoint_of, tmp_path):
    model = Model(checkpoint_of(name, dtype=dtype))
    assert model.dtype == dtype
    export(model.load(), model, tmp_path / "out")
    before, after = (load_file(d / "model.safetensors") for d in (model.path, tmp_path / "out"))
    head = {key for key, entry, _ in model.family.entries(model.load().spec) if entry.slots[0] in ("head", "head_bias")}
    assert after.keys() - before.keys() == (head - before.keys() if model.spec.tied else set())
    for key, tensor in before.items():
        less_one = "norm" in key and ("gemma" in name or name == "nemotron")
        rounding = 2.0**-23 if less_one else 0.0  # gains are held as 1 + w
        assert (after[key].double() - tensor.double()).abs().max() <= rounding, key


@pytest.mark.parametrize("name", zoo.ZOO)
def test_shapes_of_the_table_are_those_on_disk(name, checkpoint_of):
    model = Model(checkpoint_of(name))
    entries = model.family.entries(model.spec, model.spec.tied)
    bare = model.family.prefix  # which models without a head leave out
    names = ((key if key in model.checkpoint else key.removeprefix(bare), entry) for key, entry, _ in entries)
    stored = {key: entry for key, entry in names if not entry.optional or key in model.checkpoint}
    assert sorted(stored) == model.checkpoint.names
    assert all(entry.shape(model.spec) == model.checkpoint.shape(key) for key, entry in stored.items())


def test_the_zoo_has_every_family(checkpoint_of):
    kinds = {json.loads((checkpoint_of(name) / "config.json").read_text())["model_type"] for name in zoo.ZOO}
    assert kinds == set(FAMILIES)
