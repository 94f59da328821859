"""Token blocks; what the command line refuses is in tests/pipeline."""

import json
import shutil

import numpy as np
import pytest
import torch

from lmc_fast import LmcError, read_tokens
from lmc_fast.checkpoints import Model
from lmc_fast.data import split_validation


def test_blocks_are_contiguous_and_the_rest_is_dropped(make_checkpoint, tmp_path):
    np.save(tmp_path / "t.npy", np.arange(35, dtype=np.int32).reshape(5, 7))
    blocks = read_tokens(tmp_path / "t.npy", Model(make_checkpoint("neox")), 8)
    assert blocks.dtype == torch.int64 and torch.equal(blocks, torch.arange(32).view(4, 8))


def test_jsonl_documents_end_with_the_end_token(make_checkpoint, tmp_path):
    lines = [json.dumps({"text": text}) for text in ("w5 w6 w7", "w8")]
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n\n")
    blocks = read_tokens(tmp_path / "t.jsonl", Model(make_checkpoint("neox")), 6)
    assert blocks.tolist() == [[5, 6, 7, 0, 8, 0]]


def test_negative_ids_and_pickled_arrays_are_refused(make_checkpoint, tmp_path):
    model = Model(make_checkpoint("neox"))
    np.save(tmp_path / "minus.npy", np.full(64, -1))
    with pytest.raises(LmcError, match="outside the vocabulary"):
        read_tokens(tmp_path / "minus.npy", model, 8)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(LmcError, match="not a readable"):
        read_tokens(tmp_path / "objects.npy", model, 8)


def test_a_checkpoint_without_tokenizer_needs_ids(make_checkpoint, tmp_path):
    shutil.copytree(make_checkpoint("neox"), tmp_path / "bare")
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    (tmp_path / "t.txt").write_text("w2 " * 50)
    with pytest.raises(LmcError, match="has no tokenizer"):
        read_tokens(tmp_path / "t.txt", Model(tmp_path / "bare"), 8)


def test_validation_is_the_end_of_the_text_and_never_learned_from():
    blocks = torch.arange(2000).view(1000, 2)
    calibration, validation = split_validation(blocks)
    assert len(validation) == 30 and torch.equal(torch.cat([calibration, validation]), blocks)
    assert len(split_validation(blocks[:200])[1]) == 16
    assert split_validation(blocks[:100])[1] is None
