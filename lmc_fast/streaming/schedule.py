"""What is loaded when, as data: the actions of one pass over the units of a pair, for a ring of slots.

A *unit* is a block or a part of the head, a *visit* one computation with it. Passes follow one another; each is taken
to be followed by one like it, so that the last loads of a pass are the first units of the next, and what the turns have
in hand already is not loaded again.

A load starts at least one visit before its unit is needed (with two slots or more), loads keep the order in which their
units are needed, and the unit that gives way is the one whose next use is farthest away (Belady): no schedule with
loads one visit ahead has fewer of them, over any number of passes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass

Held = tuple[int | None, ...]  # the unit in each slot


@dataclass(frozen=True)
class Load:
    """Start to bring a unit into a slot."""

    unit: int
    slot: int


@dataclass(frozen=True)
class Compute:
    """Compute with a unit; slot None: it is resident."""

    unit: int
    slot: int | None


@dataclass(frozen=True)
class Release:
    """The slot's unit is not needed any more before the slot's next load, which follows."""

    unit: int
    slot: int


Action = Load | Compute | Release


def schedule(
    visits: Sequence[int], slots: int, resident: Collection[int] = (), held: Held | None = None
) -> tuple[list[Action], Held]:
    """Actions of one pass in the order in which they are issued, and what the slots hold (or await) at its end.

    visits: the units of the pass, in order. slots: size of the ring. resident: units that are always at hand. held:
    what the slots hold at the start, as returned for the pass before; None: nothing. Deterministic.

    Raises ValueError for an empty pass, and where units must be loaded but there is no slot.
    """
    contents = list(held if held is not None else [None] * slots)
    if not visits or len(contents) != slots:
        raise ValueError("a pass has at least one visit, and `held` names the unit of every slot")
    if slots < 1 and set(visits) - set(resident):
        raise ValueError("units that are not resident need at least one slot")
    count = len(visits)
    places: dict[int, list[int]] = {}
    for i, unit in enumerate(visits):
        places.setdefault(unit, []).append(i)

    used = [-1] * slots  # the visit that last used what a slot holds
    issued = -1  # the visit after which the latest load is issued
    after: list[list[Action]] = [[] for _ in range(count + 1)]  # [i]: issued before visit i
    where: list[int | None] = []
    for i in range(2 * count):  # the pass, and the look ahead into the next: without a miss there is none later either
        unit = visits[i % count]
        if unit in resident:
            where.append(None)
            continue
        if unit in contents:
            slot = contents.index(unit)
        else:
            busy = visits[(i - 1) % count] if i and slots > 1 else None
            slot = _gives_way(contents, busy, i, places, count)
            issued = max(issued, used[slot])
            if issued >= count:
                break
            old = contents[slot]
            after[issued + 1] += [Load(unit, slot)] if old is None else [Release(old, slot), Load(unit, slot)]
            contents[slot] = unit
        used[slot] = i
        where.append(slot)

    actions: list[Action] = []
    for i, unit in enumerate(visits):
        actions += [*after[i], Compute(unit, where[i])]
    return actions + after[count], tuple(contents)


def _gives_way(contents: list[int | None], busy: int | None, now: int, places: dict[int, list[int]], count: int) -> int:
    """The slot that is free or whose unit is used again last; never that of the unit `busy`, computed just before."""

    def next_use(slot: int) -> float:
        unit = contents[slot]
        if unit is None or unit not in places:
            return math.inf
        later = places[unit]
        i = bisect_right(later, now % count)
        return later[i] if i < len(later) else later[0] + count

    choices = [slot for slot, unit in enumerate(contents) if unit is None or unit != busy]
    return max(choices, key=next_use)


def steady_loads(visits: Sequence[int], slots: int, resident: Collection[int] = ()) -> dict[int, float]:
    """How often each unit is loaded per pass once the first pass is over (a mean, where passes differ)."""
    held: Held = (None,) * slots
    seen: dict[Held, int] = {}
    passes: list[list[int]] = []
    while held not in seen:
        seen[held] = len(passes)
        actions, held = schedule(visits, slots, resident, held)
        passes.append([action.unit for action in actions if isinstance(action, Load)])
    period = passes[seen[held] :]
    loads: dict[int, float] = {}
    for units in period:
        for unit in units:
            loads[unit] = loads.get(unit, 0) + 1 / len(period)
    return loads
