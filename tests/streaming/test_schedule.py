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
    """Every sequence of visits up to the names of the units."""

    def grow(prefix):
        yield prefix
        if len(prefix) < longest:
            for unit in range(max(prefix) + 2):
                yield from grow((*prefix, unit))

    return grow((0,))


def cases(longest, most_slots=4):
    for visits in sequences(longest):
        units = set(visits)
        for slots in range(1, most_slots + 1):
            for resident in itertools.chain([()], [(u,) for u in units]):
                yield visits, slots, frozenset(resident)


def passes(visits, slots, resident=(), count=PASSES, held=None):
    held = held or (None,) * slots
    out = []
    for _ in range(count):
        actions, held = schedule(visits, slots, resident, held)
        out.append(actions)
    return out, held


def check(visits, slots, resident, actions, held, count):
    """Runs the actions on a model of the ring: every rule of a correct schedule, and what the ring holds at the end."""
    ring, released, computed = list(held), set(), []
    for place, action in enumerate(actions):
        if isinstance(action, Release):
            assert ring[action.slot] == action.unit and action.slot not in released
            released.add(action.slot)
        elif isinstance(action, Load):
            assert 0 <= action.slot < slots and action.unit not in resident
            assert ring[action.slot] is None or action.slot in released  # nothing is overwritten that was not released
            assert action.unit not in ring  # nothing is loaded that is there
            ring[action.slot] = action.unit
            released.discard(action.slot)
        else:
            if action.slot is None:
                assert action.unit in resident
            else:
                assert ring[action.slot] == action.unit and action.slot not in released
                if slots > 1 and computed:  # ahead: the load was issued before the visit that precedes this one
                    visit = [i for i, a in enumerate(actions[:place]) if isinstance(a, Compute)][-1]
                    between = [a for a in actions[visit:place] if isinstance(a, Load)]
                    assert action.unit not in [a.unit for a in between]
            computed.append(action.unit)
    assert computed == list(visits) * count and not released
    return tuple(ring)


def fewest_loads(visits, slots, resident, ahead):
    """Brute force: the fewest loads of a sequence of visits, over all sets that the ring may hold."""
    best = {frozenset(): 0}
    before = None
    for unit in visits:
        if unit in resident:
            before = None
            continue
        after = {}
        for held, cost in best.items():
            if unit in held:
                options = [(held, cost)]
            else:
                room = [held] if len(held) < slots else [held - {x} for x in held if not (ahead and x == before)]
                options = [(rest | {unit}, cost + 1) for rest in room]
            for state, price in options:
                after[state] = min(price, after.get(state, price))
        best, before = after, unit
    return min(best.values())


def test_every_small_case_is_correct():
    for visits, slots, resident in cases(7):
        parts, end = passes(visits, slots, resident)
        actions = [a for part in parts for a in part]
        assert check(visits, slots, resident, actions, (None,) * slots, PASSES) == end


def loads_used(parts):
    """Loads whose unit is computed in these passes; those for a later pass do not count."""
    fresh, count = set(), 0
    for action in itertools.chain(*parts):
        if isinstance(action, Load):
            fresh.add(action.unit)
        elif isinstance(action, Compute) and action.unit in fresh:
            fresh.remove(action.unit)
            count += 1
    return count


def test_loads_are_minimal_over_any_number_of_passes():
    for visits, slots, resident in cases(6):
        parts, _ = passes(visits, slots, resident)
        for count in range(1, PASSES + 1):
            fewest = fewest_loads(visits * count, slots, resident, ahead=slots > 1)
            assert loads_used(parts[:count]) == fewest, (visits, slots, resident, count)


def test_it_starts_from_anything():
    """An abandoned pass, or a pass of another kind, leaves any units in the slots."""
    for visits in sequences(4):
        for slots in (1, 2, 3):
            units = [None, *range(max(visits) + 2)]
            for held in itertools.product(units, repeat=slots):
                filled = [u for u in held if u is not None]
                if len(set(filled)) == len(filled):
                    actions, end = schedule(visits, slots, (), held)
                    ring, computed = list(held), []
                    for a in actions:
                        if isinstance(a, Load):
                            ring[a.slot] = a.unit
                        elif isinstance(a, Compute):
                            assert ring[a.slot] == a.unit
                            computed.append(a.unit)
                    assert computed == list(visits) and tuple(ring) == end


def test_it_is_deterministic_and_its_parts_compose():
    for visits, slots, resident in cases(5):
        once = passes(visits, slots, resident)
        assert once == passes(visits, slots, resident)
        # a pass that is the same pass three times over asks for the same loads in the same order
        whole, _ = schedule(visits * PASSES, slots, resident)
        parts = [a for part in once[0] for a in part]

        def loads(actions):
            return [a for a in actions if isinstance(a, Load)]

        shorter = min(len(loads(whole)), len(loads(parts)))
        assert loads(whole)[:shorter] == loads(parts)[:shorter]


@pytest.mark.parametrize("layers", range(1, 9))
@pytest.mark.parametrize("slots", [2, 3, 4, 5])
def test_ring_sizes_that_do_not_divide_the_number_of_blocks(layers, slots):
    """slot = i % S with the next load at (i + S) % M overwrites what is needed where S does not divide M."""
    for parts in (1, 2, 3):
        for visits in (visit_order(layers, parts, learn=True), visit_order(layers, parts, learn=False)):
            out, _ = passes(visits, slots, count=4)
            check(tuple(visits), slots, frozenset(), [a for part in out for a in part], (None,) * slots, 4)


def test_turns_are_not_loaded_again():
    """Of 2 L + 1 visits, three need no load: the last block behind the head, and the first two of the next step."""
    assert steady_loads(visit_order(6, 1, learn=True), 2) == {0: 1, 1: 1, 2: 2, 3: 2, 4: 2, 5: 1, 6: 1}
    assert steady_loads(visit_order(6, 1, learn=True), 3) == {0: 1, 1: 1, 2: 1, 3: 2, 4: 1, 5: 1, 6: 1}
    assert steady_loads(visit_order(6, 1, learn=True), 7) == {}
    assert steady_loads(visit_order(6, 1, learn=True), 0, range(7)) == {}


def test_each_slot_and_each_resident_block_saves_loads():
    visits = visit_order(8, 1, learn=True)
    by_slots = [sum(steady_loads(visits, slots).values()) for slots in range(2, 10)]
    by_residents = [sum(steady_loads(visits, 2, range(r)).values()) for r in range(9)]
    for loads in (by_slots, by_residents):
        assert all(x >= y for x, y in itertools.pairwise(loads)) and loads[0] > loads[-1]


def test_what_cannot_be():
    for arguments in (((), 2), ((0, 1), 0), ((0, 1), 2, (), (None,))):
        with pytest.raises(ValueError):
            schedule(*arguments)
