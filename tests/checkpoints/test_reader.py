"""Damaged, strange and hostile checkpoints: each is refused in one sentence that names the culprit."""

import json
import os
import shutil

import pytest
import torch
from checkpoints_tiny import edit_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lmc_fast import LmcError
from lmc_fast.checkpoints import Checkpoint, Model


@pytest.fixture
def copy(make_checkpoint, tmp_path):
    """A checkpoint that the test may damage."""

    def make(variant="neox"):
        target = tmp_path / "copy"
        shutil.copytree(make_checkpoint(variant), target)
        return target

    return make


def change(directory, edit):
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def refused(directory, *words):
    with pytest.raises(LmcError) as error:
        Model(directory).load()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_missing_directory_and_file_instead_of_directory(tmp_path):
    refused(tmp_path / "absent", "absent", "does not exist")
    for name in ("~nosuchuser/x", tmp_path / ("n" * 300), f"{tmp_path}/nul\0", "x/" * 3000):
        refused(name, "does not exist")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is a file")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"])
def test_a_pipe_where_weights_are_looked_for(name, copy):
    directory = copy()
    for file in directory.glob("model*"):
        file.unlink()
    os.mkfifo(directory / name)
    refused(directory, name, "is a pipe")


def test_unreachable_hub_id():
    refused("no-such-owner/no-such-model", "no-such-owner/no-such-model", "hub")


def test_truncated_and_corrupt_weights(copy):
    directory = copy()
    file = directory / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refused(directory, "model.safetensors", "corrupt or truncated")
    file.write_bytes(b"\xff" * 100)
    refused(directory, "model.safetensors", "corrupt or truncated")


def test_corrupt_config(copy):
    directory = copy()
    (directory / "config.json").write_text("{not json")
    refused(directory, "config.json", "not valid JSON")
    (directory / "config.json").write_text("[]")
    refused(directory, "config.json", "not a JSON object")
    (directory / "config.json").unlink()
    refused(directory, "config.json", "missing")


def test_pickles_are_never_loaded(copy):
    directory = copy()
    (directory / "model.safetensors").unlink()
    refused(directory, "no model.safetensors")
    (directory / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'false'\ntR.")
    refused(directory, "pytorch_model.bin", "posix.system", "could run code")


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "weights.bin", ""])
def test_index_entries_outside_the_directory_are_refused(file, copy):
    directory = copy()
    (directory / "model.safetensors").unlink()  # it would come first
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    refused(directory, "refused")


def test_index_that_promises_too_much(copy):
    directory = copy()
    index = directory / "model.safetensors.index.json"
    (directory / "model.safetensors").rename(directory / "one.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"nothing.weight": "one.safetensors"}}))
    refused(directory, "nothing.weight")
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"x": "model-00001-of-00002.safetensors"}}))
    refused(directory, "model-00001-of-00002.safetensors", "missing")


def test_unknown_architecture_quantised_and_not_a_language_model(copy):
    directory = copy()
    edit_config(directory, model_type="rwkv")
    refused(directory, "rwkv", "keep a state", "lmc-fast families")
    edit_config(directory, model_type="gpt_neox", architectures=["GPTNeoXForQuestionAnswering"])
    refused(directory, "not a causal language model")
    edit_config(directory, architectures=["GPTNeoXForCausalLM"], quantization_config={"quant_method": "gptq"})
    refused(directory, "quantised")


def test_unsupported_options(copy):
    directory = copy("gpt2")
    edit_config(directory, add_cross_attention=True)
    refused(directory, "add_cross_attention")


def test_rope_that_depends_on_the_length(copy):
    directory = copy()
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5}
    edit_config(directory, rope_parameters=rope)
    assert Model(directory).spec.max_positions == 32  # it depends on it only beyond
    edit_config(directory, rope_parameters=rope | {"rope_type": "axial"})
    refused(directory, "axial")


def test_coverage_missing_extra_misshapen_not_float_not_finite(copy):
    directory = copy()
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.weight"
    original = load_file(directory / "model.safetensors")[name]
    change(directory, lambda t: t.pop(name))
    refused(directory, name, "missing")
    change(directory, lambda t: t.update({name: original[:, 1:].contiguous()}))
    refused(directory, name, "shape")
    change(directory, lambda t: t.update({name: original.to(torch.int8)}))
    refused(directory, name, "I8")
    change(directory, lambda t: t.update({name: original / 0}))
    refused(directory, name, "NaN or infinity")
    change(directory, lambda t: t.update({name: original, "adapter.lora_A": torch.ones(2)}))
    refused(directory, "adapter.lora_A", "lost")


def test_known_buffers_are_ignored(copy):
    directory = copy()
    change(directory, lambda t: t.update({"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}))
    Model(directory).load()


def test_names_without_the_prefix_as_on_the_hub(copy):
    directory = copy("gpt2-tied")
    with_prefix = Model(directory).load()
    tensors = load_file(directory / "model.safetensors")
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    save_file(bare, directory / "model.safetensors", metadata={"format": "pt"})
    without = Model(directory).load()
    assert all(torch.equal(with_prefix.ends[name], without.ends[name]) for name in with_prefix.ends)


def test_opening_reads_headers_only(make_checkpoint, monkeypatch):
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read"))
    assert Model(make_checkpoint("llama")).spec.attention.kv_heads == 2


def test_rows_are_read_alone_and_a_file_that_shrinks_is_noticed(copy):
    directory = copy("gpt2")
    checkpoint, name = Checkpoint(directory), "transformer.wte.weight"
    whole = load_file(directory / "model.safetensors")[name]
    assert torch.equal(checkpoint.read(name), whole)
    for start, stop in ((0, 40), (3, 17), (39, 40), (5, 5)):
        assert torch.equal(checkpoint.read_rows(name, start, stop), whole[start:stop])
    with pytest.raises(IndexError):
        checkpoint.read_rows(name, 3, 41)
    file = directory / "model.safetensors"
    with safe_open(file, framework="pt") as header:
        last = header.offset_keys()[-1]
    with open(file, "r+b") as handle:
        handle.truncate(file.stat().st_size - 1)
    with pytest.raises(LmcError, match="corrupt"):
        checkpoint.read(last)


@pytest.mark.parametrize("place", [0, 17, 39])
def test_one_bad_number_in_a_row_is_found_with_the_row(place, copy):
    directory, name = copy("gpt2"), "transformer.wte.weight"
    change(directory, lambda t: t[name][place].fill_(torch.nan))
    checkpoint = Checkpoint(directory)
    with pytest.raises(LmcError, match="NaN or infinity"):
        checkpoint.read(name)
    with pytest.raises(LmcError, match="NaN or infinity"):
        checkpoint.read_rows(name, place, place + 1)
    assert checkpoint.read_rows(name, 1, 17).isfinite().all()


def test_reading_leaves_nothing_mapped(copy):
    directory = copy()
    model = Model(directory)
    weights = model.load()
    with open("/proc/self/maps") as maps:
        assert str(directory) not in maps.read()
    assert weights.spec.layers == 2
