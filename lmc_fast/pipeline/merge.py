"""Averages of models, and task arithmetic on a base, tensor by tensor."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from ..architectures.resize import sizes_of
from ..checkpoints import LazyBlocks, Model, Slots, Stored, Table, Weights, checkpoint_names, write_checkpoint
from ..checkpoints import export as export_weights
from ..checkpoints.reader import RUN_ELEMENTS
from ..checkpoints.tensor_file import require_writable
from ..checkpoints.writer import SHARD_BYTES
from ..errors import LmcError
from ..files import read_object
from ..output import atomic_directory, check_target, partial_of, require_apart, user_path
from ..pair import in_common, pair_of
from .card import CARD_NAMES, record_of, write_card
from .progress import Cancel, Progress, Visits, Watch
from .room import endpoint_bytes, require_room
from .shares import ByBlock, Rule, Shares, shares_by_block

Place = str | Path
_log = logging.getLogger("lmc_fast")


@dataclass(frozen=True)
class _Merger:
    """Models, of which the first lends names, config, tokenizer and dtypes, and how much each counts."""

    models: list[Model]
    shares: Shares
    base: bool  # whether the last one is what the weights of the others, which say how much of each, are added to
    dtype: torch.dtype | None

    @property
    def tied(self) -> bool:
        return all(model.spec.tied for model in self.models)

    def row(self, block: int | None, slot: str) -> list[float]:
        """How much each of the models counts in a tensor; the sum is 1."""
        row = list(self.shares.of(block, slot))
        return [*row, 1 - math.fsum(row)] if self.base else row


@overload
def merge(
    a: Place,
    b: Place,
    out: Place,
    weight: float | None = None,
    *,
    weights: Sequence[float] | None = None,
    weights_by_block: ByBlock | Place | None = None,
    base: Place | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    extrapolate: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: Cancel | None = None,
) -> dict[str, Any]: ...
@overload
def merge(
    a: Sequence[Place],
    b: Place,
    *,
    weights: Sequence[float] | None = None,
    weights_by_block: ByBlock | Place | None = None,
    base: Place | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    extrapolate: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: Cancel | None = None,
) -> dict[str, Any]: ...
def merge(
    a: Place | Sequence[Place],
    b: Place,
    out: Place | None = None,
    weight: float | None = None,
    *,
    weights: Sequence[float] | None = None,
    weights_by_block: ByBlock | Place | None = None,
    base: Place | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    extrapolate: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: Cancel | None = None,
) -> dict[str, Any]:
    """Writes the weighted average of checkpoints, tensor by tensor: merge(a, b, out, weight) or merge([a, b, c], out).

    Computed by runs of rows, of more than two models in float64. Beside the weights lie README.md and
    mergekit_config.yml, which say what was merged.

    Args:
        a: a checkpoint directory or a hub id, or a list of them. The first lends names, config, tokenizer and dtypes.
        b: the second checkpoint; after a list, the directory to create.
        out: the directory to create.
        weight: the share of `b` of two; None: one half.
        weights: of each model; None: equal. They are divided by their sum, with a note.
        weights_by_block: other weights for "embed" (all before the blocks), "head" (all behind them), "3" or "0-3": the
            share of `b`, or one for each model; or a JSON file of that.
        base: task arithmetic instead: base + Σ weight (model - base); then weights are needed, and not divided.
        dtype: of the weights that are written; None: what the first model stores each tensor in.
        shard_bytes: of a file at most, where no tensor has more; by default 5 GB.
        extrapolate: weights outside [0, 1] are wanted.
        progress: called for every tensor, see Progress.
        cancel: called, or a threading.Event looked at, then; True ends the work.

    Returns:
        The record of what was merged, as it is written in README.md: models, weights, method, dtype, notes.

    Raises:
        LmcError: the checkpoints do not match, weights make no sense, `out` exists and is not empty, or a weight
            overflows.
        Cancelled: `cancel` says so; nothing is left behind.

    >>> record = lmc.merge("DIR/a", "DIR/b", "MERGED", 0.25)
    >>> record["weights"], record["method"]
    ([0.75, 0.25], 'linear')
    """
    if not isinstance(a, str | Path | Sequence):
        raise LmcError(f"models are given in a list, not as {a!r}")
    require_writable(dtype)
    places = [a, b] if isinstance(a, str | Path) else list(a)
    out = out if isinstance(a, str | Path) else b
    if out is None:
        raise LmcError("merge(a, b, out) and merge([a, b, ...], out) need a directory to write")
    rule = Rule(len(places), base is None, extrapolate)
    if len(places) < (1 if base is not None else 2):
        raise LmcError("a merge takes two models at least, or one and a base")
    notes: list[str] = []
    row = _weights(rule, weight, weights, notes)
    if isinstance(shard_bytes, bool) or not isinstance(shard_bytes, int) or shard_bytes < 1:
        raise LmcError(f"shard_bytes must be a positive number of bytes, not {shard_bytes!r}")
    places += [] if base is None else [base]
    target = user_path(out)
    require_apart((target, partial_of(target)), places)
    check_target(target)
    models = _opened(places)
    shares = Shares(row)
    if weights_by_block is not None:
        file, given = "weights_by_block", weights_by_block
        if isinstance(given, str | Path):
            file, given = str(given), read_object(user_path(given), once=True)
        shares = shares_by_block(rule, row, given, models[0].spec.layers, file, notes)
    merger = _Merger(models, shares, base is not None, dtype)
    if merger.tied and merger.row(None, "embed") != merger.row(None, "head"):
        raise LmcError("the head is the embedding, so that both need the same weights; give embed and head alike")
    notes += _on_dtypes(models, dtype)
    for note in notes:
        _log.info(note)
    watch = Watch(progress, cancel)
    most = endpoint_bytes(models[0], dtype)
    require_room(partial_of(target), most, min(most, shard_bytes))
    with atomic_directory(target, {**checkpoint_names(models[0].path), **CARD_NAMES}) as work:
        if all(model.folds == models[0].folds for model in models):
            write_checkpoint(work, _watched(_averaged(merger), watch), _config(merger), models[0].path, shard_bytes)
        else:  # what one folds into its weights the others do not: the same numbers mean something else
            mixed = Visits.of_models(watch, "writing", models[0]).of(_mixed_slots(merger))
            export_weights(mixed, models[0], work, dtype, shard_bytes)
        record = record_of(models, shares, merger.base, dtype or models[0].dtype, notes)
        write_card(work, record, models[0].family)
        for model in models:
            model.checkpoint.identity.require_unchanged()
    return record


def _weights(rule: Rule, weight: float | None, weights: Sequence[float] | None, notes: list[str]) -> tuple[float, ...]:
    if weight is not None and weights is not None:
        raise LmcError("weight and weights are both given; one of them is enough")
    if weight is not None:
        if rule.count != 2 or not rule.average:
            raise LmcError("weight is the share of B of two models; give weights, one for each model")
        return rule.row(weight, "weight", notes)
    if weights is None and not rule.average:
        raise LmcError("say how much of each model's difference from the base is added: weights, one for each model")
    return rule.row([1 / rule.count] * rule.count if weights is None else weights, "weights", notes)


def _opened(places: Sequence[Place]) -> list[Model]:
    """All models, cut to what they have in common. Raises LmcError where one does not fit the first."""
    models = [Model(place) for place in places]
    first = models[0]
    for model in models[1:]:
        try:
            first = pair_of(first, model, grow=False).a
        except LmcError as error:
            sizes = first.family is model.family and sizes_of(first.spec) != sizes_of(model.spec)
            remedy = "; lmc-fast align writes both in one size" if sizes else ""
            raise LmcError(f"{places[0]} and {model.source} cannot be merged: {error}{remedy}") from error
    return [first, *(in_common(model, first)[0] for model in models[1:])]


def _on_dtypes(models: Sequence[Model], dtype: torch.dtype | None) -> list[str]:
    """What is said of models whose weights are stored in other dtypes."""
    found = {model.source: _name(model.dtype) for model in models}
    if dtype is not None or len(set(found.values())) < 2:
        return []
    stored = ", ".join(f"{source} in {name}" for source, name in found.items())
    return [f"the models are stored in different dtypes ({stored}): what is written has the first one's; see --dtype"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _config(merger: _Merger) -> dict[str, Any]:
    """The first one's, with the vocabulary and the tie that all have in common, and the dtype that is written."""
    first = merger.models[0]
    config = dict(first.checkpoint.config)
    if "vocab_size" in config:
        config["vocab_size"] = first.vocabulary
    if "tie_word_embeddings" in config or getattr(first.config, "tie_word_embeddings", False):
        config["tie_word_embeddings"] = merger.tied
    if merger.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = _name(merger.dtype)
    return config


