"""The lmc-fast command."""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import __version__
from .alignment import Alignment
from .checkpoints import Model, check_target
from .data import block_length, read_data, split_validation
from .engine import parallel
from .errors import LmcError
from .evaluation import Curve
from .evaluation.barrier import DEFINITION
from .evaluation.plots import plot_curves, plot_learning
from .examples import Data
from .matching.learned import OBJECTIVES, History, Schedule
from .pair import Pair, mismatch, open_pair
from .pipeline.align import METHODS, Progress, align
from .pipeline.evaluate import barrier, verify
from .pipeline.export import export_into, merge
from .pipeline.run_directory import RunDirectory
from .streaming.demand import Job
from .streaming.devices import PROFILES, profile
from .streaming.meter import Meter, budget_warning
from .streaming.planner import plan
from .streaming.sizes import parse_bytes, show_bytes
from .symmetry import legal_groups

BAD_INPUT, INTERRUPTED, DIFFERENT = 2, 130, 1
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class _Lines(logging.Handler):
    """What the engine decided and why, as lines for people."""

    def __init__(self, say: Callable[[str], None]):
        super().__init__()
        self.say = say

    def emit(self, record: logging.LogRecord) -> None:
        self.say(record.getMessage())


class Console:
    """Where words and numbers go: progress and text for people, or one JSON document on standard output."""

    def __init__(self, args: argparse.Namespace):
        self.json, self.quiet = args.json, args.quiet
        log = logging.getLogger("lmc_fast")
        log.setLevel(logging.INFO)
        log.handlers = [_Lines(self.say)]

    def say(self, text: str = "") -> None:
        if not self.quiet and not self.json:
            tqdm.write(text)

    def result(self, value: dict[str, Any]) -> None:
        if self.json:
            print(json.dumps(value))

    def bar(self, total: int, text: str, unit: str = "it") -> tqdm:
        hidden = self.quiet or self.json
        return tqdm(total=total, desc=text, unit=unit, disable=hidden, leave=False, dynamic_ncols=True, file=sys.stderr)


def inspect_command(args: argparse.Namespace, console: Console) -> int:
    model = Model(args.a)
    spec = model.spec
    groups = legal_groups(spec)
    console.say(
        f"{args.a}: {spec.family}, {spec.layers} blocks, width {spec.width}, {spec.heads} heads of {spec.head_dim}"
    )
    console.say(
        f"  {spec.kv_heads} key/value groups, FFN {spec.ffn_width}, vocabulary {spec.vocab}, {spec.norm}, {model.dtype}"
    )
    console.say("symmetries:")
    for group in groups:
        console.say(f"  {'yes' if group.legal else 'no ':3}  {group.name:18} {group.what}: {group.why}")
    result: dict[str, Any] = {
        "family": spec.family,
        "groups": [vars(group) for group in groups],
    }
    if args.b:
        problem = mismatch(Pair(model, Model(args.b)))
        console.say(f"{args.a} and {args.b} " + (f"cannot be aligned: {problem}" if problem else "can be aligned"))
        result |= {"match": problem is None, "problem": problem}
        console.result(result)
        return BAD_INPUT if problem else 0
    console.result(result)
    return 0


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
            export_into(pair, alignment, run.path, _DTYPES.get(args.dtype))
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
    """What each stage took at most, and what was moved."""
    peaks = {stage["name"]: stage["peak_device"] or stage["peak_rss"] for stage in costs["stages"]}
    console.say("memory at most: " + ", ".join(f"{name} {show_bytes(peak)}" for name, peak in peaks.items()))
    if "traffic" in costs:
        moved = costs["traffic"]
        console.say(
            f"read {show_bytes(moved['bytes'] + moved['row_bytes'])} of weights in {moved['loads']} loads; "
            f"waited {moved['stall_seconds']:.1f} s for them"
        )
    worst = max(peaks, key=peaks.__getitem__)
    if memory is not None and peaks[worst] > memory:
        text = f"{worst} took {show_bytes(peaks[worst])}, more than the {show_bytes(memory)} allowed"
        print(f"lmc-fast: warning: {text}", file=sys.stderr)


