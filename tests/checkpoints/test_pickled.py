"""pytorch_model.bin: what transformers loads is what is read, no more than weights is unpickled, memory stays small."""

import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from checkpoints_tiny import reference_logits
from safetensors.torch import load_file

from lmc_fast import LmcError
from lmc_fast.checkpoints import Checkpoint, Model, pickled
from lmc_fast.checkpoints.pickled import PickledFile
from lmc_fast.engine.model import logits

needs_parts = pytest.mark.skipif(
    tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 11), reason="torch 2.11 tells where tensors lie"
)


@pytest.fixture
def as_pickled(make_checkpoint, tmp_path):
    """as_pickled(change, shards, **options of torch.save) -> a copy of a checkpoint with nothing but .bin files."""

    def make(change=dict, shards=1, variant="gpt2-tied", **options):
        directory = shutil.copytree(make_checkpoint(variant), tmp_path / f"bin-{len(os.listdir(tmp_path))}")
        tensors = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        held = change(tensors)
        if shards == 1:
            torch.save(held, directory / "pytorch_model.bin", **options)
            return directory
        homes = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(held)}
        for file in set(homes.values()):
            torch.save({name: held[name] for name in held if homes[name] == file}, directory / file, **options)
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
        return directory

    return make


def parameters(tensors):
    """As a training script leaves them: parameters, a tied head that shares its storage, rows of a larger matrix."""
    wide = torch.cat([tensors["transformer.wpe.weight"], torch.ones(3, 24)])
    rest = {name: torch.nn.Parameter(t) for name, t in tensors.items()}
    return rest | {"lm_head.weight": rest["transformer.wte.weight"], "transformer.wpe.weight": wide[:-3]}


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "old"])
@pytest.mark.parametrize(("change", "shards"), [(dict, 1), (parameters, 1), (dict, 3)])
def test_it_is_what_transformers_loads(change, shards, options, as_pickled, tokens):
    directory = as_pickled(change, shards, **options)
    found = logits(Model(directory).load(torch.float64), tokens)
    assert (found - reference_logits(directory, tokens)).abs().max() < 1e-10


def test_safetensors_come_first(as_pickled, make_checkpoint):
    directory = as_pickled(lambda tensors: {name: t * 0 for name, t in tensors.items()})
    assert not Checkpoint(directory).read("transformer.wte.weight").any()
    shutil.copy(make_checkpoint("gpt2-tied") / "model.safetensors", directory)
    assert Checkpoint(directory).read("transformer.wte.weight").any()


def test_rows_runs_and_kinds(as_pickled):
    directory, name = as_pickled(), "transformer.wte.weight"
    checkpoint = Checkpoint(directory)
    whole = torch.load(directory / "pytorch_model.bin", weights_only=True)[name]
    assert torch.equal(torch.cat(list(checkpoint.read_runs(name))), whole)
    assert torch.equal(checkpoint.read_rows(name, 3, 17), whole[3:17])
    with pytest.raises(IndexError):
        checkpoint.read_rows(name, 3, 41)
    assert checkpoint.dtype(name) == checkpoint.stored_dtype(name) == torch.float32


@needs_parts
def test_nothing_of_the_file_is_mapped_or_read_without_need(as_pickled):
    directory = as_pickled()
    file = directory / "pytorch_model.bin"
    checkpoint = Checkpoint(directory)
    whole = {name: checkpoint.read(name) for name in checkpoint.names}
    with open("/proc/self/maps") as maps:
        assert str(file) not in maps.read()
    data = bytearray(file.read_bytes())
    place = data.find(whole["transformer.wpe.weight"][2:].numpy().tobytes())
    data[place : place + 4] = bytes(4)
    file.write_bytes(data)  # in place
    assert torch.equal(checkpoint.read_rows("transformer.wpe.weight", 0, 2), whole["transformer.wpe.weight"][:2])
    assert checkpoint.read("transformer.wpe.weight")[2, 0] == 0


@pytest.mark.parametrize("kind", ["old", "compressed", "big-endian"])
def test_what_cannot_be_read_in_parts_is_held_whole_and_said(kind, as_pickled, caplog):
    caplog.set_level("INFO", "lmc_fast")
    directory = as_pickled(**({"_use_new_zipfile_serialization": False} if kind == "old" else {}))
    expected = {name: t.clone() for name, t in torch.load(directory / "pytorch_model.bin", weights_only=True).items()}
    if kind != "old":
        rewrite_archive(directory / "pytorch_model.bin", kind)
    tensors = PickledFile(directory / "pytorch_model.bin")
    assert all(torch.equal(tensors.read(name), t) for name, t in expected.items())
    assert "held whole" in caplog.text


