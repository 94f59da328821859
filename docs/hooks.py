"""What the site has beside its pages: the commands, as the parser has them, and words for what lies outside docs/."""

import argparse
import re
import sys
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = re.compile(r"^>>> (?:.+\n?)+", re.M)
OUTSIDE = re.compile(
    r"\[([^\]]*)\]\((?:\.\./)+((?:benchmarks|examples|bridges|tests|lmc_fast)/[^)#]*|README\.md)[^)]*\)"
)


class Fenced(griffe.Extension):
    """Examples in docstrings, which begin with >>> and end with the paragraph, are code and not quotations."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)


def on_files(files, config):
    files.append(File.generated(config, "reference/cli.md", content=commands()))
    return files


def on_page_markdown(markdown, page, **_):
    """A link to a file that is no page becomes its name."""
    return OUTSIDE.sub(lambda link: f"`{link[1]}`", markdown)


def commands():
    sys.path.insert(0, str(ROOT))  # mkdocs takes back what a hook inserts while it is imported
    from lmc_fast.cli.arguments import EXIT_CODES, parser

    whole = parser()
    (subcommands,) = [a for a in whole._actions if isinstance(a, argparse._SubParsersAction)]
    lines = [
        "# Commands",
        "",
        f"{whole.description} Made from the parser: `lmc-fast COMMAND --help` says the same.",
        "",
    ]
    lines += ["```", *EXIT_CODES.splitlines(), "```", ""]
    options = [a for a in whole._actions if a.option_strings]
    lines += ["| option | |", "|---|---|", *map(row, options), ""]
    for name, sub in subcommands.choices.items():
        usage = " ".join(sub.format_usage().split()).removeprefix("usage: ")
        lines += [f"## {name}", "", f"{sub.description[0].upper()}{sub.description[1:]}.", "", "```", usage, "```", ""]
        lines += ["| argument | |", "|---|---|", *map(row, sub._actions), ""]
    return "\n".join(lines)


def row(action):
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    text = (action.help or "") % {"default": action.default, "prog": "lmc-fast"}
    if action.choices:
        text += f" ({', '.join(map(str, action.choices))})"
    return f"| {names} | {text} |".replace("\n", " ").replace("A|B", "A/B").replace("a|b", "a/b")
