"""Output: stock, sharded, all or nothing."""

import errno
import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmc_fast import LmcError
from lmc_fast.checkpoints import Model, export, writer
from lmc_fast.output import atomic_directory, check_target


def test_sharded_output_loads_in_transformers_and_here(make_checkpoint, tmp_path):
    model = Model(make_checkpoint("llama"))
    weights = model.load()
    export(weights, model, tmp_path / "out", shard_bytes=10_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for t in AutoModelForCausalLM.from_pretrained(model.path).parameters()
    )
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(model.path).state_dict().items():
        assert torch.equal(stock[name], tensor)
    again = Model(tmp_path / "out").load()
    assert torch.equal(again.blocks[1]["o"], weights.blocks[1]["o"])


def test_companions_are_carried_over(make_checkpoint, tmp_path):
    model = Model(make_checkpoint("neox"))
    export(model.load(), model, tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("w3 w5") == [3, 5]


def test_a_link_out_of_the_checkpoint_is_not_followed(make_checkpoint, tmp_path, caplog):
    (tmp_path / "secret").write_text("secret")
    model = tmp_path / "hub" / "snapshots" / "1"
    shutil.copytree(make_checkpoint("neox"), model)
    (model / "LICENSE").symlink_to("../../../secret")
    (tmp_path / "hub" / "blobs").mkdir()
    (tmp_path / "hub" / "blobs" / "5").write_text("from the hub's cache")
    (model / "NOTICE").symlink_to("../../blobs/5")
    (model / "LICENSE.txt").symlink_to("NOTICE")
    export(Model(model).load(), Model(model), tmp_path / "out")
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"NOTICE", "LICENSE.txt"} <= written and "LICENSE" not in written
    assert "LICENSE is a link to another place" in caplog.text
    assert written <= set(writer.checkpoint_names(model))


def test_a_tied_model_is_written_untied(make_checkpoint, tmp_path):
    model = Model(make_checkpoint("gpt2-tied"))
    weights = model.load()
    weights.ends["head"] = weights.ends["head"] * 2
    export(weights, model, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not stock.config.tie_word_embeddings
    assert torch.equal(stock.lm_head.weight, 2 * stock.transformer.wte.weight)


def test_overflow_in_the_target_dtype_is_an_error(make_checkpoint, tmp_path):
    model = Model(make_checkpoint("neox"))
    weights = model.load().map(lambda t: t * 1e9)
    with pytest.raises(LmcError, match="float16"):
        export(weights, model, tmp_path / "out", torch.float16)


def test_atomic_directory_appears_whole(tmp_path):
    with atomic_directory(tmp_path / "new" / "out") as work:
        (work / "file").write_text("x")
        assert not (tmp_path / "new" / "out").exists()
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["out"]
    assert (tmp_path / "new" / "out").stat().st_mode & 0o077  # not private


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), LmcError("x")]
)
def test_atomic_directory_leaves_nothing_behind(error, tmp_path):
    with pytest.raises((LmcError, KeyboardInterrupt)), atomic_directory(tmp_path / "out") as work:
        (work / "file").write_text("x")
        raise error
    assert not list(tmp_path.iterdir())


def test_full_disk_says_so(make_checkpoint, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "write_file", full)
    model = Model(make_checkpoint("neox"))
    with pytest.raises(LmcError, match="disk is full"), atomic_directory(tmp_path / "out") as work:
        export(model.load(), model, work / "a")
    assert not list(tmp_path.iterdir())


def test_targets_that_are_taken(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "f").write_text("x")
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty")
    for name in ("file", "full", "file/below"):
        with pytest.raises(LmcError, match="choose another"):
            check_target(tmp_path / name)
