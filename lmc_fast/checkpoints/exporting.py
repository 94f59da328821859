"""Weights in normal form back into a stock checkpoint, tensor by tensor as the original stores them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architectures import Entry
from ..architectures.spec import SHARED
from ..errors import LmcError
from .lazy import TABLES, Slots
from .memory import Stock
from .weights import Model, Weights
from .writer import Stored, own_config, write_checkpoint


def export(
    weights: Weights, like: Model, directory: Path, dtype: torch.dtype | None = None, shard_bytes: int | None = None
) -> None:
    """Writes `weights` as a stock checkpoint with the config, tensor names, buffers and tokenizer of `like`.

    dtype: of all tensors; by default each keeps the one that `like` stores it in. Raises LmcError where that overflows.
    """
    options: dict[str, Any] = {} if shard_bytes is None else {"shard_bytes": shard_bytes}
    write_checkpoint(directory, _stored(weights, like, dtype), _config(weights, like, dtype), like.home, **options)


def export_to_memory(weights: Weights, like: Model, dtype: torch.dtype | None = None) -> Stock:
    """The same in memory, on the CPU."""
    from transformers import CONFIG_MAPPING

    tensors = {
        t.name: torch.cat([part[None] if not t.shape else part for part in t.parts()]).view(t.shape)
        for t in _stored(weights, like, dtype)
    }
    config = own_config(_config(weights, like, dtype))
    return Stock(CONFIG_MAPPING[config["model_type"]].from_dict(config), tensors)


def _config(weights: Weights, like: Model, dtype: torch.dtype | None) -> dict[str, Any]:
    config = dict(like.stored_config)
    if "tie_word_embeddings" in config or getattr(like.config, "tie_word_embeddings", False):
        config["tie_word_embeddings"] = weights.spec.tied
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype or like.loading_dtype).removeprefix("torch.")
    if "vocab_size" in config:
        config["vocab_size"] = like.vocabulary  # fewer than there were, where the other endpoint has fewer
    return config | {fold.option: False for fold in like.folds}


def _stored(weights: Weights, like: Model, dtype: torch.dtype | None) -> Iterator[Stored]:
    """The tensors of a checkpoint, each made from its slots when it is written; one block is held at a time."""
    spec, held, checkpoint = weights.spec, _Held(weights.blocks), like.checkpoint

    def parts(disk: str, entry: Entry, index: int | None, wanted: torch.dtype) -> Iterator[Tensor]:
        table = weights.table(entry.slots[0]) if index is None and entry.slots[0] in TABLES else None
        if table is not None:
            yield from (_checked(disk, rows, wanted) for _, rows in table.chunks())
        else:
            block = 0 if entry.slots[0] in SHARED else index
            slots = weights.ends if block is None else held.block(block)
            yield _checked(disk, entry.layout.join([slots[slot] for slot in entry.slots], spec), wanted)

    for name, entry, index in like.family.entries(spec, spec.tied):
        if entry.optional and index is None and entry.slots[0] not in weights.ends:
            continue
        disk, own = like.stored_as(name, index)
        wanted = dtype or own
        yield Stored(disk, wanted, entry.shape(spec), partial(parts, disk, entry, index, wanted))
    for name in like.buffers:
        yield Stored(name, checkpoint.stored_dtype(name), checkpoint.shape(name), partial(checkpoint.read_runs, name))


def _checked(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.to("cpu", dtype)
    if not tensor.isfinite().all():
        remedy = "look for huge weights" if dtype.itemsize >= 4 else "export with --dtype float32"
        raise LmcError(f"tensor {name} overflows in {str(dtype).removeprefix('torch.')}; {remedy}")
    return tensor


class _Held:
    """The block that was asked for last."""

    def __init__(self, blocks: Sequence[Slots]):
        self.blocks, self.index, self.slots = blocks, -1, Slots()

    def block(self, index: int) -> Slots:
        if index != self.index:
            self.slots = {}  # not two of them while the next one is made
            self.index, self.slots = index, self.blocks[index]
        return self.slots
