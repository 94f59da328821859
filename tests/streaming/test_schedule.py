"""The schedule, exhaustively over all small cases."""

import itertools

import pytest

from lmc_fast.engine.passes import visit_order
from lmc_fast.streaming.schedule import (
    Compute,
    Load,
    Release,
    schedule,
    steady_loads,
)

PASSES = 3


def sequences(longest):
    """Every sequence of visits up to the names of the segments."""

    def grow(prefix):
        yield prefix
        if len(prefix) < longest:
            for segment in range(max(prefix) + 2):
                yield from grow((*prefix, segment))

    return grow((0,))


def cases(longest, most_slots=4):
    for visits in sequences(longest):
        segments = set(visits)
        for buffers in range(1, most_slots + 1):
            for resident in itertools.chain([()], [(u,) for u in segments]):
                yield visits, buffers, frozenset(resident)


def passes(visits, buffers, resident=(), count=PASSES, held=None):
    held = held or (None,) * buffers
    out = []
    for _ in range(count):
        actions, held = schedule(visits, buffers, resident, held)
        out.append(actions)
    return out, held


def check(visits, buffers, resident, actions, held, count):
    """Runs the actions on a model of the ring: every rule of a correct schedule, and what the ring holds at the end."""
    ring, released, computed = list(held), set(), []
    for place, action in enumerate(actions):
        if isinstance(action, Release):
            assert ring[action.buffer] == action.segment and action.buffer not in released
            released.add(action.buffer)
        elif isinstance(action, Load):
            assert 0 <= action.buffer < buffers and action.segment not in resident
            assert (
                ring[action.buffer] is None or action.buffer in released
            )  # nothing is overwritten that was not released
            assert action.segment not in ring  # nothing is loaded that is there
            ring[action.buffer] = action.segment
            released.discard(action.buffer)
        else:
            if action.buffer is None:
                assert action.segment in resident
            else:
                assert ring[action.buffer] == action.segment and action.buffer not in released
                if buffers > 1 and computed:  # ahead: the load was issued before the visit that precedes this one
                    visit = [i for i, a in enumerate(actions[:place]) if isinstance(a, Compute)][-1]
                    between = [a for a in actions[visit:place] if isinstance(a, Load)]
                    assert action.segment not in [a.segment for a in between]
            computed.append(action.segment)
    assert computed == list(visits) * count and not released
    return tuple(ring)


def fewest_loads(visits, buffers, resident, ahead):
    """Brute force: the fewest loads of a sequence of visits, over all sets that the ring may hold."""
    best = {frozenset(): 0}
    before = None
    for segment in visits:
        if segment in resident:
            before = None
            continue
        after = {}
        for held, cost in best.items():
            if segment in held:
                options = [(held, cost)]
            else:
                room = [held] if len(held) < buffers else [held - {x} for x in held if not (ahead and x == before)]
                options = [(rest | {segment}, cost + 1) for rest in room]
            for state, price in options:
                after[state] = min(price, after.get(state, price))
        best, before = after, segment
    return min(best.values())


def test_every_small_case_is_correct():
    for visits, buffers, resident in cases(7):
        parts, end = passes(visits, buffers, resident)
        actions = [a for part in parts for a in part]
        assert check(visits, buffers, resident, actions, (None,) * buffers, PASSES) == end


def loads_used(parts):
    """Loads whose segment is computed in these passes; those for a later pass do not count."""
    fresh, count = set(), 0
    for action in itertools.chain(*parts):
        if isinstance(action, Load):
            fresh.add(action.segment)
        elif isinstance(action, Compute) and action.segment in fresh:
            fresh.remove(action.segment)
            count += 1
    return count


def test_loads_are_minimal_over_any_number_of_passes():
    for visits, buffers, resident in cases(6):
        parts, _ = passes(visits, buffers, resident)
        for count in range(1, PASSES + 1):
            fewest = fewest_loads(visits * count, buffers, resident, ahead=buffers > 1)
            assert loads_used(parts[:count]) == fewest, (visits, buffers, resident, count)


def test_it_starts_from_anything():
    """An abandoned pass, or a pass of another kind, leaves any segments in the buffers."""
    for visits in sequences(4):
        for buffers in (1, 2, 3):
            segments = [None, *range(max(visits) + 2)]
            for held in itertools.product(segments, repeat=buffers):
                filled = [u for u in held if u is not None]
                if len(set(filled)) == len(filled):
                    actions, end = schedule(visits, buffers, (), held)
                    ring, computed = list(held), []
                    for a in actions:
                        if isinstance(a, Load):
                            ring[a.buffer] = a.segment
                        elif isinstance(a, Compute):
                            assert ring[a.buffer] == a.segment
                            computed.append(a.segment)
                    assert computed == list(visits) and tuple(ring) == end


def test_it_is_deterministic_and_its_parts_compose():
    for visits, buffers, resident in cases(5):
        once = passes(visits, buffers, resident)
        assert once == passes(visits, buffers, resident)
        # a pass that is the same pass three times over asks for the same loads in the same order
        whole, _ = schedule(visits * PASSES, buffers, resident)
        parts = [a for part in once[0] for a in part]

        def loads(actions):
            return [a for a in actions if isinstance(a, Load)]

        shorter = min(len(loads(whole)), len(loads(parts)))
        assert loads(whole)[:shorter] == loads(parts)[:shorter]


@pytest.mark.parametrize("layers", range(1, 9))
@pytest.mark.parametrize("buffers", [2, 3, 4, 5])
def test_ring_sizes_that_do_not_divide_the_number_of_blocks(layers, buffers):
    """buffer = i % S with the next load at (i + S) % M overwrites what is needed where S does not divide M."""
    for parts in (1, 2, 3):
        for visits in (visit_order(layers, parts, learn=True), visit_order(layers, parts, learn=False)):
            out, _ = passes(visits, buffers, count=4)
            check(tuple(visits), buffers, frozenset(), [a for part in out for a in part], (None,) * buffers, 4)


def test_turns_are_not_loaded_again():
    """Of 2 L + 1 visits, three need no load: the last block behind the head, and the first two of the next step."""
    assert steady_loads(visit_order(6, 1, learn=True), 2) == {0: 1, 1: 1, 2: 2, 3: 2, 4: 2, 5: 1, 6: 1}
    assert steady_loads(visit_order(6, 1, learn=True), 3) == {0: 1, 1: 1, 2: 1, 3: 2, 4: 1, 5: 1, 6: 1}
    assert steady_loads(visit_order(6, 1, learn=True), 7) == {}
    assert steady_loads(visit_order(6, 1, learn=True), 0, range(7)) == {}


def test_each_slot_and_each_resident_block_saves_loads():
    visits = visit_order(8, 1, learn=True)
    by_slots = [sum(steady_loads(visits, buffers).values()) for buffers in range(2, 10)]
    by_residents = [sum(steady_loads(visits, 2, range(r)).values()) for r in range(9)]
    for loads in (by_slots, by_residents):
        assert all(x >= y for x, y in itertools.pairwise(loads)) and loads[0] > loads[-1]


def test_what_cannot_be():
    for arguments in (((), 2), ((0, 1), 0), ((0, 1), 2, (), (None,))):
        with pytest.raises(ValueError):
            schedule(*arguments)
