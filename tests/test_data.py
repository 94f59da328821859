"""Token blocks; what the command line refuses is in tests/pipeline."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import lmc_fast as lmc
from lmc_fast import LmcError, read_tokens
from lmc_fast.architectures import ImageInput
from lmc_fast.checkpoints import Model
from lmc_fast.data import as_data, split_validation
from lmc_fast.examples import Examples


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


@pytest.mark.parametrize("value", [-1, -(2**40), 40, 2**63 + 5], ids=str)
def test_the_id_that_is_outside_the_vocabulary_is_named(value, make_checkpoint, tmp_path):
    np.save(tmp_path / "t.npy", np.array([3, 39, value, 0] * 4, dtype=np.uint64 if value > 2**62 else np.int64))
    with pytest.raises(LmcError, match=f"token id {value}, outside the vocabulary of 40"):
        read_tokens(tmp_path / "t.npy", Model(make_checkpoint("neox")), 8)


def test_lines_end_only_where_json_lines_says_and_a_byte_order_mark_is_no_text(make_checkpoint, tmp_path):
    texts = ["w5\u2028w6", "w7\u0085w8", "w9\x0cw10 w11"]
    lines = "\r\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts[:2])
    lines += "\n\n" + json.dumps({"other": float("nan"), "text": texts[2]})
    (tmp_path / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfw5 w6 w7 w8")
    model = Model(make_checkpoint("neox"))
    assert read_tokens(tmp_path / "t.jsonl", model, 10).tolist() == [[5, 6, 0, 7, 8, 0, 9, 10, 11, 0]]
    assert read_tokens(tmp_path / "t.txt", model, 4).tolist() == [[5, 6, 7, 8]]


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"text": null}', "'text' is null, not a string"),
        ('{"text": 5}', "'text' is a number"),
        ('{"text": ["w5"]}', "'text' is a list"),
        ('{"text": {"a": "w5"}}', "'text' is an object"),
        ('{"text": true}', "'text' is true or false"),
        ('{"texts": "w5"}', "not a JSON object with a 'text' field"),
        ('["text"]', "not a JSON object with a 'text' field"),
        ('{"text": "w5"', "not a JSON object"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ('{"text": ' + "[" * 100_000, "not a JSON object"),
    ],
)
def test_a_line_without_text_is_refused_with_its_number(line, words, make_checkpoint, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "w5 w6"}\n' * 3 + line + "\n")
    with pytest.raises(LmcError, match=r"t.jsonl, line 4: ") as refusal:
        read_tokens(tmp_path / "t.jsonl", Model(make_checkpoint("neox")), 4)
    assert words in str(refusal.value)


def _claims(shape: str, kind: str = "<i8") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + b"\0" * 64


@pytest.mark.parametrize(
    "name, content",
    {
        "8 TB": _claims("(1000000000000,)"),
        "a negative size": _claims("(-5,)"),
        "a damaged header": _claims("(8,").replace(b"shape", b"sh\xffpe"),
        "an unclosed header": _claims("((((((("),
        "timedelta": _claims("(8,)", "<m8[s]"),
        "time": _claims("(8,)", "<M8[s]"),
        "floats": _claims("(8,)", "<f8"),
        "true and false": _claims("(8,)", "|b1"),
        "an unknown type": _claims("(8,)", "nonsense"),
        "nothing": b"",
        "several arrays": None,
    }.items(),
    ids=str,
)
def test_arrays_that_are_no_token_ids_are_refused(name, content, make_checkpoint, tmp_path):
    file = tmp_path / "t.npy"
    if content is None:
        with open(file, "wb") as handle:
            np.savez(handle, a=np.arange(5), b=np.arange(5))
    else:
        file.write_bytes(content)
    with pytest.raises(LmcError, match=r"t.npy (is not a readable|holds)"):
        read_tokens(file, Model(make_checkpoint("neox")), 2)


def test_ids_of_any_width_and_byte_order_are_read(make_checkpoint, tmp_path):
    model = Model(make_checkpoint("neox"))
    for kind in (">i4", "<u2", "|u1", ">i8", "<u8"):
        np.save(tmp_path / "t.npy", np.arange(32).astype(kind).reshape(4, 8))
        assert read_tokens(tmp_path / "t.npy", model, 32).tolist() == [list(range(32))]


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.npy"])
def test_a_pipe_as_data_is_refused_at_once(name, make_checkpoint, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(LmcError, match="is a pipe"):
        read_tokens(tmp_path / name, Model(make_checkpoint("neox")), 2)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_tokenizer_files_that_are_none_are_refused(file, make_checkpoint, tmp_path):
    shutil.copytree(make_checkpoint("neox"), tmp_path / "odd")
    (tmp_path / "t.txt").write_text("w2 " * 50)
    target = tmp_path / "odd" / file
    target.unlink(missing_ok=True)
    os.mkfifo(target)
    with pytest.raises(LmcError, match=f"{file} is a pipe"):
        read_tokens(tmp_path / "t.txt", Model(tmp_path / "odd"), 8)
    target.unlink()
    for text in ("[" * 5000, "[1, 2]", '{"model": {"vocab": 5}, "added_tokens_decoder": 5}'):
        target.write_text(text)
        with pytest.raises(LmcError, match="odd"):
            read_tokens(tmp_path / "t.txt", Model(tmp_path / "odd"), 8)


def test_a_checkpoint_without_tokenizer_needs_ids(make_checkpoint, tmp_path):
    shutil.copytree(make_checkpoint("neox"), tmp_path / "bare")
    for file in (tmp_path / "bare").glob("tokenizer*"):
        file.unlink()
    (tmp_path / "t.txt").write_text("w2 " * 50)
    with pytest.raises(LmcError, match="has no tokenizer"):
        read_tokens(tmp_path / "t.txt", Model(tmp_path / "bare"), 8)


def test_validation_is_drawn_evenly_and_never_learned_from():
    blocks = torch.arange(2000).view(1000, 2)
    calibration, validation = split_validation(blocks)
    assert len(validation) == 30 and torch.equal(torch.cat([calibration, validation]).sort(0)[0], blocks)
    assert torch.equal(validation[:, 0] // 2 * 30 // 1000, torch.arange(30))  # one from each stretch
    assert len(set((validation[:, 0] // 2 % 33).tolist())) > 10  # not every k-th: classes may come in turns
    assert torch.equal(split_validation(blocks)[1], validation)
    for count, held in ((200, 16), (100, 10), (19, 1)):
        calibration, validation = split_validation(blocks[:count])
        assert (len(calibration), len(validation)) == (count - held, held)
    assert split_validation(blocks[:9])[1] is None
    examples = Examples(torch.randn(40, 1, 2, 2), torch.arange(40) // 10)  # images, class by class
    calibration, validation = split_validation(examples)
    assert validation.targets.tolist() == [0, 1, 2, 3] and len(calibration) == 36


def test_repeated_text_does_not_leak_from_validation_into_learning():
    blocks = torch.arange(400).view(200, 2)
    calibration, validation = split_validation(torch.cat([blocks, blocks, blocks]))
    kept = {tuple(row) for row in calibration.tolist()}
    assert len(validation) == 18 and kept.isdisjoint(tuple(row) for row in validation.tolist())
    calibration, validation = split_validation(torch.ones(300, 2, dtype=torch.int64))
    assert len(calibration) + len(validation) == 300


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint16, ">i4", torch.int32])
def test_token_ids_in_memory_are_those_of_a_tensor(kind, make_checkpoint, tokens):
    pair = lmc.open_pair(make_checkpoint("neox", 1), make_checkpoint("neox", 2))
    given = tokens.to(kind) if isinstance(kind, torch.dtype) else tokens.numpy().astype(kind)
    assert torch.equal(as_data(given, pair.a), tokens)
    assert lmc.barrier(pair, given, points=3) == lmc.barrier(pair, tokens, points=3)
    assert lmc.verify(pair.a.path, pair.a.path, given)[1]


def test_data_in_memory_that_a_model_does_not_read_is_refused(make_checkpoint, tokens):
    model = lmc.Model(make_checkpoint("neox"))
    examples = lmc.Examples(tokens, tokens)

    def refused(given, words):
        with pytest.raises(lmc.LmcError, match=words):
            as_data(given, model)

    refused(tokens.float(), "integers of shape")
    refused(tokens.numpy().reshape(-1), r"not torch.int64 of \[60\].*reshape")
    refused(tokens[:0], "0 sequences")
    refused(tokens[:, :1], "of 2 to 32")
    refused(tokens.repeat(1, 3), "60 tokens")
    refused(tokens + 30, "outside the vocabulary of 40")
    refused(tokens.numpy() - 30, "outside the vocabulary of 40")
    refused(tokens.bool(), "not torch.bool")
    refused(tokens.tolist(), "not list")
    refused("text.txt", "not str; read files with read_data")
    refused(np.array(["a"]), "not <U1")
    refused(examples, "not Examples")
    with pytest.raises(lmc.LmcError, match="outside the vocabulary"):
        lmc.align(lmc.open_pair(model.path, model.path), tokens + 30)
    model.spec = replace(model.spec, task="masked")
    refused(tokens, "give Examples")
    refused(lmc.Examples(tokens, tokens[:, :3]), r"integers of shape \[3, 20\], not torch.int64 of \[3, 3\]")
    refused(lmc.Examples(tokens, tokens + 30), "a target is")
    model.spec = replace(model.spec, task="image", image=ImageInput(8, 4, 3))
    refused(tokens, "give Examples")
    refused(examples, r"images must be normalised floats of shape \['n', 3, 8, 8\]")
    refused(lmc.Examples(torch.full((2, 3, 8, 8), torch.nan), torch.arange(2)), "NaN")
    refused(lmc.Examples(torch.ones(2, 3, 8, 8), torch.arange(3)), r"shape \[2\]")
