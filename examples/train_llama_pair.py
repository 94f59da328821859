#!/usr/bin/env python3
"""Train two small Llama models (RMSNorm, RoPE, grouped queries, SwiGLU) on one text, align them, report the barriers.

    python examples/train_llama_pair.py --out DIR            # minutes, one thread

Both read the tokens of examples/pair/train.npy from other random weights and in another order. DIR/a and DIR/b are the
trained models, DIR/aligned what lmc_fast made of them; the last lines printed are rows of the table in docs/pairs.md.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from train_small_pair import train
from transformers.utils.logging import disable_progress_bar

import lmc_fast as lmc

DATA = Path(__file__).resolve().parent / "pair"
SEEDS = {"a": 1, "b": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500, help="of training")
    parser.add_argument("--align-steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--block", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    ids = {part: torch.from_numpy(np.load(DATA / f"{part}.npy").astype(np.int64)) for part in ("train", "val", "test")}
    args.vocab = int(max(part.max() for part in ids.values())) + 1
    start = time.perf_counter()
    for name, seed in SEEDS.items():
        if not (args.out / name / "config.json").exists():
            train("llama", ids["train"], ids["val"], seed, args).save_pretrained(args.out / name)
    trained = time.perf_counter() - start

    pair = lmc.open_pair(args.out / "a", args.out / "b")
    tokens, val, test = (lmc.read_tokens(DATA / f"{part}.npy", pair.a, args.block) for part in ("train", "val", "test"))
    naive = lmc.barrier(pair, test, name="naive")
    start = time.perf_counter()
    found = lmc.align(pair, tokens, validation=val, steps=args.align_steps)
    seconds = time.perf_counter() - start
    lmc.export(pair, found, args.out / "aligned")
    matched = lmc.barrier(pair, test, lmc.Alignment(*found.matched, found.matched))
    learned = lmc.barrier(lmc.open_pair(args.out / "aligned" / "a", args.out / "aligned" / "b"), test)
    print(f"{' '.join(sys.argv)}: training {trained:.0f} s, aligning {seconds:.0f} s")
    print("| pair | loss a | loss b | naive barrier | matched | learned | share of naive |")
    print(
        f"| Llama | {naive.losses[0]:.3f} | {naive.losses[-1]:.3f} | {naive.barrier:.3f} | {matched.barrier:.3f} "
        f"| {learned.barrier:.3f} | {learned.barrier / naive.barrier:.1%} |"
    )


if __name__ == "__main__":
    main()
