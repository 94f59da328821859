"""The GPU harness without a GPU: rows that resume, processes that die, a summary and a check made from rows alone."""

import importlib
import importlib.util
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

if importlib.util.find_spec("benchmarks") is None:
    pytest.skip("benchmarks are not part of an installed package", allow_module_level=True)

from benchmarks.gpu import __main__ as harness
from benchmarks.gpu import contests, kernels, suite, worker
from benchmarks.gpu.device import MOST, runnable, timed
from benchmarks.gpu.promises import MET, MISSED, OPEN, PROMISES, on_gpu, problems
from benchmarks.gpu.rows import Case, Clock, Journal, Unfinished, Unmeasured, fingerprint, latest, read_rows
from benchmarks.gpu.slices import SLICES, Place
from benchmarks.gpu.summary import summary, write_summary
from benchmarks.gpu.training import QUICK, trained
from lmc_fast.checkpoints import Model

CPU = torch.device("cpu")


def stamp(**changes):
    common = {"sources": "s1", "device": "D", "torch": "2", "triton": "3", "quick": False, "run": "r1"}
    more = {"slice": "step", "commit": "c", "cuda": "12", "python": "3", "started": "2026-01-01T00:00:00Z"}
    return common | more | changes


def place(tmp_path, seconds=100.0, **changes):
    return Place(
        **({"device": CPU, "quick": False, "scratch": tmp_path, "clock": Clock(seconds), "run": "r1"} | changes)
    )


class Calls(list):
    """Cases that note when they are measured."""

    def case(self, key, result=None, **options):
        def measure():
            self.append(key)
            if isinstance(result, Exception):
                raise result
            return [{"key": key, "value": len(self)}] if result is None else result

        return Case(key, measure, **({"seconds": 0.1} | options))


def run(tmp_path, cases, seconds=100.0, **changes):
    journal = Journal(tmp_path / "step.jsonl", stamp(**changes))
    return worker.measure(cases, journal, place(tmp_path, seconds), tmp_path / "step.running")


def test_a_second_run_measures_what_is_left(tmp_path):
    calls = Calls()
    assert run(tmp_path, [calls.case("a"), calls.case("b", Unfinished("later")), calls.case("c")]) == worker.CONTINUED
    assert calls == ["a", "b"] and not (tmp_path / "step.running").exists()
    assert run(tmp_path, [calls.case("a"), calls.case("b"), calls.case("c")], run="r2") == 0
    assert calls == ["a", "b", "b", "c"]
    assert [row["case"] for row in read_rows(tmp_path / "step.jsonl")] == ["a", "b", "c"]


@pytest.mark.parametrize("change", [{"sources": "s2"}, {"device": "E"}, {"torch": "2.1"}, {"quick": True}])
def test_rows_of_other_sources_or_devices_do_not_count(tmp_path, change):
    calls = Calls()
    run(tmp_path, [calls.case("a")])
    run(tmp_path, [calls.case("a")], run="r2", **change)
    assert calls == ["a", "a"]


def test_errors_are_rows_and_are_tried_again_by_the_next_run_only(tmp_path):
    calls = Calls()
    bad = [calls.case("a", ValueError("no")), calls.case("b", Unmeasured("needs a GPU"))]
    assert run(tmp_path, bad) == 0
    assert run(tmp_path, bad) == 0
    assert calls == ["a", "b"]
    assert run(tmp_path, [calls.case("a"), calls.case("b")], run="r2") == 0
    rows = read_rows(tmp_path / "step.jsonl")
    assert [row.get("error") for row in rows] == ["ValueError: no", None, None, None]
    assert rows[1]["unmeasured"] == "needs a GPU" and "ValueError" in rows[0]["trace"]
    assert [row["value"] for row in latest(rows)] == [3, 4]


def test_a_lost_device_ends_the_process_after_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "answers", lambda device: False)
    calls = Calls()
    assert run(tmp_path, [calls.case("a", RuntimeError("CUDA error")), calls.case("b")]) == worker.LOST
    assert calls == ["a"] and len(read_rows(tmp_path / "step.jsonl")) == 1


def test_no_case_begins_without_time_for_it(tmp_path):
    calls = Calls()
    assert run(tmp_path, [calls.case("a"), calls.case("b", seconds=50)], seconds=10) == worker.CONTINUED
    assert run(tmp_path, [calls.case("a"), calls.case("c", resumes=True)], seconds=10) == worker.CONTINUED
    assert calls == ["a"]


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path):
    file = tmp_path / "step.jsonl"
    Journal(file, stamp()).add("a", [{"key": "a"}])
    with file.open("a") as out:
        out.write('{"key": "b", "ca')
    Journal(file, stamp()).add("c", [{"key": "c"}])
    assert [row["key"] for row in read_rows(file)] == ["a", "c"]


