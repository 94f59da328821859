"""Alignment within a memory budget: the same result, refusals, damaged stores, several processes."""

import errno
import json
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace

import pytest
import torch
from checkpoints_tiny import write_lines
from live import LiveBytes
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import lmc_fast as lmc
from lmc_fast.alignment import Alignment
from lmc_fast.architectures import FAMILIES
from lmc_fast.budget import stages as stages_module
from lmc_fast.budget.devices import PROFILES
from lmc_fast.budget.meter import Meter
from lmc_fast.budget.stages import Stages, TooSmall
from lmc_fast.checkpoints import lazy
from lmc_fast.cli import main
from lmc_fast.data import read_data, sequence_length, split_validation
from lmc_fast.errors import LmcError
from lmc_fast.evaluation import function
from lmc_fast.learning.schedule import Schedule
from lmc_fast.matching import activations
from lmc_fast.matching.closed_form import Evidence
from lmc_fast.pipeline import budgeted, room
from lmc_fast.pipeline.align import align
from lmc_fast.pipeline.evaluate import compare, measure_line
from lmc_fast.pipeline.export import export_into
from lmc_fast.pipeline.matched import match_endpoints
from lmc_fast.pipeline.prepare import prepare
from lmc_fast.streaming.store import Store
from lmc_fast.symmetry import canonicalize

FAST = {"steps": 6, "batch": 4}
ENOUGH = 4 << 30


@pytest.fixture
def case(make_checkpoint, tmp_path):
    def make(variant="neox"):
        pair = lmc.open_pair(make_checkpoint(variant, 1), make_checkpoint(variant, 2))
        data = read_data(str(write_lines(tmp_path / "text.txt", 600)), pair.a, sequence_length(pair.a, 16))
        return pair, *split_validation(data)

    return make


@pytest.mark.parametrize("variant", ["neox", "gpt2-tied", "llama"])
def test_the_result_is_that_of_a_run_in_memory(variant, case, state):
    pair, tokens, validation = case(variant)
    expected = align(pair, tokens, validation=validation, **FAST)
    meter = Meter()
    found = align(pair, tokens, validation=validation, memory=ENOUGH, state_file=state, meter=meter, **FAST)
    assert [stage.name for stage in meter.stages] == ["matching", "preparing", "learning"]
    assert meter.facts["plan"]["total"] <= ENOUGH and meter.facts["traffic"]["visits"] > 0
    for x, y in ((expected.a, found.a), (expected.b, found.b)):
        assert (x.stream.matrix - y.stream.matrix).abs().max() < 1e-4
    for x, y in zip(expected.info["history"]["loss"], found.info["history"]["loss"], strict=True):
        assert abs(x - y) < 1e-5
    assert Store.open(state.parent / "store", pair.spec).layers == pair.spec.layers


def test_too_little_is_refused_before_anything_is_read(case, tmp_path, capsys, monkeypatch):
    pair, tokens, _ = case()
    monkeypatch.setattr(lmc.checkpoints.Model, "open_weights", None)
    with pytest.raises(TooSmall):
        align(pair, tokens, memory=1 << 20, **FAST)
    command = ["align", str(pair.a.path), str(pair.b.path), "--data", str(tmp_path / "text.txt"), "--block", "16"]
    assert main([*command, "--memory", "1MiB", "--out", str(tmp_path / "out")]) == 2
    assert "smallest budget that works" in capsys.readouterr().err
    assert main([*command, "--memory", "lots", "--out", str(tmp_path / "out")]) == 2
    assert not list(tmp_path.glob("out*"))


def test_one_number_that_works_for_every_stage(monkeypatch):
    spec = FAMILIES["gpt_neox"].spec(GPTNeoXConfig(hidden_size=64, num_attention_heads=4, intermediate_size=256))
    device, schedule = torch.device("cpu"), Schedule(batch=2)
    monkeypatch.setattr(budgeted, "here", lambda _: PROFILES["t4"])
    with pytest.raises(TooSmall) as refused:
        budgeted.plan_learning(spec, schedule, 16, device, 1)
    needed = refused.value.smallest
    found = budgeted.plan_learning(spec, schedule, 16, device, needed)
    assert needed == max(found.total, *found.stages.values())
    with pytest.raises(TooSmall) as refused:
        budgeted.plan_learning(spec, schedule, 16, device, needed - 1)
    assert refused.value.smallest == needed


