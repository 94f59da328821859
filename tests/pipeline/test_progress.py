"""Progress of every stage, and cancelling in each of them."""

import shutil
import signal
import threading
from functools import cache, partial

import pytest
import torch
from checkpoints_tiny import write_lines
from transformers import AutoModelForCausalLM

import lmc_fast as lmc
from lmc_fast.data import read_data, sequence_length
from lmc_fast.learning import learner
from lmc_fast.learning.muon import muon_step
from lmc_fast.pipeline import progress as module
from lmc_fast.pipeline.progress import Watch, expected_rounds

FAST = {"steps": 4, "batch": 2}
STAGES = ["matching", "preparing", "learning", "measuring", "writing", "verifying"]


@pytest.fixture(scope="module")
def case(make_checkpoint, tmp_path_factory):
    pair = lmc.open_pair(make_checkpoint("neox", 1), make_checkpoint("neox", 2))
    text = write_lines(tmp_path_factory.mktemp("text") / "text.txt", 600)
    data = read_data(str(text), pair.a, sequence_length(pair.a, 16))
    return pair, data[:-8], data[-8:]


@pytest.fixture(scope="module")
def whole(case, tmp_path_factory):
    """whole(memory) -> the outcome of a run that nothing stopped; each is made once."""

    @cache
    def make(memory):
        pair, tokens, validation = case
        out = tmp_path_factory.mktemp("whole") / "out"
        report = lmc.run(pair, tokens, out, validation=validation, memory=memory, **FAST)
        return report["history"], (out / "a" / "model.safetensors").read_bytes()

    return make


@pytest.mark.parametrize("memory", [None, 4 << 30], ids=["in memory", "streamed"])
def test_every_stage_tells_how_far_it_is(case, memory, tmp_path):
    pair, tokens, validation = case
    seen = []
    lmc.run(pair, tokens, tmp_path / "out", validation=validation, memory=memory, progress=seen.append, **FAST)
    assert list(dict.fromkeys(at.stage for at in seen)) == STAGES
    for stage in STAGES:
        steps = [at.step for at in seen if at.stage == stage]
        assert steps == sorted(steps) and all(at.step <= at.steps for at in seen if at.stage == stage)
    matching = [at for at in seen if at.stage == "matching"]
    notes = [at.note for at in matching]
    assert "statistics of activations" in notes and "round 1" in notes
    assert any(
        note.startswith("round 2, ") and note.endswith("assignments changed in the one before") for note in notes
    )
    learning = [at for at in seen if at.stage == "learning"]
    assert [at.step for at in learning] == [0, 0, 1, 2, 3, 4] and learning[-1].loss is not None
    assert learning[1].eta > 0 and learning[-1].eta == 0  # there is one before the first step
    assert learning[0].steps == 4 and learning[-1].eta == 0 and learning[3].eta > 0
    # before the first step the plan knows
    assert (learning[0].eta is not None) == (memory is not None) and (memory is None or learning[0].eta > 0)


@pytest.fixture
def commands(case, tmp_path):
    """What else takes long, by name: the call, which writes `out`, and its stages."""
    pair, tokens, validation = case
    lmc.run(pair, tokens, tmp_path / "run", validation=validation, curves=False, **FAST)
    a, b = (str(model.path) for model in pair.members)
    run, out = tmp_path / "run", tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(a)
    del model.gpt_neox.layers[1:]
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path / "small")
    return {
        "merge": (partial(lmc.merge, a, b, out), ["writing"]),
        "verify": (partial(lmc.verify, a, b), ["verifying"]),
        "grow": (partial(lmc.grow, tmp_path / "small", a, out, tokens=tokens), ["placing", "writing", "verifying"]),
        "carry": (
            partial(lmc.carry, run / "alignment.safetensors", b, out, member="b", onto=run / "a"),
            ["comparing", "writing", "verifying"],
        ),
    }


