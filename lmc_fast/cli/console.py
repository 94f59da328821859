"""Where the words and numbers of a command go, and its exit codes."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from ..errors import escaped, printable
from ..files import to_json
from ..pair import Models
from .progress import Display

DIFFERENT = 1  # exit code


class _Lines(logging.Handler):
    """What was decided and why, as lines for people; warnings always, on standard error."""

    def __init__(self, say: Callable[[str], None]):
        super().__init__()
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            print(f"lmc-fast: warning: {printable(record.getMessage())}", file=sys.stderr)
        else:
            self.say(printable(record.getMessage()))


class Console:
    """Where words and numbers go: progress and text for people, or one JSON document on standard output."""

    def __init__(self, args: argparse.Namespace):
        self.json, self.quiet = args.json, args.quiet
        log = logging.getLogger("lmc_fast")
        log.setLevel(logging.INFO)
        log.handlers = [_Lines(self.say)]

    def say(self, text: str = "") -> None:
        if not self.quiet and not self.json:
            tqdm.write("\n".join(map(escaped, text.split("\n"))))

    def result(self, value: dict[str, Any]) -> None:
        if self.json:
            print(to_json(value))

    def progress(self) -> Display:
        """Shown while a command works; a context manager around it."""
        return Display(hidden=self.quiet or self.json)


def unit_of(pair: Models) -> str:
    """What a prediction of these models is about."""
    return {"image": "images", "masked": "masked tokens", "label": "texts"}.get(pair.spec.task, "tokens")
