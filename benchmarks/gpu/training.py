"""Endpoints trained on the spot: Pythia's shape, on the source text of the installed Python packages.

Everything lies in one directory and is made once: train.npy, val.npy, test.npy, seed0/, seed1/. What is being trained
is saved every SAVE_SECONDS and when the time is up, and goes on from there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import random
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, logging

from benchmarks.common import Row
from benchmarks.gpu.rows import Clock, Unfinished

SAVE_SECONDS = 45.0
MARGIN = 20.0  # seconds before the time is up that are kept for saving


@dataclass(frozen=True)
class Recipe:
    """Sizes of text, model and training. seconds and steps: whichever ends first."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    vocab: int = 16384
    text_bytes: int = 160_000_000
    length: int = 512
    batch: int = 32
    rate: float = 1e-3
    seconds: float = 180.0
    steps: int = 1_000_000


QUICK = Recipe(64, 2, 2, 300, 400_000, 32, 4, 3e-3, 60.0, 20)


def source_files(limit: int) -> Iterator[tuple[str, str]]:
    """(part, text) of Python files in site-packages, each text once; part: train, val or test, by the text's digest.

    About `limit` bytes, but some of each part.
    """
    roots = {Path(sysconfig.get_paths()[name]) for name in ("purelib", "platlib")}
    files = sorted(file for root in roots for file in root.rglob("*.py"))
    random.Random(0).shuffle(files)
    seen: set[bytes] = set()
    parts: set[str] = set()
    total = 0
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) < 200 or digest in seen:
            continue
        seen.add(digest)
        total += len(text)
        part = "test" if digest[0] < 6 else "val" if digest[0] < 12 else "train"
        parts.add(part)
        yield part, text
        if total >= limit and len(parts) == 3:
            return


def make_corpus(directory: Path, recipe: Recipe) -> Row:
    """train.npy, val.npy, test.npy (uint16), tokenizer.json where `tokenizers` is installed, about.json."""
    about = directory / "about.json"
    if about.exists():
        return json.loads(about.read_text())
    directory.mkdir(parents=True, exist_ok=True)
    texts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for part, text in source_files(recipe.text_bytes):
        texts[part].append(text)
    row: Row = {"files": sum(map(len, texts.values())), "text_bytes": sum(len(t) for p in texts.values() for t in p)}
    if importlib.util.find_spec("tokenizers"):
        row |= {"tokenizer": "byte-level BPE, trained here"}
        encode, row["vocab"] = _bpe(texts["train"], recipe.vocab, directory / "tokenizer.json")
    else:
        row |= {"tokenizer": "bytes", "vocab": 257}
        encode = _bytes
    for part, some in texts.items():
        ids = encode(some)
        np.save(directory / f"{part}.npy", ids)
        row[f"{part}_tokens"] = len(ids)
    about.write_text(json.dumps(row))
    return row


