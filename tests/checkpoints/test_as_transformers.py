"""What transformers would load from a directory is what is read, also where files and config contradict each other."""

import json
import shutil
from collections import Counter

import pytest
import torch
import zoo
from checkpoints_tiny import edit_config, randomize, reference_logits, save_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lmc_fast import LmcError
from lmc_fast.checkpoints import Model, export
from lmc_fast.engine.model import logits

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FAMILY_WITH_TIE = (
    "llama",
    "neox",
    "gpt2-tied",
    "mistral",
    "qwen2",
    "phi3",
    "stablelm",
    "olmo",
    "phi",
    "gptj",
    "opt-tied",
)
FAMILY_WITH_TIE += ("falcon-7b", "gemma", "qwen3", "olmo2", "gemma2", "gemma3", "mixtral", "olmoe", "qwen2-moe")
FAMILY_WITH_TIE += ("qwen3-moe", "bloom", "bert", "bert-pretraining", "roberta")


@pytest.fixture
def copy_of(tmp_path):
    """Writes one variant of the zoo, whose stored tensors a function may change."""

    def make(name, change=lambda tensors: None):
        directory = tmp_path / "copy"
        zoo.write(name, directory)
        tensors = load_file(directory / SINGLE)
        change(tensors)
        save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
        return directory

    return make


def same_function(name, directory):
    x = zoo.inputs(name)
    expected = zoo.reference(directory, x)
    found = logits(Model(directory).load(torch.float64), x)
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


def table_of(tensors):
    return next(key for key in tensors if key.endswith(TABLES))


def copies(name):
    """The tensors that a tie makes one with the embedding (None) or with another tensor."""
    if name.startswith("bert"):
        return {"cls.predictions.decoder.weight": None, "cls.predictions.decoder.bias": "cls.predictions.bias"}
    if name == "roberta":
        return {"lm_head.decoder.weight": None, "lm_head.decoder.bias": "lm_head.bias"}
    return {"embed_out.weight" if name == "neox" else "lm_head.weight": None}


BIASED = ("bert", "bert-pretraining", "roberta")


@pytest.mark.parametrize(("name", "which"), [(n, "weight") for n in FAMILY_WITH_TIE] + [(n, "bias") for n in BIASED])
def test_a_stored_copy_that_differs_is_used(name, which, copy_of):
    chosen = next(copy for copy in copies(name) if copy.endswith(which))

    def change(tensors):
        shape = tensors[table_of(tensors)].shape
        shape = shape if which == "weight" else shape[:1]
        tensors[chosen] = torch.randn(shape, generator=torch.Generator().manual_seed(7)) / 4

    directory = copy_of(name, change)
    edit_config(directory, tie_word_embeddings=True)
    same_function(name, directory)
    assert Model(directory).spec.tied == (which == "bias")


@pytest.mark.parametrize("name", ["gpt2-tied", "bert", "roberta"])
def test_a_stored_copy_that_is_equal_is_tied(name, copy_of):
    def change(tensors):
        for copy, original in copies(name).items():
            tensors[copy] = tensors[original or table_of(tensors)].clone()

    directory = copy_of(name, change)
    assert Model(directory).spec.tied
    same_function(name, directory)


@pytest.mark.parametrize("name", ["gpt2-tied", "bert", "roberta"])
def test_only_the_copies_are_stored(name, copy_of):
    def change(tensors):
        for copy, original in copies(name).items():
            tensors[copy] = tensors.pop(original or table_of(tensors))

    directory = copy_of(name, change)
    same_function(name, directory)
    model = Model(directory)
    assert model.spec.tied
    export(model.load(), model, directory.parent / "out")
    same_function(name, directory.parent / "out")


def test_an_untied_bias_is_the_decoders_own(copy_of):
    def change(tensors):
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"] + 1
        tensors["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"] + 1

    directory = copy_of("bert", change)
    edit_config(directory, tie_word_embeddings=False)
    same_function("bert", directory)
    change_again = load_file(directory / SINGLE)
    del change_again["cls.predictions.decoder.bias"]  # transformers would make up zeros
    save_file(change_again, directory / SINGLE, metadata={"format": "pt"})
    with pytest.raises(LmcError, match=r"cls\.predictions\.decoder\.bias is missing"):
        Model(directory)


def test_a_single_file_comes_before_an_index(make_checkpoint, tokens, tmp_path):
    old = AutoModelForCausalLM.from_pretrained(make_checkpoint("llama"))
    old.save_pretrained(tmp_path / "m", max_shard_size="10KB")
    shutil.copy(make_checkpoint("llama", seed=2) / SINGLE, tmp_path / "m")
    expected = reference_logits(make_checkpoint("llama", seed=2), tokens)
    assert torch.equal(reference_logits(tmp_path / "m", tokens), expected)
    for stale in ("shards and index", "index alone"):
        found = logits(Model(tmp_path / "m").load(torch.float64), tokens)
        assert (found - expected).abs().max() <= 1e-9 * expected.abs().max(), stale
        for shard in (tmp_path / "m").glob("model-*.safetensors"):
            shard.unlink()


