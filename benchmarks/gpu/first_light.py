"""First light: the least that must be known of a GPU on which nothing has run, in eight minutes (`make first-light`).

Each part is a process with its own time limit; what fails in one leaves its error and does not stop the next. They are
cases of the other slices at one shape each, and first of all a small alignment with and without kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from benchmarks.common import Row
from benchmarks.gpu import kernels, pair, solvers, step, streaming
from benchmarks.gpu.contests import MODELS, ONCE, OPERATIONS
from benchmarks.gpu.rows import Case
from benchmarks.gpu.slices import Place
from benchmarks.gpu.training import QUICK, Recipe
from lmc_fast import Schedule, align, backends, open_pair
from lmc_fast.kernels.enabled import OPERATIONS as SWITCHED

TOKENS, LENGTH = 16384, 2048
STEPS = 6  # of the small alignment
SMALL = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 256}
CLOSE = {"float32": 1e-4, "bfloat16": 2e-2}  # of the losses with kernels and without, relative
FEW = ("floor", "ours", "ours + recompute", "ours, no kernels")
RECIPE = Recipe(width=512, layers=8, heads=8, text_bytes=20_000_000, length=256, seconds=30.0)  # 40 M parameters
BUDGET = 2 << 30  # of the alignment that is streamed, in bfloat16


def imports(place: Place) -> Iterator[Case]:
    """What runs here, then the small alignment: in memory (float32) and streamed (on a GPU bfloat16)."""
    yield Case("backends", lambda: [{"key": "backends", "kernels_there_are": list(SWITCHED)} | asdict(backends())])
    for name, memory in (("in memory", None), ("streamed", BUDGET)):
        key = f"small alignment {name}"
        yield Case(key, partial(_aligned, key, place, memory))


def operations(place: Place) -> Iterator[Case]:
    """Every Triton operation once at a shape of 7B, against float64, forward and with gradients."""
    model, tokens = ("tiny", 64) if place.quick else ("7B", 4096)
    dtype = torch.bfloat16 if place.device.type == "cuda" else torch.float32
    for op in (*OPERATIONS, *ONCE):
        key = f"{op} {model}"
        yield Case(key, partial(kernels.contest, key, place, op, MODELS[model], tokens, dtype))


def floor(place: Place) -> Iterator[Case]:
    """A step of learning beside an ordinary one, kernels on and off, peak memory: two blocks of 7B by route, and eight,
    where the rotation, which is made once for all blocks, weighs less."""
    for key, layers, only in (("two blocks", 2, ()), ("eight blocks", 8, FEW)):
        sizes = ("tiny", 2, 128, 32) if place.quick else ("pythia-6.9b", layers, TOKENS, LENGTH)
        yield Case(key, partial(step.measure, key, place, *sizes, only))


def streamed(place: Place) -> Iterator[Case]:
    """Eight blocks of 7B within 8 GiB beside the same step in memory."""
    key = "streamed"
    sizes = ("tiny", 3, (128,), 32) if place.quick else ("pythia-6.9b", 8, (TOKENS,), LENGTH)
    yield Case(key, partial(streaming.measure, key, place, *sizes, ("planned",)))


def solved(place: Place) -> Iterator[Case]:
    """Cayley and expm, forward and backward: batches of head maps, and Cayley of one rotation."""
    for n, batch in ((8, 16),) if place.quick else ((64, 1024), (32, 1024), (64, 32)):
        for op in ("cayley", "expm"):
            yield solvers.case_of(op, n, batch, place, solvers.FEW)
    if not place.quick:
        yield solvers.case_of("cayley", 4096, 1, place, solvers.FEW)


def aligned(place: Place) -> Iterator[Case]:
    """Two models of 40 M parameters, trained for 30 seconds each, matched and learned for 60 steps: barriers."""
    recipe = QUICK if place.quick else RECIPE
    yield from pair.cases(place, recipe, Schedule(steps=5, batch=4) if place.quick else Schedule(steps=60), least=40.0)


def _aligned(key: str, place: Place, memory: int | None) -> list[Row]:
    """Losses of every step with all kernels, and with none. Raises AssertionError where they are not close."""
    ends = [_small(place.scratch / f"small-{seed}", seed) for seed in (0, 1)]
    steps, count, length = (1, 4, 16) if place.quick else (STEPS, 32, 64)
    tokens = torch.randint(SMALL["vocab_size"], (count, length), generator=torch.Generator().manual_seed(0))
    losses = {}
    for name, switch in (("kernels", "1"), ("none", "0")):
        found: list[float] = []

        def call(found: list[float] = found) -> None:
            schedule = Schedule(steps=steps, batch=2, objective="endpoints")
            made = align(open_pair(*ends), tokens, schedule=schedule, device=place.device, memory=memory)
            found += made.info["history"]["loss"]

        step.switched(switch, call)()
        losses[name] = found
    dtype = "bfloat16" if memory and place.device.type == "cuda" else "float32"
    apart = max(abs(x - y) / abs(y) for x, y in zip(losses["kernels"], losses["none"], strict=True))
    row: Row = {"key": key, "dtype": dtype, "steps": steps, "losses": losses, "apart": apart}
    if apart > CLOSE[dtype]:
        row["error"] = f"losses with kernels and without are {apart:.1e} apart"
    return [row]


def _small(directory: Path, seed: int) -> Path:
    """A random checkpoint of two blocks, made once."""
    if not (directory / "model.safetensors").exists():
        torch.manual_seed(seed)
        GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)).save_pretrained(directory)
    return directory
