"""Alignment within a stated memory budget: is the promise kept, and what does streaming cost?

promise    align --memory, barrier, merge and verify of a Pythia-1.4B pair (synthetic) within 3 GiB: peak memory of
           every process as the system counts it, the loss before and after, the result in transformers
slice      plans for a 7B pair in 8 GiB; matching and one step on two of its blocks at full width within their plans
overhead   a streamed step beside the same step in memory: four blocks of width 1024, weights in the page cache

python -m benchmarks.streaming [--only PART ...] [--directory DIR]
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import (
    RESULTS,
    Row,
    interleave,
    lmc_fast,
    options,
    provenance,
    read_csv,
    write_csv,
    write_json,
)
from benchmarks.step import random_weights, spec_of
from benchmarks.synthetic import SHAPES, config_of, write_pair
from lmc_fast.architectures import FAMILIES, Spec
from lmc_fast.budget.demand import Job
from lmc_fast.budget.devices import here, profile
from lmc_fast.budget.meter import counted_bytes, peak_bytes, return_freed_memory
from lmc_fast.budget.planner import Plan, plan
from lmc_fast.budget.stages import Stages
from lmc_fast.checkpoints import Model
from lmc_fast.engine.passes import Item
from lmc_fast.engine.source import Resident, paired
from lmc_fast.learning.step import learn
from lmc_fast.matching.closed_form import Evidence
from lmc_fast.pipeline.matched import match_endpoints
from lmc_fast.sizes import parse_bytes
from lmc_fast.streaming.packing import Piece, pieces
from lmc_fast.streaming.ring import Streamed
from lmc_fast.streaming.store import Store
from lmc_fast.symmetry import canonicalize
from lmc_fast.symmetry.charts import Chart

SOURCES = ("lmc_fast", "benchmarks")
MARGIN = 1.05  # the promise: the budget and 5 %


def row(part: str, case: str, value: float, unit: str, promised: str = "", ok: bool | None = None) -> Row:
    made = {"part": part, "case": case, "value": round(value, 4), "unit": unit, "promised": promised, "ok": ok}
    verdict = "" if ok is None else "  ok" if ok else "  MISSED"
    print(f"{part:9} {case:58} {value:12,.5g} {unit:6} {promised}{verdict}", flush=True)
    return made


def within(part: str, case: str, peak: int, budget: int) -> Row:
    promised = f"<= {MARGIN * budget / 2**20:,.0f}"
    return row(part, case, peak / 2**20, "MiB", promised, peak <= MARGIN * budget)


def command(*arguments: object) -> tuple[int, str]:
    """(peak memory in bytes, standard output) of lmc-fast in a process of its own."""
    status, peak, text, errors = lmc_fast(*arguments)
    if status:
        raise SystemExit(f"lmc-fast {arguments[0]} failed with exit status {status}: {errors}")
    return peak, text


def promise(directory: Path, quick: bool) -> list[Row]:
    shape, memory = ("tiny", "640MiB") if quick else ("pythia-1.4b", "3GiB")
    budget, pair = parse_bytes(memory), directory / shape
    if not (pair / "tokens.npy").exists():
        write_pair(pair, shape)
    ids = np.load(pair / "tokens.npy")
    np.save(pair / "calibration.npy", ids[: 24 * 129])
    np.save(pair / "held-out.npy", ids[-2 * 129 :])
    a, b, held_out, out = pair / "a", pair / "b", pair / "held-out.npy", directory / f"{shape}-aligned"
    limit = ["--memory", memory]
    steps = ["--steps", 20 if quick else 3, "--batch", 4, "--block", 128]
    peak, text = command(
        *("align", a, b, "--data", pair / "calibration.npy", "--val", held_out, *steps, *limit, "--out", out, "--json")
    )
    report = json.loads(text)
    stages = report["costs"]["stages"]
    peak = max(peak, *(stage["peak_rss"] for stage in stages))  # the system's own figure starts anew with each stage
    rows = [within("promise", f"{shape}: align {memory}", peak, budget)]
    for stage in stages:
        rows.append(within("promise", f"  {stage['name']}", stage["peak_rss"], budget))
    excess = list(report["history"]["excess"].values())
    case = "  change of the validation excess by learning"
    rows.append(row("promise", case, excess[-1] - excess[0], "nats", "< 0", excess[-1] < excess[0]))
    traffic = report["costs"]["traffic"]
    rows.append(row("promise", "  weights read while learning", traffic["bytes"] / 2**30, "GiB"))
    rows.append(row("promise", "  computation waited for them", traffic["stall_seconds"], "s"))
    both = out / "a", out / "b"
    for name, *rest in (
        ("barrier", *both, "--data", held_out, "--block", 128, "--points", 3, *limit),
        ("merge", *both, "--out", out / "merged"),
        ("verify", a, out / "a", "--data", held_out),
    ):
        peak, _ = command(name, *rest, "--quiet")
        rows.append(within("promise", f"{shape}: {name}", peak, budget))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out / "merged")
    with torch.no_grad():
        finite = bool(model(torch.from_numpy(ids[None, :16].astype(np.int64))).logits.isfinite().all())
    rows.append(row("promise", "  merged model in transformers: finite logits", float(finite), "", "1", finite))
    return rows


def random_pieces(spec: Spec) -> Iterator[Piece]:
    """Pieces of a store of random endpoints, one block at a time."""
    for i in range(spec.layers):
        a, b = (random_weights(replace(spec, layers=1), seed + 2 * i) for seed in (1, 2))
        if i == 0:
            yield "ends", (a.ends, b.ends)
        yield i, (a.blocks[0], b.blocks[0])


def random_chart(spec: Spec) -> Chart:
    chart = Chart(spec, 2)
    generator = torch.Generator().manual_seed(3)
    for t in chart.tensors.values():
        t.data.copy_(0.02 * torch.randn(t.shape, generator=generator))
    return chart


def items_of(spec: Spec, job: Job, micro: int) -> list[Item]:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(spec.vocab, (job.sequences, job.length + 1), generator=generator)
    return [Item(part, 0.45) for part in tokens.split(micro)]


def streamed_step(store: str, spec: Spec, job: Job, budget: int) -> tuple[Plan, int, float]:
    """(the plan, peak memory, seconds) of one step in this process."""
    return_freed_memory()
    chosen = plan(spec, job, here(torch.device("cpu")), budget)
    items, chart = items_of(spec, job, chosen.strategy.micro_batch), random_chart(spec)
    route = "fused" if chosen.strategy.route == "activation" else "weight"
    with Streamed(Store.open(store, spec), buffers=max(1, chosen.buffers), resident=chosen.resident) as source:
        took = interleave(
            {"step": lambda: learn(source, items, chart, route=route, logits=chosen.strategy.logits)}, 1, warm_up=False
        )
    return chosen, peak_bytes(), took["step"][0] / 1e3


def matching(pair: Path, length: int) -> tuple[int, int, float]:
    """(planned memory, peak memory, seconds) of a round of matching in this process."""
    a, b = (Model(pair / name) for name in "ab")
    tokens = torch.from_numpy(np.load(pair / "tokens.npy")[: 24 * length].astype(np.int64)).view(-1, length)
    return_freed_memory()
    planned = Stages(a.spec, length, counted_bytes("cpu")).matching(tokens.numel())
    lazy = [canonicalize(model.open_weights(torch.float32)) for model in (a, b)]
    with tempfile.TemporaryDirectory(dir=pair) as keep:
        match = partial(match_endpoints, *lazy, tokens, Evidence(1, 0.3), keep=Path(keep), rounds=1)
        took = interleave({"match": match}, 1, warm_up=False)
    return planned, peak_bytes(), took["match"][0] / 1e3


def slices(directory: Path, quick: bool) -> list[Row]:
    rows = []
    seven = FAMILIES["gpt_neox"].spec(config_of("pythia-6.9b"))
    for device in ("h100-80gb", "rtx4090"):
        found = plan(seven, Job(16_384, 512), profile(device), 8 << 30)
        total, before = found.total / 2**30, found.stages["matching"] / 2**30
        rows.append(row("slice", f"7B in 8 GiB, {device}: planned memory", total, "GiB"))
        rows.append(row("slice", "  expected share of in-memory speed at 16,384 tokens", found.share, ""))
        rows.append(row("slice", "  expected time of a step", found.step_seconds, "s"))
        rows.append(row("slice", "  planned memory of matching", before, "GiB", "<= 8", before <= 8))
    width = 256 if quick else SHAPES["pythia-6.9b"][0]
    pair = directory / f"slice-{width}-pair"
    if not (pair / "tokens.npy").exists():
        write_pair(pair, f"slice-{width}")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        planned, peak, seconds = pool.apply(matching, (pair, 128))
    rows.append(row("slice", f"two blocks of width {width}, matching: planned memory", planned / 2**20, "MiB"))
    rows.append(within("slice", "  its peak", peak, planned))
    rows.append(row("slice", "  a round took", seconds, "s"))
    spec = replace(spec_of(width), layers=2)
    job, budget = Job(512, 256), parse_bytes("2GiB" if quick else "8GiB")
    store = directory / f"slice-{width}"
    if not store.exists():
        Store.create(store, spec, random_pieces(spec))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        chosen, peak, seconds = pool.apply(streamed_step, (str(store), spec, job, budget))
    case = f"two blocks of width {width}, {job.tokens} tokens: planned memory"
    rows.append(row("slice", case, chosen.total / 2**20, "MiB"))
    rows.append(within("slice", "  its peak", peak, chosen.total))
    rows.append(row("slice", f"  a step took (predicted {chosen.step_seconds:.3g} s)", seconds, "s"))
    return rows


def overhead(directory: Path, quick: bool) -> list[Row]:
    width, counts = (128, (2048,)) if quick else (1024, (512, 2048))
    spec = spec_of(width)
    store = directory / f"overhead-{width}"
    a, b = random_weights(spec, 1), random_weights(spec, 2)
    made = Store.open(store, spec) if store.exists() else Store.create(store, spec, pieces(a, b), part_bytes=1 << 30)
    memory, chart = Resident(*paired(a, b)), random_chart(spec)
    del a, b
    rows = []
    for count in counts:
        items = items_of(spec, Job(count, 256), 4)
        with Streamed(made, buffers=2) as source:
            one, two = (learn(s, items, chart, route="weight") for s in (memory, source))
            same = torch.equal(one[0], two[0]) and all(torch.equal(one[1][n], two[1][n]) for n in one[1])
            before = source.traffic
            times = interleave(
                {
                    "memory": lambda items=items: learn(memory, items, chart, route="weight"),
                    "streamed": lambda items=items: learn(source, items, chart, route="weight"),
                },
                2 if quick else 3,
                warm_up=False,
            )
            after = source.traffic
        ratio = statistics.median(times["streamed"]) / statistics.median(times["memory"])
        promised = {"promised": "<= 1.15", "ok": ratio <= 1.15} if count >= 2048 else {}
        rows.append(row("overhead", f"width {width}, {count} tokens: streamed : in memory", ratio, "", **promised))
        rows.append(row("overhead", "  loss and all gradients are the same bits", float(same), "", "1", same))
        steps = len(times["streamed"])
        read = (after.bytes - before.bytes) / max(1e-9, after.read_seconds - before.read_seconds)
        rows.append(row("overhead", "  weights read per step", (after.bytes - before.bytes) / steps / 2**20, "MiB"))
        rows.append(row("overhead", "  waited per step", (after.stall_seconds - before.stall_seconds) / steps, "s"))
        compute = statistics.median(times["memory"]) / 1e3
        transfer = (after.bytes - before.bytes) / steps / read
        predicted = max(compute, transfer) / compute
        rows.append(row("overhead", "  predicted from time to read and time to compute", predicted, ""))
    return rows


PARTS = {"promise": promise, "slice": slices, "overhead": overhead}


def main() -> int:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS, nargs="+", help="only these parts; rows of others stay in the results")
    parser.add_argument("--directory", type=Path, help="keep pairs and stores here, and use what is there (20 GB)")
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = args.directory or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        for name in args.only or PARTS:
            rows += PARTS[name](directory, args.quick)
    origin = provenance(*SOURCES)
    rows = [made | origin for made in rows]
    if args.json:
        write_json(args.json, rows)
    if not args.quick:
        file = RESULTS / "streaming.csv"
        others = [made for made in read_csv(file) if args.only and made["part"] not in args.only]
        write_csv(file, others + rows)
    missed = [made for made in rows if made["ok"] is False]
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
