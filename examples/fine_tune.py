#!/usr/bin/env python3
"""Fine-tune one model of examples/pair on Python code, and carry what it learned over to the other one.

    python examples/fine_tune.py                      # some minutes, one thread; everything goes to carry-out/
    python examples/fine_tune.py --out DIR --alignment DIR/alignment.safetensors --steps N

The pair was trained on Python's documentation. b is trained on for a while on the source code of the standard library,
which every Python installation carries (nothing is downloaded, nothing of it is kept). What it learned is then brought
to a, which never sees any code: `lmc-fast align --method weight` once, `lmc-fast carry` for the child. Printed is how
much of b's gain on code a receives, and what it costs a on documentation.
"""

import argparse
import ast
import math
import random
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

PAIR = Path(__file__).resolve().parent / "pair"
SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__", "encodings"}
LENGTH = 128  # tokens in a sequence


def code(source: bytes) -> str:
    """A module's statements, without comments and docstrings: those the pair has read as documentation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        tree = ast.parse(source)
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def python_code(model: Path, train: int = 400_000, test: int = 40_000) -> tuple[Tensor, Tensor]:
    """Token ids of the standard library's code: (n, LENGTH) to train on, and (m, LENGTH) of other modules to test."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [f for f in sorted(root.rglob("*.py")) if not SKIP.intersection(f.relative_to(root).parts)]
    random.Random(0).shuffle(files)
    tokenizer, found = AutoTokenizer.from_pretrained(model), []
    for size in (test, train):
        ids: list[int] = []
        while files and len(ids) < size:
            ids += [*tokenizer(code(files.pop().read_bytes()), verbose=False)["input_ids"][: size // 10], 0]
        found.append(torch.tensor(ids[: min(size, len(ids)) // LENGTH * LENGTH]).view(-1, LENGTH))
    return found[1], found[0]


def documentation() -> Tensor:
    """The pair's test tokens, (n, LENGTH)."""
    ids = torch.from_numpy(np.load(PAIR / "test.npy").astype(np.int64))
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats."""
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:].flatten())


@torch.no_grad()
def measured(model: nn.Module | Path, ids: Tensor) -> float:
    """The same of many sequences, by transformers in float32."""
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return sum(loss(model.eval(), part).item() * len(part) for part in ids.split(32)) / len(ids)


def train(model: nn.Module, ids: Tensor, steps: int, rate: float, batch: int = 16, seed: int = 0) -> None:
    """AdamW on the parameters that want a gradient; the rate falls as half a cosine after a short warm-up."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss(model, ids[torch.randint(len(ids), (batch,), generator=generator)]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def fine_tune(model: Path, out: Path, ids: Tensor, steps: int = 150, rate: float = 1e-3) -> Path:
    """Trains all weights of a checkpoint on ids (n, LENGTH); writes the child in float32, with its tokenizer."""
    child = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    train(child, ids, steps, rate)
    child.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    return out


def lmc_fast(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "lmc_fast", *map(str, arguments)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("carry-out"))
    parser.add_argument("--alignment", type=Path, help="of the pair, made before, beside a/ and b/")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--weight", type=float, default=1.0, help="how much of what was learned is added to a")
    args = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(1)

    train_ids, test_ids = python_code(PAIR / "b")
    child = fine_tune(PAIR / "b", args.out / "child", train_ids, args.steps)
    if args.alignment is None:
        data = ["--data", PAIR / "train.npy", "--val", PAIR / "val.npy", "--method", "weight", "--dtype", "float32"]
        lmc_fast("align", PAIR / "a", PAIR / "b", *data, "--out", args.out / "aligned")
        args.alignment = args.out / "aligned" / "alignment.safetensors"
    aligned_a, carried = args.alignment.parent / "a", args.out / "carried"
    onto = ["--onto", aligned_a, "--weight", args.weight, "--out", carried]
    lmc_fast("carry", args.alignment, child, "--from", "b", *onto)

    models = {"a": PAIR / "a", "b": PAIR / "b", "b, trained on code": child, "a + what b learned": carried}
    losses = {name: (measured(path, documentation()), measured(path, test_ids)) for name, path in models.items()}
    print(f"\n{'loss, nats per token':24}{'documentation':>15}{'code':>8}")
    for name, (doc, of_code) in losses.items():
        print(f"{name:24}{doc:15.3f}{of_code:8.3f}")
    gain, received = (
        losses[x][1] - losses[y][1] for x, y in (("b", "b, trained on code"), ("a", "a + what b learned"))
    )
    print(f"a receives {received / gain:.0%} of b's own gain on code")


if __name__ == "__main__":
    main()
