"""Bringing more than two models together level by level: pairs, then the averages of pairs, until there is one.

A level matches averages and moves them whole: what brings two averages together brings their members together, because
an element acts linearly on weights. Then it learns as all models at once do, each with an element of its own and the
models themselves as teachers, but on the line between the two averages.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from ..alignment import Alignment
from ..checkpoints import LazyBlocks, Slots, Table, Weights
from ..errors import Cancelled
from ..kernels.many import blend
from ..members import listed
from ..pair import Models, Pair
from ..symmetry import Transform
from ..symmetry.storage import as_stored, digest_of

_log = logging.getLogger("lmc_fast")


@dataclass(frozen=True)
class Below:
    """What levels below brought together: of each model its element, and the number of its group."""

    elements: tuple[Transform, ...]
    groups: tuple[int, ...]
    FACTS: ClassVar = ("below", "groups")  # what a run of one level alone notes of it

    @property
    def facts(self) -> dict[str, Any]:
        """What a run that goes on must have in common with the one that began."""
        return dict(zip(self.FACTS, (digest_of(self.elements), list(self.groups)), strict=True))

    def averages(self, members: Sequence[Weights]) -> list[Weights]:
        """The plain average of each group, as lazy as its members, which are canonical."""
        moved = [g.apply(w) for g, w in zip(self.elements, members, strict=True)]
        return [averaged([w for w, g in zip(moved, self.groups, strict=True) if g == k]) for k in set(self.groups)]

    def after(self, found: Sequence[Transform]) -> tuple[Transform, ...]:
        """The element of each model, from those found for the groups."""
        return tuple(as_stored(found[k].compose(g)) for g, k in zip(self.elements, self.groups, strict=True))


@dataclass(frozen=True)
class _Group:
    """Models that were brought together. elements, matched: what was found for each of `members`, by their numbers."""

    members: tuple[int, ...]
    elements: tuple[Transform, ...]
    matched: tuple[Transform, ...]


def by_levels(
    models: Models, align: Callable[[Models, Below | None, Path | None], Alignment], state: Path | None
) -> Alignment:
    """One element for each model, from alignments of two groups at a time; one left over waits for the next level.

    align: of the models of two groups, with the file of its own state beside `state`; None: of two single models.
    `matched` are what the last level began with. info: that of the last alignment, and "levels": of all.
    """
    names = models.names
    identity = (Transform.identity(models.spec),)
    groups = [_Group((k,), identity, identity) for k in range(len(models.members))]
    levels: list[dict[str, Any]] = []
    info: dict[str, Any] = {}
    while len(groups) > 1:
        joined = []
        for one, two in zip(groups[::2], groups[1::2], strict=False):
            sides = ["".join(names[k] for k in group.members) for group in (one, two)]
            _log.info("aligning %s", listed(sides))
            numbers = one.members + two.members
            some, below = Models(tuple(models.members[k] for k in numbers)), None
            if len(numbers) == 2:
                some = Pair(some.a, some.b)
            else:
                below = Below(one.elements + two.elements, (0,) * len(one.members) + (1,) * len(two.members))
            try:
                found = align(some, below, _of_level(state, len(levels)))
            except Cancelled as error:
                error.alignment = None  # of some of the models alone
                raise
            info = {key: value for key, value in found.info.items() if key not in Below.FACTS}
            levels.append(
                {"members": sides, "history": info.get("history"), "exported_step": info.get("exported_step")}
            )
            joined.append(_Group(numbers, tuple(found.members), tuple(found.matched)))
        groups = joined + groups[len(joined) * 2 :]
    (whole,) = groups
    order = sorted(range(len(names)), key=whole.members.__getitem__)
    elements, matched = ([part[k] for k in order] for part in (whole.elements, whole.matched))
    return Alignment(*elements, matched=matched, info=info | {"levels": levels})


def _of_level(state: Path | None, number: int) -> Path | None:
    return None if state is None else state.with_name(f"{state.stem}-{number}{state.suffix}")


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
