"""lmc-fast demo: the pair of tiny models that comes with the package, aligned and merged before one's eyes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import LmcError
from ..files import read_object
from ..output import partial_of
from ..pipeline.merge import merge
from .align import aligned, show_report
from .arguments import parser
from .console import Console

PACKAGE = Path(__file__).resolve().parents[1]
PLACES = (PACKAGE / "demo_pair", PACKAGE.parent / "examples" / "pair")  # of a wheel, of a checkout


def demo_pair() -> Path:
    """The directory with a/, b/, train.npy, val.npy and test.npy. Raises LmcError where this installation has none."""
    for place in PLACES:
        if (place / "a" / "config.json").is_file():
            return place
    raise LmcError(f"{PLACES[0]} is not there, which the wheel brings; install lmc-fast again: pip install lmc-fast")


def demo_command(args: argparse.Namespace, console: Console) -> int:
    pair = demo_pair()
    words = ["align", str(pair / "a"), str(pair / "b"), "--dtype", "float32", "--out", str(args.out)]
    for name, file in (("data", "train"), ("val", "val"), ("test", "test")):
        words += [f"--{name}", str(pair / f"{file}.npy")]
    words += ["--steps", str(args.steps), "--device", args.device, *(["--resume"] if args.resume else [])]
    given = parser().parse_args(words)
    console.say(
        "Two language models of a million parameters, trained on Python's documentation from different seeds: the\n"
        "average of their weights is worthless. lmc-fast now looks for changes of weights that leave each model's\n"
        "function alone and make the average a good model."
    )
    report = _finished(args, pair) if args.resume else None
    report = report or aligned(given, console)
    show_report(given, console, report)
    naive, learned = (next(c for c in report["curves"] if c["name"] == name) for name in ("naive", "learned"))
    merged, record = args.out / "merged", {}
    if not (args.resume and (merged / "config.json").exists()):  # it appears whole or not at all
        record = merge([args.out / "a", args.out / "b"], merged)
    first, last = learned["losses"][0], learned["losses"][-1]
    before, after = (curve["losses"][len(curve["losses"]) // 2] for curve in (naive, learned))
    console.say(
        f"\nThe models lose {first:.2f} and {last:.2f} nats per token of text that they have not seen. Their average\n"
        f"lost {before:.2f}; after alignment it loses {after:.2f}. It is {merged}, a stock checkpoint.\n"
        f"pictures: {args.out / 'curve.png'}, {args.out / 'learning.png'}\n"
        "next, your own pair: lmc-fast align A B --data text.txt --out DIR"
    )
    console.result(report | {"merged": {"out": str(merged), **record}})
    return 0


def _finished(args: argparse.Namespace, pair: Path) -> dict[str, Any] | None:
    """The report of an alignment that this demo finished, of which only the merge may be missing; else None."""
    if partial_of(args.out).exists() or not (args.out / "report.json").is_file():
        return None
    report = read_object(args.out / "report.json", 1 << 30)
    same = report.get("members") == [{"name": name, "source": str(pair / name)} for name in ("a", "b")]
    schedule = report.get("schedule")
    if not same or not isinstance(schedule, dict) or schedule.get("steps") != args.steps:
        raise LmcError(f"{args.out} is not what this demo with {args.steps} steps began; choose another --out")
    return report
