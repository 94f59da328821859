"""Slice `streaming`: a learning step whose weights come from pinned memory, within a budget, beside one in memory.

The store holds DISTINCT random blocks again and again, so that it is made quickly; what is moved is the same. Each
case is measured "planned", with the planner's resident units and micro-batches, and "smallest", with nothing resident
and one sequence at a time. First the streamed step runs alone, for its peak memory and traffic, then in turns with the
resident one, for the times. Boundary activations and chunks of logits are where and what the planner wants, in both;
"plain" is resident with the boundary activations on the device too.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Row, quantiles
from benchmarks.gpu.device import release, synchronize, timed
from benchmarks.gpu.models import random_chart, random_pair, random_tokens, spec_of
from benchmarks.gpu.rows import Case, Unmeasured, spread
from benchmarks.gpu.slices import Place
from lmc_fast.architectures import Spec
from lmc_fast.budget.demand import Job
from lmc_fast.budget.devices import here
from lmc_fast.budget.meter import available_memory
from lmc_fast.budget.planner import Plan, plan
from lmc_fast.checkpoints import Weights
from lmc_fast.engine.passes import Item
from lmc_fast.engine.source import Resident, paired
from lmc_fast.learning.step import learn
from lmc_fast.pipeline.budgeted import route_of
from lmc_fast.streaming.layout import block_bytes
from lmc_fast.streaming.packing import Piece
from lmc_fast.streaming.ring import Streamed
from lmc_fast.streaming.store import Store

PROMISED = 0.9  # times the speed of the resident step, at T = 16384 within BUDGET
BUDGET = 8 << 30
DISTINCT = 2
LAMBDA = 0.45
LENGTH = 2048
STEPS = 3  # of the streamed step alone


def cases(place: Place) -> Iterator[Case]:
    if place.quick:
        yield Case("tiny x 3", partial(measure, "tiny x 3", place, "tiny", 3, (128,), 32))
        return
    for layers, tokens, seconds in ((8, (16384, 4096), 150), (32, (16384,), 300)):
        key = f"7B x {layers}"
        yield Case(key, partial(measure, key, place, "pythia-6.9b", layers, tokens, LENGTH), seconds)


def measure(
    key: str,
    place: Place,
    shape: str,
    wanted: int,
    tokens: Sequence[int],
    length: int,
    variants: Sequence[str] = ("planned", "smallest"),
) -> list[Row]:
    """A row for each number of tokens and each of the variants."""
    device = place.device
    profile = here(device)
    dtype = profile.dtype
    spec = spec_of(shape, wanted, length)
    layers = room(spec, dtype, place.scratch, wanted)
    few = replace(spec, layers=min(DISTINCT, layers))
    spec = replace(spec, layers=layers)
    a, b = (w.to(dtype, "cpu") for w in random_pair(few, dtype, device))
    target = place.scratch / f"store-{shape}-{layers}"
    shutil.rmtree(target, ignore_errors=True)
    began = time.perf_counter()
    store = Store.create(target, spec, _pieces(a, b, layers), dtype)
    made = time.perf_counter() - began
    try:
        rows = []
        for count in tokens:
            job = Job(count, length)
            for name in variants:
                common = {"shape": shape, "layers": layers, "layers_wanted": wanted, "tokens": count, "length": length}
                common |= {"variant": name, "store_seconds": round(made, 1), "store_bytes": sum(store.segment_bytes)}
                planned = plan(spec, job, profile, BUDGET)
                row: Row = {"key": f"{key} T{count} {name}"} | common
                rows.append(row | compare(store, spec, (a, b), planned, name == "planned"))
        return rows
    finally:
        shutil.rmtree(target, ignore_errors=True)


def room(spec: Spec, dtype: torch.dtype, scratch: Path, wanted: int) -> int:
    """As many layers as disk and main memory hold."""
    each = block_bytes(spec, dtype.itemsize)
    disk, memory = 0.8 * shutil.disk_usage(scratch).free, 0.6 * available_memory()
    layers = min(wanted, int(min(disk, memory) / each) - 2)  # two: the tables
    if layers < min(wanted, 3):
        raise Unmeasured(f"{disk / 1e9:.0f} GB of disk and {memory / 1e9:.0f} GB of memory hold too few blocks")
    return layers


def _pieces(a: Weights, b: Weights, layers: int) -> Iterator[Piece]:
    yield "ends", (a.ends, b.ends)
    for i in range(layers):
        yield i, (a.blocks[i % len(a.blocks)], b.blocks[i % len(b.blocks)])


def compare(store: Store, spec: Spec, pair: tuple[Weights, Weights], planned: Plan, as_planned: bool) -> Row:
    """Streamed alone, then streamed and resident in turns."""
    device = torch.device(planned.device.kind)
    strategy = planned.strategy
    micro = strategy.micro_batch if as_planned else 1
    job, route = planned.job, route_of(planned, spec, device)
    chart = random_chart(spec, device)
    batch = random_tokens(spec, job.tokens, job.length, device)
    items = [Item(part, LAMBDA) for part in batch.split(micro)]

    def step(source: Any, offload: bool = strategy.boundaries_on_host) -> tuple[Tensor, dict[str, Tensor]]:
        return learn(source, items, chart, route=route, logits=strategy.logits, offload=offload)

    release(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    resident = planned.resident if as_planned else ()
    with Streamed(store, device, resident=resident, pinned=device.type == "cuda") as ring:
        step(ring)  # reads every file, with checksums
        before = ring.traffic
        synchronize(device)
        began = time.perf_counter()
        for _ in range(STEPS):
            loss, gradients = step(ring)
        synchronize(device)
        alone = (time.perf_counter() - began) / STEPS
        after = ring.traffic
        row: Row = {
            "resident": len(resident),
            "route": route,
            "micro_batch": micro,
            "streamed_alone_s": round(alone, 4),
            "stall_s": round((after.stall_seconds - before.stall_seconds) / STEPS, 4),
            "moved_bytes": (after.bytes - before.bytes) // STEPS,
            "embedding_bytes": (after.row_bytes - before.row_bytes) // STEPS,
            "loads": (after.loads - before.loads) / STEPS,
        }
        if device.type == "cuda":
            row |= {"peak_bytes": torch.cuda.max_memory_allocated(device)}
            row |= {"peak_reserved_bytes": torch.cuda.max_memory_reserved(device)}
            row["peak_share"] = round(row["peak_bytes"] / planned.budget, 3)
            row["within_budget"] = row["peak_bytes"] <= planned.budget
        halves = paired(*(w.to(store.dtype, device) for w in pair))
        every = [Weights(spec, w.ends, [w.blocks[i % len(w.blocks)] for i in range(spec.layers)]) for w in halves]
        memory = Resident(*every)
        expected, wanted = step(memory)
        row["loss_difference"] = abs(float(loss - expected))
        row["gradient_difference"] = max(_relative(gradients[name], wanted[name]) for name in wanted)
        calls: dict[str, Callable[[], object]] = {"streamed": lambda: step(ring), "resident": lambda: step(memory)}
        if strategy.boundaries_on_host:
            calls["plain"] = lambda: step(memory, offload=False)
        times = timed(calls, device, quick=False)
    for name, some in times.items():
        row |= spread(name, some)
    medians = {name: quantiles(some)[1] for name, some in times.items()}
    ratio = medians["resident"] / medians["streamed"]
    row |= {"ratio": round(ratio, 3)} if device.type == "cuda" else {"unmeasured": "needs a GPU"}
    if "plain" in medians:
        row["ratio_to_plain"] = round(medians["plain"] / medians["streamed"], 3)
    return row | prediction(planned, as_planned)


def _relative(x: Tensor, y: Tensor) -> float:
    return float((x - y).abs().max() / y.abs().max().clamp(min=1e-30))


def prediction(planned: Plan, as_planned: bool) -> Row:
    """What the planner said; its times are of its own choices."""
    profile = planned.device
    row: Row = {
        "planned_total_bytes": planned.total,
        "planned_resident": len(planned.resident),
        "boundaries_on_host": planned.strategy.boundaries_on_host,
        "logits": planned.strategy.logits,
        "profile_flops": profile.flops,
        "profile_bandwidth": profile.bandwidth,
    }
    if as_planned:
        row |= {"planned_step_s": round(planned.step_seconds, 4), "planned_share": round(planned.share, 3)}
        row |= {"planned_compute_s": round(planned.compute_seconds, 4)}
        row |= {"planned_transfer_s": round(planned.transfer_seconds, 4), "planned_moved_bytes": planned.moved}
    return row
