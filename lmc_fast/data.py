"""What models are calibrated and measured on: sequences of tokens from text, masked tokens, labelled images."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .budget.meter import require_memory
from .checkpoints import Model
from .errors import LmcError
from .examples import Data, Examples
from .files import require_regular
from .images import read_images
from .tokenizer import load_tokenizer, tokenizer_errors

Given = Data | np.ndarray[Any, Any]  # what is in memory already
LABELLED = ("label", "tags")  # tasks of texts that come with a label, or with one for each token
MASKED_SHARE = 0.15  # of the tokens that a masked language model has to guess


def read_data(path: str | Path, model: Model, length: int, at_least: int = 1) -> Data:
    """Reads what fits the model's task: tokens, the same with some masked, texts with labels, or images with labels.

    Args:
        path: a file as for read_tokens or read_images; for models that label texts or tokens, a .npz of `tokens` (n, T)
            and `labels` (n,), or (n, T) with -1 where there is none.
        model: what the data is for: its task, tokenizer and limits count.
        length: tokens in a sequence; images and labelled texts have their own.
        at_least: how many inputs there must be.

    Returns:
        Token ids (n, length) int64, or Examples.

    Raises:
        LmcError: as read_tokens and read_images do; a masked language model's tokenizer has no mask token.

    >>> lmc.read_data("text.txt", lmc.Model("A"), 16).dtype
    torch.int64
    """
    if model.spec.image:
        return read_images(path, model, at_least)
    if model.spec.task in LABELLED:
        return read_labelled(path, model, at_least)
    tokens = read_tokens(path, model, length, at_least)
    return mask_tokens(tokens, mask_id(model)) if model.spec.task == "masked" else tokens


def read_labelled(path: str | Path, model: Model, at_least: int = 1) -> Examples:
    """Texts with labels: a .npz of `tokens` (n, T) and `labels` (n,), or (n, T) of tokens, -1 where there is none.

    Raises LmcError for another file, and for what the model does not read.
    """
    file = Path(path)
    remedy = "give a .npz file of token ids `tokens` (n, T) and `labels`"
    if not os.path.exists(file):
        raise LmcError(f"{file} does not exist; {remedy}")
    require_memory(require_regular(file, remedy), file)
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = Examples(*(_tensor(arrays[name], f"{file}: {name}") for name in ("tokens", "labels")))
    except LmcError:
        raise
    except Exception as error:  # numpy raises a dozen kinds for a damaged file
        raise LmcError(f"{file} is not readable ({error}); {remedy}") from error
    if len(found.inputs) != len(found.targets) or len(found.inputs) < at_least:
        raise LmcError(
            f"{file} has {len(found.inputs)} texts and {len(found.targets)} labels; "
            f"as many of each, and at least {at_least}, are needed"
        )
    try:
        data = as_data(found, model)
    except LmcError as error:
        raise LmcError(f"{file}: {error}") from error
    assert isinstance(data, Examples)
    return data


def sequence_length(model: Model, wanted: int | None = None) -> int:
    """Tokens per sequence: as wanted, else 128, or as many as the model has positions."""
    return wanted or min(128, model.spec.max_positions)


def as_data(given: Given, model: Model) -> Data:
    """Data that is in memory already, checked: token ids (n, T) of any integer type, as a tensor or a numpy array, or
    Examples. Raises LmcError for what the model does not read.
    """
    spec = model.spec
    if spec.task == "features":
        return _whose_features(given, model)
    if not isinstance(given, Examples):
        if spec.image or spec.task in ("masked", *LABELLED):
            raise LmcError(f"{spec.family} needs inputs and targets: give Examples(inputs, targets)")
        return _ids(_tensor(given, "the data"), model)
    if not spec.image and spec.task == "causal":
        raise LmcError(f"{spec.family} predicts the next token: give token ids (n, T), not Examples")
    inputs, targets = _tensor(given.inputs, "inputs"), _tensor(given.targets, "targets")
    inputs = _images(inputs, model) if spec.image else _ids(inputs, model)
    whole = bool(spec.image) or spec.task == "label"
    shape = inputs.shape[:1] if whole else inputs.shape
    if targets.shape != shape or targets.is_floating_point():
        raise LmcError(f"targets must be integers of shape {list(shape)}, not {targets.dtype} of {list(targets.shape)}")
    _require_ids(targets if whole else targets[targets != -1], "a target", spec.vocab)
    return Examples(inputs, targets.long())


def _whose_features(given: Given, model: Model) -> Examples:
    """Inputs with a place for each vector of features: one for an input or, where a head reads all tokens, for each."""
    spec = model.spec
    inputs = _tensor(given.inputs if isinstance(given, Examples) else given, "the data")
    inputs = _images(inputs, model) if spec.image else _ids(inputs, model)
    shape = inputs.shape[:1] if spec.image or spec.headless or spec.pooling else inputs.shape
    return Examples(inputs, torch.zeros(shape, dtype=torch.int64))


def _images(pixels: Tensor, model: Model) -> Tensor:
    """Images (n, c, size, size) that the model can read."""
    image = model.spec.image
    assert image is not None
    wanted = [image.channels, image.size, image.size]
    if not pixels.is_floating_point() or list(pixels.shape[1:]) != wanted or not len(pixels):
        raise LmcError(
            f"images must be normalised floats of shape {['n', *wanted]}, not {pixels.dtype} of {list(pixels.shape)}"
        )
    if not pixels.isfinite().all():
        raise LmcError("the images hold NaN or infinity")
    return pixels.float()


def _tensor(given: Any, what: str) -> Tensor:
    if isinstance(given, np.ndarray) and given.dtype.kind in "iuf":
        native = given.astype(given.dtype.newbyteorder("="), copy=False)
        wide = native.astype(np.int64) if native.dtype.kind == "u" else native
        return torch.from_numpy(np.ascontiguousarray(wide))
    dense = isinstance(given, Tensor) and given.layout is torch.strided and not given.is_meta
    if not isinstance(given, Tensor) or not dense or given.dtype == torch.bool or given.is_complex():
        told = "layout" if isinstance(given, Tensor) and given.layout is not torch.strided else "dtype"
        kind = getattr(given, told, type(given).__name__)
        raise LmcError(f"{what} must be a tensor or a numpy array of numbers, not {kind}; read files with read_data")
    return given


def _ids(tokens: Tensor, model: Model) -> Tensor:
    """Token ids (n, T) int64 that the model can read."""
    spec = model.spec
    if tokens.is_floating_point() or tokens.dim() != 2:
        raise LmcError(
            f"token ids must be integers of shape (sequences, tokens), not {tokens.dtype} of {list(tokens.shape)}; "
            "cut a long list into rows with .reshape(-1, 128)"
        )
    if not len(tokens) or not 2 <= tokens.shape[1] <= spec.max_positions:
        raise LmcError(
            f"{tokens.shape[0]} sequences of {tokens.shape[1]} tokens: give one at least, of 2 to {spec.max_positions}"
        )
    _require_ids(tokens, "a token id", spec.table or spec.vocab)
    return tokens.long()


def _require_ids(ids: Tensor, what: str, count: int) -> None:
    if ids.numel():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= count:
            raise LmcError(f"{what} is {low if low < 0 else high}, outside the vocabulary of {count}")


def mask_tokens(tokens: Tensor, mask: int, seed: int = 0) -> Examples:
    """Hides MASKED_SHARE of tokens (n, T), at places that depend on nothing but the shape, as targets to guess."""
    chance = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed))
    hidden = chance < MASKED_SHARE
    hidden |= chance == chance.min(dim=1, keepdim=True)[0]  # at least one in every block
    return Examples(tokens.masked_fill(hidden, mask), tokens.masked_fill(~hidden, -1))


def mask_id(model: Model) -> int:
    """The id of the tokenizer's mask token. Raises LmcError where there is none."""
    mask = load_tokenizer(model.path, "masked language models need the tokenizer's mask token").mask_token_id
    if mask is None:
        raise LmcError(f"{model.path}: the tokenizer has no mask token; add the one that the model was trained with")
    return int(mask)


