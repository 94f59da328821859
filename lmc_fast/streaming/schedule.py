"""What is loaded when, as data: the actions of one pass over the segments of a pair, for a ring of buffers.

A *segment* is a block or a part of the head, a *visit* one computation with it. Passes follow one another; each is
taken to be followed by one like it, so that the last loads of a pass are the first segments of the next, and what the
turns have in hand already is not loaded again.

A load starts at least one visit before its segment is needed (with two buffers or more), loads keep the order in which
their segments are needed, and the segment that gives way is the one whose next use is farthest away (Belady): no
schedule with loads one visit ahead has fewer of them, over any number of passes.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass

Held = tuple[int | None, ...]  # the segment in each buffer


@dataclass(frozen=True)
class Load:
    """Start to bring a segment into a buffer."""

    segment: int
    buffer: int


@dataclass(frozen=True)
class Compute:
    """Compute with a segment; buffer None: it is resident."""

    segment: int
    buffer: int | None


@dataclass(frozen=True)
class Release:
    """The buffer's segment is not needed any more before the buffer's next load, which follows."""

    segment: int
    buffer: int


Action = Load | Compute | Release


def schedule(
    visits: Sequence[int], buffers: int, resident: Collection[int] = (), held: Held | None = None
) -> tuple[list[Action], Held]:
    """Actions of one pass in the order in which they are issued, and what the buffers hold (or await) at its end.

    visits: the segments of the pass, in order. buffers: size of the ring. resident: segments that are always at hand.
    held: what the buffers hold at the start, as returned for the pass before; None: nothing. Deterministic.

    Raises ValueError for an empty pass, and where segments must be loaded but there is no buffer.
    """
    contents = list(held if held is not None else [None] * buffers)
    if not visits or len(contents) != buffers:
        raise ValueError("a pass has at least one visit, and `held` names the segment of every buffer")
    if buffers < 1 and set(visits) - set(resident):
        raise ValueError("segments that are not resident need at least one buffer")
    count = len(visits)
    places: dict[int, list[int]] = {}
    for i, segment in enumerate(visits):
        places.setdefault(segment, []).append(i)

    used = [-1] * buffers  # the visit that last used what a buffer holds
    issued = -1  # the visit after which the latest load is issued
    after: list[list[Action]] = [[] for _ in range(count + 1)]  # [i]: issued before visit i
    where: list[int | None] = []
    for i in range(2 * count):  # the pass, and the look ahead into the next: without a miss there is none later either
        segment = visits[i % count]
        if segment in resident:
            where.append(None)
            continue
        if segment in contents:
            buffer = contents.index(segment)
        else:
            busy = visits[(i - 1) % count] if i and buffers > 1 else None
            buffer = _gives_way(contents, busy, i, places, count)
            issued = max(issued, used[buffer])
            if issued >= count:
                break
            old = contents[buffer]
            after[issued + 1] += (
                [Load(segment, buffer)] if old is None else [Release(old, buffer), Load(segment, buffer)]
            )
            contents[buffer] = segment
        used[buffer] = i
        where.append(buffer)

    actions: list[Action] = []
    for i, segment in enumerate(visits):
        actions += [*after[i], Compute(segment, where[i])]
    return actions + after[count], tuple(contents)


def _gives_way(contents: list[int | None], busy: int | None, now: int, places: dict[int, list[int]], count: int) -> int:
    """The buffer that is free or whose segment is used again last; never that of `busy`, computed just before."""

    def next_use(buffer: int) -> float:
        segment = contents[buffer]
        if segment is None or segment not in places:
            return math.inf
        later = places[segment]
        i = bisect_right(later, now % count)
        return later[i] if i < len(later) else later[0] + count

    choices = [buffer for buffer, segment in enumerate(contents) if segment is None or segment != busy]
    return max(choices, key=next_use)


def steady_loads(visits: Sequence[int], buffers: int, resident: Collection[int] = ()) -> dict[int, float]:
    """How often each segment is loaded per pass once the first pass is over (a mean, where passes differ)."""
    held: Held = (None,) * buffers
    seen: dict[Held, int] = {}
    passes: list[list[int]] = []
    while held not in seen:
        seen[held] = len(passes)
        actions, held = schedule(visits, buffers, resident, held)
        passes.append([action.segment for action in actions if isinstance(action, Load)])
    period = passes[seen[held] :]
    loads: dict[int, float] = {}
    for segments in period:
        for segment in segments:
            loads[segment] = loads.get(segment, 0) + 1 / len(period)
    return loads
