"""The process that measures one slice: python -m benchmarks.gpu.worker NAME ...

Cases are measured one after the other until the time is up. Whatever goes wrong in one becomes a row with an `error`;
only where the device itself is lost the process ends, and its parent starts another.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.common import Row, processor, provenance
from benchmarks.gpu.device import release
from benchmarks.gpu.rows import Case, Clock, Journal, Unfinished, Unmeasured, fingerprint
from benchmarks.gpu.slices import EVERY, HARNESS, Place
from lmc_fast.implementations import GPU_SOLVERS
from lmc_fast.kernels.enabled import SWITCH

CONTINUED, LOST = 75, 70  # exit codes: the time is up; the device answers no more
FEW_SECONDS = 20.0  # less than this is no time for a case that watches the clock itself


def stamp(slice_name: str, quick: bool, device: str, run: str, commit: str = "") -> Row:
    """What all rows of a process have in common. commit: named where git does not know it."""
    try:
        found = provenance("lmc_fast", "csrc", "benchmarks/gpu")
    except FileNotFoundError:  # no git
        there = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        found = {"commit": "unknown"} | versions | {"device": there}
    if commit and found["commit"] == "unknown":
        found["commit"] = commit
    if device == "cpu":
        found["device"] = processor()
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    sources = fingerprint([*HARNESS, *EVERY[slice_name].sources])
    more = {"triton": triton, "cuda": torch.version.cuda or "none", "system": platform.system()}
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return found | more | {"slice": slice_name, "quick": quick, "sources": sources, "run": run, "started": now}


def measure(cases: Iterable[Case], journal: Journal, place: Place, running: Path) -> int:
    """Every case that is not settled, while there is time. Returns an exit code.

    running: holds the name of the case that is being measured, for whoever finds this process dead.
    """
    for case in cases:
        if journal.settled(case.key):
            continue
        needed = 1.0 if place.quick else FEW_SECONDS if case.resumes else case.seconds
        if place.clock.left < needed:
            print(f"  {case.key}: no time left", flush=True)
            return CONTINUED
        running.write_text(case.key)
        began = time.monotonic()
        try:
            rows = case.measure()
        except Unfinished as why:
            print(f"  {case.key}: {why}", flush=True)
            running.unlink()
            return CONTINUED
        except Unmeasured as why:
            rows = [{"key": case.key, "unmeasured": str(why)}]
        except Exception as error:
            text = f"{type(error).__name__}: {str(error).strip()[:1000]}"
            rows = [{"key": case.key, "error": text, "trace": traceback.format_exc()[-2500:]}]
        seconds = round(time.monotonic() - began, 2)
        journal.add(case.key, [row | {"case_seconds": seconds} for row in rows])
        running.unlink()
        for row in rows:
            print(f"  {shown(row)}", flush=True)
        if any("error" in row for row in rows) and not answers(place.device):
            return LOST
        release(place.device)
    return 0


def answers(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal access it does not, in this process."""
    try:
        return float(torch.ones(4, device=device).sum().cpu()) == 4
    except RuntimeError:
        return False


def shown(row: Row) -> str:
    """One line about a row."""
    if "error" in row:
        return f"{row['key']}: ERROR {row['error'].splitlines()[0][:160]}"
    if "unmeasured" in row:
        return f"{row['key']}: {row['unmeasured']}"
    skip = ("key", "trace")
    hidden = ("p20_ms", "p80_ms")
    parts = [f"{name} {value}" for name, value in row.items() if name not in skip and not name.endswith(hidden)]
    return f"{row['key']}: " + ", ".join(parts)[:400]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slice", choices=EVERY)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--run", required=True, help="names the invocation: what failed in it is not tried again")
    parser.add_argument("--commit", default="")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault(SWITCH, "1")  # what is measured here is off elsewhere
    os.environ.setdefault(GPU_SOLVERS, "triton")
    torch.set_num_threads(1 if args.device == "cpu" else torch.get_num_threads())
    args.out.mkdir(parents=True, exist_ok=True)
    args.scratch.mkdir(parents=True, exist_ok=True)
    place = Place(torch.device(args.device), args.quick, args.scratch, Clock(args.seconds), args.run)
    common = stamp(args.slice, args.quick, args.device, args.run, args.commit)
    journal = Journal(args.out / f"{args.slice}.jsonl", common)
    wanted = EVERY[args.slice]
    cases = getattr(importlib.import_module(f"benchmarks.gpu.{wanted.module}"), wanted.cases)
    return measure(cases(place), journal, place, args.out / f"{args.slice}.running")


if __name__ == "__main__":
    sys.exit(main())
