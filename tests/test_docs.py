"""Documentation that can be wrong: links, names, variables, counts."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml

import lmc_fast as lmc
from lmc_fast.architectures import FAMILIES
from lmc_fast.cli.arguments import parser

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
if not (ROOT / "mkdocs.yml").is_file():
    pytest.skip("needs a checkout", allow_module_level=True)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
GENERATED = {DOCS / "reference" / "cli.md"}
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.M | re.S)


def text_of(page: Path) -> str:
    return FENCED.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    heads = re.findall(r"^#+ (.*)$", text_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(text_of(page)):
        if re.match(r"https?:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target in GENERATED or target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_on_the_site_and_every_name_in_the_reference():
    def pages(part):
        if isinstance(part, str):
            yield DOCS / part
        else:
            for value in part.values() if isinstance(part, dict) else part:
                yield from pages(value)

    listed = list(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert set(listed) - GENERATED == set(DOCS.rglob("*.md")) and len(listed) == len(set(listed))
    shown = re.findall(r"^::: lmc_fast\.(\w+)$", (DOCS / "reference" / "python.md").read_text(), re.M)
    assert sorted(shown) == sorted(set(lmc.__all__) - {"__version__"})


def commands_in(text):
    """(arguments) of every lmc-fast command in code blocks, without comments and what shells make of the rest."""
    for block in FENCED.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            found = re.match(r"(?:.*&& |torchrun .*-m )?lmc[-_]fast (.*)", line)
            if found and "..." not in line:
                words = shlex.split(found[1], comments=True)
                ends = [i for i, word in enumerate(words) if word in (">", "&&", "|")]
                yield words[: min(ends, default=len(words))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_code_are_such(page):
    for words in commands_in(page.read_text()):
        parser().parse_args(words)  # exits with what is wrong
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        ast.parse(block)


def test_wrong_commands_would_be_found():
    text = '```\nx && lmc-fast merge A "$B" --out C > d.json  # it\'s\ntorchrun -m lmc_fast align A --nothing\n```\n'
    good, bad = commands_in(text)
    assert good == ["merge", "A", "$B", "--out", "C"]
    with pytest.raises(SystemExit):
        parser().parse_args(bad)


def test_the_citation_has_the_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == lmc.__version__ and f"## {lmc.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_variable_of_ours_is_documented():
    found = set()
    for file in (ROOT / "lmc_fast").rglob("*.py"):
        found |= set(re.findall(r"LMC_FAST_[A-Z_]*[A-Z]", file.read_text()))
    page = (DOCS / "reference" / "environment.md").read_text()
    assert found and all(f"`{name}`" in page for name in found)


def test_the_readme_is_short_and_counts_the_families():
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 120
    assert set(re.findall(r"(\d+) model types", readme)) == {str(len(FAMILIES))}