def _unit(pair: Pair) -> str:
    return {"image": "images", "masked": "masked tokens"}.get(pair.spec.task, "tokens")


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
        f"matching on {tokens.numel():,} calibration {_unit(pair)}, then {steps} steps of {args.method} learning"
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


def merge_command(args: argparse.Namespace, console: Console) -> int:
    merge(args.a, args.b, args.out, args.weight)
    console.say(f"wrote {args.out}: (1 - {args.weight:g}) {args.a} + {args.weight:g} {args.b}")
    console.result({"out": str(args.out), "weight": args.weight})
    return 0


def barrier_command(args: argparse.Namespace, console: Console) -> int:
    outputs: list[Path] = args.out or []
    for file in outputs:
        if file.suffix not in (".json", ".png", ".svg", ".pdf"):
            raise LmcError(f"{file}: give names that end in .json, .png, .svg or .pdf")
        if not file.absolute().parent.is_dir():
            raise LmcError(f"{file.absolute().parent} does not exist; create it first")
    pair = open_pair(args.a, args.b)
    tokens = read_data(args.data, pair.a, block_length(pair.a, args.block))
    alignment = Alignment.load(args.alignment, pair.spec) if args.alignment else None
    with console.bar(args.points, "measuring", "point") as bar:
        how = {"device": args.device, "memory": parse_bytes(args.memory) if args.memory else None}
        curve = barrier(pair, tokens, alignment, args.points, progress=lambda _: bar.update(), **how)
    console.say("lambda    loss  excess" + ("  accuracy" if curve.accuracies else ""))
    accuracies = [f"  {share:8.2%}" for share in curve.accuracies] if curve.accuracies else [""] * len(curve.lambdas)
    for point, loss, excess, right in zip(curve.lambdas, curve.losses, curve.excess, accuracies, strict=True):
        console.say(f"{point:6.2f}  {loss:6.4f}  {excess:+.4f}{right}")
    console.say(f"barrier {curve.barrier:.4f} nats at lambda {curve.at:.2f}, {tokens.numel():,} {_unit(pair)}")
    console.say(f"  ({DEFINITION})")
    for file in outputs:
        (curve.save if file.suffix == ".json" else curve.plot)(file)
    console.result(curve.to_json())
    return 0


def plan_command(args: argparse.Namespace, console: Console) -> int:
    budget = parse_bytes(args.memory)
    pair = open_pair(args.a, args.b)
    device = profile(args.device_profile, args.device)
    schedule = Schedule()
    length = pair.spec.position_rows if pair.spec.image else block_length(pair.a, args.block)
    found = plan(pair.spec, Job(args.tokens or schedule.batch * length, length, schedule.sides), device, budget)
    warning = budget_warning(budget, args.device) if args.device_profile == "here" else None
    if budget > device.memory and not warning:
        warning = f"{device.name} has {show_bytes(device.memory)}, less than the budget of {show_bytes(budget)}"
    for line in found.table():
        console.say(line)
    if warning:
        print(f"lmc-fast: warning: {warning}", file=sys.stderr)
    console.result(found.to_json() | {"a": args.a, "b": args.b, "warning": warning})
    return 0