def test_every_tensor_of_every_shard_counts(make_checkpoint, tokens, tmp_path):
    """Wherever the index sends it; of two, that in the last file."""
    AutoModelForCausalLM.from_pretrained(make_checkpoint("llama")).save_pretrained(
        tmp_path / "m", max_shard_size="10KB"
    )
    index = json.loads((tmp_path / "m" / INDEX).read_text())
    shards, name = sorted(set(index["weight_map"].values())), "model.layers.0.mlp.up_proj.weight"
    home = index["weight_map"][name]
    other = next(s for s in shards if s != home)
    index["weight_map"][name] = other
    (tmp_path / "m" / INDEX).write_text(json.dumps(index))
    for shard, factor in ((shards[0], 2.0), (shards[-1], 3.0)):
        tensors = load_file(tmp_path / "m" / shard)
        tensors.setdefault(name, load_file(make_checkpoint("llama") / SINGLE)[name] * factor)
        save_file(tensors, tmp_path / "m" / shard, metadata={"format": "pt"})
    expected = reference_logits(tmp_path / "m", tokens)
    found = logits(Model(tmp_path / "m").load(torch.float64), tokens)
    assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_the_file_that_config_json_names(make_checkpoint, tokens, tmp_path):
    shutil.copytree(make_checkpoint("llama"), tmp_path / "m")
    shutil.copy(make_checkpoint("llama", seed=2) / SINGLE, tmp_path / "m" / "chosen.safetensors")
    edit_config(tmp_path / "m", transformers_weights="chosen.safetensors")
    expected = reference_logits(tmp_path / "m", tokens)
    model = Model(tmp_path / "m")
    assert (logits(model.load(torch.float64), tokens) - expected).abs().max() <= 1e-9 * expected.abs().max()
    export(model.load(), model, tmp_path / "out")
    assert (reference_logits(tmp_path / "out", tokens) - expected).abs().max() <= 1e-9 * expected.abs().max()
    edit_config(tmp_path / "m", transformers_weights="../chosen.safetensors")
    with pytest.raises(LmcError, match="transformers_weights"):
        Model(tmp_path / "m")


@pytest.mark.parametrize("wide", [("norm",), ("norm", "embed", "lm_head"), ("layers",)])
def test_each_tensor_keeps_its_dtype(wide, make_checkpoint, tmp_path):
    shutil.copytree(make_checkpoint("llama"), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / SINGLE)
    tensors = {key: t.clone() if any(w in key for w in wide) else t.bfloat16() for key, t in tensors.items()}
    save_file(tensors, tmp_path / "m" / SINGLE, metadata={"format": "pt"})
    edit_config(tmp_path / "m", dtype="bfloat16")
    model = Model(tmp_path / "m")
    assert model.coarsest_dtype == torch.bfloat16
    counts = Counter()
    for t in tensors.values():
        counts[t.dtype] += t.numel()
    assert model.dtype == counts.most_common(1)[0][0]
    export(model.load(), model, tmp_path / "out")
    after = load_file(tmp_path / "out" / SINGLE)
    assert all(torch.equal(after[key], t) and after[key].dtype == t.dtype for key, t in tensors.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    export(model.load(), model, tmp_path / "narrow", torch.float16)
    assert {t.dtype for t in load_file(tmp_path / "narrow" / SINGLE).values()} == {torch.float16}
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "float16"


def test_names_and_buffers_are_written_as_they_were(copy_of, tmp_path):
    """The original gpt2: no prefix, masks stored, the head tied to the embedding."""
    masks = {f"h.{i}.attn.bias": torch.tril(torch.ones(32, 32)).view(1, 1, 32, 32) for i in range(2)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}

    def change(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)
        tensors |= masks

    directory = copy_of("gpt2-tied", change)
    model = Model(directory)
    export(model.load(), model, tmp_path / "out")
    before, after = load_file(directory / SINGLE), load_file(tmp_path / "out" / SINGLE)
    assert after.keys() - before.keys() == {"lm_head.weight"}
    assert all(torch.equal(after[key], t) and after[key].dtype == t.dtype for key, t in before.items())
    x = zoo.inputs("gpt2-tied")
    one, two = (
        AutoModelForCausalLM.from_pretrained(d).eval()(input_ids=x).logits for d in (directory, tmp_path / "out")
    )
    assert torch.equal(one, two)


def test_nothing_that_is_written_points_at_files_that_are_not(tmp_path):
    """Own code, adapters, indices and logs of the original stay behind; tokenizer and licence go along."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    model = LlamaForCausalLM(config)
    randomize(model, 1)
    model.save_pretrained(tmp_path / "m")
    save_tokenizer(tmp_path / "m")
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit_config(tmp_path / "m", auto_map=own, _name_or_path="elsewhere")
    tokenizer = tmp_path / "m" / "tokenizer_config.json"
    known = json.loads(tokenizer.read_text())
    tokenizer.write_text(json.dumps(known | {"auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}))
    left = ("pytorch_model.bin.index.json", "adapter_config.json", "trainer_state.json", "README.md", "modeling_own.py")
    for name in left:
        (tmp_path / "m" / name).write_text("{}")
    (tmp_path / "m" / "LICENSE.txt").write_text("MIT")
    loaded = Model(tmp_path / "m")
    export(loaded.load(), loaded, tmp_path / "out")
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert not written & set(left) and {"LICENSE.txt", "tokenizer.json", "generation_config.json"} <= written
    assert not {"auto_map", "_name_or_path"} & json.loads((tmp_path / "out" / "config.json").read_text()).keys()
    for trust in (False, True):
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=trust)
        assert type(stock) is LlamaForCausalLM
        assert AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=trust).encode("w3 w5") == [3, 5]