@pytest.mark.parametrize("command", ["merge", "verify", "grow", "carry"])
def test_other_commands_tell_how_far_they_are_and_can_be_cancelled(commands, command, tmp_path):
    (call, stages), out = commands[command], tmp_path / "out"
    seen = []
    call(progress=seen.append)
    assert list(dict.fromkeys(at.stage for at in seen)) == stages
    for stage in stages:
        told = [at for at in seen if at.stage == stage]
        assert told[-1].step == told[-1].steps > 1
        flag = threading.Event()

        def stop(at, stage=stage, flag=flag):
            if at.stage == stage and at.step:
                flag.set()

        if out.exists():
            shutil.rmtree(out)
        with pytest.raises(lmc.Cancelled, match=f"cancelled while {stage}"):
            call(progress=stop, cancel=flag)
        assert not out.exists() and not out.with_name("out.partial").exists()


def test_what_a_callback_raises_is_not_taken_for_a_fault_of_transformers(case, caplog):
    def fail(at):
        if at.step:
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        lmc.verify(case[0].a.path, case[0].b.path, progress=fail)
    assert "our own engine" not in caplog.text


def test_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    seen = []
    watch = Watch(seen.append)
    watch.begin("learning", 10, 4, step_seconds=7.0)
    now[0] += 6
    watch.at(6, 10)
    watch.begin("measuring", 3)
    assert [at.eta for at in seen] == [6 * 7.0, 4 * 3.0, None]


@pytest.mark.parametrize(
    ("changed", "most", "least", "largest"),
    [
        ([], 50, 8, 8),
        ([], 3, 3, 3),
        ([40], 50, 2, 8),
        ([40, 20], 50, 5, 10),
        ([40, 40], 50, 10, 50),
        ([9, 0], 50, 2, 2),
    ],
)
def test_rounds_that_are_expected(changed, most, least, largest):
    assert least <= expected_rounds(changed, most) <= largest


@pytest.mark.parametrize("stage", STAGES)
def test_cancelled_in_any_stage_it_goes_on_to_the_same_bits(case, whole, stage, tmp_path):
    pair, tokens, validation = case
    flag = threading.Event()
    how = {"validation": validation, **FAST}

    def stop(at):
        if at.stage == stage and at.step:
            flag.set()

    cancel = flag if stage == "learning" else flag.is_set
    memory = 4 << 30 if stage == "preparing" else None
    with pytest.raises(lmc.Cancelled, match=f"cancelled while {stage}") as caught:
        lmc.run(pair, tokens, tmp_path / "out", progress=stop, cancel=cancel, memory=memory, **how)
    assert isinstance(caught.value, lmc.LmcError) and not (tmp_path / "out").exists()
    kept = (tmp_path / "out.partial").exists()
    assert kept == (stage != "matching") == ("go on with resume=True" in str(caught.value))
    report = lmc.run(pair, tokens, tmp_path / "out", resume=kept, memory=memory, **how)
    assert (report["history"], (tmp_path / "out" / "a" / "model.safetensors").read_bytes()) == whole(memory)


def test_an_interruption_in_the_middle_of_an_update_waits_for_its_end(case, tmp_path, monkeypatch):
    """Else the state would have half of the step's parameters moved, and the step would be taken again."""
    pair, tokens, _ = case
    expected = lmc.align(pair, tokens, **FAST)
    calls = []

    def interrupted(*rest):
        calls.append(0)
        muon_step(*rest)
        if len(calls) == 4:  # the first of several in the second step
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(learner, "muon_step", interrupted)
    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        lmc.align(pair, tokens, state_file=state, **FAST)
    assert len(calls) == 6
    monkeypatch.undo()
    resumed = lmc.align(pair, tokens, state_file=state, **FAST)
    assert resumed.info["history"] == expected.info["history"] and torch.equal(
        resumed.b.stream.matrix, expected.b.stream.matrix
    )
