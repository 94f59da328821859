#!/usr/bin/env python3
"""Train the pair of tiny language models in examples/pair from text that every Python installation carries.

    python examples/train_pair.py                     # rewrites examples/pair (minutes, one thread)
    python examples/train_pair.py --out DIR --steps N
    python examples/train_pair.py --seeds 4 --siblings --jobs 2 --out DIR   # a, b, c, d, narrow, shallow, small

Two GPT-NeoX models of about a million parameters see the same training text, but start from different random weights
and read the text in different orders. Each is a good model of held-out text; the average of their weights is not. That
gap is what lmc_fast closes. --seeds makes more of them, --siblings also smaller ones: of width 96 (narrow), of 3 blocks
(shallow), of both (small). Nothing is downloaded. The text differs between Python versions; the README.md that is
written with the models names the version used.
"""

import argparse
import ast
import inspect
import math
import platform
import random
import re
import shutil
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

END = "<|endoftext|>"
NAMES = "abcdefghijklmnopqrstuvwxyz"  # a has seed 1, b 2, ...: of the initial weights and of the order of the data
NARROW, SHALLOW = {"hidden_size": 96, "num_attention_heads": 3, "intermediate_size": 384}, {"num_hidden_layers": 3}
SIBLINGS = {"narrow": (5, NARROW), "shallow": (6, SHALLOW), "small": (7, NARROW | SHALLOW)}  # name -> seed, sizes
RUN = 10  # a paragraph that repeats this many words in a row from an earlier one is left out
SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "__pycache__"}

# ---------------------------------------------------------------------------------------------------------------- text


def docstrings(source: bytes) -> list[str]:
    """The docstrings of a module, its classes and its functions, without importing it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        tree = ast.parse(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text for text in found if text]


def collect(shortest: int = 200) -> dict[str, str]:
    """Name -> text, a document per help topic and per module. No two paragraphs share RUN words in a row."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources = {name: [text] for name, text in sorted(topics.items())}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not SKIP.intersection(parts) and not parts[0].startswith("config-"):
            sources["/".join(parts)] = docstrings(path.read_bytes())

    seen: set[tuple[str, ...]] = set()
    documents = {}
    for name, texts in sources.items():
        kept = []
        for paragraph in (p for text in texts for p in re.split(r"\n\s*\n", inspect.cleandoc(text))):
            words = re.findall("[a-z]+", paragraph.lower())
            runs = {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}
            if seen.isdisjoint(runs):
                kept.append(paragraph.rstrip())
                seen |= runs
        text = "\n\n".join(kept).strip("\n")
        if len(text) >= shortest:
            documents[name] = text
    return documents


def split(documents: dict[str, str], share: float, seed: int) -> dict[str, list[str]]:
    """Whole documents in a random order: the first `share` of the text is test, the next validation, the rest train.

    Documents longer than a tenth of that share go to train, so that no single one dominates the held-out text.
    """
    names = sorted(documents)
    random.Random(seed).shuffle(names)
    size = share * sum(map(len, documents.values()))
    splits: dict[str, list[str]] = {"test": [], "val": [], "train": []}
    done = 0
    for name in names:
        text = documents[name]
        if done >= 2 * size or len(text) > size / 10:
            splits["train"].append(text)
        else:
            splits["test" if done < size else "val"].append(text)
            done += len(text)
    random.Random(seed + 1).shuffle(splits["train"])  # so far its long documents are at the front
    return splits


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: any text can be encoded, and decoding gives it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """All documents in a row, an end-of-text token after each."""
    end = tokenizer.convert_tokens_to_ids(END)
    ids = [token for text in texts for token in [*tokenizer.backend_tokenizer.encode(text).ids, end]]
    return np.array(ids, dtype=np.uint16)


# ------------------------------------------------------------------------------------------------------------ training


