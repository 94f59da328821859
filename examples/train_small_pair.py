#!/usr/bin/env python3
"""Train two small models of one family, from other random weights and in another order of one text.

    python examples/train_small_pair.py --family llama --out DIR     # minutes, one thread; also neox, qwen3

DIR/a and DIR/b are float16 checkpoints, DIR/train.npy, val.npy and test.npy the text, as in examples/pair. The text is
that of examples/pair (--text docs), or the source code of Python's standard library (--text code) with a vocabulary of
its own. `python -m benchmarks.alignment DIR` measures the pair.
"""

import argparse
import math
import sysconfig
from pathlib import Path

import numpy as np
import torch
from train_pair import SKIP, batches, encode, evaluate, next_token_loss, split, train_tokenizer
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

DATA = Path(__file__).resolve().parent / "pair"
LETTERS = 2_400_000  # of source code that are read
PARTS = ("train", "val", "test")


def build(family: str, vocab: int, block: int) -> PreTrainedModel:
    shape = {"vocab_size": vocab, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    shape |= {"max_position_embeddings": block, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0}
    if family == "neox":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, intermediate_size=512, rope_parameters=rope))
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2, intermediate_size=344))
    return Qwen3ForCausalLM(Qwen3Config(**shape, num_key_value_heads=2, head_dim=32, intermediate_size=344))


def code() -> dict[str, str]:
    """Name -> source of each module of the standard library, as far as LETTERS go."""
    root, found, letters = Path(sysconfig.get_paths()["stdlib"]), {}, 0
    for path in sorted(root.rglob("*.py"), key=lambda path: path.name):
        parts = path.relative_to(root).parts
        if SKIP.isdisjoint(parts) and not parts[0].startswith("config-") and letters < LETTERS:
            text = path.read_text(encoding="utf-8", errors="ignore")
            if 2_000 < len(text) < 60_000:
                found["/".join(parts)], letters = text, letters + len(text)
    return found


def train(family: str, ids: torch.Tensor, val: torch.Tensor, seed: int, args: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = build(family, args.vocab, args.block)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    stream = batches(ids, args.block, args.batch, torch.Generator().manual_seed(1000 + seed))
    for step in range(args.steps):
        share = min(1.0, (step + 1) / 60) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * share
        loss = next_token_loss(model, next(stream))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1:5d}  val {evaluate(model, val[: 64 * args.block], args.block):.3f}", flush=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", choices=("llama", "neox", "qwen3"), required=True)
    parser.add_argument("--text", choices=("docs", "code"), default="docs")
    parser.add_argument("--seeds", type=int, nargs=2, default=(1, 2))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--block", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.text == "code":
        texts = split(code(), share=0.05, seed=0)
        tokenizer = train_tokenizer(texts["train"], args.vocab)
        ids = {part: encode(tokenizer, texts[part]) for part in PARTS}
    else:
        ids, tokenizer = {part: np.load(DATA / f"{part}.npy") for part in PARTS}, None
    for part, tokens in ids.items():
        np.save(args.out / f"{part}.npy", tokens)
    train_ids, val = (torch.from_numpy(ids[part].astype(np.int64)) for part in ("train", "val"))
    for name, seed in zip("ab", args.seeds, strict=True):
        if not (args.out / name / "config.json").exists():
            train(args.family, train_ids, val, seed, args).half().save_pretrained(args.out / name)
        if tokenizer is not None:
            tokenizer.save_pretrained(args.out / name)


if __name__ == "__main__":
    main()
