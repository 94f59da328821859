"""The learning defaults against their neighbours: barrier and seconds of each variant on one pair, at equal steps.

    python -m benchmarks.learning [PAIR] [--steps N] [--quick] [--json FILE] [--check]

PAIR: a directory with a/, b/, train.npy, test.npy (default: examples/pair). One thread; seconds are process CPU time.
--check: the defaults are not worse than any variant by more than 0.01 nats.
"""

import sys
import time
from pathlib import Path

import torch

from benchmarks.common import RESULTS, ROOT, Row, options, provenance, write_csv, write_json
from lmc_fast import Pair, Schedule, align, barrier, open_pair, read_tokens

VARIANTS: dict[str, dict] = {
    "default": {},
    "one-sided": {"method": "one-sided"},
    "one-sided, twice the rate": {"method": "one-sided", "matrix_lr": 2 * Schedule.matrix_lr},
    "loss on the text": {"objective": "text"},
    "half the rate": {"matrix_lr": Schedule.matrix_lr / 2},
    "twice the rate": {"matrix_lr": 2 * Schedule.matrix_lr},
    "lambda in [.2, .8]": {"low": 0.2, "high": 0.8},
    "lambda in [.45, .55]": {"low": 0.45, "high": 0.55},
    "matching on weights alone": {"activations": 0.0},
    "half the batch, twice the steps": {"batch": 4, "stretch": 2},
}
TOLERANCE = 0.01
BATCH = 8


def measure(pair: Pair, name: str, steps: int, tokens: torch.Tensor, test: torch.Tensor) -> Row:
    variant = {"batch": BATCH} | VARIANTS[name]
    start = time.process_time()
    alignment = align(pair, tokens, steps=steps * variant.pop("stretch", 1), **variant)
    seconds = time.process_time() - start
    curve = barrier(pair, test, alignment)
    middle = curve.excess[len(curve.excess) // 2]
    return {
        "variant": name,
        "barrier": round(curve.barrier, 4),
        "middle": round(middle, 4),
        "seconds": round(seconds, 1),
    }


def main() -> int:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("pair", nargs="?", type=Path, default=ROOT / "examples" / "pair")
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pair = open_pair(args.pair / "a", args.pair / "b")
    tokens, test = (read_tokens(args.pair / name, pair.a, 128) for name in ("train.npy", "test.npy"))
    names = ["default", "loss on the text"] if args.quick else list(VARIANTS)
    steps, test = (20, test[:32]) if args.quick else (args.steps, test[::2])
    print(f"{args.pair.name}, {steps} steps of {BATCH} blocks\n{'variant':34}{'barrier':>9}{'middle':>9}{'CPU s':>8}")
    rows = []
    for name in names:
        row = measure(pair, name, steps, tokens, test)
        rows.append(row | {"pair": args.pair.name, "steps": steps} | provenance("lmc_fast", "csrc", "benchmarks"))
        print(f"{name:34}{row['barrier']:9.4f}{row['middle']:+9.4f}{row['seconds']:8.1f}", flush=True)
    if args.json:
        write_json(args.json, rows)
    if not args.quick:
        write_csv(RESULTS / f"learning-{args.pair.name}.csv", rows)
    best = min(row["barrier"] for row in rows)
    bad = rows[0]["barrier"] > best + TOLERANCE
    if bad:
        print(f"missed: the default reaches {rows[0]['barrier']}, the best variant {best}", file=sys.stderr)
    return 1 if args.check and bad else 0


if __name__ == "__main__":
    sys.exit(main())
