"""lmc-fast carry: what was trained on one endpoint, for the other."""

from __future__ import annotations

import argparse

import torch

from ..checkpoints import Model
from ..checkpoints.adapters import is_adapter
from ..data import read_data, sequence_length
from ..output import user_path
from ..pipeline.carry import PROOF_SEQUENCES, carry
from ..sizes import parse_bytes
from .console import Console


def carry_command(args: argparse.Namespace, console: Console) -> int:
    tokens = None
    if args.data is not None:
        child = None if is_adapter(user_path(args.child)) else args.child
        model = Model(args.endpoint or child or args.onto or args.alignment.absolute().parent / args.member)
        tokens = read_data(args.data, model, sequence_length(model))[:PROOF_SEQUENCES]
    with console.progress() as shown:
        report = carry(
            args.alignment,
            args.child,
            args.out,
            member=args.member,
            endpoint=args.endpoint,
            onto=args.onto,
            weight=args.weight,
            full=args.full,
            basis=args.basis,
            evenly=args.evenly,
            dtype=None if args.dtype is None else getattr(torch, args.dtype),
            tokens=tokens,
            device=args.device,
            memory=None if args.memory is None else parse_bytes(args.memory),
            progress=shown,
        )
    if report.get("agreement"):
        told = ", ".join(f"{slot} {share:.0%}" for slot, share in report["agreement"].items())
        console.say(f"in the {report['basis']} basis; counted as far as the matrices agree (mean over blocks): {told}")
    if "adapters" in report:
        ranks = ", ".join(map(str, report["ranks"]))
        console.say(f"{report['modules']} modules of rank {ranks}, exact: checked against {report['endpoint']}")
        if report["biases"]:
            console.say("the adapter has biases now (lora_bias: peft 0.14 or newer), since norms before it have some")
        console.say(f"wrote {args.out}, an adapter for {report['onto']}")
    else:
        proof, whole = report["proof"], f"{report['child']} is {report['distance']:.3f} away from {report['endpoint']}"
        console.say(f"{whole} (0: the same weights, 1: unrelated ones)")
        console.say(f"brought over: KL {proof['kl']:.1e} nats to the original: same function, says {proof['by']}")
        if "onto" in report:
            what = f"{report['onto']} + {args.weight:g} x (what was trained on {report['endpoint']})"
            console.say(f"wrote {args.out}: {what}; KL {report['moved']['kl']:.2g} nats to the former")
        else:
            console.say(f"wrote {args.out}: the function of {report['child']} in the basis of {args.alignment}")
    console.result(report)
    return 0
