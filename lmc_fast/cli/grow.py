"""lmc-fast grow: a model as one of the size of another, with the same function."""

from __future__ import annotations

import argparse

import torch

from ..architectures.resize import sizes_of
from ..checkpoints import Model
from ..data import read_data, sequence_length
from ..output import check_target, partial_of, require_apart
from ..pipeline.growing import grow
from .console import Console


def grow_command(args: argparse.Namespace, console: Console) -> int:
    require_apart((args.out, partial_of(args.out)), (args.model, args.like, args.data))
    check_target(args.out)
    tokens = None
    if args.data is not None:
        model = Model(args.model)
        tokens = read_data(args.data, model, sequence_length(model, args.length))
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    with console.progress() as shown:
        how = {"dtype": dtype, "device": args.device}
        written = grow(args.model, args.like, args.out, tokens=tokens, progress=shown, **how)
    console.say(f"wrote {args.out}: the function of {args.model}, in a size that has room for {args.like}")
    names = {"out": str(args.out), "model": str(args.model), "like": str(args.like)}
    console.result(names | {"sizes": sizes_of(written.spec)})
    return 0