def test_the_fingerprint_follows_the_sources():
    assert fingerprint(["lmc_fast/kernels"]) == fingerprint(["lmc_fast/kernels"]) != fingerprint(["lmc_fast/engine"])
    for one in SLICES.values():
        assert all((harness.ROOT / name).exists() for name in one.sources)


def invocation(tmp_path, seconds=999.0):
    return harness.Invocation(tmp_path, tmp_path, "cpu", False, time.monotonic() + seconds, "r1")


def test_a_process_that_dies_leaves_a_row_and_another_goes_on(tmp_path, monkeypatch, capsys):
    """The first crashes in a case, the second hangs in one and is killed, the third loses the device, the last ends."""
    deeds = [("a", -11), ("b", None), (None, worker.LOST), (None, 0)]

    def supervised(command, seconds):
        case, code = deeds.pop(0)
        if case:
            (tmp_path / "step.running").write_text(case)
        return code

    monkeypatch.setattr(harness, "supervised", supervised)
    assert harness.run_slice("step", invocation(tmp_path)) == (True, "")
    rows = read_rows(tmp_path / "step.jsonl")
    assert [(row["case"], row["error"]) for row in rows] == [
        ("a", "the process ended with -11"),
        ("b", "the process did not end in time and was killed"),
    ]
    assert not deeds and "ERROR" in capsys.readouterr().out


@pytest.mark.parametrize(
    "code, finished, trouble",
    [
        (0, True, ""),
        (worker.CONTINUED, False, ""),
        (1, False, "step: the process ended with 1 outside of any case"),
        (worker.LOST, False, f"step: {harness.MOST_PROCESSES} processes died"),
    ],
)
def test_exit_codes_of_a_process(tmp_path, monkeypatch, code, finished, trouble):
    monkeypatch.setattr(harness, "supervised", lambda command, seconds: code)
    assert harness.run_slice("step", invocation(tmp_path)) == (finished, trouble)
    assert not read_rows(tmp_path / "step.jsonl")


def test_no_process_without_time(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "supervised", None)
    assert harness.run_slice("step", invocation(tmp_path, harness.GRACE)) == (False, "")


