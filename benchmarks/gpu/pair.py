"""Slice `pair`: two seeds of a 160 M-parameter model are trained on the device and aligned by lmc_fast.align.

Barriers are in nats per token, on files that neither training nor alignment has seen.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import Row
from benchmarks.gpu.device import release
from benchmarks.gpu.rows import Case, Unfinished, fingerprint
from benchmarks.gpu.slices import Place
from benchmarks.gpu.training import MARGIN, QUICK, Recipe, blocks, make_corpus, trained
from lmc_fast import Alignment, LmcError, Pair, Schedule, align, barrier, open_pair
from lmc_fast.pipeline.align import Progress

LEAST = 420.0  # seconds that an alignment should find when it begins
LENGTH = 256  # of calibration and test blocks
PROMISED = 0.5  # of the naive barrier, at most


def cases(
    place: Place, recipe: Recipe | None = None, schedule: Schedule | None = None, least: float = LEAST
) -> Iterator[Case]:
    """least: seconds that an alignment should find when it begins."""
    recipe = recipe or (QUICK if place.quick else Recipe())
    schedule = schedule or (Schedule(steps=5, batch=4) if place.quick else Schedule())
    made_by = fingerprint(["benchmarks/gpu/training.py"])  # where that changes, everything is made again
    directory = place.scratch / f"pair-{'quick-' * place.quick}{recipe.width}-{made_by}"
    if place.quick:
        yield Case("corpus quick", lambda: [{"key": "corpus quick"} | make_corpus(directory, recipe)])
    else:
        yield Case("corpus", lambda: [{"key": "corpus"} | make_corpus(directory, recipe)], seconds=120)
    for seed in (0, 1):
        key = f"train {seed}"
        yield Case(key, partial(_train, key, place, directory, seed, recipe), resumes=True)
    yield Case("align", partial(_align, "align", place, directory, recipe, schedule, least), resumes=True)


def _train(key: str, place: Place, directory: Path, seed: int, recipe: Recipe) -> list[Row]:
    return [{"key": key, "seed": seed} | trained(directory, seed, recipe, place.device, place.clock)]


def _align(key: str, place: Place, directory: Path, recipe: Recipe, schedule: Schedule, least: float) -> list[Row]:
    """Barriers of the naive, matched and learned pair, times and peak memory."""
    for seed in (0, 1):
        trained(directory, seed, recipe, place.device, place.clock)
    release(place.device)
    quick, device = place.quick, place.device
    state = directory / "state.safetensors"
    if not quick and place.clock.left < least:
        raise Unfinished("both endpoints are trained, the alignment is for the next run")
    pair = open_pair(directory / "seed0", directory / "seed1")
    length = recipe.length if quick else LENGTH
    calibration = blocks(directory / "train.npy", length, 64 if quick else 8192)
    validation = blocks(directory / "val.npy", length, 8 if quick else 64)
    test = blocks(directory / "test.npy", length, 8 if quick else 128)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.monotonic()
    matched_at = [0.0]

    def watch(at: Progress) -> None:
        if at.step == 0:
            matched_at[0] = time.monotonic()
        if place.clock.left < MARGIN:
            raise KeyboardInterrupt  # align saves its state and passes it on

    try:
        found = align(
            pair,
            calibration,
            schedule=schedule,
            validation=validation,
            device=device,
            progress=watch,
            state_file=state,
        )
    except KeyboardInterrupt:
        raise Unfinished("the alignment is saved, to be continued") from None
    except LmcError:  # perhaps a state that another version wrote: the next run begins anew
        state.unlink(missing_ok=True)
        raise
    ended = time.monotonic()
    row: Row = {"key": key, "steps": len(found.info["history"]["loss"]), "route": found.info["route"]}
    row |= {"matching_seconds": round(matched_at[0] - began, 1), "learning_seconds": round(ended - matched_at[0], 1)}
    if device.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    row |= barriers(pair, found, test, device, 3 if quick else 11)
    state.unlink(missing_ok=True)
    return [row]


def barriers(pair: Pair, found: Alignment, test: torch.Tensor, device: torch.device, points: int) -> Row:
    """Of the endpoints as they are, as matching left them, and as learned; loss of the endpoints and the middle."""
    row: Row = {"test_tokens": test.numel()}
    stages = {"naive": None, "matched": Alignment(*found.matched, found.matched), "learned": found}
    for name, stage in stages.items():
        curve = barrier(pair, test, stage and placed(stage, device), points, device=device)
        row[f"barrier_{name}"] = round(curve.barrier, 4)
        row[f"middle_{name}"] = round(curve.excess[points // 2], 4)
        if name != "matched":
            row |= {f"loss_a_{name}": round(curve.losses[0], 4), f"loss_b_{name}": round(curve.losses[-1], 4)}
    row["ratio"] = round(row["barrier_learned"] / max(row["barrier_naive"], 1e-9), 4)
    return row


def placed(alignment: Alignment, device: torch.device) -> Alignment:
    """The same with its matrices on the device."""
    a, b = (g.map(lambda t: t.to(device)) for g in (alignment.a, alignment.b))
    return Alignment(a, b, (a, b), alignment.info)