def read_tokens(path: str | Path, model: Model, length: int, at_least: int = 1) -> Tensor:
    """Reads token ids and cuts them into contiguous sequences; what is left of the last is dropped.

    Args:
        path: text (.txt), documents (.jsonl, a "text" in each line), which the checkpoint's own tokenizer cuts, or
            integer ids of any shape (.npy).
        model: whose tokenizer, vocabulary and positions count.
        length: tokens in a sequence, from 2 to the model's positions.
        at_least: how many sequences there must be.

    Returns:
        Token ids (n, length) int64.

    Raises:
        LmcError: the file is missing, unreadable or too short, an id lies outside the vocabulary, or `length` is out of
            range.

    >>> lmc.read_tokens("text.txt", lmc.Model("A"), 16).shape[1]
    16
    """
    file = Path(path)
    if not os.path.exists(file):
        raise LmcError(f"{file} does not exist; give a .txt, .jsonl or .npy file")
    size = require_regular(file, "give a .txt, .jsonl or .npy file")
    if length < 2 or length > model.spec.max_positions:
        raise LmcError(f"sequence length {length} is out of range: the model has {model.spec.max_positions} positions")
    require_memory(size, file)
    ids = _load_ids(file) if file.suffix == ".npy" else _tokenize(file, model)
    vocab = model.spec.table or model.spec.vocab
    if len(ids):
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab:
            raise LmcError(f"{file} holds token id {low if low < 0 else high}, outside the vocabulary of {vocab}")
    count = len(ids) // length
    if count < at_least:
        raise LmcError(f"{file} has {len(ids)} tokens; at least {at_least * length} are needed (sequences of {length})")
    return torch.from_numpy(ids[: count * length].astype(np.int64)).view(count, length)