def test_a_process_that_hangs_is_killed_with_what_it_started(tmp_path):
    began = time.monotonic()
    pid_file = tmp_path / "pid"
    assert harness.supervised(["sh", "-c", f"sleep 60 & echo $! > {pid_file}; wait"], 0.5) is None
    assert time.monotonic() - began < 10
    time.sleep(0.1)
    state = Path(f"/proc/{int(pid_file.read_text())}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def measured(**changes):
    """Rows of a GPU that keep every promise, but for `changes` of the step's."""
    step = {"slice": "step", "key": "7B T16384 ours", "variant": "ours", "tokens": 16384, "width": 4096}
    step |= {"per_floor": 1.4, "shape": "x", "layers": 4, "ms": 1.0, "peak_mib": 1.0, "picked": "weight"}
    return [stamp(case="7B T16384") | step | changes]


@pytest.mark.parametrize(
    "changes, verdict",
    [
        ({}, MET),
        ({"per_floor": 1.6}, MISSED),
        ({"per_floor": 1.6, "tokens": 4096}, OPEN),
        ({"per_floor": 1.6, "quick": True}, OPEN),
        ({"per_floor": 1.6, "cuda": "none"}, OPEN),
        ({"error": "broke"}, OPEN),
    ],
)
def test_a_promise_is_judged_by_real_rows_only(changes, verdict):
    (promise,) = (p for p in PROMISES if p.slice == "step")
    rows = measured(**changes)
    assert promise.verdict(rows) == verdict
    assert bool(problems(rows)) == (verdict == MISSED or "error" in changes)


def streaming(variant, ratio, fits):
    return stamp(slice="streaming", key=variant, variant=variant, tokens=16384, ratio=ratio, within_budget=fits)


def test_streaming_counts_the_best_way_that_fits():
    promise = next(p for p in PROMISES if p.best)
    assert promise.measured([streaming("planned", 0.99, False)]) is None
    assert promise.verdict([streaming("planned", 0.99, False), streaming("smallest", 0.8, True)]) == MISSED
    assert promise.verdict([streaming("planned", 0.95, True), streaming("smallest", 0.8, True)]) == MET


@pytest.mark.parametrize("name", SLICES)
def test_cases_have_names_of_their_own(tmp_path, name):
    module = importlib.import_module(f"benchmarks.gpu.{SLICES[name].module}")
    for device in ("cpu", "cuda"):
        keys = [case.key for case in module.cases(place(tmp_path, device=torch.device(device)))]
        assert len(keys) == len(set(keys)) > 1
    assert all(case.seconds < 60 * SLICES[name].minutes for case in module.cases(place(tmp_path)))


def test_the_worst_solver_counts():
    row = stamp(slice="solvers", key="cayley 1024 x 64 x 64 float32", n=64, batch=1024, dtype="float32", ratio=12.0)
    promise = next(p for p in PROMISES if p.text.startswith("cayley"))
    assert promise.verdict([row]) == MET
    assert promise.verdict([row, row | {"ratio": 9.9}]) == MISSED
    assert promise.verdict([row | {"n": 32, "ratio": 2.0}]) == OPEN
    assert not on_gpu(row | {"unmeasured": "needs a GPU"})


def test_the_page_says_what_is_not_measured(tmp_path):
    page = summary([], quick=False)
    assert page.count(OPEN) == len(PROMISES) and "there are no rows" in page
    rows = measured(per_floor=1.6)
    write_summary(tmp_path, rows, quick=False)
    page = (tmp_path / "SUMMARY.md").read_text()
    assert "| 1.6 | MISSED |" in page and "promised ≤ 1.5" in page and page.count(OPEN) == len(PROMISES) - 1
    assert "1.6" in (tmp_path / "step.csv").read_text() and not (tmp_path / "pair.csv").exists()


def test_every_slice_has_its_table():
    kernel = {"slice": "kernels", "op": "dual_linear", "pass": "f", "dtype": "bfloat16", "model": "7B", "tokens": 16384}
    stream = {
        "layers": 8,
        "layers_wanted": 32,
        "resident": 2,
        "streamed_ms": 1500.0,
        "resident_ms": 1200.0,
        "stall_s": 0.1,
    }
    stream |= {"moved_bytes": 2**30, "peak_bytes": 3 * 2**30, "planned_step_s": 1.25, "planned_total_bytes": 2**32}
    solver = {"torch_ms": 50.0, "ours_ms": 4.0, "ratio": 12.5, "need": 10.0, "ours_error": 1e-7, "torch_error": 2e-7}
    aligned = {"barrier_naive": 3.1, "barrier_matched": 1.2, "barrier_learned": 0.2, "matching_seconds": 9.0}
    aligned |= {"learning_seconds": 99.0, "steps": 1200, "peak_bytes": 2**31, "ratio": 0.0645}
    seed = {"seed": 0, "parameters": 162_000_000, "tokens": 5_000_000, "seconds": 180.0, "val_loss": 1.5}
    rows = [
        *measured(),
        stamp(slice="tests", key="tests/a.py", passed=3, failed=1, skipped=2, failures=["test_x"]),
        stamp(key="a", ratio=0.8, verdict="not used", accurate=True, **kernel),
        stamp(key="b", ratio=1.7, verdict="used", accurate=False, **kernel),
        stamp(key="c", ratio=1.0, chosen="weight", **(kernel | {"op": "interp_linear", "pass": "f+b"})),
        stamp(key="kernel x", unmeasured="the kernel does not take this shape", **kernel),
        stamp(slice="solvers", key="expm 1024 x 64 x 64 float32", n=64, batch=1024, dtype="float32", ok=True, **solver),
        streaming("planned", 0.8, True) | stream,
        stamp(slice="pair", key="train 0", **seed),
        stamp(slice="pair", key="align", **aligned),
    ]
    page = summary(rows, quick=False)
    for text in (
        "| failed tests on the device | ≤ 0 | 1 | MISSED |",
        "1 files: 3 passed, 1 failed, 2 skipped",
        "- tests/a.py: test_x",
        "| dual_linear | f | 0.8 - 1.7 | 1 of 2 | 7B T16384 0.8; 7B T16384 1.7 |",
        "| interp_linear | f+b | 1.0 - 1.0 | - |",
        "Less accurate than torch: b.",
        "1 not measured: the kernel does not take this shape",
        "| expm 1024 x 64 x 64 float32 | 50.0 | 4.0 | 12.5 | 10.0 | 1.0e-07 / 2.0e-07 |",
        "| x, 4 blocks | 16384 | ours (weight) | 1.0 | 1.4 | 1.0 |",
        "| 8 of 32 | 16384 | planned (2 units resident) | 1.5 | 1.2 | 0.8 | 0.1 | 1.0 | 3.0 | 1.25 | 4.0 |",
        "162,000,000 parameters, 5,000,000 tokens in 180.0 s, validation loss 1.5",
        "barrier naive 3.1, matched 1.2, learned 0.2 nats",
    ):
        assert text in page, (text, page)


@pytest.mark.parametrize("op", [*contests.OPERATIONS, *contests.ONCE])
def test_all_formulations_of_an_operation_agree(op):
    """What is compared computes the same: output and gradients, in float64."""
    made = (contests.OPERATIONS | contests.ONCE)[op](contests.MODELS["tiny"], 24, contests.Draw(CPU, torch.float64))

    def fresh():
        return {name: t.clone() for name, t in made.inputs.items()}

    inputs = made.inputs if made.wanted else None
    slope = contests.Draw(CPU, torch.float64)(*made.truth(inputs or fresh()).shape)
    truth, gradients = kernels.outcome(made.truth, inputs or fresh(), made.wanted, slope if made.wanted else None)
    for name, f in {"ours": made.ours, **made.rivals}.items():
        y, found = kernels.outcome(f, inputs or fresh(), made.wanted, slope if made.wanted else None)
        tolerance = 1e-6 if op.endswith("_") else 1e-10  # the losses' rivals compute in float32
        assert torch.allclose(y, truth, atol=tolerance), name
        assert all(torch.allclose(g, t, atol=1e-10) for g, t in zip(found, gradients, strict=True)), name
    for name, f in made.forward_only.items():
        assert torch.allclose(kernels.outcome(f, made.inputs, (), None)[0], truth, atol=1e-10), name


def test_errors_are_measured_against_float64(tmp_path):
    rows = kernels.contest("k", place(tmp_path, quick=True), "dual_linear", contests.MODELS["tiny"], 24, torch.float32)
    assert [row["unmeasured"] for row in rows] == ["needs a GPU"] * 2
    assert all(0 < row["ours_error"] < 1e-5 and row["accurate"] and "ratio" not in row for row in rows)
    assert json.dumps(rows)


class FakeEvent:
    """Counts calls instead of time."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now

    def elapsed_time(self, other):
        return other.at - self.at


def test_times_by_events(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)

    def call(ms):
        FakeEvent.now += ms

    times = timed({"a": lambda: call(2.0), "b": lambda: call(3.0)}, torch.device("cuda"), quick=False)
    assert times == {"a": [2.0] * MOST, "b": [3.0] * MOST}


def test_what_finds_no_memory_is_named():
    def large():
        raise torch.OutOfMemoryError("no")

    fit, names = runnable({"a": lambda: None, "b": large}, CPU)
    assert list(fit) == ["a"] and names == ["b"]


def test_training_goes_on_to_the_same_bits(tmp_path):
    recipe = replace(QUICK, length=8, batch=2, steps=20, seconds=1e6, width=16, heads=2, layers=1)
    weights = []
    for name, clocks in (("whole", [1e6]), ("halves", [0, 1e6])):
        directory = tmp_path / name
        directory.mkdir()
        (directory / "about.json").write_text(json.dumps({"vocab": 50}))
        for part in ("train", "val"):
            np.save(directory / f"{part}.npy", np.random.default_rng(0).integers(50, size=400).astype(np.uint16))
        for seconds in clocks:
            try:
                row = trained(directory, 0, recipe, CPU, Clock(seconds))
            except Unfinished as why:
                assert seconds == 0 and "to be continued" in str(why) and (directory / "seed0.pt").exists()
        assert row["steps"] == 20 and not (directory / "seed0.pt").exists()
        assert trained(directory, 0, recipe, CPU, Clock(0)) == row
        weights.append(Model(directory / "seed0").load())
    for x, y in zip(weights[0].blocks, weights[1].blocks, strict=True):
        assert all(torch.equal(x[slot], y[slot]) for slot in x)


def test_counts_of_a_junit_file(tmp_path):
    file = tmp_path / "r.xml"
    cases = '<testcase name="a" time="1"/><testcase name="b" time="2"><failure/></testcase>'
    file.write_text(f"<suites><suite>{cases}<testcase name='c'><skipped/></testcase></suite></suites>")
    found = suite.counts(file)
    assert found == {"passed": 1, "failed": 1, "skipped": 1, "seconds": 3.0, "failures": ["b"]}
