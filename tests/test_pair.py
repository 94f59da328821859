"""Pairs whose vocabularies are padded differently, and what users are told about what is read."""

import json
import logging
import shutil

import pytest
import torch
import zoo
from checkpoints_tiny import VOCAB, edit_config, reference_logits, save_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lmc_fast as lmc
from lmc_fast import LmcError
from lmc_fast.checkpoints import Model, notes_on
from lmc_fast.pipeline.evaluate import verify


def resized(directory, target, rows, tokenizer=True):
    """The same model with more rows, as transformers pads them."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(target)
    if tokenizer:
        save_tokenizer(target)
    return target


@pytest.mark.parametrize("variant", ["neox", "gpt2-tied"])
def test_rows_that_no_token_uses_are_left_out(variant, make_checkpoint, tokens, tmp_path, caplog):
    a, b = make_checkpoint(variant), resized(make_checkpoint(variant, seed=2), tmp_path / "b", VOCAB + 8)
    with caplog.at_level(logging.WARNING, logger="lmc_fast"):
        pair = lmc.open_pair(a, b)
    assert f"rows {VOCAB} to {VOCAB + 7} of {b} are left out (no token uses them)" in caplog.messages[0]
    assert pair.a.spec == pair.b.spec and pair.b.spec.vocab == VOCAB
    alignment = lmc.align(pair, tokens, method="weight")
    lmc.export(pair, alignment, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "b" / "config.json").read_text())
    assert config["vocab_size"] == VOCAB
    expected = reference_logits(b, tokens)[..., :VOCAB].log_softmax(-1)
    found = reference_logits(tmp_path / "out" / "b", tokens).log_softmax(-1)
    assert (found - expected).abs().max() < 1e-4
    assert verify(b, tmp_path / "out" / "b")[1]


def test_rows_of_bert_and_its_biases(tmp_path):
    zoo.write("bert", tmp_path / "a")
    zoo.write("bert", tmp_path / "b", 2)
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:8]])
    save_file(tensors, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    edit_config(tmp_path / "b", vocab_size=VOCAB + 8)
    pair = lmc.open_pair(tmp_path / "a", tmp_path / "b")
    weights = pair.b.load()
    assert weights.ends["head_bias"].shape == (VOCAB,) and weights.ends["head"].shape[0] == VOCAB
    assert any("no tokenizer to tell" in warning for warning in pair.warnings)


def test_tokens_in_use_are_not_left_out(make_checkpoint, tmp_path):
    a = make_checkpoint("neox")
    b = resized(make_checkpoint("neox", seed=2), tmp_path / "b", VOCAB + 8)
    small = resized(a, tmp_path / "small", VOCAB - 4)
    with pytest.raises(LmcError, match=rf"{b} uses {VOCAB} tokens, {small} has rows for {VOCAB - 4}"):
        lmc.open_pair(small, b)
    for changes in ({"pad_token_id": VOCAB + 3}, {"pad_token_id": None, "eos_token_id": [0, VOCAB + 3]}):
        edit_config(b, **changes)
        with pytest.raises(LmcError, match=f"uses {VOCAB + 4} tokens"):
            lmc.open_pair(a, b)


def test_classes_are_never_left_out(tmp_path):
    zoo.write("vit", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        tensors[name] = tensors[name][:4].contiguous()
    save_file(tensors, tmp_path / "b" / "model.safetensors", metadata={"format": "pt"})
    edit_config(tmp_path / "b", id2label={str(i): f"L{i}" for i in range(4)}, label2id={f"L{i}": i for i in range(4)})
    with pytest.raises(LmcError, match="vocab differs"):
        lmc.open_pair(tmp_path / "a", tmp_path / "b")


def test_notes(make_checkpoint, tmp_path):
    assert not notes_on(Model(make_checkpoint("neox")))
    assert "tied to the embedding" in notes_on(Model(make_checkpoint("gpt2-tied")))[0]
    for name in ("gemma", "roberta"):
        zoo.write(name, tmp_path / name)
        assert "mergekit" in notes_on(Model(tmp_path / name))[0]
    shutil.copytree(make_checkpoint("gpt2"), tmp_path / "c")
    edit_config(tmp_path / "c", tie_word_embeddings=True, scale_attn_by_inverse_layer_idx=True)
    first, second = notes_on(Model(tmp_path / "c"))
    assert "another one is stored" in first and "scale_attn_by_inverse_layer_idx" in second
    shutil.copytree(make_checkpoint("llama"), tmp_path / "d")
    edit_config(tmp_path / "d", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert "beyond 32 tokens" in notes_on(Model(tmp_path / "d"))[0]


def test_the_shorter_of_two_trained_lengths_counts(make_checkpoint, tmp_path):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    for name, longest in (("a", 32), ("b", 16)):
        shutil.copytree(make_checkpoint("llama"), tmp_path / name)
        parameters = rope | {"original_max_position_embeddings": longest, "factor": 1.0}
        edit_config(tmp_path / name, rope_parameters=parameters)
    pair = lmc.open_pair(tmp_path / "a", tmp_path / "b")
    assert pair.a.spec.max_positions == pair.b.spec.max_positions == 16
    with pytest.raises(LmcError, match="16 positions"):
        lmc.read_tokens(tmp_path / "a" / "model.safetensors", pair.a, 20)
