"""lmc-fast align: the whole way from two checkpoints to two aligned ones, with proof and report."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from ..data import read_data, sequence_length
from ..learning import parallel
from ..learning.learner import History
from ..learning.schedule import METHODS, Schedule
from ..members import CLOSED_SCHEMES
from ..pair import open_models
from ..pipeline.run import run
from ..pipeline.run_directory import RunDirectory
from ..pipeline.settings import require_settings
from ..sizes import parse_bytes, show_bytes
from .console import Console, unit_of


def align_command(args: argparse.Namespace, console: Console) -> int:
    args.memory = None if args.memory is None else parse_bytes(args.memory)
    args.device = parallel.own_device(args.device)
    with parallel.together(args.device):
        first = parallel.place()[0] == 0
        console.quiet |= not first
        report = aligned(args, console)
    if first:
        show_report(args, console, report)
        written = [f"{args.out}/{name}" for name in report["proof"]]
        console.say(f"next: lmc-fast merge {' '.join(written)} --out {args.out}/merged")
        console.result(report)
    return 0


def aligned(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The report of the run that `args` ask for, whose memory is in bytes and whose device is this process's own."""
    if parallel.place()[0] == 0:  # before anything is read
        RunDirectory(args.out, args.resume, (args.a, args.b, *args.more, args.data, args.val, args.test))
    given = {"steps": args.steps, "batch": args.batch, "objective": args.objective, "seed": args.seed}
    given |= {"matrix_lr": args.matrix_lr, "scale_lr": args.scale_lr}
    given |= {"low": args.range and args.range[0], "high": args.range and args.range[1]}
    options = {name: value for name, value in given.items() if value is not None}
    schedule = Schedule.of(args.method, None, options)
    require_settings(args.method, args.activations)
    pair = open_models([args.a, args.b, *args.more])
    length = sequence_length(pair.a, args.length)
    tokens = read_data(args.data, pair.a, length)
    validation, test = (None if file is None else read_data(file, pair.a, length) for file in (args.val, args.test))
    learns = args.method in METHODS and args.scheme not in CLOSED_SCHEMES
    each = " for each alignment of a level" if args.scheme == "hierarchical" and len(pair.members) > 2 else ""
    console.say(
        f"matching on {tokens.numel():,} calibration {unit_of(pair)}, then {schedule.steps if learns else 0} steps of "
        f"{args.method} learning{each}"
    )
    with console.progress() as shown:
        return run(
            pair,
            tokens,
            args.out,
            method=args.method,
            scheme=args.scheme,
            start=args.start,
            schedule=schedule,
            validation=validation,
            test=test,
            activations=args.activations,
            device=args.device,
            memory=args.memory,
            dtype=args.dtype and getattr(torch, args.dtype),
            resume=args.resume,
            progress=shown,
            points=args.points,
            curves=not args.no_curves,
        )


def show_report(args: argparse.Namespace, console: Console, report: dict[str, Any]) -> None:
    """In words: what was proven, which state was exported, what it cost, what the curves say."""
    for name, found in report["proof"].items():
        console.say(
            f"endpoint {name}: KL to the original {found['kl']:.1e} nats, max |log-probability difference| "
            f"{found['max_log_probability']:.1e}: same function, says {found['by']}"
        )
    _show_learning(console, report)
    _show_costs(console, report["costs"], args.memory)
    curves = report.get("curves", [])
    for curve in curves:
        lowest = f", lowest accuracy {min(curve['accuracies']):.2%}" if curve.get("accuracies") else ""
        console.say(f"barrier {curve['name']:>8}: {curve['words']}{lowest}")
    if curves:
        which = args.test or args.val or f"a part of {args.data}, held out from learning"
        console.say(f"  ({report['definition']}; ±: standard error over inputs; on {which})")
    written = [f"{args.out}/{name}" for name in report["proof"]]
    console.say(f"wrote {', '.join(written)}, alignment.safetensors, report.json, report.html")


def _show_learning(console: Console, report: dict[str, Any]) -> None:
    """Which state was exported, and by which objective it was learned."""
    if "history" not in report:
        return
    history, step = History(**report["history"]), report["exported_step"]
    what = "what matching found, which learning made no better"
    if step:
        what = f"the state of step {step} of {len(history.loss)}, learned with --objective {report['objective']}"
    console.say(
        f"exported: {what}; validation excess {history.excess[step]:+.4f} nats, after matching {history.excess[0]:+.4f}"
    )


def _show_costs(console: Console, costs: dict[str, Any], memory: int | None) -> None:
    """What each stage took, and what was moved."""
    peaks = {stage["name"]: stage["peak_device"] or stage["peak_rss"] for stage in costs["stages"]}
    took = [f"{s['name']} {s['seconds']:.1f} s and {show_bytes(peaks[s['name']])}" for s in costs["stages"]]
    console.say("time, and memory at most: " + ", ".join(took))
    if "traffic" in costs:
        moved = costs["traffic"]
        console.say(
            f"read {show_bytes(moved['bytes'])} of weights in {moved['loads']} loads "
            f"and {show_bytes(moved['row_bytes'])} of embedding rows; waited {moved['stall_seconds']:.1f} s for them"
        )
    worst = max(peaks, key=peaks.__getitem__)
    if memory is not None and peaks[worst] > memory:
        text = f"{worst} took {show_bytes(peaks[worst])}, more than the {show_bytes(memory)} allowed"
        print(f"lmc-fast: warning: {text}", file=sys.stderr)
