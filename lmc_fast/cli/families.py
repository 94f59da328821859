"""lmc-fast families: which model types are supported, and why some others are not."""

from __future__ import annotations

import argparse

from ..model_types import KNOWN_AS, REFUSED
from .console import Console


def families_command(args: argparse.Namespace, console: Console) -> int:
    wide = max(map(len, KNOWN_AS | REFUSED))
    console.say(f"{len(KNOWN_AS)} model types (model_type in config.json) are supported:")
    for kind, known in sorted(KNOWN_AS.items()):
        console.say(f"  {kind:{wide}}  {known}")
    console.say("not supported, because:")
    for kind, why in sorted(REFUSED.items()):
        console.say(f"  {kind:{wide}}  {why}")
    console.result({"supported": KNOWN_AS, "refused": REFUSED})
    return 0
