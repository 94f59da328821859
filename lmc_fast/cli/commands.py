"""The short commands: inspect, plan, merge, barrier, verify. Each returns its exit code."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from ..alignment import Alignment
from ..budget.meter import budget_warning
from ..checkpoints import Model
from ..checkpoints.writer import SHARD_BYTES
from ..data import read_data, sequence_length
from ..errors import LmcError
from ..evaluation import Curve, Simplex
from ..evaluation.curve import DEFINITION, is_own
from ..evaluation.simplex import SIMPLEX_DEFINITION
from ..learning.healing import healing_bytes
from ..members import listed
from ..output import Workspace, partial_of, require_apart
from ..pair import open_models
from ..pipeline.evaluate import barrier, require_points, verify
from ..pipeline.inspection import inspect, plan
from ..pipeline.merge import merge
from ..sizes import parse_bytes, show_bytes
from .boundary import BAD_INPUT
from .console import DIFFERENT, Console, unit_of


def inspect_command(args: argparse.Namespace, console: Console) -> int:
    found = inspect(args.a, args.b, args.data, more=args.more)
    places = [args.a, *([args.b] if args.b else []), *args.more]
    spec, dtype = found.model.spec, found.model.dtype
    att = spec.attention
    console.say(
        f"{args.a}: {spec.family}, {spec.layers} blocks, width {spec.width}, {att.heads} heads of {att.head_dim}"
    )
    console.say(
        f"  {att.kv_heads} key/value groups, FFN {spec.ffn.width}, vocabulary {spec.vocab}, {spec.norms.kind}, {dtype}"
    )
    console.say("symmetries:")
    for group in found.groups:
        console.say(f"  {'yes' if group.legal else 'no ':3}  {group.name:18} {group.what}: {group.why}")
    for name, notes in zip(places, (found.notes, *found.other_notes), strict=True):
        for note in notes:
            console.say(f"note on {name}: {note}")
    if found.others:
        verdict = f"cannot be aligned: {found.problem}" if found.problem else "can be aligned"
        console.say(f"{listed(places)} {verdict}")
    console.result(found.to_json())
    return BAD_INPUT if found.problem else 0


def merge_command(args: argparse.Namespace, console: Console) -> int:
    places = [args.a, *([] if args.b is None else [args.b]), *args.more]
    shard_bytes = SHARD_BYTES if args.shard_size is None else parse_bytes(args.shard_size, "shard size")
    how: dict[str, Any] = {"weights": args.weights, "weights_by_block": args.weights_by_block, "base": args.base}
    how |= {
        "dtype": args.dtype and getattr(torch, args.dtype),
        "shard_bytes": shard_bytes,
        "extrapolate": args.extrapolate,
    }
    if args.weight is not None and len(places) != 2:
        raise LmcError("--weight is the share of B of two models; give --weights, one for each model")
    with console.progress() as display:
        how["progress"] = display
        if args.weight is None:
            record = merge(places, args.out, **how)
        else:
            record = merge(args.a, args.b, args.out, args.weight, **how)
    shown = " + ".join(f"{w:g} {place}" for w, place in zip(record["weights"], places, strict=True))
    if args.base is not None:
        shown = f"{args.base}, and of the difference from it {shown}"
    console.say(f"wrote {args.out}, in {record['dtype']}: {shown}")
    console.result({"out": str(args.out), **record})
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
    sources = [args.a, args.b, *args.more]
    places = (place for file in outputs for place in (file, partial_of(file)))
    require_apart(places, (*sources, args.data, args.alignment))
    models = open_models(sources)
    first = models.members[0]
    tokens = read_data(args.data, first, sequence_length(first, args.length))
    alignment = None if args.alignment is None else Alignment.load(args.alignment, models.spec, len(sources))
    with console.progress() as shown:
        how = {"device": args.device, "memory": memory}
        found = barrier(models, tokens, alignment, args.points, progress=shown, **how)
    measured = f"{tokens.numel():,} {unit_of(models)}"
    if isinstance(found, Curve):
        _show_curve(console, found, measured)
    else:
        _show_simplex(console, found, sources, measured)
    for file in outputs:
        (found.save if file.suffix == ".json" else found.plot)(file)
    console.result(found.to_json())
    return 0


def _show_curve(console: Console, curve: Curve, measured: str) -> None:
    console.say("lambda    loss  excess" + ("  accuracy" if curve.accuracies else ""))
    accuracies = [f"  {share:8.2%}" for share in curve.accuracies] if curve.accuracies else [""] * len(curve.lambdas)
    for point, loss, excess, right in zip(curve.lambdas, curve.losses, curve.excess, accuracies, strict=True):
        console.say(f"{point:6.2f}  {loss:6.4f}  {excess:+.4f}{right}")
    console.say(f"barrier {curve.words}")
    console.say(f"  ({DEFINITION}; ±: standard error over inputs; {measured})")


def _show_simplex(console: Console, found: Simplex, sources: list[str], measured: str) -> None:
    for name, source, loss in zip(found.names, sources, found.corners, strict=True):
        console.say(f"{name}  loss {loss:.4f}  {source}")
    for curve in found.edges:
        console.say(f"{curve.name}  barrier {curve.barrier:.4f} {curve.unit} at lambda {curve.at:.2f}")
    middle = f"the average of all: {found.centroid:+.4f} {found.unit} over the mean of their losses"
    console.say(f"{middle}; their ensemble {found.ensemble - sum(found.corners) / len(sources):+.4f}")
    shares = ", ".join(f"{name} {share:.2f}" for name, share in zip(found.names, found.at, strict=True))
    console.say(f"barrier {found.barrier:.4f} {found.unit} at {shares}; {len(found.places)} places, {measured}")
    console.say(f"  ({SIMPLEX_DEFINITION})")


def plan_command(args: argparse.Namespace, console: Console) -> int:
    how = {"device": args.device, "profile": args.device_profile, "tokens": args.tokens, "length": args.length}
    found = plan(args.a, args.b, *args.more, memory=args.memory, **how)
    budget, device = found.budget, found.device
    warning = budget_warning(budget, args.device) if args.device_profile == "here" else None
    if budget > device.memory and not warning:
        warning = f"{device.name} has {show_bytes(device.memory)}, less than the budget of {show_bytes(budget)}"
    for line in found.table():
        console.say(line)
    members = found.job.members
    healing = healing_bytes(found.store_bytes // found.device.dtype.itemsize // members, members)
    console.say(f"heal, which trains all weights of a merge of them, would hold about {show_bytes(healing)}")
    if warning:
        print(f"lmc-fast: warning: {warning}", file=sys.stderr)
    facts = {"a": args.a, "b": args.b, "more": args.more, "heal_bytes": healing, "warning": warning}
    console.result(found.to_json() | facts)
    return 0


def verify_command(args: argparse.Namespace, console: Console) -> int:
    tokens = None
    if args.data is not None:
        model = Model(args.a)
        tokens = read_data(args.data, model, sequence_length(model))[:64]
    memory = None if args.memory is None else parse_bytes(args.memory)
    with console.progress() as shown:
        found, same = verify(args.a, args.b, tokens, args.device, memory=memory, progress=shown)
    console.say(f"KL {found.kl:.2e} nats per token, max |log-probability difference| {found.max_log_probability:.2e}")
    console.say(f"loss {found.loss_a:.5f} and {found.loss_b:.5f} nats per token")
    console.say(("same function" if same else "different functions") + f", says {found.by}")
    console.result(found.to_json() | {"same": same})
    return 0 if same else DIFFERENT
