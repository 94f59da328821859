"""The main claim: the barrier of trained pairs before and after `lmc-fast align` with its defaults.

    python -m benchmarks.alignment [PAIR ...] [--no-val] [--quick] [--json FILE] [--check]

PAIR: a directory with a/, b/, train.npy, val.npy, test.npy; by default the one in examples/. The barrier is measured by
transformers alone, on the exported stock checkpoints, interpolated tensor by tensor, on the test tokens. The align
command runs in a process of its own; its time and peak memory are taken there. --no-val: without --val, so that a part
of train.npy, which the endpoints have seen, judges; what is promised is then a share of the naive barrier, and the rows
go to alignment-no-val.csv. Rows of other pairs stay.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, logging

from benchmarks.common import RESULTS, ROOT, Row, options, provenance, read_csv, write_csv, write_json

PROMISED = {"gpt2_shakespeare": 0.015, "neox_mixed": 0.10, "pair": 0.15}  # nats, by the pair's directory name
ENDPOINT_SHIFT = 1e-4  # nats that an endpoint's own test loss may move
UNSEEN = 0.06  # of the naive barrier, of any pair, without --val
SECONDS = 600
BLOCK = 128


@torch.no_grad()
def stock_losses(a: Path, b: Path, tokens: Path, points: int, limit: int | None) -> list[float]:
    """Test losses (nats per token) at `points` lambdas between two checkpoints, by transformers alone, float32."""
    model, other = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (a, b))
    left = {name: t.clone() for name, t in model.state_dict().items()}
    right = other.state_dict()
    ids = torch.from_numpy(np.load(tokens).astype(np.int64))
    blocks = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)[:limit]
    losses = []
    for i in range(points):
        model.load_state_dict({name: torch.lerp(left[name], right[name], i / (points - 1)) for name in left})
        total = 0.0
        for part in blocks.split(32):
            logits = model(input_ids=part).logits[:, :-1]
            total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()).item() * len(part)
        losses.append(total / len(blocks))
    return losses


def barrier(losses: list[float]) -> float:
    last = len(losses) - 1
    return max(x - ((last - i) * losses[0] + i * losses[-1]) / last for i, x in enumerate(losses))


def measure(pair: Path, quick: bool, validated: bool) -> Row:
    points, limit = (3, 64) if quick else (11, None)
    naive = stock_losses(pair / "a", pair / "b", pair / "test.npy", points, limit)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        command = [sys.executable, "-m", "lmc_fast", "align", pair / "a", pair / "b", "--data", pair / "train.npy"]
        val = Path(scratch) / "val.npy"
        np.save(val, np.load(pair / "val.npy")[: BLOCK * limit if limit else None])
        command += ["--val", val] if validated else []
        command += ["--dtype", "float32", "--out", out, "--quiet"]
        command += ["--steps", "20", "--batch", "8"] if quick else []
        start = time.perf_counter()
        process = subprocess.Popen([str(c) for c in command], cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            raise SystemExit(f"align failed on {pair}")
        aligned = stock_losses(out / "a", out / "b", pair / "test.npy", points, limit)
    return {
        "pair": pair.name,
        "val": validated,
        "naive": round(barrier(naive), 4),
        "aligned": round(barrier(aligned), 4),
        "middle_excess": round(aligned[len(aligned) // 2] - (aligned[0] + aligned[-1]) / 2, 4),
        "endpoint_shift": max(abs(aligned[i] - naive[i]) for i in (0, -1)),
        "loss_a": round(aligned[0], 4),
        "loss_b": round(aligned[-1], 4),
        "seconds": round(seconds, 1),
        "peak_rss_mib": usage.ru_maxrss // 1024,
        "threads": torch.get_num_threads(),
    }


def missed(row: Row, quick: bool) -> str | None:
    """The promise that a row breaks, or None."""
    if row["endpoint_shift"] > ENDPOINT_SHIFT:
        return f"an endpoint's loss moved by {row['endpoint_shift']:.1e}"
    promised = PROMISED.get(row["pair"], row["naive"] / 2) if row["val"] else UNSEEN * row["naive"]
    limit = row["naive"] / 2 if quick else promised
    if row["aligned"] > limit:
        return f"barrier {row['aligned']} > {limit}"
    if not quick and row["seconds"] > SECONDS:
        return f"{row['seconds']} s > {SECONDS} s"
    return None


def main() -> int:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="*", type=Path, default=[ROOT / "examples" / "pair"])
    parser.add_argument("--no-val", action="store_true")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows, problems = [], []
    print(f"{'pair':18}{'naive':>8}{'aligned':>9}{'middle':>9}{'endpoints moved':>17}{'seconds':>9}{'MiB':>7}")
    for pair in args.pairs:
        row = measure(pair.resolve(), args.quick, not args.no_val)
        rows.append(row | provenance("lmc_fast", "csrc", "benchmarks", "examples"))
        print(
            f"{row['pair']:18}{row['naive']:8.4f}{row['aligned']:9.4f}{row['middle_excess']:+9.4f}"
            f"{row['endpoint_shift']:17.1e}{row['seconds']:9.1f}{row['peak_rss_mib']:7}"
        )
        problem = missed(row, args.quick)
        if problem:
            problems.append(f"{row['pair']}: {problem}")
    print(f"barriers in nats per token on test tokens, {rows[0]['device']}, torch {rows[0]['torch']}")
    if args.json:
        write_json(args.json, rows)
    if not args.quick:
        target = RESULTS / ("alignment-no-val.csv" if args.no_val else "alignment.csv")
        others = [row for row in read_csv(target) if row["pair"] not in {row["pair"] for row in rows}]
        write_csv(target, others + rows)
    for problem in problems:
        print("missed:", problem, file=sys.stderr)
    return 1 if args.check and problems else 0


if __name__ == "__main__":
    sys.exit(main())
