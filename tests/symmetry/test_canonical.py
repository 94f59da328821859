"""Norm absorption keeps the function and reaches the form it promises."""

import pytest
import torch
from checkpoints_tiny import VARIANTS, reference_logits
from transformers import AutoModelForCausalLM

from lmc_fast import LmcError
from lmc_fast.checkpoints import Model, export
from lmc_fast.engine.model import logits
from lmc_fast.symmetry import canonicalize


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probabilities_stay(variant, make_checkpoint, tokens):
    model = Model(make_checkpoint(variant))
    ours = logits(canonicalize(model.load(torch.float64)), tokens).log_softmax(-1)
    expected = reference_logits(model.path, tokens).log_softmax(-1)
    assert (ours - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_form(variant, make_checkpoint):
    weights = canonicalize(Model(make_checkpoint(variant)).load(torch.float64))
    spec = weights.spec
    for block in weights.blocks:
        assert (block["attn_norm"] == 1).all() and (block["ffn_norm"] == 1).all()
        if "v_bias" in block:
            assert (block["v_bias"] == 0).all()
            assert (block["k_bias"].view(spec.attention.kv_heads, -1)[:, spec.rope.rotary_dim :] == 0).all()
        if spec.norms.kind == "layernorm":
            assert block["o"].mean(0).abs().max() < 1e-14 and block["down"].mean(0).abs().max() < 1e-14
    assert (weights.ends["final_norm"] == 1).all()
    assert weights.ends["head"].mean(0).abs().max() < 1e-14
    if spec.norms.kind == "layernorm":
        assert weights.ends["embed"].mean(1).abs().max() < 1e-14
    else:  # centring is not function-preserving without a mean-subtracting norm
        assert weights.ends["embed"].mean(1).abs().max() > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_doing_it_twice_changes_nothing(variant, make_checkpoint):
    once = canonicalize(Model(make_checkpoint(variant)).load(torch.float64))
    twice = canonicalize(once)
    for x, y in zip([once.ends, *once.blocks], [twice.ends, *twice.blocks], strict=True):
        assert all(torch.allclose(x[name], y[name], rtol=0, atol=1e-13) for name in x)


@pytest.mark.parametrize("variant", ["neox", "neox-no-attention-bias", "gpt2-tied", "llama"])
def test_the_exported_form_is_stock(variant, make_checkpoint, tokens, tmp_path):
    model = Model(make_checkpoint(variant))
    export(canonicalize(model.load(torch.float64)), model, tmp_path / "out", torch.float64)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert type(stock).__name__ == model.checkpoint.config["architectures"][0]
    expected = reference_logits(model.path, tokens).log_softmax(-1)
    assert (reference_logits(tmp_path / "out", tokens).log_softmax(-1) - expected).abs().max() < 1e-9


def test_computed_in_float64_whatever_the_dtype(make_checkpoint):
    model = Model(make_checkpoint("gpt2"))
    exact = canonicalize(model.load(torch.float64))
    rounded = canonicalize(model.load(torch.float32))
    for x, y in zip([exact.ends, *exact.blocks], [rounded.ends, *rounded.blocks], strict=True):
        assert all(torch.equal(x[name].float(), y[name]) for name in x)


def test_dead_gain_with_a_bias(make_checkpoint, tokens):
    """γ = 0 with β ≠ 0: solved where the other columns of the head can stand in, refused where they cannot."""
    weights = Model(make_checkpoint("neox")).load(torch.float64)
    weights.ends["final_norm"][3] = 0
    weights.ends["final_norm_bias"][3] = 0
    assert (
        logits(canonicalize(weights), tokens).log_softmax(-1) - logits(weights, tokens).log_softmax(-1)
    ).abs().max() < 1e-9
    weights.ends["final_norm_bias"][3] = 1
    with pytest.raises(LmcError, match="final_norm"):
        canonicalize(weights)
    weights.ends["head"][:, 3] = weights.ends["head"][:, :3].sum(1)
    assert (
        logits(canonicalize(weights), tokens).log_softmax(-1) - logits(weights, tokens).log_softmax(-1)
    ).abs().max() < 1e-9
