"""Slice `step`: engine.step.learn beside an ordinary training step of one model, on cross-entropy, no optimiser.

    floor                 forward, backward, gradients of all weights of one model
    fused, concat, weight ours by one route, every block's graph kept (+ recompute: computed again in backward)
    ours                  ours, route by kernels.dispatch
    ours, no kernels      ours with LMC_FAST_KERNELS=0: torch operations only; "ours, no dual_gemm": without that one
    ours, divergence      the default objective: both endpoints' predictions are computed too
    rotation alone        the part of ours that does not grow with tokens and layers: the rotation and its gradient

Weights are bfloat16, the transform's leaves float32. Peak memory is what torch handed out above the weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from benchmarks.common import Row, quantiles
from benchmarks.floor import task_loss
from benchmarks.gpu.device import peak, release, runnable, timed
from benchmarks.gpu.models import LLAMA, random_chart, random_pair, random_tokens, spec_of
from benchmarks.gpu.rows import Case, spread
from benchmarks.gpu.slices import Place
from lmc_fast.engine.passes import Item, choose_route
from lmc_fast.engine.source import Resident, paired
from lmc_fast.kernels.enabled import OPERATIONS, SWITCH
from lmc_fast.learning.step import learn

LAMBDA = 0.45
WITHOUT_DUAL_GEMM = ",".join(name for name in OPERATIONS if name != "dual_gemm")
ROUTES = ("fused", "concat", "weight")
LENGTH = 2048
SHAPES = {"7B": ("pythia-6.9b", 4), "1B": ("pythia-1.4b", 4), "7B gated": (LLAMA, 2)}
TOKENS = (16384, 8192, 4096, 2048)
PROMISED = 1.5  # times the floor, at T = 16384 for 7B blocks


def cases(place: Place) -> Iterator[Case]:
    if place.quick:
        yield Case("tiny T128", partial(measure, "tiny T128", place, "tiny", 2, 128, 32))
        return
    for tokens in TOKENS:
        for name, (shape, layers) in SHAPES.items():
            key = f"{name} T{tokens}"
            yield Case(key, partial(measure, key, place, shape, layers, tokens, LENGTH), seconds=30 + tokens / 200)


def switched(kernels: str, call: Callable[[], object]) -> Callable[[], object]:
    """`call` with LMC_FAST_KERNELS set."""

    def run() -> None:
        before = os.environ.get(SWITCH)
        os.environ[SWITCH] = kernels
        try:
            call()
        finally:
            del os.environ[SWITCH]
            if before is not None:
                os.environ[SWITCH] = before

    return run


def measure(
    key: str, place: Place, shape: str, layers: int, tokens: int, length: int, only: Sequence[str] = ()
) -> list[Row]:
    """One row for each variant, or for those of `only`."""
    device = place.device
    spec = spec_of(shape, layers, length)
    dtype = torch.bfloat16
    source = Resident(*paired(*random_pair(spec, dtype, device)))
    release(device)
    a = source.members[0]
    chart = random_chart(spec, device)
    batch = random_tokens(spec, tokens, length, device)
    items = [Item(batch, LAMBDA)]

    def floor() -> None:
        model = a.map(lambda t: t.detach().requires_grad_())
        leaves = [*model.ends.values(), *(t for block in model.blocks for t in block.values())]
        torch.autograd.grad(task_loss(model, batch), leaves, allow_unused=True)

    def ours(route: str | None, keep: bool, divergence: bool = False) -> Callable[[], object]:
        return lambda: learn(source, items, chart, divergence=divergence, keep=keep, route=route)

    def rotation() -> None:
        (made,) = chart.rotations()
        torch.autograd.grad(made, chart.tensors["rotation"], made.detach())

    calls: dict[str, Callable[[], object]] = {"floor": floor, "ours": ours(None, True)}
    calls["ours + recompute"] = ours(None, False)
    for route in ROUTES:
        calls[route], calls[f"{route} + recompute"] = ours(route, True), ours(route, False)
    calls["ours, no kernels"] = switched("0", ours(None, True))
    calls["ours, no dual_gemm"] = switched(WITHOUT_DUAL_GEMM, ours(None, True))
    calls["ours, divergence"] = ours(None, True, True)
    calls["rotation alone"] = rotation
    calls = {name: call for name, call in calls.items() if not only or name in only}
    fit, large = runnable(calls, device)
    memory = {name: peak(call, device) for name, call in fit.items()}
    times = timed(fit, device, place.quick)
    picked = {keep: choose_route(source, items, keep).route for keep in (True, False)}
    medians = {name: quantiles(some)[1] for name, some in times.items()}
    common: Row = {"shape": shape, "width": spec.width, "layers": layers, "tokens": tokens, "length": length}
    rows = []
    for name in calls:
        row: Row = {"key": f"{key} {name}", "variant": name} | common
        if name in large:
            rows.append(row | {"unmeasured": "does not fit the device's memory"})
            continue
        row |= {"picked": picked["recompute" not in name] if name.startswith("ours") else ""}
        row |= spread("", times[name]) | {"peak_mib": round(memory[name] / 2**20, 1)}
        if "floor" in medians:
            row["per_floor"] = round(medians[name] / medians["floor"], 3)
        rows.append(row)
    return rows
