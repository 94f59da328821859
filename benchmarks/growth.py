"""Growing smaller models to the size of larger ones: exact for many families, and what alignment makes of it.

    python -m benchmarks.growth [--check]                      # 12 families, random parameters; a minute
    python -m benchmarks.growth --trained DIR [NAME ...]       # trained models of several sizes; minutes each

Families: a tiny checkpoint is grown in width, heads, FFN units and depth, to the size of another, by `lmc_fast`;
transformers loads what was written with its own class, every tensor in place, and its outputs are compared with those
of the original. In float64 they are equal; what is written in float32 is at most twice as far off as the original is.
Shrinking what was grown gives the original (of LayerNorm models in another width: their canonical form) again.

Trained: DIR is what `examples/train_pair.py --siblings --out DIR` wrote: narrow (width 96 for 128), shallow (3 blocks
for 4), small (both). Each is aligned with examples/pair/a by `lmc-fast align`, 500 steps; "three" are narrow, shallow
and that one, all at once. Losses are those of transformers alone on the test text: of stock checkpoints, and of their
averages, tensor by tensor.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import logging

from benchmarks.alignment import barrier, stock_losses
from benchmarks.common import RESULTS, ROOT, Row, lmc_fast, options, provenance, read_csv, write_csv, write_json
from benchmarks.members import measured

sys.path[:0] = [str(ROOT / "tests" / part) for part in ("", "families")]

import zoo  # noqa: E402
from sizes import enlarge  # noqa: E402

import lmc_fast as lmc  # noqa: E402
from lmc_fast.checkpoints import Model, Weights, export  # noqa: E402
from lmc_fast.symmetry import canonicalize  # noqa: E402
from lmc_fast.symmetry.grown import GrownModel, alike  # noqa: E402

SOURCES = ("lmc_fast", "tests/families", "benchmarks/growth.py", "benchmarks/alignment.py", "examples")
FFN, DEPTH = {"ffn": 52}, {"depth": 4}
WIDE, MORE = {"width": 40}, {"heads": 8, "groups": 4}
BOTH = {"width": 48, "heads": 2.0, "groups": 2.0}  # where head_dim is width / heads, and RoPE keeps it
GROUPS = {"groups": 4}  # as many heads, each with a key of its own
FAMILIES: dict[str, tuple[dict[str, int | float], ...]] = {  # width, heads, FFN units, depth
    "neox": (BOTH, BOTH, FFN, DEPTH),
    "gpt2-tied": ({"width": 36}, BOTH, {"ffn": 80}, DEPTH),
    "opt": ({"width": 36}, {"width": 48, "heads": 8}, FFN, DEPTH),
    "llama": (WIDE, MORE, FFN, DEPTH),
    "mistral": (WIDE, MORE, FFN, DEPTH),
    "qwen2": (BOTH, GROUPS, FFN, DEPTH),
    "qwen3": (WIDE, MORE, FFN, DEPTH),
    "phi3": (BOTH, GROUPS, FFN, DEPTH),
    "gemma2": (WIDE, MORE, FFN, DEPTH),
    "olmo2": (BOTH, GROUPS, FFN, DEPTH),
    "mixtral": (WIDE, MORE, FFN, DEPTH),
    "vit": ({"width": 36}, {"width": 48, "heads": 6}, FFN, DEPTH),
}
KINDS = ("width", "heads", "ffn", "depth")
EXACT, FLOOR = 1e-12, 1e-6
PROMISED = {"narrow": 0.11, "shallow": 0.13}  # nats of excess of the middle


def grow_one(name: str, kind: str, changes: dict[str, int | float]) -> Row:
    x = zoo.inputs(name)
    with tempfile.TemporaryDirectory() as home:
        place = Path(home)
        zoo.write(name, place / "small")
        enlarge(place / "small", place / "large", changes)
        small = Model(place / "small")
        grown = alike([small, Model(place / "large")])[0]
        assert isinstance(grown, GrownModel)
        weights = grown.open_weights(torch.float64)
        tied = replace(weights, spec=replace(weights.spec, tied=grown.spec.tied))
        for dtype in (torch.float64, torch.float32):
            export(tied, grown, place / str(dtype), dtype)
        outcomes = {
            (file, dtype): zoo.outcome(name, zoo.reference(place / file, x, dtype)).double()
            for file, dtype in (
                ("small", torch.float64),
                ("small", torch.float32),
                ("torch.float64", torch.float64),
                ("torch.float32", torch.float32),
            )
        }
        wanted = outcomes["small", torch.float64]
        errors = {key: float((found - wanted).abs().max()) for key, found in outcomes.items()}
        return {
            "model": name,
            "grown": kind,
            "float64": errors["torch.float64", torch.float64],
            "float32": errors["torch.float32", torch.float32],
            "own_float32": errors["small", torch.float32],
            "stock": True,  # zoo.reference raises otherwise
            "round_trip": back_again(small, grown, weights),
        }


def back_again(small: Model, grown: GrownModel, weights: Weights) -> str:
    """ "same bits" as stored, or, of a canonical form, the largest relative difference."""
    before = small.load(torch.float64)
    if grown.growth.centred:
        before = canonicalize(before)
    after = grown.growth.shrink(weights)
    slots = zip([before.ends, *before.blocks], [after.ends, *after.blocks], strict=True)
    pairs = [(x[name], y[name]) for x, y in slots for name in x]
    if not grown.growth.centred and all(torch.equal(x.float(), y.float()) for x, y in pairs):
        return "same bits"
    return f"{max(float((x - y).abs().max() / x.abs().max().clamp(min=1e-30)) for x, y in pairs):.0e}"


def align_one(directory: Path, name: str, steps: int) -> Row:
    text = ROOT / "examples" / "pair"
    files = ["--data", text / "train.npy", "--val", text / "val.npy"]
    with tempfile.TemporaryDirectory() as home:
        place = Path(home)
        out, pair = place / "out", (directory / name, text / "a")
        more = ["--steps", steps]
        status, _, _, errors = lmc_fast(*("align", *pair, *files, "--dtype", "float32", "--out", out, "--quiet", *more))
        if status:
            raise SystemExit(f"align failed on {name}: {errors}")
        alignment = lmc.Alignment.load(out / "alignment.safetensors")
        matched = lmc.Alignment(*alignment.matched, alignment.matched, alignment.info)
        lmc.export(lmc.open_pair(*pair), matched, place / "matched", torch.float32)
        tokens = torch.from_numpy(np.load(text / "train.npy")[:65536].astype(np.int64)).view(-1, 128)
        lmc.grow(*pair, place / "grown", tokens=tokens, dtype=torch.float32)
        own = stock_losses(pair[0], pair[0], text / "test.npy", 2, None)[0]
        naive = stock_losses(place / "grown", pair[1], text / "test.npy", 3, None)
        after_matching = stock_losses(place / "matched" / "a", place / "matched" / "b", text / "test.npy", 3, None)
        learned = stock_losses(out / "a", out / "b", text / "test.npy", 11, None)
        record = alignment.info["grown"][0]
        return {
            "model": name,
            "with": "examples/pair/a",
            "places": " ".join(map(str, record["places"])),
            "chosen": record["chosen"],
            "steps": len(alignment.info["history"]["loss"]),
            "loss": round(own, 4),
            "loss_moved": f"{abs(naive[0] - own):.1e}",
            "loss_of_a": round(naive[-1], 4),
            "naive": round(barrier(naive), 4),
            "matched": round(barrier(after_matching), 4),
            "learned": round(learned[5] - (learned[0] + learned[-1]) / 2, 4),
            "learned_barrier": round(barrier(learned), 4),
        }


def align_three(directory: Path, steps: int) -> Row:
    """Two smaller models of different shapes with one that is larger than both: excess of the average of all."""
    text, models = ROOT / "examples" / "pair", [directory / "narrow", directory / "shallow"]
    larger = text / "a"
    files = ["--data", text / "train.npy", "--val", text / "val.npy"]
    with tempfile.TemporaryDirectory() as home:
        out = Path(home) / "out"
        more = ["--dtype", "float32", "--out", out, "--quiet", "--steps", steps]
        status, _, _, errors = lmc_fast("align", *models, larger, *files, *more)
        if status:
            raise SystemExit(f"align failed on three: {errors}")
        grown = [Path(home) / model.name for model in models]
        tokens = torch.from_numpy(np.load(text / "train.npy")[:65536].astype(np.int64)).view(-1, 128)
        for model, place in zip(models, grown, strict=True):
            lmc.grow(model, larger, place, tokens=tokens, dtype=torch.float32)
        naive = measured([*grown, larger], text / "test.npy", None, inside_too=False)
        learned = measured([out / name for name in "abc"], text / "test.npy", None, inside_too=False)
        return {
            "model": "narrow and shallow",
            "with": "examples/pair/a",
            "steps": steps,
            "naive": naive["average"],
            "learned": learned["average"],
            "learned_barrier": learned["worst_edge"],
        }


def problems_of(row: Row) -> list[str]:
    """What a row of the families breaks."""
    found = []
    if row["float64"] > EXACT:
        found.append(f"{row['float64']:.1e} in float64")
    if row["float32"] > 2 * row["own_float32"] + FLOOR:
        found.append(f"{row['float32']:.1e} in float32, the original {row['own_float32']:.1e}")
    if row["round_trip"] != "same bits" and float(row["round_trip"]) > 1e-15:
        found.append(f"shrinks to something else by {row['round_trip']}")
    return found


def main() -> int:
    parser = options(__doc__.split("\n", 1)[0])
    parser.add_argument("--trained", type=Path, metavar="DIR", help="trained models of several sizes")
    parser.add_argument("--steps", type=int, default=500, help="of learning (default: 500)")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of the trained models (default: all)")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows, problems = [], []
    if args.trained is None:
        for name, sizes in list(FAMILIES.items())[: 2 if args.quick else None]:
            for kind, changes in zip(KINDS, sizes, strict=True):
                row = grow_one(name, kind, changes)
                problems += [f"{name}, {kind}: {problem}" for problem in problems_of(row)]
                rows.append(row | provenance(*SOURCES))
                print(
                    f"{name:10} {kind:6} float64 {row['float64']:.1e}  float32 {row['float32']:.1e} (original "
                    f"{row['own_float32']:.1e})  shrunk: {row['round_trip']}"
                )
        target = RESULTS / "growth.csv"
    else:
        for name in args.names or ("narrow", "shallow", "small", "three"):
            steps = 20 if args.quick else args.steps
            row = align_three(args.trained, steps) if name == "three" else align_one(args.trained, name, steps)
            if row["learned"] > PROMISED.get(name, row["naive"] / 2):
                problems.append(f"{name}: excess {row['learned']} > {PROMISED.get(name, row['naive'] / 2)}")
            rows.append(row | provenance(*SOURCES))
            print(", ".join(f"{key} {value}" for key, value in row.items()))
        target = RESULTS / "growth-trained.csv"
        rows = [row for row in read_csv(target) if row["model"] not in {r["model"] for r in rows}] + rows
    if args.json:
        write_json(args.json, rows)
    if not args.quick:
        write_csv(target, rows)
    for problem in problems:
        print("missed:", problem, file=sys.stderr)
    return 1 if args.check and problems else 0


if __name__ == "__main__":
    sys.exit(main())
