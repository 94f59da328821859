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


def outcome(name, directory, adapter):
    """What transformers computes in float64, with an adapter in the weights."""
    x, argument = zoo.inputs(name), "input_ids"
    model = merge_into(zoo.stock(directory, torch.float64), adapter)
    patch = pytest.MonkeyPatch()
    patch.setattr(torch, "float", torch.float64)
    with torch.no_grad(), true_float64():
        out = model(**{argument: x})
    patch.undo()
    logits = getattr(out, "logits", None)
    return zoo.outcome(name, out.prediction_logits if logits is None else logits)


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