def test_a_disk_without_room_for_the_store(case, monkeypatch):
    pair, tokens, _ = case()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage(500, 0, 500))
    with pytest.raises(LmcError, match="500 bytes free"):
        align(pair, tokens, memory=ENOUGH, **FAST)


def test_a_disk_that_fills_while_statistics_are_written(case, monkeypatch, state):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    pair, tokens, _ = case()
    monkeypatch.setattr(activations, "write_file", full)
    with pytest.raises(LmcError, match=r"statistics-0.*disk is full"):
        align(pair, tokens, memory=ENOUGH, state_file=state, **FAST)
    assert not list(state.parent.iterdir())


def test_statistics_need_what_is_planned(case, monkeypatch, tmp_path):
    pair, tokens, _ = case()
    a, b = (canonicalize(model.open_weights()) for model in (pair.a, pair.b))
    match_endpoints(a, b, tokens, Evidence(1, 0.3), keep=tmp_path)
    written = sum(f.stat().st_size for f in tmp_path.glob("statistics-*"))
    planned = budgeted.disk_bytes(pair.spec, Evidence(1, 0.3), None)
    assert planned <= written <= planned + 2000 * pair.spec.layers  # headers
    assert budgeted.disk_bytes(pair.spec, Evidence(1, 0), None) == 0


def test_statistics_are_taken_from_what_fits():
    spec = FAMILIES["gpt_neox"].spec(GPTNeoXConfig(hidden_size=64, num_attention_heads=4, intermediate_size=256))
    device = replace(PROFILES["t4"], base=1000)
    stages = Stages(spec, 128, 1000)
    least = max(stages.all("cuda").values())
    assert budgeted.tokens_to_gather(spec, 128, device, stages.matching(1 << 20), 1 << 22) == 1 << 20
    assert budgeted.tokens_to_gather(spec, 128, device, least, 100) == 100
    with pytest.raises(TooSmall, match="smallest budget") as refused:
        budgeted.tokens_to_gather(spec, 128, device, least - 1, 1 << 15)
    assert refused.value.smallest == least


@pytest.mark.parametrize(("vocab", "width"), [(1 << 14, 8), (64, 96)], ids=["tables", "blocks"])
def test_every_stage_needs_what_is_planned(vocab, width, tmp_path, monkeypatch):
    """What is alive at a time, of models that are mostly tables (rows of them are what counts) and mostly blocks."""
    for module in (lazy, stages_module, function):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1 << 16)
    for name in ("ELEMENTS", "GATHERED"):
        monkeypatch.setattr(stages_module, name, 1 << 10 if name == "ELEMENTS" else 64)
    shape = {"hidden_size": width, "num_attention_heads": 2, "intermediate_size": 4 * width, "num_hidden_layers": 3}
    for seed, side in enumerate("ab"):
        torch.manual_seed(seed)
        GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=vocab, **shape)).save_pretrained(tmp_path / side)
    pair = lmc.open_pair(tmp_path / "a", tmp_path / "b")
    tokens, stages = torch.arange(4 * 16).view(4, 16), Stages(pair.spec, 16)
    peaks = {}

    def measured(name, call):
        with LiveBytes() as live, torch.no_grad():
            result = call()
        peaks[name] = live.peak
        return result

    lazily = [canonicalize(model.open_weights()) for model in (pair.a, pair.b)]
    base = measured("matching", lambda: match_endpoints(*lazily, tokens, Evidence(1, 0.3), keep=tmp_path))
    alignment = Alignment(*base, base)
    dtype = torch.float32
    measured("preparing", lambda: Store.create(tmp_path / "store", pair.spec, prepare(lazily, base, dtype), dtype))
    measured("measuring", lambda: measure_line(pair, tokens, alignment, 11, "line", "cpu", 1))
    measured("writing", lambda: export_into(pair, alignment, tmp_path / "out"))
    measured("verifying", lambda: compare(pair.a, lmc.checkpoints.Model(tmp_path / "out" / "a"), tokens, "cpu", 1))
    held = {"matching": 0, "preparing": stages.transforms(1)}
    for name, least in stages.all().items():
        planned = least - held.get(name, stages.alignment)
        assert peaks[name] <= planned, name
        if name in ("matching", "writing", "preparing"):
            assert peaks[name] > planned / 3, name


