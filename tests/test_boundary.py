"""Whatever goes wrong in the command: one sentence, exit code 2, and a log where it was our fault."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmc_fast import LmcError
from lmc_fast.cli import main
from lmc_fast.cli.boundary import guarded

COMMAND = [sys.executable, "-m", "lmc_fast"]


class Panic(BaseException):
    """As libraries in Rust raise it."""


def failing(error):
    def work():
        print("before")
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LmcError("x\nis bad; mend it"), r"error: x\\nis bad; mend it$"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y\n"), r"error: /x/y\\n could not be .*: No space left"),
        (OSError(errno.EMFILE, "Too many open files"), "error: a file could not be .*: Too many open files$"),
        (MemoryError(), "not enough memory; give --memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), "not enough memory"),
    ],
    ids=str,
)
def test_what_the_user_can_mend_is_one_sentence(error, words, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert guarded(failing(error)) == 2
    shown = capsys.readouterr()
    assert shown.out == "before\n" and shown.err.count("\n") == 1 and re.search(words, shown.err.strip()), shown.err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error", [ValueError("a\x1b[2J\nb"), KeyError(), OSError("odd"), Panic("index"), RecursionError()]
)
def test_a_bug_is_called_one_and_its_traceback_is_in_a_log(error, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert guarded(failing(error)) == 2
    (message,) = capsys.readouterr().err.splitlines()
    (log,) = tmp_path.iterdir()
    assert f"this is a bug, please report it with {log}: {type(error).__name__}" in message and message.isprintable()
    assert "Traceback" in log.read_text() and type(error).__name__ in log.read_text()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    assert guarded(failing(error)) == 2 and "no log could be written" in capsys.readouterr().err


def test_an_interrupt_and_an_exit_keep_their_codes(capsys):
    assert guarded(failing(KeyboardInterrupt())) == 130 and capsys.readouterr().err == "lmc-fast: interrupted\n"
    for line, code in ((["--version"], 0), (["nonsense"], 2)):
        with pytest.raises(SystemExit) as end:
            main(line)
        assert end.value.code == code


def test_a_full_or_closed_output_does_not_stop_the_work(tmp_path):
    script = (
        "import sys, pathlib; from lmc_fast.cli.boundary import guarded\n"
        "def work():\n"
        "    for _ in range(3): print('x' * 100_000, flush=True)\n"
        "    print('\\u03bb \\ud800'); pathlib.Path(sys.argv[1]).touch(); return 0\n"
        "sys.exit(guarded(work))"
    )

    def run(name, **streams):
        done = tmp_path / name
        process = subprocess.Popen([sys.executable, "-c", script, done], stderr=subprocess.PIPE, text=True, **streams)
        if streams.get("stdout") == subprocess.PIPE:
            process.stdout.close()
        code, error = process.wait(60), process.stderr.read()
        assert done.exists() and "Traceback" not in error and "Exception" not in error, error
        return code, error

    assert run("closed", stdout=subprocess.PIPE) == (0, "")
    with open("/dev/full", "w") as full:
        code, error = run("full", stdout=full)
    assert code == 2 and "standard output takes no more (No space left on device)" in error
    with open(tmp_path / "out", "w") as out:
        assert run("ascii", stdout=out, env=os.environ | {"PYTHONIOENCODING": "ascii"}) == (0, "")
    assert (tmp_path / "out").read_text().endswith("\\u03bb \\ud800\n")
    assert run("none", preexec_fn=lambda: os.close(1)) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_libraries_are_imported_ends_in_one_line(number, tmp_path):
    slow = tmp_path / "torch.py"  # found before the real one
    slow.write_text(f"import pathlib, time; pathlib.Path({str(tmp_path / 'here')!r}).touch(); time.sleep(60)")
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{root}"}
    process = subprocess.Popen([*COMMAND, "inspect", "x"], stderr=subprocess.PIPE, text=True, env=environment, cwd=root)
    while not (tmp_path / "here").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    assert process.stderr.read() == "lmc-fast: interrupted\n"
