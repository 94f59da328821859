"""The names of model types: those of the tables, shown without torch; others are refused with their reason."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from lmc_fast import LmcError
from lmc_fast.architectures import FAMILIES
from lmc_fast.checkpoints import Model
from lmc_fast.cli import main
from lmc_fast.model_types import KNOWN_AS, REFUSED


def test_they_are_those_of_the_tables():
    assert KNOWN_AS.keys() == FAMILIES.keys()
    assert not REFUSED.keys() & FAMILIES.keys()
    assert REFUSED.keys() | FAMILIES.keys() <= {*CONFIG_MAPPING.keys()}


def test_the_command_lists_them(capsys):
    assert main(["families"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {kind} " in out and words in out for kind, words in (KNOWN_AS | REFUSED).items())
    assert main(["families", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"supported": KNOWN_AS, "refused": REFUSED}


def test_names_do_not_need_torch():
    code = "import sys, lmc_fast.model_types; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == ["False"]


def test_the_page_about_a_new_family_can_be_followed():
    """Its blocks of Python, one after the other; the first half is what would be written, the rest checks it."""
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "add-a-family.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert sum(block.count("\n") for block in blocks) <= 60
    kind = "eurobert"
    assert kind not in FAMILIES
    try:
        exec("\n".join(blocks), {"__name__": "add_a_family"})
        assert FAMILIES.pop(kind).name == kind
    finally:
        FAMILIES.pop(kind, None)


@pytest.mark.parametrize("kind", ["llama4_text", "t5", "deepseek_v3"])
def test_a_refusal_says_why(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with pytest.raises(LmcError, match="is not supported: it") as caught:
        Model(tmp_path)
    assert REFUSED[kind] in str(caught.value)
