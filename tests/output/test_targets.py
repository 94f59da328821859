"""Places for output that are refused before any work."""

import os
import socket

import pytest

from lmc_fast.errors import LmcError
from lmc_fast.output import check_file_target, check_target, require_apart, targets, user_path


def test_places_that_cannot_become_a_directory(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "f").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as made:
        monkeypatch.chdir(tmp_path)
        made.bind("socket")
    for name, words in {
        "full": "not empty",
        "full/f": "is a file",
        "full/f/below": "not a writable directory",
        "dangling/below": "not a writable directory",
        "loop/below": "not a writable directory",
        "link": "is a link",
        "loop": "is a link",
        "dangling": "is a link",
        "fifo": "neither",
        "socket": "neither",
        "x" * 250: "too long",  # with .partial
        "/".join(["y" * 200] * 30): "too long",
        ".": "name of its own",
        "..": "name of its own",
        "full/..": "name of its own",
        "/": "name of its own",
        os.fsdecode(b"\xff"): "UTF-8",
    }.items():
        with pytest.raises(LmcError, match=words):
            check_target(tmp_path / name if name[0] != "." else tmp_path.__class__(name))
    for name in ("empty", "new", "new/deep/down", "x" * 240, "näme"):
        check_target(tmp_path / name)
    monkeypatch.setattr(os.path, "ismount", lambda _: True)
    with pytest.raises(LmcError, match="mounted"):
        check_target(tmp_path / "empty")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(LmcError, match="not a writable"):
        check_target(tmp_path / "new")


def test_places_that_cannot_become_a_file(tmp_path):
    (tmp_path / "directory").mkdir()
    (tmp_path / "link.png").symlink_to("a.png")
    os.mkfifo(tmp_path / "fifo")
    for name, words in {"directory": "not a file", "link.png": "link", "fifo": "not a file", "no/a": "create"}.items():
        with pytest.raises(LmcError, match=words):
            check_file_target(tmp_path / name)
    (tmp_path / "a.png").touch()
    check_file_target(tmp_path / "a.png")
    check_file_target(tmp_path / "new.png")


def test_paths_as_people_write_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x") == tmp_path / "x"
    for text, words in {"~nosuchuser/x": "no such user", "": "empty", "a\0b": "zero byte", "\ud800": "no file"}.items():
        with pytest.raises(LmcError, match=words):
            user_path(text)


def test_outputs_and_inputs_lie_apart(tmp_path, monkeypatch):
    model = tmp_path / "model"
    (model / "deep").mkdir(parents=True)
    (model / "data.txt").touch()
    (tmp_path / "other").symlink_to("model")
    outside = tmp_path / "out"
    require_apart([outside], [model, model / "data.txt", None, "org/name-on-the-hub"])
    require_apart([tmp_path / "model.partial"], [model])
    for output in (model, model / "out", model / "deep" / "x", tmp_path / "other" / "out", tmp_path / "x/../model/y"):
        with pytest.raises(LmcError, match="is an input"):
            require_apart([output], [model])
    for source in (model / "data.txt", tmp_path / "other" / "data.txt", model / "deep"):
        with pytest.raises(LmcError, match=r"the input .* lies inside"):
            require_apart([model], [source])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LmcError, match="lies inside"):
        require_apart([targets.Path("out")], ["."])
