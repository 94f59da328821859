"""Every family's logits against transformers, and what its table says about tensors and symmetries."""

import pytest
import torch
from checkpoints_tiny import VARIANTS, reference_logits
from transformers import AutoModelForCausalLM

from lmc_fast.checkpoints import Model, export
from lmc_fast.engine.model import logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_in_float64(variant, make_checkpoint, tokens, poisoned):
    directory = make_checkpoint(variant)
    ours = logits(Model(directory).load(torch.float64), tokens)
    expected = reference_logits(directory, tokens)
    assert ours.dtype == expected.dtype == torch.float64
    assert (ours - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_in_float32_are_as_exact_as_transformers(variant, make_checkpoint, tokens):
    directory = make_checkpoint(variant)
    truth = reference_logits(directory, tokens)
    theirs = (reference_logits(directory, tokens, torch.float32).double() - truth).abs().max()
    ours = (logits(Model(directory).load(torch.float32), tokens).double() - truth).abs().max()
    assert ours <= 2 * theirs + 1e-6 * truth.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_load_and_export_is_the_identity_on_every_tensor(variant, make_checkpoint, tmp_path):
    model = Model(make_checkpoint(variant))
    export(model.load(), model, tmp_path / "out")
    before = AutoModelForCausalLM.from_pretrained(model.path).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    if model.spec.tied:
        assert "lm_head.weight" in Model(tmp_path / "out").checkpoint


def test_shapes_of_the_table_are_those_on_disk(make_checkpoint):
    for variant in VARIANTS:
        model = Model(make_checkpoint(variant))
        entries = model.family.entries(model.spec, model.spec.tied)
        assert sorted(name for name, _, _ in entries) == model.checkpoint.names
        assert all(entry.shape(model.spec) == model.checkpoint.shape(name) for name, entry, _ in entries)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_round_trip(dtype, make_checkpoint, tmp_path):
    model = Model(make_checkpoint("neox", dtype=dtype))
    assert model.dtype == dtype
    export(model.load(), model, tmp_path / "out")
    for name in model.checkpoint.names:
        assert torch.equal(model.checkpoint.read(name), Model(tmp_path / "out").checkpoint.read(name))
