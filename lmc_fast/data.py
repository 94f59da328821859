"""What models are calibrated and measured on: token blocks from text, masked tokens, labelled images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .checkpoints import Model
from .errors import LmcError
from .examples import Data, Examples
from .images import read_images

MASKED_SHARE = 0.15  # of the tokens that a masked language model has to guess
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def read_data(path: str | Path, model: Model, length: int, at_least: int = 1) -> Data:
    """What fits the model's task: blocks of `length` tokens, the same with some masked, or labelled images."""
    if model.spec.image:
        return read_images(path, model, at_least)
    tokens = read_tokens(path, model, length, at_least)
    return mask_tokens(tokens, mask_id(model)) if model.spec.task == "masked" else tokens


def block_length(model: Model, wanted: int | None = None) -> int:
    """Tokens per block: as wanted, else 128, or as many as the model has positions."""
    return wanted or min(128, model.spec.max_positions)


def mask_tokens(tokens: Tensor, mask: int, seed: int = 0) -> Examples:
    """Hides MASKED_SHARE of tokens (n, T), at places that depend on nothing but the shape, as targets to guess."""
    chance = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed))
    hidden = chance < MASKED_SHARE
    hidden |= chance == chance.min(dim=1, keepdim=True)[0]  # at least one in every block
    return Examples(tokens.masked_fill(hidden, mask), tokens.masked_fill(~hidden, -1))


def mask_id(model: Model) -> int:
    """The id of the tokenizer's mask token. Raises LmcError where there is none."""
    mask = _tokenizer(model, "masked language models need the tokenizer's mask token").mask_token_id
    if mask is None:
        raise LmcError(f"{model.path}: the tokenizer has no mask token; add the one that the model was trained with")
    return int(mask)


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
    vocab = model.spec.table or model.spec.vocab
    if len(ids) and (ids.min() < 0 or ids.max() >= vocab):
        raise LmcError(f"{file} holds token id {int(ids.max())}, outside the vocabulary of {vocab}")
    count = len(ids) // length
    if count < at_least:
        raise LmcError(f"{file} has {len(ids)} tokens; at least {at_least * length} are needed (blocks of {length})")
    return torch.from_numpy(ids[: count * length].astype(np.int64)).view(count, length)


def split_validation(blocks: Data, share: float = 0.03, least: int = 16) -> tuple[Data, Data | None]:
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


def _tokenizer(model: Model, remedy: str) -> Any:
    from transformers import AutoTokenizer

    if not any((model.path / name).exists() for name in _TOKENIZERS):  # transformers would make up an empty one
        raise LmcError(f"{model.path} has no tokenizer; {remedy}")
    try:
        return AutoTokenizer.from_pretrained(model.path, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for a missing or damaged tokenizer
        raise LmcError(f"{model.path}: the tokenizer does not load ({type(error).__name__}); {remedy}") from error


def _tokenize(file: Path, model: Model) -> np.ndarray:
    documents = _read_documents(file)
    tokenizer = _tokenizer(model, "give .npy token ids")
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
