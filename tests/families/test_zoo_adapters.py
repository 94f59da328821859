"""LoRA adapters carried into another basis: the same function, the same rank."""

import pytest
import torch
import zoo
from carried import BIASED, PLAIN, align, computed, error
from safetensors.torch import load_file

import lmc_fast as lmc


@pytest.mark.parametrize("name", [*PLAIN, *BIASED])
def test_the_carried_adapter_does_to_the_aligned_model_what_it_did_to_the_original(name, checkpoint_of, tmp_path):
    off, done, report = error(name, checkpoint_of(name), tmp_path)
    assert off <= 1e-10 and done > 1e-3
    assert report["biases"] == (name in BIASED)
    before, after = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("adapter", "out"))
    assert before.keys() <= after.keys()
    assert all(after[key].shape == t.shape and after[key].dtype == t.dtype for key, t in before.items())


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["q_proj", "v_proj", "o_proj", "down_proj", "lm_head", "embed_tokens"]),
        ("neox", "all-linear"),
        ("gpt2-tied", ["c_attn", "c_proj", "c_fc"]),
        ("gemma3", ["q_proj", "k_proj", "gate_proj", "embed_tokens"]),
        ("phi3-partial", ["qkv_proj", "gate_up_proj"]),
        ("qwen2-moe", ["q_proj", "shared_expert.up_proj", "shared_expert_gate"]),
    ],
)
def test_peft_makes_and_loads_them(name, targets, checkpoint_of, tmp_path):
    peft = pytest.importorskip("peft")
    b = checkpoint_of(name)
    alignment = align(name, b, tmp_path / "aligned")
    config = peft.LoraConfig(target_modules=targets, r=4, rank_pattern={"q_proj": 2}, use_rslora=True)
    model = peft.get_peft_model(zoo.stock(b, torch.float64), config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2)
    model.save_pretrained(tmp_path / "adapter")
    lmc.carry(alignment, tmp_path / "adapter", tmp_path / "out", member="b")
    stock = zoo.stock(tmp_path / "aligned" / "b", torch.float64)
    loaded = peft.PeftModel.from_pretrained(stock, tmp_path / "out", autocast_adapter_dtype=False)
    before, after, plain = (computed(m.eval(), name) for m in (model, loaded, zoo.stock(b, torch.float64)))
    assert (before - plain).abs().max() > 1e-2
    assert (after - before).abs().max() <= 1e-10 * before.abs().max()
