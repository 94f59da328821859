"""Tokenizers are compared by what they do, not by how their files are written."""

import json
import logging
import shutil

import pytest
from checkpoints_tiny import VOCAB, save_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lmc_fast import LmcError, open_pair
from lmc_fast.tokenizer import compare_tokenizers

LETTERS = {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyzĠ")}
MERGED = {"th": 27, "he": 28, "the": 29, "Ġthe": 30}


def bpe(merges, **parts):
    """Byte-level BPE over a few letters."""
    tokenizer = Tokenizer(models.BPE(LETTERS | MERGED, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def save(directory, tokenizer, added=()):
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_tokens(list(added), special_tokens=True)
    directory.mkdir(exist_ok=True)
    fast.save_pretrained(directory)
    return directory


BASE = [("t", "h"), ("th", "e"), ("h", "e"), ("Ġ", "the")]
OTHERS = {
    "merges in another order": lambda: (bpe([("h", "e"), ("t", "h"), ("th", "e"), ("Ġ", "the")]), ()),
    "a normaliser": lambda: (bpe(BASE, normalizer=normalizers.Lowercase()), ()),
    "another pre-tokeniser": lambda: (bpe(BASE, pre_tokenizer=pre_tokenizers.Whitespace()), ()),
    "two ids changed places": lambda: (_swapped(), ()),
    "an id with another token": lambda: (bpe(BASE), ("<|end|>", "<|start|>")),
    "an added token with another meaning": lambda: (bpe(BASE), ("<pad>",)),
}


def _swapped():
    content = json.loads(bpe(BASE).to_str())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    return Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("what", OTHERS)
def test_tokenizers_that_do_something_else(what, tmp_path):
    a = save(tmp_path / "a", bpe(BASE), ("<|start|>", "<|end|>"))
    tokenizer, added = OTHERS[what]()
    b = save(tmp_path / "b", tokenizer, added or ("<|start|>", "<|end|>"))
    problem = compare_tokenizers(a, b).problem
    assert problem and "\n" not in problem and "share a tokenizer" in problem


def test_the_same_vocabulary_split_differently(tmp_path):
    a = save(tmp_path / "a", bpe(BASE), ("<|start|>", "<|end|>"))
    b = shutil.copytree(a, tmp_path / "b")
    content = json.loads((b / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"<|start|>": 31, "<|end|>": 32}
    (b / "tokenizer.json").write_text(json.dumps(content))
    found = compare_tokenizers(a, b)
    assert found.problem is None and not found.warnings and found.used == 33


def test_a_token_more_is_told(tmp_path):
    a, b = save(tmp_path / "a", bpe(BASE)), save(tmp_path / "b", bpe(BASE), ("<pad>",))
    found = compare_tokenizers(a, b)
    assert found.problem is None and found.used == 32
    assert len(found.warnings) == 1 and "'<pad>' (31)" in found.warnings[0] and str(b) in found.warnings[0]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_files_of_slow_tokenizers(kind, tmp_path):
    for name, reverse in (("a", False), ("b", False), ("c", True)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
        if kind == "bert":
            words = [f"x{i}" for i in range(30)]
            words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(words[::-1] if reverse else words)]
            (tmp_path / name / "vocab.txt").write_text("\n".join(words) + "\n")
        else:
            letters = [chr(33 + i) for i in range(64)]
            words = {c: i for i, c in enumerate(letters[::-1] if reverse else letters)}
            (tmp_path / name / "vocab.json").write_text(json.dumps(words))
            (tmp_path / name / "merges.txt").write_text("#version: 0.2\n")
    assert compare_tokenizers(tmp_path / "a", tmp_path / "b").problem is None
    assert "the ids" in compare_tokenizers(tmp_path / "a", tmp_path / "c").problem


def test_what_cannot_be_compared_is_said(make_checkpoint, tmp_path, caplog):
    a, b = make_checkpoint("neox"), shutil.copytree(make_checkpoint("neox", seed=2), tmp_path / "b")
    with caplog.at_level(logging.WARNING, logger="lmc_fast"):
        assert compare_tokenizers(a, b).used == VOCAB
        open_pair(a, b)
        assert not caplog.messages
        (b / "tokenizer.json").unlink()
        assert compare_tokenizers(a, b).used == VOCAB
        assert open_pair(a, b).warnings == tuple(caplog.messages)
        assert len(caplog.messages) == 1 and str(b) in caplog.messages[0] and "no tokenizer" in caplog.messages[0]
        (b / "tokenizer.json").write_text("{")
        open_pair(a, b)
        assert str(b) in caplog.messages[1] and "not valid JSON" in caplog.messages[1]
        assert compare_tokenizers(b, b).used is None
        assert "neither" in compare_tokenizers(b, b).warnings[0]


def test_a_pair_with_other_ids_is_refused(make_checkpoint, tmp_path):
    b = shutil.copytree(make_checkpoint("neox", seed=2), tmp_path / "b")
    content = json.loads((b / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {"w3": 4, "w4": 3}
    (b / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(LmcError, match="'w3' the ids 3 and 4"):
        open_pair(make_checkpoint("neox"), b)
    save_tokenizer(b)
    open_pair(make_checkpoint("neox"), b)