def _watched(tensors: Iterator[Stored], watch: Watch) -> Iterator[Stored]:
    """The same, of which the watch is told whenever one is about to be made."""
    known = list(tensors)
    visits = Visits(watch, "writing", len(known))

    def parts(tensor: Stored) -> Iterable[Tensor]:
        visits()
        yield from tensor.parts()

    return (replace(tensor, parts=partial(parts, tensor)) for tensor in known)


def _averaged(merger: _Merger) -> Iterator[Stored]:
    """The tensors of the family's table under the first one's names, whatever each calls them; its buffers."""
    models = merger.models
    first, tables = models[0], [model.coverage.names for model in models]
    ties = first.family.ties(first.spec) if merger.tied else []
    once = {c.name for c, o in ties if all(names.get(c.name) == names.get(o.name) for names in tables)}
    for name, entry, block in first.family.entries(replace(first.spec, tied=False)):
        having = [(model, disk) for model, names in zip(models, tables, strict=True) if (disk := names.get(name))]
        if name in once or not having:
            continue
        row = merger.row(block, entry.slots[0])
        shares = [share for share, names in zip(row, tables, strict=True) if name in names]
        if len(shares) < len(row):  # an optional one, such as a pooler, that not all have
            total = math.fsum(shares)
            shares = [share / total for share in shares] if total > 0 else [1 / len(shares)] * len(shares)
        model, disk = having[0]
        dtype, shape = merger.dtype or model.checkpoint.dtype(disk), entry.shape(first.spec)
        parts = partial(_mixed, having, shares, shape, dtype)
        yield Stored(first.coverage.own.get(name, name), dtype, shape, parts)
    for name in first.coverage.buffers:
        stored = first.checkpoint
        yield Stored(name, stored.stored_dtype(name), stored.shape(name), partial(stored.read_runs, name))


