"""lmc-fast diagnose: where and why the line of a pair is not flat."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..alignment import Alignment
from ..data import read_data, sequence_length
from ..errors import LmcError
from ..evaluation.diagnosis_plots import plot_diagnosis
from ..evaluation.plots import is_own_picture
from ..files import read_object, to_json
from ..output import Workspace, partial_of, require_apart, write_whole
from ..pair import open_pair
from ..pipeline.diagnose import diagnose
from .console import Console

MAKER = "lmc-fast diagnose"


def diagnose_command(args: argparse.Namespace, console: Console) -> int:
    outputs: list[Path] = args.out or []
    for file in outputs:
        if file.suffix not in (".json", ".png", ".svg", ".pdf"):
            raise LmcError(f"{file}: give names that end in .json, .png, .svg or .pdf")
        Workspace(file, None).require_free()
        if file.exists() and not _is_own(file):
            raise LmcError(f"{file} is no diagnosis that lmc-fast wrote; choose another name, or remove it")
    places = (place for file in outputs for place in (file, partial_of(file)))
    require_apart(places, (args.a, args.b, args.data, args.alignment))
    pair = open_pair(args.a, args.b)
    tokens = read_data(args.data, pair.a, sequence_length(pair.a, args.length))
    alignment = None if args.alignment is None else Alignment.load(args.alignment, pair.spec, 2)
    with console.progress() as shown:
        found = diagnose(pair, tokens, alignment, sequences=args.sequences, device=args.device, progress=shown)
    losses = found.losses
    console.say(f"losses: A {losses['a']:.4f}, B {losses['b']:.4f}, middle {losses['middle']:.4f}: {found.excess:+.4f}")
    console.say(
        f"the middle at temperature {found.temperature:.2f}: {losses['calibrated']:.4f}; the ensemble of both: "
        f"{losses['ensemble']:.4f}"
    )
    spaces = list(found.blocks[0].matched)
    columns = "".join(f"{space:>9}" for space in (*spaces, "stream"))
    console.say(f"block  alone  cosine  distance  variance{columns}   (alone: nats; others: M to A and B, A to B)")
    for i, block in enumerate(found.blocks):
        partners = "".join(f"{value:9.2f}" for value in (*(block.matched[s] for s in spaces), block.stream))
        console.say(f"{i:5}{block.own:+7.3f}{block.cosine:8.3f}{block.distance:10.3f}{block.variance:10.3f}{partners}")
    for sentence in found.advice:
        console.say(f"- {sentence}")
    report = found.to_json() | {"maker": MAKER}
    for file in outputs:
        if file.suffix == ".json":
            write_whole(file, to_json(report, indent=2) + "\n")
        else:
            plot_diagnosis(found, file)
    console.result(report)
    return 0


def _is_own(file: Path) -> bool:
    if file.suffix != ".json":
        return is_own_picture(file)
    try:
        return read_object(file).get("maker") == MAKER
    except LmcError:
        return False
