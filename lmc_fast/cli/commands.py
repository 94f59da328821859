"""The short commands: inspect, plan, merge, barrier, verify. Each returns its exit code."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..alignment import Alignment
from ..budget.demand import Job
from ..budget.devices import profile
from ..budget.meter import budget_warning
from ..budget.planner import plan
from ..checkpoints import Model, notes_on
from ..data import read_data, sequence_length
from ..errors import LmcError
from ..evaluation.curve import DEFINITION, is_own
from ..learning.schedule import Schedule
from ..output import Workspace, partial_of, require_apart
from ..pair import open_pair, pair_of
from ..pipeline.evaluate import barrier, require_points, verify
from ..pipeline.export import merge
from ..sizes import parse_bytes, show_bytes
from ..symmetry import legal_groups
from .boundary import BAD_INPUT
from .console import DIFFERENT, Console, unit_of


def inspect_command(args: argparse.Namespace, console: Console) -> int:
    model = Model(args.a, headers_only=True)
    spec = model.spec
    groups, att = legal_groups(spec), spec.attention
    console.say(
        f"{args.a}: {spec.family}, {spec.layers} blocks, width {spec.width}, {att.heads} heads of {att.head_dim}"
    )
    console.say(
        f"  {att.kv_heads} key/value groups, FFN {spec.ffn.width}, vocabulary {spec.vocab},"
        f" {spec.norms.kind}, {model.dtype}"
    )
    console.say("symmetries:")
    for group in groups:
        console.say(f"  {'yes' if group.legal else 'no ':3}  {group.name:18} {group.what}: {group.why}")
    result: dict[str, Any] = {
        "family": spec.family,
        "groups": [vars(group) for group in groups],
        "notes": notes_on(model),
    }
    for note in notes_on(model):
        console.say(f"note on {args.a}: {note}")
    if args.b:
        other = Model(args.b, headers_only=True)
        problem, warnings = "", tuple[str, ...]()
        for note in notes_on(other):
            console.say(f"note on {args.b}: {note}")
        try:
            warnings = pair_of(model, other).warnings
        except LmcError as error:
            problem = str(error)
        console.say(f"{args.a} and {args.b} " + (f"cannot be aligned: {problem}" if problem else "can be aligned"))
        result |= {"match": not problem, "problem": problem or None, "warnings": list(warnings)}
        console.result(result)
        return BAD_INPUT if problem else 0
    console.result(result)
    return 0


def merge_command(args: argparse.Namespace, console: Console) -> int:
    merge(args.a, args.b, args.out, args.weight)
    console.say(f"wrote {args.out}: (1 - {args.weight:g}) {args.a} + {args.weight:g} {args.b}")
    console.result({"out": str(args.out), "weight": args.weight})
    return 0


def barrier_command(args: argparse.Namespace, console: Console) -> int:
    outputs: list[Path] = args.out or []
    require_points(args.points)
    memory = None if args.memory is None else parse_bytes(args.memory)
    for file in outputs:
        if file.suffix not in (".json", ".png", ".svg", ".pdf"):
            raise LmcError(f"{file}: give names that end in .json, .png, .svg or .pdf")
        Workspace(file, None).require_free()
        if file.exists() and not is_own(file):
            raise LmcError(f"{file} is no curve that lmc-fast wrote; choose another name, or remove it")
    places = (place for file in outputs for place in (file, partial_of(file)))
    require_apart(places, (args.a, args.b, args.data, args.alignment))
    pair = open_pair(args.a, args.b)
    tokens = read_data(args.data, pair.a, sequence_length(pair.a, args.length))
    alignment = None if args.alignment is None else Alignment.load(args.alignment, pair.spec)
    with console.progress() as shown:
        how = {"device": args.device, "memory": memory}
        curve = barrier(pair, tokens, alignment, args.points, progress=shown, **how)
    console.say("lambda    loss  excess" + ("  accuracy" if curve.accuracies else ""))
    accuracies = [f"  {share:8.2%}" for share in curve.accuracies] if curve.accuracies else [""] * len(curve.lambdas)
    for point, loss, excess, right in zip(curve.lambdas, curve.losses, curve.excess, accuracies, strict=True):
        console.say(f"{point:6.2f}  {loss:6.4f}  {excess:+.4f}{right}")
    console.say(f"barrier {curve.barrier:.4f} nats at lambda {curve.at:.2f}, {tokens.numel():,} {unit_of(pair)}")
    console.say(f"  ({DEFINITION})")
    for file in outputs:
        (curve.save if file.suffix == ".json" else curve.plot)(file)
    console.result(curve.to_json())
    return 0


def plan_command(args: argparse.Namespace, console: Console) -> int:
    budget = parse_bytes(args.memory)
    pair = open_pair(args.a, args.b, headers_only=True)
    device = profile(args.device_profile, args.device)
    schedule = Schedule()
    length = pair.spec.position_rows if pair.spec.image else sequence_length(pair.a, args.length)
    found = plan(pair.spec, Job(args.tokens or schedule.batch * length, length, schedule.moving), device, budget)
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
    if args.data is not None:
        model = Model(args.a)
        tokens = read_data(args.data, model, sequence_length(model))[:64]
    memory = None if args.memory is None else parse_bytes(args.memory)
    found, same = verify(args.a, args.b, tokens, args.device, memory=memory)
    console.say(f"KL {found.kl:.2e} nats per token, max |log-probability difference| {found.max_log_probability:.2e}")
    console.say(f"loss {found.loss_a:.5f} and {found.loss_b:.5f} nats per token")
    console.say(("same function" if same else "different functions") + f", says {found.by}")
    console.result(found.to_json() | {"same": same})
    return 0 if same else DIFFERENT
