"""Steering by held-out data: which state goes on, by which objective and how fast; and it is the same after a kill."""

import math
from dataclasses import asdict

import pytest
import torch
from checkpoints_tiny import write_lines

import lmc_fast as lmc
from lmc_fast.learning.learner import History
from lmc_fast.learning.schedule import Schedule
from lmc_fast.learning.steering import Turn, best_of, decide, is_due, trial_steps
from lmc_fast.symmetry.storage import pack

AUTO = Schedule(steps=200)


def walk(excesses, schedule=AUTO):
    """Turns of a run whose validations say so, at the steps at which they are due."""
    due = [step for step in range(schedule.steps + 1) if is_due(schedule, step)]
    seen, turns = {}, []
    for step, value in zip(due, excesses, strict=False):
        seen[step] = value
        turn = decide(schedule, seen, turns)
        turns += [turn] if turn else []
    return turns


def facts(turns):
    return [(t.step, t.origin, t.text, t.factor) for t in turns]


@pytest.mark.parametrize(
    ("excesses", "expected"),
    [
        ([0.5, 0.3, 0.4], [(12, 0, 0.0, 1.0), (24, 12, 1.0, 1.0)]),  # the text wins: back to it
        ([0.5, 0.4, 0.3], [(12, 0, 0.0, 1.0), (24, 24, 0.0, 1.0)]),  # the endpoints' predictions win: go on with them
        ([0.5, 0.7, 0.6], [(12, 0, 0.0, 1.0), (24, 0, 0.0, 0.25)]),  # both are worse than nothing
        ([-0.1, 0.6, 0.7], [(12, 0, 0.0, 1.0), (24, 0, 1.0, 0.25)]),
        (
            [0.5, 0.4, 0.3, 0.2, 0.25, 0.21],
            [(12, 0, 0.0, 1.0), (24, 24, 0.0, 1.0), (60, 40, 0.0, 0.5), (80, 40, 0.0, 0.25)],
        ),
        ([0.5, 0.4, 0.3, 0.2, 0.201, 0.2], [(12, 0, 0.0, 1.0), (24, 24, 0.0, 1.0)]),  # noise is no rise
    ],
)  # fmt: skip
def test_what_validation_decides(excesses, expected):
    assert facts(walk(excesses)) == expected


def test_a_chosen_objective_is_not_tried_but_steered():
    schedule = Schedule(steps=200, objective="text")
    assert trial_steps(schedule) == trial_steps(Schedule(steps=9)) == 0 and trial_steps(AUTO) == 12
    assert facts(walk([0.5, 0.6, 0.4, 0.3], schedule)) == [(20, 0, 1.0, 0.5)]
    for steps in (1, 2, 7, 20, 55, 1200):
        for objective in ("auto", "text"):
            schedule = Schedule(steps=steps, objective=objective)
            due = [step for step in range(steps + 1) if is_due(schedule, step)]
            assert due[0] == 0 and due[-1] == steps and len(due) <= 14
            assert {trial_steps(schedule), 2 * trial_steps(schedule)} <= set(due)


def test_warm_up_counts_tokens_and_begins_again_where_a_run_goes_back():
    schedule = Schedule(steps=400)
    assert [schedule.warmup_steps(tokens) for tokens in (2048, 1024, 512, 1, 1 << 20)] == [10, 20, 40, 40, 1]
    assert schedule.rate(4, 512) == 5 / 40 and schedule.rate(100, since=96) == 0.5 * schedule.rate(100)
    assert schedule.matrix_rate(64) == schedule.matrix_rate(128) == 4 * schedule.matrix_rate(512) == 0.035


def test_short_runs_take_longer_steps():
    hastes = [Schedule(steps=steps).haste for steps in (0, 1, 10, 30, 250, 1200)]
    assert hastes[:3] == [4, 4, 4] and hastes[4:] == [1, 1]
    assert hastes[3] == pytest.approx(math.sqrt(250 / 30)) and Schedule(steps=30).rate(2) == 1


def test_best_is_the_first_of_the_least():
    assert best_of({0: 0.2, 5: 0.1, 10: 0.1, 15: math.inf}) == 5


def test_a_history_comes_back_from_json():
    history = History([1.0], {0: 0.1, 1: 0.05}, [Turn(1, 0, 1.0, 0.5, "x")])
    assert History(**asdict(history)) == history and (history.exported, history.since, history.factor) == (1, 1, 0.5)


@pytest.fixture
def job(make_checkpoint, tmp_path):
    pair = lmc.open_pair(make_checkpoint("neox", 1), make_checkpoint("neox", 2))
    return pair, lmc.read_tokens(write_lines(tmp_path / "text.txt", 3000), pair.a, 16)


def numbers(alignment):
    return [t for side in alignment.members for _, t in sorted(pack(side, "x").items())]


def test_a_harmful_run_gives_back_what_matching_found(job):
    pair, tokens = job
    found = lmc.align(pair, tokens, steps=30, batch=2, matrix_lr=3.0, scale_lr=1.0, final=1.0)
    history = History(**found.info["history"])
    assert min(history.excess, key=history.excess.get) == found.info["exported_step"] == history.exported
    if history.exported == 0:
        matched = [t for side in found.matched for _, t in sorted(pack(side, "x").items())]
        assert all(torch.equal(x, y) for x, y in zip(numbers(found), matched, strict=True))
    assert any(turn.returns and turn.factor < 1 for turn in history.turns)


@pytest.mark.parametrize("at", [1, 4, 5, 8, 13])
def test_a_killed_run_takes_the_same_turns_to_the_same_bits(at, job, tmp_path):
    pair, tokens = job
    options = {"steps": 20, "batch": 2, "matrix_lr": 2.0, "final": 1.0, "state_file": tmp_path / "state.safetensors"}
    expected = lmc.align(pair, tokens, **(options | {"state_file": None}))
    assert len(expected.info["history"]["turns"]) > 2

    def stop(progress):
        if progress.stage == "learning" and progress.step == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lmc.align(pair, tokens, progress=stop, **options)
    found = lmc.align(pair, tokens, **options)
    assert found.info["history"] == expected.info["history"]
    assert all(torch.equal(x, y) for x, y in zip(numbers(found), numbers(expected), strict=True))


def test_endpoints_that_predict_nothing_are_warned_about_and_too_little_data_is_said(job, caplog):
    pair, tokens = job
    found = lmc.align(pair, tokens[:6], steps=2, batch=2)
    assert any("too little data" in note for note in found.info["notes"])
    useless = [note for note in found.info["notes"] if "predicts next to nothing" in note]
    assert len(useless) == 2 and useless[0] in caplog.text