def rewrite_archive(file, kind):
    """The same tensors compressed, or as a machine with the other order of bytes writes them."""
    with zipfile.ZipFile(file) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if kind == "compressed" else zipfile.ZIP_STORED) as archive:
        for name, content in entries:
            if kind == "big-endian" and "/data/" in name:
                content = np.frombuffer(content, "<f4").byteswap().tobytes()
            archive.writestr(name, b"big" if kind == "big-endian" and name.endswith("/byteorder") else content)


class Opens:
    """Unpickling it would write a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_anything_but_weights_is_refused_and_not_run(as_pickled, tmp_path):
    trap = tmp_path / "trap"
    nan = {"transformer.wpe.weight": torch.full((32, 24), torch.nan)}
    cases = [
        (lambda t: t | {"x": Opens(trap)}, ("more", "save_pretrained")),
        (lambda t: torch.nn.Linear(2, 2), ("torch.nn.modules.linear.Linear", "save_pretrained")),
        (lambda t: {"model": t}, ("model is a dict", "not a tensor")),
        (lambda t: t | {"epoch": 3}, ("epoch is a int",)),
        (lambda t: list(t.values()), ("holds a list",)),
        (lambda t: t | {"transformer.wte.weight": t["transformer.wte.weight"].to_sparse()}, ("sparse",)),
        (lambda t: t | {"transformer.wte.weight": t["transformer.wte.weight"].to(torch.complex64)}, ("complex64",)),
        (lambda t: t | {"transformer.wte.weight": t["transformer.wte.weight"].int()}, ("I32", "not a float")),
        (lambda t: t | nan, ("transformer.wpe.weight", "NaN or infinity")),
    ]
    for change, words in cases:
        directory = as_pickled(change)
        with pytest.raises(LmcError) as error:
            Model(directory).load()
        assert "\n" not in str(error.value) and all(word in str(error.value) for word in (str(directory), *words))
    assert not trap.exists()


@pytest.mark.parametrize("damage", [b"", b"cposix\nsystem\n(S'false'\ntR.", b"PK\x03\x04", None])
def test_damaged_files(damage, as_pickled):
    directory = as_pickled()
    file = directory / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:3000] if damage is None else damage)
    with pytest.raises(LmcError) as error:
        Model(directory)
    assert "\n" not in str(error.value) and "pytorch_model.bin" in str(error.value)


@needs_parts
def cut_entry(file):
    """One tensor's bytes cut, in an archive that is whole otherwise."""
    with zipfile.ZipFile(file) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w") as new:
        for name, data in entries.items():
            new.writestr(name, data[: len(data) // 2] if name.endswith("data/0") else data)


@needs_parts
def test_tensors_without_all_their_values(as_pickled):
    file = as_pickled() / "pytorch_model.bin"
    cut_entry(file)
    with pytest.raises(LmcError, match=r"is truncated: transformer\.\S+ needs \d+ bytes, \d+ are there"):
        PickledFile(file)
    file = as_pickled(lambda tensors: tensors | {"lm_head.weight": torch.empty(2, 2, device="meta")}) / file.name
    with pytest.raises(LmcError, match=r"tensor lm_head\.weight has no values"):
        PickledFile(file)


def test_a_file_that_shrinks_and_one_that_is_missing(as_pickled):
    directory = as_pickled(shards=2)
    model = Model(directory)
    with open(directory / "pytorch_model-00001-of-00002.bin", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(LmcError, match="become shorter"):
        model.load()
    (directory / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(LmcError, match="is missing"):
        Model(directory)


def test_an_old_torch_is_refused(as_pickled, monkeypatch):
    monkeypatch.setattr(pickled, "SAFE_TORCH", (99, 0))
    with pytest.raises(LmcError, match="not safe to read"):
        Model(as_pickled())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pointer_of_git_lfs(name, as_pickled):
    directory = as_pickled()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (directory / name).write_text(pointer)
    with pytest.raises(LmcError, match="git lfs pull"):
        Model(directory)


@pytest.mark.parametrize("file", ["../x.bin", "model.safetensors", "sub/x.bin"])
def test_the_index_is_checked(file, as_pickled):
    directory = as_pickled()
    (directory / "pytorch_model.bin").unlink()
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": file}}))
    with pytest.raises(LmcError, match="refused"):
        Model(directory)
