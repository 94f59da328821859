#!/usr/bin/env python3
"""Train two tiny models of one family from other random weights, align them, print a row of docs/pairs.md.

    python examples/train_family_pair.py qwen3 --out DIR            # a few minutes, one thread

Both read the text of examples/pair, cut and shuffled otherwise. Masked language models see 15 % of it masked. DIR/a and
DIR/b are the trained models, DIR/aligned what lmc_fast made of them; barriers are those of held-out text.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

import lmc_fast as lmc

DATA = Path(__file__).resolve().parent / "pair"
SEEDS = {"a": 1, "b": 2}
PARTS = ("train", "val", "test")
MASKED = 0.15  # of the tokens
WIDTH = 96

_ENCODER = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 4 * WIDTH}
_DECODER = _ENCODER | {"num_key_value_heads": 2, "intermediate_size": 256, "tie_word_embeddings": False}
_DECODER |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# family: (configuration, class, options)
FAMILIES = {
    "bert": ("BertConfig", "BertForMaskedLM", _ENCODER | _QUIET),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _DECODER | {"head_dim": 24}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        _DECODER
        | {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 32}
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        _DECODER | {"intermediate_size": 128, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}


def build(family: str, vocab: int, block: int) -> PreTrainedModel:
    config, model, options = FAMILIES[family]
    sizes = {"vocab_size": vocab, "max_position_embeddings": block}
    return getattr(transformers, model)(getattr(transformers, config)(**options, **sizes))


def masked(tokens: Tensor, mask: int, generator: torch.Generator) -> lmc.Examples:
    """Some tokens become `mask`, and are what is to be predicted."""
    hidden = torch.rand(tokens.shape, generator=generator) < MASKED
    hidden[:, 0] |= ~hidden.any(1)
    return lmc.Examples(torch.where(hidden, mask, tokens), torch.where(hidden, tokens, -1))


def batches(ids: Tensor, block: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless (batch, block) pieces: each pass cuts the text at a new offset and shuffles the pieces."""
    while True:
        offset = int(torch.randint(block, (), generator=generator))
        pieces = ids[offset : offset + (len(ids) - offset) // block * block].view(-1, block)
        order = torch.randperm(len(pieces), generator=generator)
        for rows in order[: len(order) // batch * batch].view(-1, batch):
            yield pieces[rows]


def text_loss(model: PreTrainedModel, tokens: Tensor, mask: int | None, generator: torch.Generator) -> Tensor:
    if mask is None:
        logits = model(input_ids=tokens).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    examples = masked(tokens, mask, generator)
    logits = model(input_ids=examples.inputs).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), examples.targets.flatten(), ignore_index=-1)


def train(
    model: PreTrainedModel, draw: Callable[[torch.Generator], Tensor], seed: int, args: argparse.Namespace
) -> None:
    """draw: the loss of the next batch."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    generator, total = torch.Generator().manual_seed(1000 + seed), 0.0
    for step in range(args.steps):
        share = min(1.0, (step + 1) / 60) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * share
        loss = draw(generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1:5d}  train {total / 100:.3f}", flush=True)
            total = 0.0


def train_on_text(family: str, ids: Tensor, vocab: int, seed: int, args: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(seed)
    is_masked = "Masked" in FAMILIES[family][1]
    model = build(family, vocab + is_masked, args.block)
    mask = vocab if is_masked else None
    stream = batches(ids, args.block, args.batch, torch.Generator().manual_seed(seed))
    train(model, lambda generator: text_loss(model, next(stream), mask, generator), seed, args)
    return model


def texts(family: str, args: argparse.Namespace) -> tuple[dict[str, Tensor | lmc.Examples], Tensor, int]:
    """(each part in pieces of `block`, the training text in a row, how many tokens there are)."""
    ids = {part: torch.from_numpy(np.load(DATA / f"{part}.npy").astype(np.int64)) for part in PARTS}
    vocab = 1 + max(int(part.max()) for part in ids.values())
    pieces: dict[str, Tensor | lmc.Examples] = {}
    for part, row in ids.items():
        whole = row[: len(row) // args.block * args.block].view(-1, args.block)
        is_masked = "Masked" in FAMILIES[family][1]
        pieces[part] = masked(whole, vocab, torch.Generator().manual_seed(0)) if is_masked else whole
    return pieces, ids["train"], vocab


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=700, help="of training")
    parser.add_argument("--align-steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--block", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    data, ids, vocab = texts(args.family, args)
    start = time.perf_counter()
    for name, seed in SEEDS.items():
        if not (args.out / name / "config.json").exists():
            train_on_text(args.family, ids, vocab, seed, args).save_pretrained(args.out / name)
    trained = time.perf_counter() - start

    pair = lmc.open_pair(args.out / "a", args.out / "b")
    naive = lmc.barrier(pair, data["test"], name="naive")
    start = time.perf_counter()
    found = lmc.align(pair, data["train"], validation=data["val"], steps=args.align_steps)
    seconds = time.perf_counter() - start
    lmc.export(pair, found, args.out / "aligned")
    matched = lmc.barrier(pair, data["test"], lmc.Alignment(*found.matched, found.matched))
    learned = lmc.barrier(lmc.open_pair(args.out / "aligned" / "a", args.out / "aligned" / "b"), data["test"])
    print(f"{' '.join(sys.argv)}: training {trained:.0f} s, aligning {seconds:.0f} s")
    print("| family | loss a | loss b | naive barrier | matched | learned | learned / naive |")
    print(
        f"| {args.family} | {naive.losses[0]:.3f} | {naive.losses[-1]:.3f} | {naive.barrier:.3f} "
        f"| {matched.barrier:.3f} | {learned.barrier:.3f} | {learned.barrier / naive.barrier:.1%} |"
    )


if __name__ == "__main__":
    main()
