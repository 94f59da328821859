"""Files of other people's making: what is not an ordinary JSON file is refused at once and in one sentence."""

import os

import pytest

from lmc_fast import LmcError
from lmc_fast.files import JSON_DEPTH, parse_json, read_json, read_object, to_json


@pytest.mark.parametrize(
    "text, words",
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * (JSON_DEPTH + 2) + b"]" * (JSON_DEPTH + 2), f"more than {JSON_DEPTH}"),
        (b'{"x": ' * (JSON_DEPTH + 2) + b"1" + b"}" * (JSON_DEPTH + 2), f"more than {JSON_DEPTH}"),
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "-Infinity"),
        (b"[1e999]", "1e999"),
        (b"[" + b"9" * 5000 + b"]", "too large"),
        (b"[1, 2]", "not a JSON object"),
        (b"null", "not a JSON object"),
    ],
)
def test_no_json_object_is_refused_with_its_name(text, words, tmp_path):
    file = tmp_path / "x.json"
    file.write_bytes(text)
    with pytest.raises(LmcError, match=r"x.json") as refusal:
        read_object(file)
    assert words in str(refusal.value)


def test_depth_and_numbers_that_are_fine():
    assert parse_json("[" * JSON_DEPTH + "1e30" + "]" * JSON_DEPTH, "x")
    assert parse_json('{"a": [1000000000000000019884624838656, -0.5]}', "x")["a"][0] == 1000000000000000019884624838656


def test_pipes_devices_directories_and_large_files_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "directory.json").mkdir()
    (tmp_path / "large.json").write_bytes(b"")
    os.truncate(tmp_path / "large.json", 1 << 40)  # takes no room
    for name in ("pipe", "zero", "loop", "directory", "large", "absent", "n" * 300, "nul\0"):
        with pytest.raises(LmcError, match=name[:3]):
            read_json(tmp_path / f"{name}.json")


def test_names_in_messages_cannot_act_on_a_terminal():
    message = str(LmcError("tensor \x1b[2Jevil\nlmc-fast: done\u2028\u202e\ud800 é λ is missing"))
    assert message == r"tensor \x1b[2Jevil\nlmc-fast: done\u2028\u202e\ud800 é λ is missing"
    assert len(str(LmcError("x" * 10**6))) < 1100


def test_neither_nan_nor_infinity_is_written():
    assert to_json({"x": [1.5, None]}) == '{"x": [1.5, null]}'
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            to_json([bad])