@pytest.fixture
def state(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "state"


@pytest.mark.parametrize(("name", "rest"), [("block-00001.bin", b""), ("embed.bin", b"\0"), ("head-00000.bin", b"\0")])
def test_a_damaged_store_is_made_anew(name, rest, case, state):
    pair, tokens, _ = case()
    first = align(pair, tokens, memory=ENOUGH, state_file=state, **FAST)
    file = state.parent / "store" / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + rest)
    again = align(pair, tokens, memory=ENOUGH, state_file=state, **FAST)
    assert file.read_bytes() == whole and torch.equal(again.b.stream.matrix, first.b.stream.matrix)


def test_a_read_error_while_learning_names_the_file_and_keeps_the_state(case, state, monkeypatch):
    pair, tokens, _ = case()
    create = Store.create

    def spoilt(target, *rest, **options):
        create(target, *rest, **options)
        file = target / "block-00001.bin"
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content)

    monkeypatch.setattr(Store, "create", spoilt)
    with pytest.raises(LmcError, match=r"block-00001\.bin is corrupt"):
        align(pair, tokens, memory=ENOUGH, state_file=state, **FAST)
    monkeypatch.undo()
    shutil.rmtree(state.parent / "store")
    assert len(align(pair, tokens, memory=ENOUGH, state_file=state, **FAST).info["history"]["loss"]) == FAST["steps"]


def test_the_command_reports_what_it_took(case, tmp_path, capsys):
    pair, _, _ = case()
    command = ["align", str(pair.a.path), str(pair.b.path), "--data", str(tmp_path / "text.txt"), "--block", "16"]
    command += [
        "--steps",
        "3",
        "--batch",
        "2",
        "--memory",
        "4GiB",
        "--test",
        command[4],
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for words in ("plan for 4 GiB", "memory at most: matching ", "verifying", "of embedding rows; waited"):
        assert words in shown, words
    costs = json.loads((tmp_path / "out" / "report.json").read_text())["costs"]
    assert costs["plan"]["budget"] == ENOUGH and costs["traffic"]["loads"] >= 0
    assert {stage["name"] for stage in costs["stages"]} >= {"matching", "learning", "measuring", "writing"}
    assert not (tmp_path / "out" / "store").exists() and not list(tmp_path.glob("*.partial"))
    both = [str(tmp_path / "out" / side) for side in "ab"]
    limited = ["barrier", *both, "--data", str(tmp_path / "text.txt"), "--block", "16", "--memory"]
    assert main([*limited, "1MiB"]) == 2 and main([*limited, "4GiB"]) == 0


def test_the_budget_that_is_named_works_when_it_is_typed(case, tmp_path, capsys):
    pair, _, _ = case()
    a, b, out, text = (str(p) for p in (pair.a.path, pair.b.path, tmp_path / "out", tmp_path / "text.txt"))
    data = ["--data", text, "--block", "16"]
    for command in (
        ["align", a, b, *data, "--val", text, "--steps", "2", "--batch", "2", "--out", out],
        ["align", a, b, *data, "--method", "weight", "--out", out + "-weight"],
        ["barrier", a, b, *data, "--alignment", out + "/alignment.safetensors"],
        ["verify", a, out + "/a", "--data", text],
    ):
        assert main([*command, "--quiet", "--memory", "1MiB"]) == 2
        named = re.search(r"smallest budget that works is (\d+MiB)", capsys.readouterr().err)[1]
        assert main([*command, "--quiet", "--memory", named]) == 0
        assert main([*command, "--quiet", "--memory", ""]) == 2  # an unset variable is no limit of its own
        assert "''" in capsys.readouterr().err


@pytest.mark.parametrize("memory", [(), ("--memory", "4GiB")], ids=["in memory", "streamed"])
def test_torchrun_with_two_processes_computes_what_one_does(memory, case, tmp_path):
    pair, _, _ = case()
    command = ["align", str(pair.a.path), str(pair.b.path), "--data", str(tmp_path / "text.txt"), "--block", "16"]
    command += ["--steps", "5", "--batch", "4", "--json", *memory, "--out"]
    assert main([*command, str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "lmc_fast"]
    done = subprocess.run([*launch, *command, str(tmp_path / "two")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert json.loads(done.stdout)["history"] == two["history"]  # one document, from the first process alone
    for x, y in zip(one["history"]["loss"], two["history"]["loss"], strict=True):
        assert abs(x - y) < 1e-5
    assert not list(tmp_path.glob("*.partial"))