def _bpe(texts: list[str], vocab: int, file: Path) -> tuple[Any, int]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    sample = texts[: max(1, len(texts) // 8)]
    tokenizer.train_from_iterator(sample, trainer)
    tokenizer.save(str(file))

    def encode(some: list[str]) -> np.ndarray:
        parts = []
        for start in range(0, len(some), 512):
            for found in tokenizer.encode_batch(some[start : start + 512]):
                parts.append(np.array([*found.ids, 0], dtype=np.uint16))
        return np.concatenate(parts) if parts else np.zeros(0, np.uint16)

    return encode, tokenizer.get_vocab_size()


def _bytes(texts: list[str]) -> np.ndarray:
    """A text's bytes plus one, each text closed by 0."""
    parts = [np.append(np.frombuffer(t.encode(), np.uint8).astype(np.uint16) + 1, np.uint16(0)) for t in texts]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint16)


def blocks(file: Path, length: int, most: int | None = None) -> Tensor:
    """(n, length) int64, evenly from the whole file where there are more than `most`."""
    ids = np.load(file, mmap_mode="r")
    count = len(ids) // length
    picked = np.arange(count) if most is None or count <= most else np.linspace(0, count - 1, most).astype(int)
    rows = np.stack([ids[i * length : (i + 1) * length] for i in picked])
    return torch.from_numpy(rows.astype(np.int64))


def new_model(recipe: Recipe, vocab: int) -> Any:
    config = GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=4 * recipe.width,
        max_position_embeddings=2048,
        use_parallel_residual=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPTNeoXForCausalLM(config)


class Training:
    """One endpoint: its weights and its order of the text follow from `seed`. The schedule goes by time and steps."""

    def __init__(self, directory: Path, seed: int, recipe: Recipe, device: torch.device):
        self.directory, self.seed, self.recipe, self.device = directory, seed, recipe, device
        self.result, self.state = directory / f"seed{seed}", directory / f"seed{seed}.pt"
        self.ids = torch.from_numpy(np.load(directory / "train.npy").astype(np.int32))
        torch.manual_seed(seed)
        self.model = new_model(recipe, json.loads((directory / "about.json").read_text())["vocab"])
        self.model.to(device)
        on_gpu = device.type == "cuda"
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        plain = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.95), fused=on_gpu)
        self.steps, self.seconds, self.losses = 0, 0.0, list[float]()
        if self.state.exists():
            saved = torch.load(self.state, map_location=device, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.steps, self.seconds, self.losses = saved["steps"], saved["seconds"], saved["losses"]

    @property
    def progress(self) -> float:
        return max(self.steps / self.recipe.steps, self.seconds / self.recipe.seconds)

    def run(self, clock: Clock) -> Row:
        """Trains to the end and writes a stock checkpoint. Raises Unfinished, with all saved, where time is short."""
        saved_at = time.monotonic()
        while self.progress < 1:
            began = time.monotonic()
            for _ in range(10):
                if self.progress < 1:
                    self._step()
            self.losses.append(self._loss.item())  # waits for the device
            self.seconds += time.monotonic() - began
            if clock.left < MARGIN:
                self._save()
                raise Unfinished(f"trained {self.seconds:.0f} of {self.recipe.seconds:.0f} s, to be continued")
            if time.monotonic() - saved_at > SAVE_SECONDS:
                self._save()
                saved_at = time.monotonic()
        self.model.config.architectures = ["GPTNeoXForCausalLM"]
        logging.disable_progress_bar()
        self.model.save_pretrained(self.result)
        tokens = self.steps * self.recipe.batch * self.recipe.length
        row: Row = {
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "tokens": tokens,
            "tokens_per_second": round(tokens / self.seconds),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "first_loss": round(self.losses[0], 4),
            "last_loss": round(self.losses[-1], 4),
            "val_loss": round(self.validate(), 4),
        }
        (self.result / "training.json").write_text(json.dumps(row))
        self.state.unlink(missing_ok=True)
        return row

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _step(self) -> None:
        recipe = self.recipe
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.steps)
        starts = torch.randint(len(self.ids) - recipe.length, (recipe.batch,), generator=generator)
        rows = torch.stack([self.ids[s : s + recipe.length] for s in starts.tolist()]).long()
        batch = rows.to(self.device)
        done = self.progress
        rate = min(1.0, done / 0.02 + 0.01) * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate * rate
        with self._autocast():
            loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._loss = loss.detach()
        self.steps += 1

    @torch.no_grad()
    def validate(self) -> float:
        total, parts = 0.0, blocks(self.directory / "val.npy", self.recipe.length, 128).split(self.recipe.batch)
        self.model.eval()
        for part in parts:
            with self._autocast():
                total += self.model(input_ids=part.to(self.device), labels=part.to(self.device)).loss.item()
        return total / len(parts)

    def _save(self) -> None:
        partial = self.state.with_suffix(".partial")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"steps": self.steps, "seconds": self.seconds, "losses": self.losses}, partial)
        os.replace(partial, self.state)


def trained(directory: Path, seed: int, recipe: Recipe, device: torch.device, clock: Clock) -> Row:
    """Trains an endpoint unless it is there."""
    done = directory / f"seed{seed}" / "training.json"
    if done.exists():
        return json.loads(done.read_text())
    make_corpus(directory, recipe)
    return Training(directory, seed, recipe, device).run(clock)