def verify_command(args: argparse.Namespace, console: Console) -> int:
    tokens = None
    if args.data:
        model = Model(args.a)
        tokens = read_data(args.data, model, block_length(model))[:64]
    found, same = verify(args.a, args.b, tokens, args.device)
    console.say(f"KL {found.kl:.2e} nats per token, max |log-probability difference| {found.max_log_probability:.2e}")
    console.say(f"loss {found.loss_a:.5f} and {found.loss_b:.5f} nats per token")
    console.say("same function" if same else "different functions")
    console.result(found.to_json() | {"same": same})
    return 0 if same else DIFFERENT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmc-fast", description="Align two transformers so that their average is good."
    )
    parser.add_argument("--version", action="version", version=f"lmc-fast {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, function: Callable, text: str, *models: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        for model in models:
            sub.add_argument(
                model.strip("?"), nargs="?" if model.endswith("?") else None, metavar=model.strip("?").upper()
            )
        sub.add_argument("--json", action="store_true", help="one JSON document on standard output, nothing else")
        sub.add_argument("--quiet", action="store_true", help="no progress, only errors")
        sub.add_argument("--device", default="cpu", help="torch device (default: cpu)")
        return sub

    text = "what a checkpoint is, which symmetries are legal and why not, and whether two checkpoints match"
    command("inspect", inspect_command, text, "a", "b?")

    sub = command(
        "align", align_command, "align two checkpoints and write both, changed but computing the same", "a", "b"
    )
    sub.add_argument(
        "--data", required=True, help="calibration text (.txt, .jsonl, .npy token ids) or images (.npz, class folders)"
    )
    sub.add_argument("--val", help="text that picks the best state of the run (default: the last 3%% of --data)")
    sub.add_argument("--test", help="text to report barriers on (default: the validation text)")
    sub.add_argument("--out", required=True, type=Path, help="directory to create")
    sub.add_argument("--method", choices=METHODS, default="dual", help="default: dual")
    sub.add_argument("--steps", type=_positive, help=f"learning steps (default: {Schedule.steps})")
    sub.add_argument("--batch", type=_positive, help=f"token blocks per step (default: {Schedule.batch})")
    sub.add_argument("--block", type=_positive, help="tokens per block (default: 128)")
    sub.add_argument(
        "--range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help=f"where lambda is drawn while learning (default: {Schedule.low} {Schedule.high})",
    )
    text = "what to approach along the line: the endpoints' own predictions, or the text (default: endpoints)"
    sub.add_argument("--objective", choices=OBJECTIVES, help=text)
    sub.add_argument("--matrix-lr", type=float, help=f"of rotations and head maps (default: {Schedule.matrix_lr})")
    sub.add_argument("--scale-lr", type=float, help=f"of scales and RoPE angles (default: {Schedule.scale_lr})")
    sub.add_argument("--activations", type=float, default=0.3, help="weight of activation evidence in matching (0.3)")
    sub.add_argument("--seed", type=int, help="default: 0")
    sub.add_argument("--dtype", choices=_DTYPES, help="of the written weights (default: as in the input)")
    limit = "hold no more than this, e.g. 8GiB (on a GPU: of its memory); weights stream from disk (default: no limit)"
    sub.add_argument("--memory", help=limit)
    sub.add_argument("--resume", action="store_true", help="go on with an interrupted run")

    sub = command("plan", plan_command, "memory and time within a budget; only headers are read", "a", "b")
    sub.add_argument("--memory", required=True, help="the budget: 8GiB, 3GB, 512MiB or a number of bytes")
    names = ", ".join(PROFILES)
    sub.add_argument("--device-profile", default="here", help=f"here (default: what --device says), {names}")
    sub.add_argument("--tokens", type=_positive, help=f"tokens per step (default: {Schedule.batch} blocks)")
    sub.add_argument("--block", type=_positive, help="tokens per block (default: 128)")

    sub = command("merge", merge_command, "write the weighted average of two checkpoints", "a", "b")
    sub.add_argument("--weight", type=float, default=0.5, help="share of B (default: 0.5)")
    sub.add_argument("--out", required=True, type=Path, help="directory to create")

    sub = command("barrier", barrier_command, "loss along the straight line between two checkpoints", "a", "b")
    sub.add_argument("--data", required=True, help="held-out text (.txt, .jsonl, .npy) or images (.npz, folder)")
    sub.add_argument("--alignment", help="an alignment.safetensors to apply first")
    sub.add_argument("--points", type=_positive, default=11, help="default: 11")
    sub.add_argument("--memory", help=limit)
    sub.add_argument("--block", type=_positive, help="tokens per block (default: 128)")
    sub.add_argument("--out", type=Path, nargs="+", help="files to write: curve.json, curve.png")

    sub = command("verify", verify_command, "do two checkpoints compute the same function?", "a", "b")
    sub.add_argument("--data", help="text to compare on (default: random tokens)")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt


def _require_device(name: str) -> None:
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise LmcError(f"device {name} is not usable: {error}") from error


def main(argv: list[str] | None = None) -> int:
    """Runs one command. 0: done; 1: verify found a difference; 2: bad input, in one sentence; 130: interrupted."""
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        import transformers

        transformers.logging.set_verbosity_error()
        _require_device(args.device)
        return args.function(args, Console(args))
    except LmcError as error:
        print(f"lmc-fast: error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("lmc-fast: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
