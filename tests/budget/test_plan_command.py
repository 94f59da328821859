"""lmc-fast plan: the table before anything runs."""

import json

import pytest

from lmc_fast.checkpoints import reader
from lmc_fast.cli import main


@pytest.fixture
def pair(make_checkpoint):
    return str(make_checkpoint("neox", 1)), str(make_checkpoint("neox", 2))


def refused(capsys, *command):
    assert main([str(c) for c in command]) == 2
    shown = capsys.readouterr()
    assert not shown.out
    (message,) = shown.err.strip().splitlines()
    assert message.startswith("lmc-fast: error: ")
    return message


@pytest.fixture
def headers_only(monkeypatch):
    """Reading a tensor's values is an error."""

    def read(*_):
        raise AssertionError("a tensor was loaded")

    monkeypatch.setattr(reader.Checkpoint, "read", read)


def test_the_table(pair, capsys, headers_only):
    assert main(["plan", *pair, "--memory", "4GiB", "--block", "32"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "budget 4 GiB",
        "interpreter and libraries",
        "logits",
        "resident",
        "a step of 512 tokens",
        "hidden from",
    ):
        assert word in shown
    command = ["plan", *pair, "--memory", "4GiB", "--block", "32", "--device-profile", "rtx4090", "--tokens", "64"]
    assert main([*command, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["total"] <= value["budget"] == 4 << 30 and value["job"]["tokens"] == 64
    assert value["device"]["name"] == "rtx4090" and value["a"] == pair[0] and value["warning"] is None


def test_more_than_there_is(pair, capsys, headers_only):
    for options, words in ((["--device-profile", "t4"], "t4 has"), ([], "more than the")):
        assert main(["plan", *pair, "--memory", "900TiB", "--block", "32", "--quiet", *options]) == 0
        shown = capsys.readouterr()
        assert words in shown.err and "warning" in shown.err and not shown.out


def test_too_little_names_the_smallest_that_works(pair, capsys, headers_only):
    command = ["plan", *pair, "--block", "32", "--device-profile", "h200", "--memory"]
    message = refused(capsys, *command, "1KiB")
    smallest = next(word for word in message.split() if word.endswith("MiB") and word[0].isdigit())
    assert main([*command, smallest]) == 0
    assert "in all" in capsys.readouterr().out


def test_bad_arguments(pair, tmp_path, capsys):
    assert "'lots'" in refused(capsys, "plan", *pair, "--memory", "lots")
    assert "nowhere" in refused(capsys, "plan", pair[0], tmp_path / "nowhere", "--memory", "1GiB")
    assert "'abacus'" in refused(capsys, "plan", *pair, "--memory", "1GiB", "--device-profile", "abacus")
    with pytest.raises(SystemExit) as stop:
        main(["plan", *pair])
    assert stop.value.code == 2
