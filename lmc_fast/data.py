"""Token blocks from a text file, a .jsonl with a `text` field, or a .npy of token ids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .checkpoints import Model
from .errors import LmcError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def read_tokens(path: str | Path, model: Model, length: int, at_least: int = 1) -> Tensor:
    """Token ids cut into contiguous blocks: (n, length) int64. Text is cut by the checkpoint's own tokenizer.

    Raises LmcError for a missing, unreadable, empty or too short file, or ids outside the vocabulary.
    """
    file = Path(path)
    if not file.is_file():
        raise LmcError(f"{file} does not exist; give a .txt, .jsonl or .npy file")
    if length < 2 or length > model.spec.max_positions:
        raise LmcError(f"block length {length} is out of range: the model has {model.spec.max_positions} positions")
    ids = _load_ids(file) if file.suffix == ".npy" else _tokenize(file, model)
    if len(ids) and (ids.min() < 0 or ids.max() >= model.spec.vocab):
        raise LmcError(f"{file} holds token id {int(ids.max())}, outside the vocabulary of {model.spec.vocab}")
    count = len(ids) // length
    if count < at_least:
        raise LmcError(f"{file} has {len(ids)} tokens; at least {at_least * length} are needed (blocks of {length})")
    return torch.from_numpy(ids[: count * length].astype(np.int64)).view(count, length)


def split_validation(blocks: Tensor, share: float = 0.03, least: int = 16) -> tuple[Tensor, Tensor | None]:
    """(calibration, validation): the last `share` of the blocks, at least `least`, unless that is more than a tenth."""
    held = max(int(len(blocks) * share), least)
    return (blocks[:-held], blocks[-held:]) if 10 * held <= len(blocks) else (blocks, None)


def _load_ids(file: Path) -> np.ndarray:
    try:
        ids = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise LmcError(f"{file} is not a readable .npy file ({error})") from error
    if not np.issubdtype(ids.dtype, np.integer):
        raise LmcError(f"{file} holds {ids.dtype}, not integer token ids")
    return ids.reshape(-1)


def _tokenize(file: Path, model: Model) -> np.ndarray:
    from transformers import AutoTokenizer

    documents = _read_documents(file)
    if not any((model.path / name).exists() for name in _TOKENIZERS):  # transformers would make up an empty one
        raise LmcError(f"{model.path} has no tokenizer; give .npy token ids")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for a missing or damaged tokenizer
        raise LmcError(f"{model.path}: the tokenizer does not load ({type(error).__name__}); give .npy ids") from error
    end = [] if tokenizer.eos_token_id is None or len(documents) < 2 else [tokenizer.eos_token_id]
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + end
    return np.array(ids, dtype=np.int64)


def _read_documents(file: Path) -> list[str]:
    try:
        text = file.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise LmcError(f"{file} is not readable UTF-8 text ({error})") from error
    if file.suffix != ".jsonl":
        return [text]
    documents = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                documents.append(str(json.loads(line)["text"]))
            except (ValueError, KeyError, TypeError) as error:
                raise LmcError(f"{file}, line {number}: not a JSON object with a 'text' field") from error
    return documents
