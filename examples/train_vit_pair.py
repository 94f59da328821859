#!/usr/bin/env python3
"""Train two small vision transformers on MNIST's 10,000 test digits, align them, report barriers and accuracies.

    python examples/train_vit_pair.py --data DIRECTORY --out DIR      # minutes, one thread

DIRECTORY holds mnist_t10k-images-idx3-ubyte.gz and mnist_t10k-labels-idx1-ubyte.gz. 8,000 digits train the models, one
tenth of them also choose the alignment's best state; 2,000 are for the report. DIR/a and DIR/b are the trained models,
DIR/aligned what lmc_fast made of them, DIR/test.npz the held-out digits.
"""

import argparse
import gzip
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils.logging import disable_progress_bar

import lmc_fast as lmc

SEEDS = {"a": 1, "b": 2}
TRAINING = 8000


def read_digits(directory: Path) -> tuple[Tensor, Tensor]:
    """Images (10000, 1, 28, 28) float32 about [-1, 1], labels (10000,) int64, in one fixed random order."""
    with gzip.open(directory / "mnist_t10k-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(directory / "mnist_t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    order = np.random.default_rng(0).permutation(len(labels))
    images = torch.from_numpy(pixels[order].astype(np.float32)) / 127.5 - 1
    return images, torch.from_numpy(labels[order].astype(np.int64))


def build() -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=28,
        patch_size=7,
        num_channels=1,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each batch moved by up to two pixels."""
    down, right = (int(n) for n in torch.randint(-2, 3, (2,), generator=generator))
    return images.roll((down, right), dims=(2, 3))


def train(images: Tensor, labels: Tensor, seed: int, args: argparse.Namespace) -> ViTForImageClassification:
    torch.manual_seed(seed)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    generator = torch.Generator().manual_seed(1000 + seed)
    steps = args.epochs * (len(images) // args.batch)
    done = 0
    for epoch in range(args.epochs):
        total = 0.0
        order = torch.randperm(len(images), generator=generator)[: len(images) // args.batch * args.batch]
        for rows in order.view(-1, args.batch):
            share = min(1.0, (done + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * done / steps)))
            for group in optimizer.param_groups:
                group["lr"] = args.lr * share
            logits = model(pixel_values=shifted(images[rows], generator)).logits
            loss = torch.nn.functional.cross_entropy(logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item()
            done += 1
        print(f"epoch {epoch + 1:3d}  train {total * args.batch / len(order):.4f}", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--align-steps", type=int, default=600)
    parser.add_argument("--align-batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    images, labels = read_digits(args.data)
    start = time.perf_counter()
    for name, seed in SEEDS.items():
        if not (args.out / name / "config.json").exists():
            train(images[:TRAINING], labels[:TRAINING], seed, args).save_pretrained(args.out / name)
    trained = time.perf_counter() - start

    held = TRAINING * 9 // 10
    parts = {"calibration": slice(0, held), "val": slice(held, TRAINING), "test": slice(TRAINING, None)}
    for name, rows in parts.items():
        np.savez(args.out / f"{name}.npz", images=images[rows].numpy(), labels=labels[rows].numpy())
    pair = lmc.open_pair(args.out / "a", args.out / "b")
    calibration, val, test = (lmc.read_images(args.out / f"{name}.npz", pair.a) for name in parts)
    naive = lmc.barrier(pair, test, name="naive")
    start = time.perf_counter()
    found = lmc.align(pair, calibration, validation=val, steps=args.align_steps, batch=args.align_batch)
    seconds = time.perf_counter() - start
    lmc.export(pair, found, args.out / "aligned")
    matched = lmc.barrier(pair, test, lmc.Alignment(*found.matched, found.matched))
    learned = lmc.barrier(lmc.open_pair(args.out / "aligned" / "a", args.out / "aligned" / "b"), test)
    print(f"{' '.join(sys.argv)}: training {trained:.0f} s, aligning {seconds:.0f} s")
    print("| pair | accuracy a | accuracy b | lowest on the path: naive | matched | learned | barrier: naive | matched "
          "| learned |")  # fmt: skip
    curves = (naive, matched, learned)
    lowest = " | ".join(f"{min(curve.accuracies or [0]):.2%}" for curve in curves)
    barriers = " | ".join(f"{curve.barrier:.4f}" for curve in curves)
    ends = naive.accuracies or [0.0]
    print(f"| ViT | {ends[0]:.2%} | {ends[-1]:.2%} | {lowest} | {barriers} |")


if __name__ == "__main__":
    main()
