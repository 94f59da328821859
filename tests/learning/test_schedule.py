"""Schedules: what is refused and in which words, and what follows from the method."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from checkpoints_tiny import write_lines

import lmc_fast as lmc
from lmc_fast.errors import LmcError
from lmc_fast.learning.schedule import EDGES, Schedule


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("steps", bad) for bad in (-5, -1, 2.5, math.nan, "10", None, True)],
        *[("batch", bad) for bad in (0, -3, 1.0, None)],
        *[("sides", bad) for bad in (0, 3, -1, 1.5, "2", True)],
        *[("low", bad) for bad in (-0.1, 0.7, math.nan, -math.inf, "0.1", None)],
        *[("high", bad) for bad in (0.3, 1.1, math.nan, math.inf, False)],
        *[("objective", bad) for bad in ("txet", "", None, 1)],
        *[(name, bad) for name in ("matrix_lr", "scale_lr") for bad in (-1e-3, math.nan, math.inf, "1", None)],
        *[("warmup", bad) for bad in (-1, 0.5)],
        *[("final", bad) for bad in (-0.1, 1.5, math.nan)],
        *[("seed", bad) for bad in (-1, 1 << 32, 0.5, "0")],
    ],
)
def test_a_field_that_makes_no_sense_is_named_in_one_sentence(field, value):
    with pytest.raises(LmcError) as error:
        Schedule(**{field: value})
    text = str(error.value)
    assert text.startswith("lambda is drawn from low to high" if "lambda" in text else field), text
    assert "\n" not in text and (str(value) in text or "lambda" in text)


def test_numbers_of_numpy_are_numbers():
    schedule = Schedule(steps=np.int64(5), batch=np.int32(2), low=np.float32(0.25), high=1, seed=(1 << 32) - 1)
    assert json.loads(json.dumps(asdict(schedule))) == asdict(schedule)
    assert (schedule.steps, schedule.low, schedule.high) == (5, 0.25, 1.0)
    schedule.rows(3, 7)


def test_sides_follow_from_the_method():
    assert Schedule.of("dual", None, {}).sides == 2 and Schedule.of("one-sided", None, {"steps": 3}).sides == 1
    assert Schedule.of("one-sided", Schedule(steps=3), {}) == Schedule(steps=3, sides=1)
    assert Schedule.of("dual", Schedule(sides=2), {}).moving == Schedule().moving == 2


def test_what_contradicts_is_refused_before_anything_is_read(make_checkpoint, tmp_path):
    pair = lmc.open_pair(make_checkpoint("neox", 1), make_checkpoint("neox", 2))
    tokens = lmc.read_tokens(write_lines(tmp_path / "text.txt", 600), pair.a, 16)
    cases = [
        ({"schedule": Schedule(steps=2), "steps": 2}, "steps and a schedule are both given"),
        ({"schedule": Schedule(sides=2), "method": "one-sided"}, "method one-sided moves B alone"),
        ({"schedule": Schedule(sides=1)}, "method dual moves both endpoints"),
        ({"method": "one-sided", "sides": 2}, "method one-sided moves B alone"),
        ({"stesp": 2}, "option stesp is unknown; did you mean steps"),
        ({"learning_rate": 2}, "option learning_rate is unknown; a schedule has steps, batch"),
        ({"schedule": {"steps": 2}}, "schedule must be a Schedule"),
        ({"method": "weight", "stesp": 2}, "option stesp is unknown"),
        ({"activations": math.nan}, "activations must be"),
        ({"activations": -1}, "activations must be"),
        ({"method": "duel"}, "'duel' is unknown"),
    ]
    for options, words in cases:
        with pytest.raises(LmcError, match=words):
            lmc.align(pair, tokens, **options)
        with pytest.raises(LmcError, match=words):
            lmc.run(pair, tokens, tmp_path / "out", **options)
    assert [f.name for f in tmp_path.iterdir()] == ["text.txt"]


def test_one_sided_leaves_a_as_matching_left_it(make_checkpoint, tmp_path):
    pair = lmc.open_pair(make_checkpoint("neox", 1), make_checkpoint("neox", 2))
    tokens = lmc.read_tokens(write_lines(tmp_path / "text.txt", 600), pair.a, 16)
    found = lmc.align(pair, tokens, method="one-sided", schedule=Schedule(steps=2, batch=2))
    assert found.info["schedule"]["sides"] == 1
    canonical = lmc.Alignment(found.a, found.b, found.matched)
    before = lmc.Alignment(*found.matched, found.matched)
    assert lmc.barrier(pair, tokens, canonical, 3).losses[0] == lmc.barrier(pair, tokens, before, 3).losses[0]


@pytest.mark.parametrize("members", [3, 4])
def test_places_between_many_cover_every_edge_and_the_centroid(members):
    schedule = Schedule(low=0.3, high=0.7, seed=5)
    places = [schedule.place(number, members) for number in range(60 * EDGES)]
    assert all(math.isclose(sum(place), 1) and min(place) >= 0 for place in places)
    inner = [place for place in places if min(place) > 0]
    assert len(inner) == 60 * (EDGES - 1) and all(abs(share - 1 / members) <= 0.4 for place in inner for share in place)
    edges = {}
    for place in places:
        if min(place) == 0:
            i, j = (k for k, share in enumerate(place) if share)
            edges.setdefault((i, j), []).append(place[j])
    assert len(edges) == members * (members - 1) / 2 and len({len(line) for line in edges.values()}) == 1
    for line in edges.values():
        assert 0.3 <= min(line) < 0.36 and 0.64 < max(line) <= 0.7
    assert schedule.place(3, 2) == schedule.lam(3)