def split_validation(data: Data, share: float = 0.03, least: int = 16, seed: int = 0) -> tuple[Data, Data | None]:
    """(calibration, validation): `share` of the data is held out, at least `least` but at most a tenth.

    One sequence from each of equal stretches, at a place that only `seed` decides: text is not alike from its first
    page to its last, and image folders go class by class. Text that is repeated elsewhere is not learned from, either,
    if anything else is left. Nothing is held out of fewer than ten sequences (None).
    """
    held = min(max(int(len(data) * share), least), len(data) // 10)
    if not held:
        return data, None
    edges = torch.arange(held + 1) * len(data) // held
    chance = torch.rand(held, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    picked = edges[:-1] + (chance * edges.diff()).long()
    rest = torch.ones(len(data), dtype=torch.bool)
    rest[picked] = False
    if isinstance(data, Tensor):
        factors = torch.randint(1 << 40, data.shape[1:], generator=torch.Generator().manual_seed(seed))
        digest = (data.cpu() * factors).sum(1)  # wraps around
        fresh = rest & ~torch.isin(digest, digest[picked])
        rest = fresh if fresh.any() else rest
    return data[rest.nonzero()[:, 0].to(data.device)], data[picked.to(data.device)]


def _load_ids(file: Path) -> np.ndarray:
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)  # mapped: the file must be as long as its header says
    except Exception as error:  # numpy raises a dozen kinds for a damaged header
        raise LmcError(f"{file} is not a readable .npy file ({error})") from error
    if not isinstance(found, np.ndarray):
        found.close()
        raise LmcError(f"{file} is not a readable .npy file (it holds several arrays); save one with numpy.save")
    if found.dtype.kind not in "iu":
        raise LmcError(f"{file} holds {found.dtype}, not integer token ids")
    return np.array(found).reshape(-1)


def _tokenize(file: Path, model: Model) -> np.ndarray:
    documents = list(_read_documents(file))
    remedy = "give .npy token ids"
    tokenizer = load_tokenizer(model.path, remedy)
    end = [] if tokenizer.eos_token_id is None or len(documents) < 2 else [tokenizer.eos_token_id]
    ids: list[int] = []
    with tokenizer_errors(f"{model.path}: the tokenizer fails on {file}", remedy):
        for document in documents:
            ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"] + end
    return np.array(ids, dtype=np.int64)


def _read_documents(file: Path) -> Iterator[str]:
    """The whole text, or the "text" of every line; a byte-order mark is no part of it."""
    try:
        with open(file, encoding="utf-8-sig") as lines:
            if file.suffix == ".jsonl":
                # lines end where JSON Lines says: not at U+2028 or U+0085, which strings may hold
                yield from (
                    _document(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
                )
            else:
                yield lines.read()
    except (UnicodeDecodeError, OSError) as error:
        raise LmcError(f"{file} is not readable UTF-8 text ({error})") from error


def _document(line: str, at: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LmcError(f"{at}: not a JSON object with a 'text' field ({type(error).__name__})") from error
    if not isinstance(found, dict) or "text" not in found:
        raise LmcError(f"{at}: not a JSON object with a 'text' field")
    text = found["text"]
    if not isinstance(text, str):
        raise LmcError(f"{at}: 'text' is {_json_kind(text)}, not a string; remove the line or give it a text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise LmcError(f"{at}: 'text' holds half of a surrogate pair, which is no character; remove it") from None
    return text


def _json_kind(value: object) -> str:
    if value is None:
        return "null"
    kinds = {bool: "true or false", dict: "an object", list: "a list"}
    return kinds.get(type(value), "a number")
