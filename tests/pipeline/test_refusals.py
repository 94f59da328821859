"""What can be refused is refused before work begins: places, room on the disk, arguments."""

import json
import os
import resource
import shutil
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import lmc_fast as lmc
from lmc_fast.cli import main
from lmc_fast.errors import LmcError
from lmc_fast.evaluation import Curve
from lmc_fast.evaluation.curve import is_own
from lmc_fast.pipeline import room
from lmc_fast.pipeline.room import alignment_bytes, endpoint_bytes, require_room, state_bytes
from lmc_fast.pipeline.run import run

FAST = ["--steps", "4", "--batch", "2", "--block", "16"]


@pytest.fixture
def case(make_checkpoint, tmp_path, monkeypatch):
    """A directory to work in with copies of two models, a and b, and data ids.npy."""
    for seed, name in enumerate("ab", 1):
        shutil.copytree(make_checkpoint("neox", seed), tmp_path / name)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(2, 40, 3000))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *command, words=()):
    found = main([str(part) for part in command])
    error = capsys.readouterr().err.strip().splitlines()
    assert found == 2 and error[-1].startswith("lmc-fast: error: "), error
    for word in words:
        assert word in error[-1], error


def everything(directory):
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(directory.rglob("*"))}


ALIGN = ["align", "a", "b", "--data", "ids.npy", *FAST, "--quiet"]
NOWHERE = {
    "a": ("a is an input",),
    "a/out": ("a/out lies inside a",),
    "ids.npy": ("ids.npy is an input",),
    "link": ("link",),
    "fifo": ("fifo",),
    ".": ("name of its own",),
    "~nosuchuser/out": ("no such user",),
    "x" * 250: ("too long",),
    os.fsdecode(b"out\xff"): ("UTF-8",),
    "taken": ("taken.partial", "did not make"),
}


@pytest.mark.parametrize("out", NOWHERE, ids=ascii)
def test_places_for_output(out, case, capsys, monkeypatch):
    Path("link").symlink_to("nowhere")
    os.mkfifo("fifo")
    Path("taken.partial").mkdir()
    Path("taken.partial/thesis.tex").write_text("mine")
    names = sorted(str(p) for p in case.rglob("*"))
    monkeypatch.setattr(lmc.checkpoints.Model, "open_weights", None)
    monkeypatch.setattr(lmc.checkpoints.Model, "load", None)
    refused(capsys, *ALIGN, "--out", out, words=NOWHERE[out])
    refused(capsys, "merge", "a", "b", "--out", out, words=NOWHERE[out] if out != "ids.npy" else ())
    assert sorted(str(p) for p in case.rglob("*")) == names
    assert Path("taken.partial/thesis.tex").read_text() == "mine"


def test_home_is_found(case, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(case / "home"))
    assert main(["merge", "a", "b", "--out", "~/m", "--quiet"]) == 0
    assert main([*ALIGN, "--method", "weight", "--out", "~/o"]) == 0
    assert {p.name for p in (case / "home").iterdir()} == {"m", "o"} and not Path("~").exists()


def test_inputs_in_the_place_of_work(case, capsys):
    shutil.copytree("a", "out.partial")
    before = everything(case)
    refused(capsys, "align", "out.partial", *ALIGN[2:], "--out", "out", words=("out.partial is an input",))
    shutil.copytree("a", "two.partial/deep")
    refused(capsys, "align", "two.partial/deep", *ALIGN[2:], "--out", "two", words=("lies inside two.partial",))
    shutil.copy("ids.npy", "two.partial/ids.npy")
    shutil.rmtree("two.partial/deep")
    refused(capsys, *ALIGN, "--val", "two.partial/ids.npy", "--out", "two", words=("lies inside two.partial",))
    shutil.rmtree("two.partial")
    assert everything(case) == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--range", "nan", "nan"], ("low",)),
        (["--range", "inf", "inf"], ("low",)),
        (["--range", "0.9", "0.1"], ("0.9",)),
        (["--range", "-5", "7"], ("-5",)),
        (["--matrix-lr", "nan"], ("matrix_lr",)),
        (["--matrix-lr", "1e308"], ("matrix_lr",)),
        (["--matrix-lr", "-1"], ("matrix_lr",)),
        (["--scale-lr", "inf"], ("scale_lr",)),
        (["--activations", "nan"], ("activations",)),
        (["--activations", "-1"], ("activations",)),
        (["--activations", "1e308"], ("activations",)),
        (["--seed", str(10**30)], ("seed",)),
        (["--seed", "-1"], ("seed",)),
        (["--batch", "100000000"], ("batch",)),
        (["--memory", ""], ("memory",)),
        (["--memory", "9" * 30 + "TiB"], ("memory",)),
        (["--memory", "9" * 5000], ("memory",)),
        (["--device", "meta"], ("meta",)),
        (["--device", ""], ("device",)),
        (["--val", ""], ("empty",)),
        (["--test", "~nosuchuser/x"], ("no such user",)),
    ],
    ids=lambda options: " ".join(options)[:30],
)
def test_arguments(options, words, case, capsys, monkeypatch):
    before = everything(case)
    monkeypatch.setattr(lmc.checkpoints.Model, "open_weights", None)
    monkeypatch.setattr(lmc.checkpoints.Model, "load", None)
    refused(capsys, *ALIGN, "--out", "out", *options, words=words)
    assert everything(case) == before