def build(vocab: int, block: int, **smaller: int) -> GPTNeoXForCausalLM:
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512} | smaller
    config = GPTNeoXConfig(
        **sizes,
        vocab_size=vocab,
        max_position_embeddings=block,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        use_parallel_residual=True,
        tie_word_embeddings=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


def batches(ids: Tensor, block: int, batch: int, generator: torch.Generator):
    """Endless (batch, block) pieces: each pass cuts the text at a new offset and shuffles the blocks."""
    while True:
        offset = int(torch.randint(block, (), generator=generator))
        blocks = ids[offset : offset + (len(ids) - offset) // block * block].view(-1, block)
        order = torch.randperm(len(blocks), generator=generator)
        for rows in order[: len(order) // batch * batch].view(-1, batch):
            yield blocks[rows]


def next_token_loss(model: GPTNeoXForCausalLM, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: GPTNeoXForCausalLM, ids: Tensor, block: int) -> float:
    """Mean next-token cross-entropy in nats over contiguous blocks."""
    blocks = ids[: len(ids) // block * block].view(-1, block)
    pieces = blocks.split(32)
    return sum(next_token_loss(model, piece).item() * len(piece) for piece in pieces) / len(blocks)


def train(
    ids: Tensor, val: Tensor, name: str, seed: int, smaller: dict[str, int], args: argparse.Namespace
) -> GPTNeoXForCausalLM:
    torch.set_num_threads(args.threads)
    torch.manual_seed(seed)
    model = build(args.vocab, args.block, **smaller)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.98))
    stream = batches(ids, args.block, args.batch, torch.Generator().manual_seed(1000 + seed))
    recent: list[float] = []
    for step in range(args.steps):
        warm = min(1.0, (step + 1) / args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        loss = next_token_loss(model, next(stream))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % 100 == 0:
            held_out = evaluate(model, val[: 64 * args.block], args.block)
            print(f"{name}  step {step + 1:5d}  train {np.mean(recent):.3f}  val {held_out:.3f}", flush=True)
            recent.clear()
    return model


def train_all(
    wanted: dict[str, tuple[int, dict[str, int]]], ids: Tensor, val: Tensor, args: argparse.Namespace
) -> Iterator[tuple[str, GPTNeoXForCausalLM]]:
    """Each model with its name, as soon as it is trained; --jobs of them at a time."""
    if args.jobs == 1:
        for name, (seed, smaller) in wanted.items():
            yield name, train(ids, val, name, seed, smaller, args)
        return
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        jobs = {pool.submit(train, ids, val, name, *how, args): name for name, how in wanted.items()}
        for job in as_completed(jobs):
            yield jobs[job], job.result()


# ------------------------------------------------------------------------------------------------------------- the pair


def path_losses(a: GPTNeoXForCausalLM, b: GPTNeoXForCausalLM, ids: Tensor, block: int) -> list[float]:
    """Test loss at 11 points of the straight line from a's weights to b's."""
    left, right = a.state_dict(), b.state_dict()
    between = build(a.config.vocab_size, block)
    losses = []
    for step in range(11):
        between.load_state_dict({name: torch.lerp(left[name], right[name], step / 10) for name in left})
        losses.append(evaluate(between, ids, block))
    return losses


def readme(
    names: list[str], rows: list[str], line: list[float], args: argparse.Namespace, sizes: int, seconds: float
) -> str:
    excess = [loss - ((10 - i) * line[0] + i * line[10]) / 10 for i, loss in enumerate(line)]
    listed = ", ".join(f"`{name}/`" for name in names)
    some, all_of_them = ("Two", "Both") if len(names) == 2 else (str(len(names)), "All")
    small = "" if sizes == 1 else " (narrow: width 96, shallow: 3 layers, small: both)"
    return f"""# {some} tiny language models

Written by `examples/train_pair.py` (Python {platform.python_version()}, torch {torch.__version__.split("+")[0]},
{seconds:.0f} s of training in all, one thread).

- {listed}: GPT-NeoX, 4 layers of width 128{small}, float16,
  with a byte-level BPE of {args.vocab} tokens. {all_of_them} saw the same training text, from different initial
  weights and in different orders: {args.steps} steps of
  {args.batch} x {args.block} tokens each, AdamW, learning rate {args.lr:g}, weight decay {args.weight_decay:g}.
- `train.npy`, `val.npy`, `test.npy`: token ids (uint16), documents in a row with `{END}` after each. A document
  (a help topic, or all docstrings of a module) is in one split only; no two paragraphs share {RUN} words in a row.

Measured on the files in this directory, mean loss per token in nats over blocks of {args.block} tokens:

| split | tokens | unigram | {" | ".join(names)} |
|---|---|---|{"---|" * len(names)}
{chr(10).join(rows)}

Test loss of the weights (1 - λ) a + λ b for λ = 0, 0.1, ..., 1:
{", ".join(f"{loss:.3f}" for loss in line)}.
The largest excess over the straight line between the two ends, the barrier, is **{max(excess):.3f} nats**.

## Origin and licence of the text

The text is CPython's own documentation: the help topics of `pydoc_data.topics` and the docstrings of the standard
library. It was changed as follows: repeated paragraphs and very short documents left out, documents shuffled, the text
cut into tokens. It is used under the PSF License Agreement and the other terms in `LICENSE-PYTHON.txt`, a copy of
CPython's licence file.

```
{sys.copyright.strip()}
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "pair")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--block", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=60, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--ship", type=int, default=700_000, help="at most this many training tokens go into train.npy")
    parser.add_argument("--threads", type=int, default=1, help="of each model that is trained")
    parser.add_argument("--seeds", type=int, default=2, choices=range(2, 27), metavar="N", help="models: a, b, c, ...")
    parser.add_argument("--siblings", action="store_true", help="also a narrow, a shallow and a small one")
    parser.add_argument("--jobs", type=int, default=1, help="models trained at the same time, each in its process")
    parser.add_argument("--keep", action="store_true", help="do not train anew what --out has already")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bar()

    texts = split(collect(), share=0.05, seed=0)
    tokenizer = train_tokenizer(texts["train"], args.vocab)
    ids = {part: encode(tokenizer, texts[part]) for part in ("train", "val", "test")}
    for part, tokens in ids.items():
        letters = sum(map(len, texts[part]))
        print(f"{part}: {len(texts[part])} documents, {letters} characters, {len(tokens)} tokens")
    tensors = {part: torch.from_numpy(tokens.astype(np.int64)) for part, tokens in ids.items()}

    args.out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(Path(sysconfig.get_paths()["stdlib"]) / "LICENSE.txt", args.out / "LICENSE-PYTHON.txt")
    start = time.perf_counter()
    models: dict[str, tuple[int, dict[str, int]]] = {
        name: (seed, {}) for seed, name in enumerate(NAMES[: args.seeds], 1)
    }
    models |= SIBLINGS if args.siblings else {}
    missing = {name: how for name, how in models.items() if not (args.keep and (args.out / name).is_dir())}
    for name, model in train_all(missing, tensors["train"], tensors["val"], args):
        model.half().save_pretrained(args.out / name)
        tokenizer.save_pretrained(args.out / name)
        again = AutoTokenizer.from_pretrained(args.out / name)
        assert again(texts["test"][0])["input_ids"] == tokenizer(texts["test"][0])["input_ids"], "tokenizer changed"
    seconds = time.perf_counter() - start
    shipped = {part: tokens[: args.ship] for part, tokens in ids.items()}
    for part, tokens in shipped.items():
        np.save(args.out / f"{part}.npy", tokens)

    # Everything reported is measured on the float16 checkpoints as saved, computing in float32.
    trained = [AutoModelForCausalLM.from_pretrained(args.out / name, dtype=torch.float32) for name in models]
    counts = np.bincount(ids["train"], minlength=args.vocab) + 1.0
    unigram = -np.log(counts / counts.sum())
    rows = []
    for part, tokens in shipped.items():
        losses = [evaluate(model, tensors[part][: len(tokens)], args.block) for model in trained]
        found = " | ".join(f"{loss:.3f}" for loss in losses)
        rows.append(f"| {part} | {len(tokens)} | {unigram[tokens].mean():.3f} | {found} |")
    line = path_losses(trained[0], trained[1], tensors["test"], args.block)
    text = readme(list(models), rows, line, args, 1 + len(SIBLINGS) * args.siblings, seconds)
    (args.out / "README.md").write_text(text, encoding="utf-8")
    print(*rows, "path: " + " ".join(f"{loss:.3f}" for loss in line), f"{seconds:.0f} s", sep="\n")


if __name__ == "__main__":
    main()
