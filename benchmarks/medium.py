"""Pairs of 8 blocks, up to 6.3 million parameters outside the embeddings: the barrier by width, in slices of a night.

    python -m benchmarks.medium DIR [--seconds N] [--steps N] [--align-steps N] [--quick]

DIR keeps what is done: endpoints while and after they are trained, and the alignment's state. A call works for N
seconds, saves and exits with 3; the same command goes on, to the same bits, until all rows are there (exit 0; about ten
hours on one core). Text of examples/pair; barriers by transformers alone on its test text. Rows go to
benchmarks/results/medium.csv.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel, logging

import lmc_fast as lmc
from benchmarks.common import RESULTS, Row, provenance, read_csv, write_csv
from benchmarks.tiny import VOCABULARY, aligned, excesses, loss_of, next_token_loss, text

TARGET = RESULTS / "medium.csv"
WIDTHS, LAYERS, HEAD, LENGTH, BATCH = (64, 128, 256), 8, 32, 128, 16
RATE, WARMUP = 2e-3, 100
UNFINISHED = 3  # exit status: call again
SAVE = 120.0  # seconds between two saves


class TimeUp(Exception):
    """The slice is over; what was done is saved."""


def build(width: int, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    sizes = {"hidden_size": width, "num_attention_heads": width // HEAD, "intermediate_size": 4 * width}
    shape = {"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, "max_position_embeddings": LENGTH}
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, **sizes, rope_parameters=rope))


def put(state: object, file: Path) -> None:
    """Whole or not at all."""
    part = file.with_suffix(".partial")
    torch.save(state, part)
    os.replace(part, file)


def trained(folder: Path, width: int, seed: int, steps: int, end: float) -> PreTrainedModel:
    """A model of so many steps; goes on from what is in `folder`. Raises TimeUp."""
    file, model = folder / f"width-{width}-seed-{seed}.pt", build(width, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.1)
    done, tokens = 0, text("train", LENGTH)
    if file.exists():
        state = torch.load(file, weights_only=True)
        if state["steps"] != steps:
            raise SystemExit(f"{file} belongs to a run of {state['steps']} steps; give --steps {state['steps']}")
        done = state["done"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    saved = time.monotonic()

    def save() -> None:
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        put(parts | {"done": done, "steps": steps}, file)

    while done < steps:
        rows = torch.randint(len(tokens), (BATCH,), generator=torch.Generator().manual_seed(seed * 1_000_003 + done))
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (done + 1) / WARMUP, (steps - done) / (0.6 * steps))
        loss = next_token_loss(model, tokens[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done += 1
        if time.monotonic() > min(end, saved + SAVE) or done == steps:
            save()
            saved = time.monotonic()
            print(f"width {width}, seed {seed}: step {done} of {steps}, loss {loss.item():.3f}", flush=True)
        if time.monotonic() > end and done < steps:
            raise TimeUp
    return model.eval()


def measure(folder: Path, width: int, steps: int, align_steps: int, end: float, few: bool) -> Row:
    """Raises TimeUp."""
    made = [trained(folder, width, seed, steps, end) for seed in (1, 2)]
    places = [folder / f"width-{width}-{name}" for name in "ab"]
    for model, place in zip(made, places, strict=True):
        if not place.exists():
            part = place.with_name(place.name + ".partial")
            model.save_pretrained(part)
            os.replace(part, place)
    pair = lmc.open_pair(*places)
    test = text("test", LENGTH)[: 16 if few else None]
    try:
        found = lmc.align(
            pair,
            text("train", LENGTH),
            steps=align_steps,
            state_file=folder / f"width-{width}-alignment.safetensors",
            cancel=lambda: time.monotonic() > end,
        )
    except lmc.Cancelled as error:
        raise TimeUp from error
    row: Row = {"width": width, "layers": LAYERS, "steps": steps, "align_steps": align_steps}
    blocks = made[0].base_model.layers
    row["parameters"] = sum(p.numel() for p in blocks.parameters())
    row |= {f"loss_{name}": round(loss_of(model, test), 4) for name, model in zip("ab", made, strict=True)}
    row["naive"] = round(excesses(*made, test)[0], 4)
    for kind in ("matched", "learned"):
        barrier, middle = excesses(*aligned(pair, found, kind == "matched"), test)
        row |= {kind: round(barrier, 4), f"{kind}_middle": round(middle, 4)}
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--quick", action="store_true", help="a few steps at width 64; writes no row")
    parser.add_argument("--seconds", type=float, default=600.0, help="of this slice")
    parser.add_argument("--steps", type=int, default=3000, help="of training each endpoint")
    parser.add_argument("--align-steps", type=int, default=1200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    args.folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    steps, align_steps = (4, 2) if args.quick else (args.steps, args.align_steps)
    for width in WIDTHS[:1] if args.quick else WIDTHS:
        known = [] if args.quick else read_csv(TARGET)
        if any(row["width"] == str(width) and row["steps"] == str(steps) for row in known):
            continue
        try:
            row = measure(args.folder, width, steps, align_steps, end, args.quick)
        except TimeUp:
            print("the slice is over; the same command goes on")
            return UNFINISHED
        row |= provenance("lmc_fast", "benchmarks", "examples")
        print(*(f"{key} {value}" for key, value in row.items()), flush=True)
        if not args.quick:
            write_csv(TARGET, [*(r for r in known if r["width"] != str(width)), row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
