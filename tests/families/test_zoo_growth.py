"""A smaller model of every family becomes a larger one with the same function, or is refused with the reason."""

from dataclasses import replace

import pytest
import torch
import zoo
from elements import KNOWN
from sizes import enlarge

from lmc_fast import LmcError
from lmc_fast.architectures.resize import sizes_of
from lmc_fast.checkpoints import Model, export
from lmc_fast.symmetry import canonicalize
from lmc_fast.symmetry.grown import GrownModel, alike

EVERYTHING = {"width": 48, "heads": 2.0, "groups": 2.0, "ffn": 52, "shared": 36, "depth": 4}
SOME = {  # where not everything can grow
    **{name: {"ffn": 52} for name, known in KNOWN.items() if known.residual == "plain"},
    **{name: {"ffn": 52, "depth": 3} for name, known in KNOWN.items() if known.residual == "fixed"},
    **{name: {"ffn": 52} for name in ("bert-headless", "xlmr-headless", "electra-headless", "distilbert-headless")},
    "deberta-headless": {"ffn": 52},
    **{name: {"ffn": 52, "depth": 4} for name in ("modernbert", "modernbert-headless")},
    "megatron-bert": {"ffn": 52, "depth": 3},
    "megatron-label": {"width": 48, "heads": 2.0, "ffn": 52, "depth": 3},
    "clip-vision": {"ffn": 52, "depth": 3},
    "falcon-rw": {"ffn": 108, "depth": 3},
    **{name: {"width": 48, "depth": 3} for name in ("bloom", "mpt", "mpt-clipped")},
    **dict.fromkeys(("phi", "phi3-partial", "stablelm", "stablelm-parallel-biased"), EVERYTHING | {"width": 64}),
    **dict.fromkeys(("falcon-7b", "falcon-40b"), EVERYTHING | {"ffn": 108}),
}
ALONE = [
    ("llama", {"width": 40}),
    ("llama", {"heads": 8}),
    ("llama", {"groups": 4}),  # as many heads, each with a key of its own
    ("llama", {"heads": 6, "groups": 3}),
    ("olmo2", {"groups": 4}),
    ("gemma", {"width": 32}),
    ("gemma2", {"depth": 4}),
    ("gemma3", {"depth": 3, "width": 32}),  # only where blocks see as far back
    ("gpt2", {"width": 36}),  # no RoPE: head_dim grows with it
    ("gptj", {"width": 48}),  # beyond the part of a head that RoPE turns
    ("vit", {"heads": 2}),  # neither holds the other: both grow
    ("neox", {"ffn": 41}),
]


@pytest.mark.parametrize(
    ("name", "changes"), [*((name, SOME.get(name, EVERYTHING)) for name in zoo.ZOO), *ALONE], ids=str
)
def test_a_larger_model_computes_the_same(name, changes, tmp_path):
    zoo.write(name, tmp_path / "small")
    enlarge(tmp_path / "small", tmp_path / "large", changes)
    small = Model(tmp_path / "small")
    grown, other = alike([small, Model(tmp_path / "large")])
    assert isinstance(grown, GrownModel) and sizes_of(grown.spec) == sizes_of(other.spec) != sizes_of(small.spec)
    weights = grown.open_weights(torch.float64)
    weights = replace(weights, spec=replace(weights.spec, tied=grown.spec.tied))
    x, outcomes = zoo.inputs(name), {}
    for dtype in (torch.float64, torch.float32):
        export(weights, grown, tmp_path / str(dtype), dtype)
        outcomes[dtype] = zoo.outcome(name, zoo.reference(tmp_path / str(dtype), x, dtype))
    expected = zoo.outcome(name, zoo.reference(small.path, x))
    own_error = (zoo.outcome(name, zoo.reference(small.path, x, torch.float32)) - expected).abs().max()
    assert (outcomes[torch.float64] - expected).abs().max() < 1e-12
    assert (outcomes[torch.float32] - expected).abs().max() <= 2 * own_error + 1e-6
    assert sizes_of(Model(tmp_path / "torch.float32").spec) == sizes_of(other.spec)


@pytest.mark.parametrize("name", ["llama-tied-biased", "qwen3", "olmo2", "gemma3", "qwen2-moe", "neox", "vit"])
def test_and_shrinks_back(name, tmp_path):
    zoo.write(name, tmp_path / "small")
    enlarge(tmp_path / "small", tmp_path / "large", EVERYTHING)
    small = Model(tmp_path / "small")
    grown, _ = alike([small, Model(tmp_path / "large")])
    back = grown.growth.shrink(grown.open_weights(torch.float64))
    before = small.load(torch.float64)
    if grown.growth.centred:
        before = canonicalize(before)
    for found, wanted in zip([back.ends, *back.blocks], [before.ends, *before.blocks], strict=True):
        assert found.keys() == wanted.keys()
        for slot, w in wanted.items():
            assert torch.allclose(found[slot], w, rtol=1e-15, atol=0)
            if not grown.growth.centred:  # the very bits that are stored
                assert torch.equal(found[slot].float(), w.float())


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {"head_dim": 16}, "RoPE turns each dimension at its own speed"),
        ("bert", {"width": 48, "heads": 6}, "LayerNorm subtracts the mean of a stream that has one"),
        ("clip-vision", {"width": 48, "heads": 6}, "LayerNorm subtracts the mean of a stream that has one"),
        ("megatron-bert", {"width": 48, "heads": 6}, "the norm in front of its head sees all channels"),
        ("llama-headless", {"width": 48, "heads": 8}, "the stream is the output, which would be wider"),
        ("roberta", {"depth": 3}, "behind every block a norm changes the stream"),
        ("bloom", {"width": 48, "heads": 6}, "ALiBi's slopes depend on how many heads there are"),
        ("falcon-rw", {"width": 48}, "ALiBi's penalty depends on it"),
        ("mixtral", {"experts": 8}, "a router without a bias cannot be told to choose none of them"),
    ],
    ids=str,
)
def test_what_cannot_grow_is_refused(name, changes, reason, tmp_path):
    zoo.write(name, tmp_path / "small")
    enlarge(tmp_path / "small", tmp_path / "large", changes)
    models = [Model(tmp_path / "small"), Model(tmp_path / "large")]
    with pytest.raises(LmcError, match=reason) as caught:
        alike(models)
    assert str(models[0].path) in str(caught.value)
