"""From a checkpoint to the normal form (named slots) and back, with nothing dropped on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architectures import Fold, Spec
from ..architectures.layouts import OfExpert, Plain
from ..architectures.spec import SHARED
from ..errors import LmcError
from .configs import read_config, spec_of
from .coverage import cover
from .lazy import TABLES, LazyBlocks, Slots, Table
from .memory import MemoryCheckpoint, Stock
from .reader import Checkpoint

Place = Any  # str | Path | a transformers model | (config, state dict)


@dataclass
class Weights:
    """One model in normal form: named slots, as in architectures.spec.

    Lazy weights (Model.open_weights) have LazyBlocks, and their tables are not among the `ends` but in `tables`.

    Attributes:
        spec: what the slots are of.
        ends: slots outside the blocks.
        blocks: the slots of each block.
        tables: of lazy weights "embed" and "head", (rows, width), read by rows.
    """

    spec: Spec
    ends: Slots
    blocks: Sequence[Slots]
    tables: dict[str, Table] = field(default_factory=dict)

    def table(self, name: str) -> Table | None:
        """One of the tables by rows, lazy or not.

        Args:
            name: "embed" or "head".

        Returns:
            The table; None where the architecture has none of that name.
        """
        return Table.of(self.ends[name]) if name in self.ends else self.tables.get(name)

    @property
    def small_ends(self) -> Slots:
        """`ends` without the tables."""
        return {name: t for name, t in self.ends.items() if name not in TABLES}

    def map(self, function: Callable[[Tensor], Tensor]) -> Weights:
        """Applies a function to every tensor.

        Args:
            function: what to do to a tensor; it must treat rows of tables one by one.

        Returns:
            The weights with the results, as lazy as these.
        """
        tables = {name: table.map(function) for name, table in self.tables.items()}
        ends = {name: function(t) for name, t in self.ends.items()}
        return Weights(self.spec, ends, self._map_blocks(lambda _, w: _each(w, function)), tables)

    def in_dtype(
        self, dtype: torch.dtype, ends: Callable[[Slots], Slots], block: Callable[[int, Slots], Slots]
    ) -> Weights:
        """Applies functions to the ends and to each block, in at least `dtype`; the result keeps its own.

        Args:
            dtype: to compute in, where that of a tensor is narrower.
            ends: must treat rows of tables one by one: of lazy weights it is given some rows of a table at a time, and
                no row of the others.
            block: of the number of a block and its slots.

        Returns:
            The weights with the results, as lazy as these.
        """

        def wide(function: Callable[[Slots], Slots], slots: Slots) -> Slots:
            own = {name: t.dtype for name, t in slots.items()}
            work = _each(slots, lambda t: t.to(torch.promote_types(t.dtype, dtype)))
            out = dict(function(work))
            del work  # a block is large
            return {name: out.pop(name).to(own[name]) for name in list(out)}

        none = {name: table.rows(0, 0) for name, table in self.tables.items()}

        def lazily(name: str) -> Table:
            return self.tables[name].map(lambda rows: wide(ends, self.ends | none | {name: rows})[name])

        small = {name: t for name, t in wide(ends, self.ends | none).items() if name not in none}
        blocks = self._map_blocks(lambda i, w: wide(lambda v: block(i, v), w))
        return Weights(self.spec, small, blocks, {name: lazily(name) for name in self.tables})

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Weights:
        """The same in another dtype, or on another device.

        Args:
            dtype: of all tensors.
            device: where to; None: where they are.

        Returns:
            The weights there, as lazy as these.
        """
        return self.map(lambda t: t.to(device=device, dtype=dtype))

    def load(self) -> Weights:
        """The same with everything in memory.

        Returns:
            Weights that are not lazy.
        """
        tables = {name: table.rows(0, table.shape[0]) for name, table in self.tables.items()}
        return Weights(self.spec, self.ends | tables, list(self.blocks))

    def _map_blocks(self, function: Callable[[int, Slots], Slots]) -> Sequence[Slots]:
        """`function` may use up the dict that it is given."""
        if isinstance(self.blocks, LazyBlocks):
            return self.blocks.map(function)
        return [function(i, dict(slots)) for i, slots in enumerate(self.blocks)]


def _each(slots: Slots, function: Callable[[Tensor], Tensor]) -> Slots:
    """`function` of every tensor; each is dropped from `slots` as soon as it is no longer needed."""
    return {name: function(slots.pop(name)) for name in list(slots)}


def lerp(a: Weights, b: Weights, weight: float) -> Weights:
    """(1 - weight) a + weight b, slot by slot."""

    def mix(x: Slots, y: Slots) -> Slots:
        return {name: torch.lerp(x[name], y[name], weight) for name in x}

    return Weights(a.spec, mix(a.ends, b.ends), [mix(x, y) for x, y in zip(a.blocks, b.blocks, strict=True)])


class Model:
    """A checkpoint whose architecture is known and whose tensors are exactly the expected ones.

    Args:
        place: a directory, a hub id, a transformers model, or (config, state dict); the last two are not copied.
        headers_only: do not download weights, which cannot be read then.

    Attributes:
        checkpoint: its files, or what is in memory.
        source: what it was asked for as.
        family: how its tensors are named and laid out.
        config: of transformers.
        coverage: which stored tensor is which of the family's.
        spec: its architecture: kinds and sizes.

    Raises:
        LmcError: the architecture or one of its options is unknown, or a tensor is missing, unexpected, not a float or
            of another shape than the config says.

    >>> model = lmc.Model("A")
    >>> model.spec.layers, model.spec.width, model.dtype
    (2, 24, torch.float32)
    """

    def __init__(self, place: Place, headers_only: bool = False):
        if isinstance(place, str | Path):
            self.checkpoint = Checkpoint(place, headers_only)
        else:
            self.checkpoint = MemoryCheckpoint(place)
        self.source = self.checkpoint.source  # as it was asked for: a directory or a hub id
        self.family, self.config = read_config(self.checkpoint)
        spec = spec_of(self.family, self.config, self.checkpoint.path / "config.json")
        self.coverage, self.spec = cover(self.checkpoint, self.family, spec)

    @property
    def home(self) -> Path | None:
        """Its directory; None of a model in memory."""
        return self.checkpoint.home

    @property
    def path(self) -> Path:
        """Its directory. Raises LmcError for a model in memory."""
        if self.home is None:
            raise LmcError(
                f"a {self.source} has neither a tokenizer nor an image processor; give token ids, or images as floats"
            )
        return self.home

    def stock(self) -> Stock:
        """Itself, with all its tensors in memory.

        Returns:
            (config, state dict), as they are stored.
        """
        stored = self.checkpoint
        if isinstance(stored, MemoryCheckpoint):
            return Stock(self.config, stored.tensors)
        return Stock(self.config, {name: stored.read(name) for name in stored.names})

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the checkpoint's numbers are stored in."""
        sizes: dict[torch.dtype, int] = {}
        for name in self.coverage.own.values():
            dtype = self.checkpoint.dtype(name)
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(self.checkpoint.shape(name))
        return max(sizes, key=sizes.__getitem__)

    @property
    def coarsest_dtype(self) -> torch.dtype:
        """The dtype of its tensors that rounds most."""
        return max({self.checkpoint.dtype(n) for n in self.coverage.own.values()}, key=lambda d: torch.finfo(d).eps)

    @property
    def loading_dtype(self) -> torch.dtype:
        """The dtype that transformers loads it in: config.json's, else that of the first tensor."""
        return getattr(self.config, "dtype", None) or self.checkpoint.dtype(self.checkpoint.names[0])

    @property
    def folds(self) -> list[Fold]:
        """Options of this checkpoint that reading folds into the weights."""
        return [fold for fold in self.family.folds if getattr(self.config, fold.option, False)]

    @property
    def vocabulary(self) -> int:
        """Tokens that it reads (of text), or outputs that it has (of images)."""
        return self.spec.table or self.spec.vocab

    @property
    def original(self) -> Model:
        """The checkpoint as it is on disk."""
        return self

    @property
    def stored_config(self) -> dict[str, Any]:
        """What a config.json says that describes models of `spec`."""
        return self.checkpoint.config

    @property
    def buffers(self) -> list[str]:
        """Names of stored tensors that carry no weights."""
        return self.coverage.buffers

    def stored_as(self, name: str, block: int | None) -> tuple[str, torch.dtype]:
        """How this checkpoint stores a tensor.

        Args:
            name: of the tensor in its family's table.
            block: the number of its block; None outside the blocks.

        Returns:
            (its name in the files, its dtype there).
        """
        names = self.coverage
        return names.own.get(name, name), self.checkpoint.dtype(names.names[name])

    def limited(self, vocabulary: int, positions: int) -> Model:
        """The same with the first rows of its vocabulary only, for shorter texts.

        Args:
            vocabulary: rows that are kept.
            positions: tokens of a text at most.

        Returns:
            A copy that reads the same files.
        """
        model = copy(self)
        model.spec = replace(
            self.spec,
            max_positions=positions,
            vocab=self.spec.vocab if self.spec.table else vocabulary,
            table=vocabulary if self.spec.table else 0,
        )
        return model

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Weights:
        """All weights in normal form. A tied head is materialised, and the result's spec says untied.

        Args:
            dtype: to convert them to.
            device: where to.

        Returns:
            The weights, in memory.
        """
        lazy = self.open_weights(dtype, device)
        if not self.spec.tied:
            return lazy.load()
        del lazy.tables["head"]
        weights = lazy.load()
        weights.ends["head"] = weights.ends["embed"]
        return weights

    def open_weights(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Weights:
        """As `load`, lazy: blocks and rows of tables are read whenever they are asked for.

        Args:
            dtype: to convert them to.
            device: where to.

        Returns:
            Weights of which nothing but the small ends is in memory.
        """
        blocks = LazyBlocks(self.spec.layers, lambda i: self._load(i, dtype, device))
        tables = {}
        for slot in TABLES:
            shape = self.spec.shape(slot)
            if shape and slot == "head" and self.spec.headless:
                tables[slot] = _identity(shape[0], dtype, device)
            elif shape:
                tables[slot] = self._table(slot, (shape[0], shape[1]), dtype, device)
        return Weights(replace(self.spec, tied=False), self._load(None, dtype, device), blocks, tables)

    def _table(self, slot: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str) -> Table:
        name = next(e.name for e in self.family.ends if e.slots == (slot,) and isinstance(e.layout, Plain))
        disk = self.coverage.names[name]
        return Table(shape, lambda a, b: self.checkpoint.read_rows(disk, a, b).to(device=device, dtype=dtype))

    def _load(self, block: int | None, dtype: torch.dtype, device: torch.device | str) -> Slots:
        slots: Slots = {}
        experts: dict[str, list[Tensor]] = {}
        names = self.coverage.names
        for name, entry, index in self.family.entries(replace(self.spec, tied=False)):
            shared = entry.slots[0] in SHARED
            here = block is not None if shared else index == block
            if here and name in names and entry.slots[0] not in TABLES:
                tensor = self.checkpoint.read(names[name]).to(device=device, dtype=dtype)
                if entry.slots == ("head_bias",):
                    tensor = tensor[: self.vocabulary]
                if isinstance(entry.layout, OfExpert):
                    experts.setdefault(entry.slots[0], []).append(tensor)
                else:
                    slots |= zip(entry.slots, entry.layout.split(tensor, self.spec), strict=True)
        slots |= {slot: torch.stack(experts.pop(slot)) for slot in list(experts)}
        if block is not None:
            slots |= self._absent(block, dtype, device)
            for fold in self.folds:
                slots |= fold.change(block, slots)
        return _each(slots, Tensor.contiguous)

    def _absent(self, block: int, dtype: torch.dtype, device: torch.device | str) -> Slots:
        """Of norms that a block does not have, what does nothing: gains 1 and biases 0."""
        names = [e.slots[0] for e in self.family.block if block < e.first and e.present(self.spec)]
        fills = ((name, float(not name.endswith("_bias"))) for name in names)
        return {name: torch.full(self.spec.shapes[name], fill, dtype=dtype, device=device) for name, fill in fills}


def _identity(size: int, dtype: torch.dtype, device: torch.device | str) -> Table:
    """The head of a model that has none."""

    def rows(start: int, stop: int) -> Tensor:
        return torch.eye(size, dtype=dtype, device=device)[start:stop]

    return Table((size, size), rows)
