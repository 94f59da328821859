"""LoRA adapters carried into another basis: the same function, the same rank, or refused with the reason."""

import pytest
import torch
import zoo
from checkpoints_tiny import true_float64
from elements import KNOWN, random_element
from lora import adapted, merge_into, write_adapter
from safetensors.torch import load_file

import lmc_fast as lmc
from lmc_fast import Alignment
from lmc_fast.checkpoints import Model
from lmc_fast.pipeline.export import export_endpoint
from lmc_fast.symmetry import Transform

# with embeddings; no norm's bias goes into another bias
PLAIN = (
    "llama",
    "mistral",
    "qwen2",
    "phi3-partial",
    "gemma",
    "gemma2",
    "gemma3",
    "olmo2",
    "olmo",
    "olmoe",
    "qwen2-moe",
)
PLAIN += ("stablelm-parallel-biased", "falcon-40b")
# the carried adapter has biases
BIASED = ("llama-tied-biased", "qwen3-tied-biased", "neox", "neox-sequential", "gpt2-tied", "gptj", "phi", "falcon-rw")
BIASED += ("opt", "bloom", "bert-pretraining", "roberta")


@pytest.fixture
def aligned(checkpoint_of, tmp_path):
    """aligned(name) -> (B, B in the aligned basis, alignment.safetensors) for random elements; a/ is B's double."""

    def make(name):
        b = checkpoint_of(name)
        spec, home = Model(b).spec, tmp_path / "aligned"
        element = random_element(KNOWN[name], spec, 7)
        home.mkdir()
        for member in "ab":
            export_endpoint(Model(b), element, home / member, torch.float64)
        digests = Model(b).checkpoint.identity.digests()
        inputs = {"members": [{"config.json": ""}, digests], "sources": [None, str(b)]}
        alone = Transform.identity(spec)
        Alignment(alone, element, (alone, alone), {"inputs": inputs}).save(home / "alignment.safetensors")
        return b, home / "b", home / "alignment.safetensors"

    return make


def computed(model, name):
    """Logits of a stock model in float64, transformers' casts to float32 taken out."""
    patch = pytest.MonkeyPatch()
    patch.setattr(torch, "float", torch.float64)
    with torch.no_grad(), true_float64():
        out = model(input_ids=zoo.inputs(name))
    patch.undo()
    logits = getattr(out, "logits", None)
    return out.prediction_logits if logits is None else logits


def outcome(name, directory, adapter):
    """What transformers computes with an adapter in the weights."""
    return zoo.outcome(name, computed(merge_into(zoo.stock(directory, torch.float64), adapter), name))


@pytest.mark.parametrize("name", [*PLAIN, *BIASED])
def test_the_carried_adapter_does_to_the_aligned_model_what_it_did_to_the_original(name, aligned, tmp_path):
    b, moved, alignment = aligned(name)
    modules = adapted(zoo.stock(b, torch.float64), embeddings=name in PLAIN)
    modules = {path: m for path, m in modules.items() if not path.endswith(("pooler.dense", "seq_relationship"))}
    adapter = write_adapter(tmp_path / "adapter", modules)
    report = lmc.carry(alignment, adapter, tmp_path / "out", member="b")
    assert report["biases"] == (name in BIASED) and report["modules"] == len(modules)
    before, after = (load_file(d / "adapter_model.safetensors") for d in (adapter, tmp_path / "out"))
    assert before.keys() <= after.keys()
    assert all(after[key].shape == t.shape and after[key].dtype == t.dtype for key, t in before.items())
    expected, found = outcome(name, b, adapter), outcome(name, moved, tmp_path / "out")
    plain = zoo.outcome(name, zoo.reference(b, zoo.inputs(name)))
    assert (expected - plain).abs().max() > 1e-2
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()


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
def test_peft_makes_and_loads_them(name, targets, aligned, tmp_path):
    peft = pytest.importorskip("peft")
    b, moved, alignment = aligned(name)
    config = peft.LoraConfig(target_modules=targets, r=4, rank_pattern={"q_proj": 2}, use_rslora=True)
    model = peft.get_peft_model(zoo.stock(b, torch.float64), config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.2)
    model.save_pretrained(tmp_path / "adapter")
    lmc.carry(alignment, tmp_path / "adapter", tmp_path / "out", member="b")
    stock = zoo.stock(moved, torch.float64)
    loaded = peft.PeftModel.from_pretrained(stock, tmp_path / "out", autocast_adapter_dtype=False)
    before, after = (zoo.outcome(name, computed(m.eval(), name)) for m in (model, loaded))
    assert (before - zoo.outcome(name, zoo.reference(b, zoo.inputs(name)))).abs().max() > 1e-2
    assert (after - before).abs().max() <= 1e-10 * before.abs().max()
