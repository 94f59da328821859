"""lmc-fast heal: distil a merged model from its endpoints, or see that an endpoint is as good a start."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..checkpoints import Model
from ..data import read_data, sequence_length
from ..errors import LmcError
from ..output import user_path
from ..pipeline.heal import heal
from .console import Console


def heal_command(args: argparse.Namespace, console: Console) -> int:
    model = Model(args.merged)
    length = sequence_length(model, args.length)
    given = _sources(args.data)
    data = {name: read_data(file, model, length) for name, file in given.items()}
    how = {"steps": args.steps, "batch": args.batch, "seed": args.seed, "rate": args.rate}
    with console.progress() as shown:
        report = heal(
            args.merged,
            args.endpoints,
            data.get("", data),
            args.out,
            start=args.start,
            dtype=None if args.dtype is None else getattr(torch, args.dtype),
            device=args.device,
            resume=args.resume,
            progress=shown,
            **{name: value for name, value in how.items() if value is not None},
        )
    console.say("held-out losses as they are: " + ", ".join(f"{n} {x:.4f}" for n, x in report["controls"].items()))
    if report["trials"]:
        console.say("after a trial from each: " + ", ".join(f"{n} {x:.4f}" for n, x in report["trials"].items()))
    console.say(
        f"wrote {args.out}: from {report['started_from']}, the state of step {report['written_step']} of "
        f"{report['steps']}, held-out loss {report['loss_after']:.4f}"
    )
    console.result(report)
    return 0


def _sources(given: list[str]) -> dict[str, Path]:
    """One file for all, or NAME=FILE for each endpoint. Raises LmcError."""
    if len(given) == 1 and "=" not in given[0]:
        return {"": user_path(given[0])}
    found = {}
    for entry in given:
        name, equals, file = entry.partition("=")
        if not equals or not name or name in found:
            raise LmcError(f"--data takes one file, or NAME=FILE for endpoints (a=..., b=...), not {entry!r}")
        found[name] = user_path(file)
    return found