def test_arguments_of_other_commands(case, capsys):
    data = ["--data", "ids.npy", "--block", "16"]
    refused(capsys, "barrier", "a", "b", *data, "--points", "100000", words=("points",))
    refused(capsys, "barrier", "a", "b", *data, "--memory", "", words=("memory",))
    refused(capsys, "barrier", "a", "b", *data, "--alignment", "", words=("empty",))
    refused(capsys, "verify", "a", "b", "--data", "", words=("empty",))
    refused(capsys, "inspect", "a", "--device", "meta", words=("meta",))
    with pytest.raises(LmcError, match="meta"):
        lmc.verify("a", "b", device="meta")
    with pytest.raises(LmcError, match="points"):
        lmc.barrier(lmc.open_pair("a", "b"), lmc.read_tokens("ids.npy", lmc.open_pair("a", "b").a, 16), points=2000)


def test_room_on_the_disk(case, capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(room.shutil, "disk_usage", lambda _: usage(0, 0, 500))
        for command in (ALIGN, ["merge", "a", "b"]):
            refused(capsys, *command, "--out", "out", words=("500 bytes free", "are needed"))
        assert not list(case.glob("out*"))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(room.resource, "getrlimit", lambda _: (1 << 20, limit[1]))
    with pytest.raises(LmcError, match="ulimit -f"):
        require_room(case, 0, 2 << 20)


def test_what_is_written_is_no_more_than_was_said(case):
    pair = lmc.open_pair("a", "b")
    tokens = lmc.read_tokens("ids.npy", pair.a, 16)
    report = run(pair, tokens, "out", steps=4, batch=2)
    assert report["proof"]

    def size(path):
        return sum(p.stat().st_size for p in Path(path).rglob("*") if p.is_file())

    said, spare = endpoint_bytes(pair.a), 1 << 18
    assert said - spare <= size("out/a") <= said
    assert alignment_bytes(pair.spec) - spare >= Path("out/alignment.safetensors").stat().st_size / 2
    assert Path("out/alignment.safetensors").stat().st_size <= alignment_bytes(pair.spec)
    lmc.align(pair, tokens, steps=4, batch=2, state_file="state.safetensors")
    assert Path("state.safetensors").stat().st_size <= state_bytes(pair.spec, 2)


CURVE = Curve([0.0, 0.5, 1.0], [1.0, 2.0, 1.0])


def test_curves_replace_curves_and_nothing_else(case, capsys):
    barrier = ["barrier", "a", "b", "--data", "ids.npy", "--block", "16", "--points", "3", "--quiet"]
    before = everything(case)
    Path("notes.json").write_text('{"mine": 1}')
    Path("photo.png").write_bytes(b"\x89PNG\r\n\x1a\nmine")
    Path("link.json").symlink_to("notes.json")
    Path("directory.png").mkdir()
    for name, words in {
        "a/config.json": "config.json",
        "a/new.json": "lies inside a",
        "notes.json": "no curve",
        "photo.png": "no curve",
        "link.json": "link",
        "directory.png": "not a file",
        "no/curve.json": "does not exist",
    }.items():
        refused(capsys, *barrier, "--out", name, words=(words,))
    assert Path("notes.json").read_text() == '{"mine": 1}' and Path("photo.png").read_bytes().endswith(b"mine")
    for name in ("notes.json", "photo.png", "link.json"):
        Path(name).unlink()
    Path("directory.png").rmdir()
    assert everything(case) == before
    names = ["c.json", "c.png", "c.svg", "c.pdf"]
    for _ in range(2):
        assert main([*barrier, "--out", *names]) == 0
        assert all(is_own(Path(name)) for name in names)
    assert set(everything(case)) - set(everything(case / "a")) - set(everything(case / "b")) == {
        str(case / name) for name in (*names, "a", "b", "ids.npy")
    }


@pytest.mark.parametrize("suffix", [".json", ".png", ".svg", ".pdf"])
def test_a_full_disk_leaves_the_old_curve(suffix, tmp_path, monkeypatch):
    file = tmp_path / f"curve{suffix}"
    write = CURVE.save if suffix == ".json" else CURVE.plot
    write(file)
    before = everything(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150, limit[1]))
    try:
        with pytest.raises(LmcError, match="could not write"):
            write(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert everything(tmp_path) == before
    assert suffix != ".json" or json.loads(file.read_text())["barrier"] == 1.0


@pytest.mark.parametrize("odd", [5, b"x", {}, object()], ids=["number", "bytes", "dict", "object"])
def test_what_is_of_another_type_is_refused_in_a_sentence(odd, make_checkpoint, tokens, tmp_path):
    a, b = make_checkpoint("neox", 1), make_checkpoint("neox", 2)
    pair, out = lmc.open_pair(a, b), tmp_path / "out"
    alignment = lmc.align(pair, tokens, method="weight")
    for call in (
        partial(lmc.carry, odd, a, out, member="b"),
        partial(lmc.carry, a, odd, out, member="b"),
        partial(lmc.carry, a, b, odd, member="b"),
        partial(lmc.merge, odd, out),
        partial(lmc.merge, [a, b], odd),
        partial(lmc.merge, [a, b], out, dtype=odd),
        partial(lmc.merge, [a, b], out, dtype=torch.int64),
        partial(lmc.grow, a, odd, out),
        partial(lmc.grow, a, b, out, dtype=odd),
        partial(lmc.heal, a, odd, tokens, out),
        partial(lmc.open_models, odd),
        partial(lmc.open_models, "ab"),
        partial(lmc.barrier, pair, tokens, odd),
        partial(lmc.diagnose, pair, tokens, odd),
        partial(lmc.align, pair, tokens, base=odd),
        partial(lmc.extend, pair, tokens, odd, 1),
        partial(lmc.export, pair, odd, out),
        partial(lmc.export, pair, alignment, odd),
        partial(lmc.export, pair, alignment, out, odd),
        partial(lmc.run, pair, tokens, odd),
        partial(lmc.Alignment.load, odd),
    ):
        with pytest.raises(lmc.LmcError):
            call()
    assert not list(tmp_path.iterdir())
