"""lmc-fast align: the whole way from two checkpoints to two aligned ones, with proof and report."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from ..alignment import Alignment
from ..budget.meter import Meter
from ..budget.sizes import parse_bytes, show_bytes
from ..checkpoints import check_target
from ..data import block_length, read_data, split_validation
from ..errors import LmcError
from ..evaluation import Curve
from ..evaluation.curve import DEFINITION, plot_curves
from ..evaluation.plots import plot_learning
from ..examples import Data
from ..learning import parallel
from ..learning.learner import History, Schedule
from ..pair import Pair, open_pair
from ..pipeline.align import Progress, align
from ..pipeline.evaluate import barrier, verify
from ..pipeline.export import export_into
from ..pipeline.run_directory import RunDirectory
from ..version import __version__
from .console import Console, unit_of

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def align_command(args: argparse.Namespace, console: Console) -> int:
    args.memory = parse_bytes(args.memory) if args.memory else None
    args.device = parallel.own_device(args.device)
    with parallel.together(args.device):
        console.quiet |= parallel.place()[0] > 0
        return _align(args, console)


def _align(args: argparse.Namespace, console: Console) -> int:
    check_target(args.out)
    pair = open_pair(args.a, args.b)
    length = block_length(pair.a, args.block)
    tokens = read_data(args.data, pair.a, length)
    if args.val:
        validation: Data | None = read_data(args.val, pair.a, length)
    else:
        tokens, validation = split_validation(tokens)
    held_out = read_data(args.test, pair.a, length) if args.test else validation
    if pair.spec.task == "features":
        validation = held_out = None  # features have no loss
    given = {"steps": args.steps, "batch": args.batch, "objective": args.objective}
    given |= {"matrix_lr": args.matrix_lr, "scale_lr": args.scale_lr}
    given |= {"seed": args.seed, "low": args.range and args.range[0], "high": args.range and args.range[1]}
    options = {name: value for name, value in given.items() if value is not None}

    meter = Meter(args.device)
    if parallel.place()[0]:  # the first process does what is done once
        parallel.wait()
        state_file = RunDirectory(args.out, resume=True).state_file
        _align_with_bar(args, console, pair, tokens, validation, state_file, options, meter)
        return 0
    with RunDirectory(args.out, args.resume) as run:
        parallel.wait()
        try:
            alignment = _align_with_bar(args, console, pair, tokens, validation, run.state_file, options, meter)
        except KeyboardInterrupt:
            if run.state_file.exists():
                console.say(f"interrupted; the state is in {run.path}: go on with --resume")
            raise
        run.drop_store()
        report: dict[str, Any] = {"a": args.a, "b": args.b, "version": __version__, **alignment.info}
        curves: list[Curve] = []
        if held_out is not None:
            with meter.stage("measuring"):
                curves = _three_curves(args, console, pair, held_out, alignment)
            report["curves"] = [curve.to_json() for curve in curves]
            report["definition"] = DEFINITION
            plot_curves(curves, run.path / "curve.png")
        if "history" in alignment.info:
            plot_learning(History(**alignment.info["history"]), run.path / "learning.png")
        console.say("writing the aligned endpoints")
        with meter.stage("writing"):
            export_into(pair, alignment, run.path, DTYPES.get(args.dtype))
        alignment.save(run.path / "alignment.safetensors")
        with meter.stage("verifying"):
            report["proof"] = _proof(args, console, run.path, held_out)
        report["costs"] = meter.to_json()
        (run.path / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        run.publish()
    _show_costs(console, report["costs"], args.memory)
    for curve in curves:
        lowest = f", lowest accuracy {min(curve.accuracies):.2%}" if curve.accuracies else ""
        console.say(f"barrier {curve.name:>8}: {curve.barrier:.4f} nats at lambda {curve.at:.1f}{lowest}")
    if curves:
        which = args.test or args.val or f"the end of {args.data}, which was not used for learning"
        console.say(f"  ({DEFINITION}; on {which})")
    console.say(f"wrote {args.out}/a, {args.out}/b, alignment.safetensors, report.json")
    console.say(f"next: lmc-fast merge {args.out}/a {args.out}/b --weight 0.5 --out {args.out}/merged")
    console.result(report)
    return 0


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


def _align_with_bar(
    args: argparse.Namespace,
    console: Console,
    pair: Pair,
    tokens: Data,
    validation: Data | None,
    state_file: Path,
    options: dict[str, Any],
    meter: Meter,
) -> Alignment:
    steps = options.get("steps", Schedule.steps) if args.method in ("dual", "one-sided") else 0
    console.say(
        f"matching on {tokens.numel():,} calibration {unit_of(pair)}, then {steps} steps of {args.method} learning"
    )
    with console.bar(steps, "matching", "step") as bar:

        def progress(at: Progress) -> None:
            bar.set_description("learning", refresh=False)
            shown = {} if at.loss is None else {"loss": f"{at.loss:.3f}"}
            if at.excess is not None:
                shown["validation excess"] = f"{at.excess:.4f}"
            if bar.format_dict["elapsed"] > 0 and at.tokens:
                shown["tokens/s"] = f"{at.tokens * (bar.format_dict['rate'] or 0):,.0f}"
            bar.set_postfix(shown, refresh=False)
            bar.update(at.step - bar.n)

        return align(
            pair,
            tokens,
            method=args.method,
            validation=validation,
            activations=args.activations,
            device=args.device,
            progress=progress,
            memory=args.memory,
            state_file=state_file,
            meter=meter,
            **options,
        )


def _three_curves(
    args: argparse.Namespace, console: Console, pair: Pair, tokens: Data, alignment: Alignment
) -> list[Curve]:
    matched = Alignment(*alignment.matched, alignment.matched)
    stages: list[tuple[str, Alignment | None]] = [("naive", None), ("matched", matched)]
    if args.method in ("dual", "one-sided"):
        stages.append(("learned", alignment))
    curves = []
    with console.bar(11 * len(stages), "measuring", "point") as bar:
        for name, stage in stages:
            how = {"name": name, "device": args.device, "memory": args.memory}
            curves.append(barrier(pair, tokens, stage, progress=lambda _: bar.update(), **how))
    return curves


def _proof(args: argparse.Namespace, console: Console, out: Path, tokens: Data | None) -> dict[str, Any]:
    """Compares each written endpoint with its original and says so."""
    proof = {}
    for name, original in (("a", args.a), ("b", args.b)):
        sample = None if tokens is None else tokens[:16]
        found, same = verify(original, out / name, sample, args.device)
        console.say(
            f"endpoint {name}: KL to the original {found.kl:.1e} nats, max |log-probability difference| "
            f"{found.max_log_probability:.1e}: {'same function' if same else 'DIFFERENT FUNCTION'}"
        )
        if not same:
            raise LmcError(
                f"the aligned {original} does not keep its function (KL {found.kl:.1e}); try --dtype float32"
            )
        proof[name] = found.to_json()
    return proof
