"""Which arguments lmc-fast takes; read and shown without torch, which takes seconds to import."""

from __future__ import annotations

import argparse

from ..budget.profiles import SHEETS
from ..learning.schedule import CLOSED_FORMS, METHODS, OBJECTIVES, Schedule
from ..members import SCHEMES, STARTS
from ..output import user_path
from ..version import __version__
from .completion import SHELLS, PrintCompletion

DTYPES = ("float32", "float16", "bfloat16")  # that can be written

EXIT_CODES = """exit codes:
  0    done
  1    verify found a difference
  2    refused or failed, in one sentence; nothing is lost
  129, 130, 143
       ended by SIGHUP (a closed terminal), SIGINT (Ctrl-C) or SIGTERM;
       what was learned is kept: go on with --resume"""


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(
        prog="lmc-fast",
        description="Change the weights of two transformers, not what they compute, so that their average is good.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whole.add_argument("--version", action="version", version=f"lmc-fast {__version__}")
    text = "print a script by which this shell completes lmc-fast (needs shtab)"
    whole.add_argument("--print-completion", choices=SHELLS, action=PrintCompletion, help=text)
    commands = whole.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, text: str, *models: str, module: str = "commands") -> argparse.ArgumentParser:
        """module: of this package, whose NAME_command does the work; imported when the command is run."""
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=(module, f"{name}_command"))
        for model in models:
            sub.add_argument(
                model.strip("?"), nargs="?" if model.endswith("?") else None, metavar=model.strip("?").upper()
            )
        for model in models:
            name, text = (
                model.strip("?"),
                "the branch, tag or commit of its repository on the hub (also: OWNER/NAME@REVISION)",
            )
            sub.add_argument(f"--revision-{name}", metavar="REVISION", help=f"of {name.upper()}: {text}")
        sub.add_argument("--json", action="store_true", help="one JSON document on standard output, nothing else")
        sub.add_argument("--quiet", action="store_true", help="print nothing but errors and warnings")
        sub.add_argument("--device", default="cpu", help="where to compute: a torch device, e.g. cuda (default: cpu)")
        return sub

    sub = command("demo", "align and merge the two tiny models that come with the package: two minutes", module="demo")
    sub.add_argument("--out", type=user_path, default=user_path("demo-out"), help="directory to create (demo-out)")
    sub.add_argument("--steps", type=positive_integer, default=250, help="steps of learning (default: 250)")
    sub.add_argument("--resume", action="store_true", help="continue an interrupted run")

    command("families", "list the model types that are supported, and why some others are not", module="families")

    command("env", "show versions, what computes, processor, memory and GPUs: for bug reports", module="env")

    text = "show what a checkpoint is, which of its symmetries can be used and why, and whether others fit it"
    sub = command("inspect", text, "a", "b?")
    sub.add_argument("more", nargs="*", metavar="MORE", help="any number of further checkpoints")
    text = "text or images that show where empty blocks go, where one model is grown by some (weights are read, then)"
    sub.add_argument("--data", type=user_path, help=text)

    sub = command(
        "align",
        "align two checkpoints, or more; write them with changed weights that compute the same",
        "a",
        "b",
        module="align",
    )
    sub.add_argument("more", nargs="*", metavar="MORE", help="any number of further checkpoints")
    text = (
        "how more than two are brought together: all learned at once (joint), pairs and then averages of pairs "
        "(hierarchical, with --steps for each), closed-form matching of all (universe), by weights alone (mergemany)"
    )
    sub.add_argument("--scheme", choices=SCHEMES, default=SCHEMES[0], help=f"{text}; default: {SCHEMES[0]}")
    text = f"what joint learning starts from (default: {STARTS[0]})"
    sub.add_argument("--start", choices=STARTS, default=STARTS[0], help=text)
    sub.add_argument(
        "--data",
        required=True,
        type=user_path,
        help="calibration text (.txt, .jsonl, .npy token ids) or images (.npz, class folders)",
    )
    sub.add_argument(
        "--val",
        type=user_path,
        help="text or images that pick the best state (default: 3%% of --data, held out evenly)",
    )
    sub.add_argument(
        "--test", type=user_path, help="text or images to measure the curves on (default: what --val says)"
    )
    sub.add_argument("--out", required=True, type=user_path, help="directory to create")
    sub.add_argument("--method", choices=(*METHODS, *CLOSED_FORMS), default="dual", help="how to align (default: dual)")
    sub.add_argument("--steps", type=whole_number, help=f"steps of learning (default: {Schedule.steps})")
    sub.add_argument("--batch", type=positive_integer, help=f"sequences per step (default: {Schedule.batch})")
    sub.add_argument("--length", "--block", type=positive_integer, help="tokens per sequence (default: 128)")
    sub.add_argument(
        "--range",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help=f"where lambda is drawn while learning (default: {Schedule.low} {Schedule.high})",
    )
    text = "what to predict along the line: what the endpoints predict, the text, or what a trial of both on held-out "
    text += "data finds better (default: auto)"
    sub.add_argument("--objective", choices=OBJECTIVES, help=text)
    sub.add_argument(
        "--matrix-lr",
        type=float,
        help=f"learning rate of rotations and of maps in heads (default: {Schedule.matrix_lr})",
    )
    sub.add_argument(
        "--scale-lr", type=float, help=f"learning rate of scales and RoPE angles (default: {Schedule.scale_lr})"
    )
    sub.add_argument(
        "--activations",
        type=float,
        default=0.3,
        help="how much activations count beside weights in matching (default: 0.3)",
    )
    sub.add_argument("--seed", type=int, help="seed of the order in which data is read (default: 0)")
    sub.add_argument("--dtype", choices=DTYPES, help="dtype of the written weights (default: each checkpoint's own)")
    limit = "use at most this much memory, e.g. 8GiB (on a GPU: of its own), and read weights from disk when needed"
    sub.add_argument("--memory", help=limit)
    text = "points of each curve (default: 11 of what was learned, 3 of the naive and the matched one)"
    sub.add_argument("--points", type=positive_integer, help=text)
    sub.add_argument("--no-curves", action="store_true", help="do not measure the line")
    sub.add_argument("--resume", action="store_true", help="continue an interrupted run")

    sub = command(
        "plan",
        "show how models would be learned within a memory budget and how long a step takes; no weights are read",
        "a",
        "b",
    )
    sub.add_argument("more", nargs="*", metavar="MORE", help="any number of further checkpoints")
    sub.add_argument("--memory", required=True, help="the budget: 8GiB, 3GB, 512MiB or a number of bytes")
    names = ", ".join(SHEETS)
    sub.add_argument(
        "--device-profile",
        default="here",
        help=f"device to plan for: here (default: the one that --device names), {names}",
    )
    sub.add_argument("--tokens", type=positive_integer, help=f"tokens per step (default: {Schedule.batch} sequences)")
    sub.add_argument("--length", "--block", type=positive_integer, help="tokens per sequence (default: 128)")

    text = "write the weighted average of two or more checkpoints, or what they add to a base"
    merge_arguments(command("merge", text, "a", "b?"))

    text = "bring what was trained on one endpoint, a checkpoint or a LoRA adapter, over to the other"
    sub = command("carry", text, module="carry")
    sub.add_argument("alignment", type=user_path, help="alignment.safetensors of the pair, best beside its a/ and b/")
    sub.add_argument("child", metavar="CHILD", help="a checkpoint fine-tuned from an endpoint, or its LoRA adapter")
    sub.add_argument("--from", dest="member", metavar="a|b", required=True, help="the endpoint it comes from")
    sub.add_argument("--out", required=True, type=user_path, help="directory to create")
    text = "what to add to, e.g. DIR/a (default: a checkpoint is written as it is, an adapter for the other endpoint)"
    sub.add_argument("--onto", metavar="ALIGNED", help=text)
    sub.add_argument("--weight", type=float, default=1.0, help="times what was trained is added (default: 1)")
    text = "where to add: aligned, as DIR/b is; matched, as matching alone laid it; auto, what is nearer (default)"
    sub.add_argument("--basis", choices=("auto", "aligned", "matched"), default="auto", help=text)
    text = "add all in full (default: what reads into heads, units or experts counts as far as these matrices agree)"
    sub.add_argument("--evenly", action="store_true", help=text)
    text = "the checkpoint it was trained from (default: where it was when it was aligned, else the aligned one)"
    sub.add_argument("--endpoint", metavar="CHECKPOINT", help=text)
    sub.add_argument("--full", action="store_true", help="write the checkpoint that an adapter makes, not an adapter")
    sub.add_argument("--data", type=user_path, help="text or images to prove it on (default: random tokens or images)")
    sub.add_argument("--dtype", choices=DTYPES, help="dtype of the written weights (default: that of what is carried)")
    sub.add_argument("--memory", help=limit)

    sub = command(
        "barrier",
        "measure the loss along the line between two checkpoints; of more, on all lines and inside",
        "a",
        "b",
    )
    sub.add_argument("more", nargs="*", metavar="MORE", help="any number of further checkpoints")
    sub.add_argument("--data", required=True, type=user_path, help="held-out text or images, as for align")
    sub.add_argument("--alignment", type=user_path, help="alignment.safetensors of these models, to be applied first")
    sub.add_argument("--points", type=positive_integer, default=11, help="points on each line (default: 11)")
    sub.add_argument("--memory", help=limit)
    sub.add_argument("--length", "--block", type=positive_integer, help="tokens per sequence (default: 128)")
    sub.add_argument("--out", type=user_path, nargs="+", help="files to write: curve.json, curve.png")

    text = "write a model as one of the size of another, larger one, with the same function"
    sub = command("grow", text, "model", module="grow")
    text = "a model of the wanted size, of the same family"
    sub.add_argument("--like", required=True, metavar="OTHER", help=text)
    sub.add_argument("--out", required=True, type=user_path, help="directory to create")
    text = "text or images that show where empty blocks go (default: evenly spread), and to compare both models on"
    sub.add_argument("--data", type=user_path, help=text)
    sub.add_argument("--length", "--block", type=positive_integer, help="tokens per sequence (default: 128)")
    sub.add_argument("--dtype", choices=DTYPES, help="dtype of the written weights (default: the model's own)")

    text = "say where and why the middle of the line between two checkpoints is worse than its ends, block by block"
    sub = command("diagnose", text, "a", "b", module="diagnose")
    sub.add_argument("--data", required=True, type=user_path, help="held-out text or images, as for align")
    sub.add_argument("--alignment", type=user_path, help="alignment.safetensors of the pair, to be applied first")
    sub.add_argument("--sequences", type=positive_integer, default=16, help="inputs to look at (default: 16)")
    sub.add_argument("--length", "--block", type=positive_integer, help="tokens per sequence (default: 128)")
    sub.add_argument("--out", type=user_path, nargs="+", help="files to write: diagnosis.json, diagnosis.png")

    text = (
        "distil a merged model from its endpoints (ordinary training of all weights), or an endpoint if that is better"
    )
    sub = command("heal", text, "merged", module="heal")
    text = "the checkpoints that were merged: a, b, ..."
    sub.add_argument("--from", dest="endpoints", required=True, nargs="+", metavar="MODEL", help=text)
    text = "text or images on which all of them teach together, or NAME=FILE for each: a=code.txt b=prose.txt"
    sub.add_argument("--data", required=True, nargs="+", metavar="FILE", help=text)
    sub.add_argument("--out", required=True, type=user_path, help="directory to create")
    sub.add_argument("--steps", type=positive_integer, help="steps of training (default: 200)")
    sub.add_argument("--batch", type=positive_integer, help="sequences per step (default: 16)")
    text = "what to begin with: average (the merged model), a, b, ... or auto, which tries all (default: auto)"
    sub.add_argument("--start", default="auto", help=text)
    sub.add_argument("--rate", type=float, help="learning rate of AdamW up to width 128, less beyond (default: 1e-3)")
    sub.add_argument("--seed", type=int, help="seed of the order in which data is read (default: 0)")
    sub.add_argument("--length", "--block", type=positive_integer, help="tokens per sequence (default: 128)")
    sub.add_argument("--dtype", choices=DTYPES, help="dtype of the written weights (default: the model's own)")
    sub.add_argument("--resume", action="store_true", help="continue an interrupted run")

    sub = command("verify", "check whether two checkpoints compute the same function", "a", "b")
    sub.add_argument("--data", type=user_path, help="text or images to compare on (default: random tokens or images)")
    sub.add_argument("--memory", help=limit)
    return whole


def merge_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("more", nargs="*", metavar="MORE", help="any number of further checkpoints")
    sub.add_argument("--weight", type=float, help="share of B, of two checkpoints (default: 0.5)")
    text = "weight of each checkpoint, in their order (default: equal); divided by their sum, with a note"
    sub.add_argument("--weights", type=float, nargs="+", metavar="W", help=text)
    text = 'JSON file of other weights for some blocks: {"embed": [...], "0-3": [...], "4": [...], "head": [...]}'
    sub.add_argument("--weights-by-block", type=user_path, metavar="FILE", help=text)
    text = "task arithmetic: to this checkpoint, add --weights times the others' differences from it"
    sub.add_argument("--base", help=text)
    sub.add_argument("--extrapolate", action="store_true", help="allow weights below 0 and above 1")
    text = "dtype of the written weights (default: what the first checkpoint stores each tensor in)"
    sub.add_argument("--dtype", choices=DTYPES, help=text)
    sub.add_argument("--shard-size", metavar="SIZE", help="of a file of weights at most, e.g. 2GB (default: 5GB)")
    sub.add_argument("--out", required=True, type=user_path, help="directory to create")


def whole_number(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return value


def positive_integer(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
