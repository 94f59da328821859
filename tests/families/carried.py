"""Adapters of zoo models carried into the basis of random elements, and how far off their function then is."""

from pathlib import Path

import pytest
import torch
import zoo
from checkpoints_tiny import true_float64
from elements import KNOWN, random_element
from lora import adapted, merge_into, write_adapter
from torch import Tensor, nn

import lmc_fast as lmc
from lmc_fast import Alignment
from lmc_fast.checkpoints import Model
from lmc_fast.pipeline.export import export_endpoint
from lmc_fast.symmetry import Transform

# with embeddings; no norm's bias goes into another bias
PLAIN = ("llama", "mistral", "qwen2", "phi3-partial", "gemma", "gemma2", "gemma3", "olmo2", "olmo", "olmoe")
PLAIN += ("qwen2-moe", "stablelm-parallel-biased", "falcon-40b")
# the carried adapter has biases
BIASED = ("llama-tied-biased", "qwen3-tied-biased", "neox", "neox-sequential", "gpt2-tied", "gptj", "phi", "falcon-rw")
BIASED += ("opt", "bloom", "bert-pretraining", "roberta")


def align(name: str, b: Path, home: Path) -> Path:
    """alignment.safetensors of a pair of which b is one, with random elements; b in the aligned basis is home/b, and
    home/a its double, in float64.
    """
    spec = Model(b).spec
    element = random_element(KNOWN[name], spec, 7)
    home.mkdir()
    for member in "ab":
        export_endpoint(Model(b), element, home / member, torch.float64)
    digests = Model(b).checkpoint.identity.digests()
    inputs = {"members": [{"config.json": ""}, digests], "sources": [None, str(b)]}
    alone = Transform.identity(spec)
    Alignment(alone, element, (alone, alone), {"inputs": inputs}).save(home / "alignment.safetensors")
    return home / "alignment.safetensors"


def write_random(name: str, b: Path, out: Path) -> dict[str, nn.Module]:
    """A random adapter for all that peft adapts of b; returns the adapted modules by path."""
    modules = adapted(zoo.stock(b, torch.float64), embeddings=name in PLAIN)
    modules = {path: m for path, m in modules.items() if not path.endswith(("pooler.dense", "seq_relationship"))}
    write_adapter(out, modules)
    return modules


def computed(model: nn.Module, name: str) -> Tensor:
    """What must not change of a stock model's outputs, in float64, transformers' casts to float32 taken out."""
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch, true_float64():
        patch.setattr(torch, "float", torch.float64)
        out = model(input_ids=zoo.inputs(name))
    logits = getattr(out, "logits", None)
    return zoo.outcome(name, out.prediction_logits if logits is None else logits)


def error(name: str, b: Path, work: Path) -> tuple[float, float, dict]:
    """(how far the carried adapter is off, how much the adapter does, what carry reports), relative to the outputs."""
    alignment = align(name, b, work / "aligned")
    write_random(name, b, work / "adapter")
    report = lmc.carry(alignment, work / "adapter", work / "out", member="b")
    places = (b, work / "adapter"), (work / "aligned" / "b", work / "out")
    expected, found = (computed(merge_into(zoo.stock(d, torch.float64), x), name) for d, x in places)
    plain = computed(zoo.stock(b, torch.float64), name)
    size = expected.abs().max()
    return ((found - expected).abs().max() / size).item(), ((expected - plain).abs().max() / size).item(), report
