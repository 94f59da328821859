"""Figures of the README and docs/explanation/measured.md are those of the committed rows in benchmarks/results/."""

import csv
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
if not RESULTS.is_dir() or not (ROOT / "mkdocs.yml").is_file():
    pytest.skip("needs a checkout", allow_module_level=True)
README = (ROOT / "README.md").read_text()
MEASURED = (ROOT / "docs" / "explanation" / "measured.md").read_text()


def rows(name):
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def percent(share):
    return f"{100 * float(share):.0f} %"


def test_pairs():
    for row in rows("alignment.csv"):
        shown = f"| {float(row['naive']):.3f} | {float(row['aligned']):.3f} |"
        assert shown in README, row["pair"]
        spent = f"| {float(row['seconds']):.0f} | {row['peak_rss_mib']} MiB |"
        assert f"{shown} {float(row['middle_excess']):+.3f} | " in MEASURED and spent in MEASURED, row["pair"]
        if row["pair"] == "pair":
            assert f"`alignment` ({float(row['seconds']):.0f} s on two cores, {row['peak_rss_mib']} MiB)" in README


def test_models_of_different_sizes():
    for row in rows("growth-trained.csv"):
        shown = f"{float(row['naive']):.3f} | {float(row['learned']):.3f} |"
        assert shown in README or row["model"] == "small", row["model"]


def test_the_gpu():
    row = next(row for row in rows("gpu/pair.csv") if row["case"] == "align")
    seconds = float(row["matching_seconds"]) + float(row["learning_seconds"])
    shown = f"{seconds:.0f} s on an H200 | {float(row['barrier_naive']):.3f} | {float(row['barrier_learned']):.3f} |"
    assert shown in README


def test_carrying():
    tuned = {
        row["alignment"]: row for row in rows("carry.csv") if row["case"] in ("a + fine-tune", "a + 1 x fine-tune")
    }
    adapter = {row["alignment"]: row for row in rows("carry.csv") if row["case"] == "a with adapter"}
    assert f"| {percent(tuned['none']['share'])} | {percent(tuned['learned']['share'])} | `carry`" in README
    whole, lora = percent(tuned["learned"]["share"]), percent(adapter["learned"]["share"])
    assert f"fine-tune brings {whole} of its gain to the other model, a LoRA adapter {lora}" in README
    for table, name in ((tuned, "**the fine-tune**"), (adapter, "a rank-16 adapter, by peft, and its full difference")):
        cells = [f"{percent(row['share'])}, {float(row['rise']):.2f}" for way, row in table.items() if way != "none"]
        line = next(line for line in MEASURED.splitlines() if line.startswith(f"| {name} |"))
        assert [cell.strip(" *") for cell in line.split("|")[2:-1]] == cells


def test_a_step():
    table = {(row["d"], row["tokens"], row["variant"]): row for row in rows("step.csv")}
    shapes = sorted({(int(d), int(tokens)) for d, tokens, _ in table})
    kept, recomputed = [], []
    for d, tokens in shapes:
        ours, again, whole = (
            table.get((str(d), str(tokens), variant)) for variant in ("ours", "ours + recompute", "reference")
        )
        kept.append(float(ours["per floor"]))
        recomputed.append(float(again["per floor"]))
        start = f"| {d}, {tokens:,} | {kept[-1]:.2f} | {recomputed[-1]:.2f} | "
        assert start in MEASURED, (d, tokens)
        if whole is not None:
            end = f"{float(whole['per floor']):.2f} | {float(again['per reference']):.2f} |"
            assert start + end in MEASURED, (d, tokens)
    assert f"| {min(kept):.2f} to {max(recomputed):.2f} | `step`" in README


def test_memory():
    row = next(row for row in rows("streaming.csv") if row["case"] == "pythia-1.4b: align 3GiB")
    assert f"peak | | {float(row['value']):.0f} MiB | `streaming`" in README
    assert f"| {float(row['value']):.0f} MiB |" in MEASURED


def test_many_models():
    table = {row["case"]: row for row in rows("members.csv")}
    shown = (
        f"average of all | {float(table['naive']['average']):.3f} | {float(table['joint']['average']):.3f} | `members`"
    )
    assert shown in README
    for scheme in ("hierarchical", "joint"):
        row = table[scheme]
        shown = f"| {float(row['average']):.3f} | {float(row['worst_edge']):.3f} | {float(row['worst_inside']):.3f} |"
        assert f"| `{scheme}` {shown}" in MEASURED, scheme
        assert max(json.loads(row["edges"]).values()) == float(row["worst_edge"])
    assert f"takes {float(table['step of 4 against 2']['ratio']):.2f} times the processor time" in MEASURED