def _mixed(
    having: Sequence[tuple[Model, str]], shares: Sequence[float], shape: tuple[int, ...], dtype: torch.dtype
) -> Iterator[Tensor]:
    """The average of one tensor, or of its first rows, by runs of its first dimension."""
    size = max(1, RUN_ELEMENTS // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], size):
        rows = (model.checkpoint.read_rows(disk, start, min(start + size, shape[0])) for model, disk in having)
        mixed = _mix(rows, shares).to(dtype)
        if not mixed.isfinite().all():
            remedy = (
                "look for huge weights, or give smaller shares" if dtype.itemsize >= 4 else "merge with --dtype float32"
            )
            raise LmcError(f"tensor {having[0][1]} overflows in {_name(dtype)}; {remedy}")
        yield mixed


def _mix(tensors: Iterator[Tensor], shares: Sequence[float]) -> Tensor:
    """Σ share tensor, shares that sum to 1. Of two tensors the middle is that of curves along their line, bit by bit;
    of more it is summed in float64.
    """
    if len(shares) == 2:
        x, y = tensors
        wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        mixed = torch.lerp(x.to(wide), y.to(wide), shares[1])
        if mixed.isfinite().all():  # else the difference of two huge numbers overflowed, which their average may not
            return mixed
        return torch.lerp(x.double(), y.double(), shares[1])
    total: Tensor | None = None
    for tensor, share in zip(tensors, shares, strict=True):
        part = tensor.double() * share
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _mixed_slots(merger: _Merger) -> Weights:
    """The average in normal form, one block at a time."""
    opened = [model.open_weights(torch.float64) for model in merger.models]

    def mix(slots: Sequence[Slots], block: int | None) -> Slots:
        return {name: _mix((s.pop(name) for s in slots), merger.row(block, name)) for name in list(slots[0])}

    def table(name: str) -> Callable[[int, int], Tensor]:
        row = merger.row(None, name)
        return lambda start, stop: _mix((w.tables[name].rows(start, stop) for w in opened), row)

    first = opened[0]
    tables = {name: Table(known.shape, table(name)) for name, known in first.tables.items()}
    blocks = LazyBlocks(len(first.blocks), lambda i: mix([w.blocks[i] for w in opened], i))
    return Weights(first.spec, mix([dict(w.ends) for w in opened], None), blocks, tables)
