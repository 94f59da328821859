"""What every benchmark shares: options, interleaved timing, rows that say where they come from."""

import argparse
import csv
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

Row = dict[str, Any]


def options(description: str | None) -> argparse.ArgumentParser:
    """The three options of every benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions; under a minute on two cores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--check", action="store_true", help="exit 1 where a promised figure is missed")
    return parser


def interleave(
    variants: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Milliseconds of `repeats` calls of each variant, in turns after a warm-up call, so that drift hits all alike.

    For one-thread variants on a shared machine pass time.process_time.
    """
    for call in variants.values() if warm_up else ():
        call()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, call in variants.items():
            start = clock()
            call()
            times[name].append((clock() - start) * 1e3)
    return times


def lmc_fast(*arguments: object) -> tuple[int, int, str, str]:
    """(exit status, peak memory in bytes, standard output, standard error) of the command in a process of its own.

    The peak is looked up while it runs: what the system tells afterwards has the parent's memory in it, and none of
    what was before a stage.
    """
    command = [sys.executable, "-m", "lmc_fast", *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as text, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=text, stderr=errors)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _high_water(process.pid))
            time.sleep(0.02)
        text.seek(0)
        errors.seek(0)
        return process.returncode, peak, text.read(), errors.read()


def _high_water(process: int) -> int:
    """Bytes, of a process that runs the command; 0 before and after that, and on systems without /proc."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
        command = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return 1024 * int(found[0]) if found and b"lmc_fast" in command else 0


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[1], statistics.median(times), cuts[7]


def provenance(*sources: str) -> Row:
    """Commit (marked +dirty where `sources`, results aside, differ from it), versions and processor."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:  # no git here
            return ""
        return done.stdout.strip()

    commit = git("rev-parse", "--short=12", "HEAD") or "unknown"
    if git("status", "--porcelain", "--", *sources, ":(exclude)benchmarks/results"):
        commit += "+dirty"
    return {
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_json(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n")


def write_csv(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[Row]:
    """What write_csv wrote, all of it text; nothing where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
