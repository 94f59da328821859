"""Kills and full disks at some file operations; all of them: python -m benchmarks.crash."""

import importlib.util

import pytest

if importlib.util.find_spec("benchmarks") is None:
    pytest.skip("benchmarks are not part of an installed package", allow_module_level=True)

from benchmarks.crash import measure


@pytest.mark.parametrize("command", ["align", "merge"])
def test_nothing_is_lost(command, capfd):
    rows = list(measure(0.0, [command], ["kill", "full"]))
    assert [row["points"] for row in rows] == [2, 2]
    assert not any(row["wrong"] for row in rows), capfd.readouterr().out
