"""A family is rows of a table: none is longer than what a reader takes in at once."""

import ast
from pathlib import Path

import pytest

import lmc_fast.architectures

FILES = sorted(Path(lmc_fast.architectures.__file__).parent.glob("*.py"))
MOST = 80  # lines


def tables(file):
    """(name, lines) of everything at the top of a file that holds rows: entries, families, what they share."""
    for node in ast.parse(file.read_text()).body:
        if not isinstance(node, ast.Assign):
            continue
        families = [
            call for call in ast.walk(node) if isinstance(call, ast.Call) and ast.unparse(call.func) == "Family"
        ]
        for part in families or [node]:
            yield ast.unparse(node.targets[0]), part.end_lineno - part.lineno + 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_table_is_longer_than_eighty_lines(file):
    assert all(lines <= MOST for _, lines in tables(file)), [t for t in tables(file) if t[1] > MOST]
    assert len(file.read_text().splitlines()) <= 400


def test_families_are_among_them():
    longest = {file.stem: max((lines for _, lines in tables(file)), default=0) for file in FILES}
    assert longest["modernbert"] > 20 and longest["deberta"] > 20
