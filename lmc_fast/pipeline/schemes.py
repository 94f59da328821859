"""Bringing more than two models together level by level: pairs, then the averages of pairs, until there is one.

Each level moves whole averages, so that it is an alignment of all models below it: what brings two averages together
brings their members together, because an element acts linearly on weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..alignment import Alignment
from ..checkpoints import LazyBlocks, Model, Slots, Table, Weights
from ..errors import Cancelled
from ..kernels.many import blend
from ..members import listed
from ..pair import Models, Pair
from ..symmetry import Transform, canonicalize

_log = logging.getLogger("lmc_fast")


@dataclass(frozen=True)
class _Group:
    """Models that were brought together. elements, matched: what was found for each of `members`, by their numbers."""

    members: tuple[int, ...]
    elements: tuple[Transform, ...]
    matched: tuple[Transform, ...]
    model: Model


def by_levels(models: Models, align: Callable[[Pair, Path | None], Alignment], state: Path | None) -> Alignment:
    """One element for each model, from alignments of two at a time; one that is left over waits for the next level.

    align: of a pair of models or averages, with the file of its own state beside `state`. `matched` are the last
    level's, on top of what was learned below it. info: that of the last alignment, and "levels": of all.
    """
    names, spec = models.names, models.spec
    identity = (Transform.identity(spec),)
    groups = [_Group((k,), identity, identity, model) for k, model in enumerate(models.members)]
    levels: list[dict[str, Any]] = []
    info: dict[str, Any] = {}
    while len(groups) > 1:
        joined = []
        for one, two in zip(groups[::2], groups[1::2], strict=False):
            sides = ["".join(names[k] for k in group.members) for group in (one, two)]
            _log.info("aligning %s", listed(sides))
            try:
                found = align(Pair(one.model, two.model), _of_level(state, len(levels)))
            except Cancelled as error:
                error.alignment = None  # of two of the groups: it would mean nothing for the models
                raise
            info = found.info
            levels.append(
                {"members": sides, "history": info.get("history"), "exported_step": info.get("exported_step")}
            )
            joined.append(_joined(models, one, two, found))
        groups = joined + groups[len(joined) * 2 :]
    (whole,) = groups
    order = sorted(range(len(names)), key=whole.members.__getitem__)
    members, matched = ([part[k] for k in order] for part in (whole.elements, whole.matched))
    return Alignment(*members, matched=matched, info=info | {"levels": levels})


def _of_level(state: Path | None, number: int) -> Path | None:
    return None if state is None else state.with_name(f"{state.stem}-{number}{state.suffix}")


def _joined(models: Models, one: _Group, two: _Group, found: Alignment) -> _Group:
    members = one.members + two.members

    def through(elements: Sequence[Transform]) -> tuple[Transform, ...]:
        return tuple(g.compose(e) for group, g in zip((one, two), elements, strict=True) for e in group.elements)

    elements = through(found.members)
    parts = [(models.members[k], g) for k, g in zip(members, elements, strict=True)]
    return _Group(members, elements, through(found.matched), AverageModel(parts))


class AverageModel(Model):
    """The plain average of models, each in canonical form and moved by its element; made anew whenever it is read."""

    def __init__(self, parts: Sequence[tuple[Model, Transform]]):
        first = parts[0][0]
        self.source = f"the average of {listed([model.source for model, _ in parts])}"
        self.checkpoint, self.family, self.coverage = first.checkpoint, first.family, first.coverage
        self.config, self.spec, self.parts = first.config, first.spec, parts

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Weights:
        return self.open_weights(dtype, device).load()

    def open_weights(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Weights:
        return averaged([g.apply(canonicalize(model.open_weights(dtype, device))) for model, g in self.parts])


def averaged(members: Sequence[Weights]) -> Weights:
    """The mean of lazy weights, as lazy as these."""
    shares = [1 / len(members)] * len(members)

    def mean(slots: Sequence[Slots]) -> Slots:
        return {name: blend([w[name] for w in slots], shares) for name in slots[0]}

    def table(name: str) -> Table:
        def rows(start: int, stop: int) -> Tensor:
            return blend([w.tables[name].rows(start, stop) for w in members], shares)

        return Table(members[0].tables[name].shape, rows)

    blocks = LazyBlocks(len(members[0].blocks), lambda i: mean([w.blocks[i] for w in members]))
    tables = {name: table(name) for name in members[0].tables}
    return Weights(members[0].spec, mean([w.ends for w in members]), blocks, tables)
