"""The script for shells: complete, and understood by bash."""

import shutil
import subprocess
import sys

import pytest

from lmc_fast.cli import main


def test_bash_completes_commands_and_options(tmp_path):
    pytest.importorskip("shtab", reason="needs shtab")
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    command = [sys.executable, "-m", "lmc_fast", "--print-completion", "bash"]
    (tmp_path / "lmc-fast").write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    ask = """
    source ./lmc-fast; COMP_WORDS=(lmc-fast {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
    $(complete -p lmc-fast | sed 's/.*-F \\([^ ]*\\).*/\\1/'); printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    for words, expected in (("al", "align"), ("d", "demo"), ("align --sch", "--scheme"), ("verify --mem", "--memory")):
        done = subprocess.run(
            [bash, "--norc", "-c", ask.format(words=words)], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        assert expected in done.stdout.split(), (words, done.stdout, done.stderr)


def test_without_shtab_it_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print-completion", "bash"]) == 2
    assert "lmc-fast[completion]" in capsys.readouterr().err
