"""The command line as a user meets it: results, refusals, interruption."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints_tiny import edit_config, write_lines
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lmc_fast import Alignment, align, export, open_pair
from lmc_fast.cli import main
from lmc_fast.pipeline import align as align_module

FAST = ["--steps", "6", "--batch", "2", "--block", "16"]


@pytest.fixture
def pair(make_checkpoint):
    return str(make_checkpoint("neox", 1)), str(make_checkpoint("neox", 2))


@pytest.fixture
def text(tmp_path):
    return str(write_lines(tmp_path / "text.txt", 2000))


def files(directory: Path) -> dict[str, bytes]:
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(directory.rglob("*")) if f.is_file()}


def refused(capsys, *command, words=()):
    assert main([str(c) for c in command]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("lmc-fast: error: ")
    for word in words:
        assert str(word) in message, message


@pytest.mark.parametrize("method", ["dual", "one-sided", "activation", "weight"])
def test_align_writes_stock_endpoints_and_a_report(method, pair, text, tmp_path, capsys):
    before = [files(Path(p)) for p in pair]
    out = tmp_path / "out"
    assert main(["align", *pair, "--data", text, "--val", text, "--out", str(out), "--method", method, *FAST]) == 0
    shown = capsys.readouterr().out
    assert "barrier    naive" in shown and "same function" in shown and "barrier = max over the grid" in shown
    learned = method in ("dual", "one-sided")
    assert ("barrier  learned" in shown) == learned
    expected = {"a", "b", "alignment.safetensors", "report.json", "report.html", "curve.png"} | (
        {"learning.png"} if learned else set()
    )
    assert {f.name for f in out.iterdir()} == expected
    assert [f.name for f in tmp_path.iterdir() if "out" in f.name] == ["out"]
    report = json.loads((out / "report.json").read_text())
    assert [len(c["losses"]) for c in report["curves"]] == [3, 3] + [11] * learned
    assert report["proof"]["a"]["kl"] < 1e-8
    ids = torch.arange(16)[None]
    for name, original in zip("ab", pair, strict=True):
        x, y = (AutoModelForCausalLM.from_pretrained(p)(ids).logits.log_softmax(-1) for p in (original, out / name))
        assert (x - y).abs().max() < 1e-3
        assert not torch.equal(load_file(out / name / "model.safetensors")["embed_out.weight"], x)
    assert [files(Path(p)) for p in pair] == before


def test_merge_is_the_middle_of_the_curve(pair, text, tmp_path, capsys):
    out, merged = tmp_path / "out", tmp_path / "merged"
    main(["align", *pair, "--data", text, "--val", text, "--out", str(out), *FAST, "--quiet"])
    assert main(["merge", str(out / "a"), str(out / "b"), "--out", str(merged)]) == 0
    capsys.readouterr()
    curve = ["barrier", str(out / "a"), str(out / "b"), "--data", text, "--block", "16", "--json"]
    assert main([*curve, "--out", str(tmp_path / "c.json"), str(tmp_path / "c.png")]) == 0
    middle = json.loads(capsys.readouterr().out)["losses"][5]
    assert main(["barrier", str(merged), str(merged), "--data", text, "--block", "16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["losses"][0] == middle
    left, right, mean = (load_file(d / "model.safetensors") for d in (out / "a", out / "b", merged))
    assert all(torch.equal(mean[name], torch.lerp(left[name], right[name], 0.5)) for name in mean)
    assert (tmp_path / "c.png").stat().st_size > 1000
    assert "definition" in json.loads((tmp_path / "c.json").read_text())


def test_barrier_of_an_alignment_equals_that_of_its_export(pair, text, tmp_path, capsys):
    out = tmp_path / "out"
    main(["align", *pair, "--data", text, "--out", str(out), *FAST, "--quiet"])
    common = ["--data", text, "--block", "16", "--points", "3", "--json"]
    main(["barrier", *pair, "--alignment", str(out / "alignment.safetensors"), *common])
    applied = json.loads(capsys.readouterr().out)["losses"]
    main(["barrier", str(out / "a"), str(out / "b"), *common])
    assert np.allclose(applied, json.loads(capsys.readouterr().out)["losses"], atol=1e-5)


def test_python_interface_gives_the_same(pair, text, tmp_path):
    from lmc_fast import read_tokens

    p = open_pair(*pair)
    blocks = read_tokens(text, p.a, 16)
    alignment = align(p, blocks, validation=blocks, steps=6, batch=2)
    main(["align", *pair, "--data", text, "--val", text, "--out", str(tmp_path / "cli"), *FAST, "--quiet"])
    saved = Alignment.load(tmp_path / "cli" / "alignment.safetensors", p.spec)
    assert saved.info["history"]["loss"] == alignment.info["history"]["loss"]
    alignment.save(tmp_path / "x.safetensors")
    again = Alignment.load(tmp_path / "x.safetensors", p.spec)
    assert torch.equal(again.b.blocks[0]["vo"].matrix, alignment.b.blocks[0]["vo"].matrix)
    export(p, alignment, tmp_path / "api")
    assert {f.name for f in (tmp_path / "api").iterdir()} == {"a", "b", "alignment.safetensors"}


def test_verify_tells_same_from_different(pair, text, capsys):
    assert main(["verify", pair[0], pair[0]]) == 0
    assert main(["verify", *pair, "--data", text]) == 1
    assert "different functions" in capsys.readouterr().out


def test_inspect(pair, make_checkpoint, capsys):
    assert main(["inspect", *pair]) == 0
    shown = capsys.readouterr().out
    assert "can be aligned" in shown and "no   FFN scales" in shown and "gelu is not homogeneous" in shown
    assert main(["inspect", pair[0], str(make_checkpoint("llama")), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["problem"] == "their architectures differ (gpt_neox and llama)"
    assert main(["inspect", *pair, str(make_checkpoint("llama"))]) == 2
    assert f" cannot be aligned with {pair[0]}: their architectures differ" in capsys.readouterr().out
    assert main(["inspect", *pair, str(make_checkpoint("neox", 3))]) == 0
    assert "can be aligned" in capsys.readouterr().out


def test_tokens_may_come_as_text_jsonl_or_npy(pair, tmp_path, capsys):
    words = write_lines(tmp_path / "t.txt", 640).read_text()
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": words}) + "\n")
    np.save(tmp_path / "t.npy", np.array([int(w[1:]) for w in words.split()], dtype=np.uint16))
    losses = []
    for name, length in (("t.txt", "--length"), ("t.jsonl", "--block"), ("t.npy", "--length")):  # two names of one
        assert main(["barrier", *pair, "--data", str(tmp_path / name), "--points", "3", length, "16", "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["losses"])
    assert losses[0] == losses[1] == losses[2]


def test_bad_text_is_refused(pair, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    cases = {
        "absent.txt": (None, "does not exist"),
        "empty.txt": ("", "at least"),
        "short.txt": ("w1 w2 w3", "at least"),
        "bad.jsonl": ('{"text": "w1"}\n{"no": 1}\n', "line 2"),
        "bad.npy": ("not numpy", "not a readable .npy"),
    }
    for name, (content, words) in cases.items():
        if content is not None:
            (tmp_path / name).write_text(content)
        refused(capsys, "align", *pair, "--data", tmp_path / name, *out, words=(name, words))
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    refused(capsys, "align", *pair, "--data", tmp_path / "latin.txt", *out, words=("UTF-8",))
    np.save(tmp_path / "float.npy", np.ones(100))
    refused(capsys, "align", *pair, "--data", tmp_path / "float.npy", *out, words=("not integer",))
    np.save(tmp_path / "big.npy", np.full(1000, 40))
    refused(capsys, "align", *pair, "--data", tmp_path / "big.npy", *out, words=("vocabulary of 40",))
    good = write_lines(tmp_path / "good.txt")
    refused(capsys, "align", *pair, "--data", good, *out, "--block", "33", words=("32 positions",))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("variant", "changes", "words"),
    [
        ("llama", {}, "architectures differ"),
        ("neox-sequential", {"hidden_act": "gelu"}, "parallel differs"),
        (
            "neox",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.5}},
            "rope",
        ),
        ("neox", {"layer_norm_eps": 1e-3}, "norm_eps differs"),
        ("neox", {"hidden_act": "relu"}, "activation differs (gelu and relu)"),
    ],
)
def test_pairs_that_do_not_match(variant, changes, words, make_checkpoint, text, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(make_checkpoint(variant, 2), other)
    edit_config(other, **changes)
    command = ["align", make_checkpoint("neox", 1), other, "--data", text, "--out", tmp_path / "out"]
    refused(capsys, *command, words=("cannot be aligned", words))
    refused(capsys, "merge", make_checkpoint("neox", 1), other, "--out", tmp_path / "out", words=(words,))
    assert not list(tmp_path.glob("out*"))


def test_other_tokenizer(make_checkpoint, text, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(make_checkpoint("neox", 2), other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["w7"], vocab["w8"] = vocab["w8"], vocab["w7"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    command = ["align", make_checkpoint("neox", 1), other, "--data", text, "--out", tmp_path / "out"]
    refused(capsys, *command, words=("tokenizer",))


def test_output_that_is_taken_or_read_only(pair, text, tmp_path, capsys, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "f").write_text("x")
    for command in (["align", *pair, "--data", text], ["merge", *pair]):
        refused(capsys, *command, "--out", tmp_path / "full", words=("not empty",))
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    refused(capsys, "merge", *pair, "--out", tmp_path / "new", words=("not a writable directory",))
    assert (tmp_path / "full" / "f").read_text() == "x"


def test_other_bad_arguments(pair, text, tmp_path, capsys):
    refused(capsys, "merge", *pair, "--weight", "1.5", "--out", tmp_path / "m", words=("1.5",))
    refused(capsys, "barrier", *pair, "--data", text, "--points", "2", words=("at least 3",))
    refused(capsys, "barrier", *pair, "--data", text, "--out", tmp_path / "x.txt", words=("x.txt",))
    refused(capsys, "barrier", *pair, "--data", text, "--alignment", tmp_path / "no", words=("no does not exist",))
    refused(capsys, "verify", pair[0], tmp_path / "nothing", words=("nothing",))
    refused(capsys, "inspect", pair[0], "--device", "warp", words=("warp",))
    refused(capsys, "align", *pair, "--data", text, "--out", tmp_path / "o", "--resume", words=("nothing to resume",))
    with pytest.raises(SystemExit) as stop:
        main(["align", *pair])
    assert stop.value.code == 2


def test_nan_loss_keeps_the_state(pair, text, tmp_path, capsys, monkeypatch):
    """A diverged run: one sentence, the last good state on disk, and --resume with a smaller rate goes on."""
    out = tmp_path / "out"
    command = ["align", *pair, "--data", text, "--out", out, *FAST]
    real = align_module.Learner.gradients

    def diverging(self):
        loss, gradients = real(self)
        return loss * float("nan") if self.done == 3 and self.schedule.matrix_lr == 0.035 else loss, gradients

    monkeypatch.setattr(align_module.Learner, "gradients", diverging)
    refused(capsys, *command, words=("nan at step 4", "--matrix-lr"))
    assert [f.name for f in tmp_path.glob("out*")] == ["out.partial"]
    refused(capsys, *command, words=("unfinished run", "--resume"))
    refused(capsys, *command, "--resume", "--seed", "5", words=("cannot resume", "seed"))
    assert main([str(c) for c in [*command, "--resume", "--matrix-lr", "0.01"]]) == 0
    assert [f.name for f in tmp_path.glob("out*")] == ["out"]


def test_a_failed_export_keeps_the_learning(pair, text, tmp_path, capsys, monkeypatch):
    command = ["align", *pair, "--data", text, "--out", tmp_path / "out", *FAST]
    from lmc_fast.checkpoints import writer

    write = writer.write_file

    def full(file, *rest):
        if file.name.startswith("model"):
            raise OSError(28, "No space left on device")
        write(file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_file", full)
        refused(capsys, *command, words=("disk is full",))
    assert {f.name for f in (tmp_path / "out.partial").iterdir()} == {"lock", "state.safetensors"}
    assert main([str(c) for c in [*command, "--resume"]]) == 0


def test_two_runs_on_one_output(pair, text, tmp_path, capsys):
    from lmc_fast.pipeline.run_directory import RunDirectory

    with RunDirectory(tmp_path / "out"):
        refused(capsys, "align", *pair, "--data", text, "--out", tmp_path / "out", *FAST, words=("another run",))
    assert not list(tmp_path.glob("out*"))


def start(command):
    """The command in a process of its own that saves its state after every step."""
    code = "import torch, lmc_fast.pipeline.align as a; torch.set_num_threads(1); a.SAVE_SECONDS = 0.0\n"
    code += "import sys; from lmc_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *command]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


WITHIN = ("--memory", "1200MiB" if torch.version.cuda else "700MiB")  # the interpreter with CUDA's libraries is larger


@pytest.fixture(scope="module")
def whole_run(request, make_checkpoint, tmp_path_factory):
    """(command without --out, files of its uninterrupted result)."""
    directory = tmp_path_factory.mktemp("whole")
    text = write_lines(directory / "text.txt", 2000)
    command = ["align", str(make_checkpoint("neox", 1)), str(make_checkpoint("neox", 2)), "--data", str(text)]
    command += ["--steps", "60", "--batch", "2", "--block", "16", *request.param]
    process = start([*command, "--out", str(directory / "out")])
    assert process.wait() == 0, process.stderr.read()
    return command, files(directory / "out")


@pytest.mark.parametrize(
    ("whole_run", "moment", "kill"),
    [
        ((), "learning", signal.SIGINT),
        ((), "learning", signal.SIGTERM),
        ((), "learning", signal.SIGKILL),
        (WITHIN, "matched", signal.SIGKILL),
        (WITHIN, "learning", signal.SIGHUP),
    ],
    indirect=["whole_run"],
    ids=str,
)
def test_a_killed_run_resumes_to_the_same_bits(whole_run, moment, kill, tmp_path):
    command, one = whole_run
    command = [*command, "--out", str(tmp_path / "broken")]
    broken = start(command)
    state = tmp_path / "broken.partial" / "state.safetensors"
    seen = set()  # sizes: of what matching found, then with the learner's state
    while len(seen) < (2 if moment == "learning" else 1):
        assert broken.poll() is None, broken.stderr.read()
        if state.exists():
            seen.add(state.stat().st_size)
        time.sleep(0.001)
    broken.send_signal(kill)
    if kill == signal.SIGKILL:
        assert broken.wait() == -9
    else:
        assert broken.wait() == 128 + kill
        last = broken.stderr.read().splitlines()[-1]
        assert last.startswith("lmc-fast: interrupted; the state is in ") and last.endswith(": go on with --resume")
    assert not (tmp_path / "broken").exists()
    resumed = start([*command, "--resume"])
    assert resumed.wait() == 0, resumed.stderr.read()
    two = files(tmp_path / "broken")
    assert one.keys() == two.keys()
    for name in one:
        if name == "report.json":
            assert _without_costs(one[name]) == _without_costs(two[name])
        else:
            assert name.endswith("png") or one[name] == two[name], name
    assert not list(tmp_path.glob("*.partial"))


def _without_costs(report: bytes) -> dict:
    found = json.loads(report)
    assert found.pop("costs")["stages"]
    return found


@pytest.mark.parametrize("name", ["LMC_FAST_ROUTE", "LMC_FAST_KERNELS", "LMC_FAST_GPU_SOLVERS"])
def test_a_setting_that_is_nonsense(name, pair, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(name, "sideways")
    out = tmp_path / "out"
    refused(capsys, "align", *pair, "--data", text, "--out", out, *FAST, words=[name, "sideways"])
    assert not list(tmp_path.glob("out*"))
