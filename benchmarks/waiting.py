"""What users wait for, as ratios: an old commit and this one, in turns, in processes of one thread.

    python -m benchmarks.waiting --check                  start-up and the pair in examples/
    python -m benchmarks.waiting --models DIR --check     also the real model that benchmarks.real_models wrote to DIR

CPU time counts (user and system), start-up and all stages included, since others may use the machine meanwhile; of
`--version` and `inspect` the median of five. Memory is the process's own peak. The old commit is checked out in a
temporary directory.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import RESULTS, ROOT, Row, options, provenance, write_csv, write_json

OLD = "808dcea"
PAIR = ROOT / "examples" / "pair"
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """arguments: of lmc-fast; OUT stands for a new directory. need: the largest ratio of new to old; most: seconds, and
    MiB, that the new one may take."""

    name: str
    arguments: tuple[str, ...]
    need: float | None = None
    most: tuple[float | None, float | None] = (None, None)
    repeats: int = 1


def cases(models: Path | None, quick: bool) -> Iterator[Case]:
    yield Case("version", ("--version",), most=(0.4, 60), repeats=5)
    yield Case("inspect", ("inspect", str(PAIR / "a")), most=(1.0, None), repeats=5)
    text = [f"--{name}={PAIR / file}.npy" for name, file in (("data", "train"), ("val", "val"), ("test", "test"))]
    steps = 10 if quick else 100
    ends = str(PAIR / "a"), str(PAIR / "b")
    yield Case(f"examples, {steps} steps", ("align", *ends, *text, "--steps", str(steps), "--out", "OUT"), 0.6)
    if models:
        data = [f"--data={models / 'calibration.npy'}", f"--val={models / 'validation.npy'}"]
        data += [f"--test={models / 'test.npy'}", "--out", "OUT"]
        planted = str(models / "base"), str(models / "planted")
        yield Case("planted, weights", ("align", *planted, *data, "--method", "weight"), 0.35, (None, 2.2 * 1024))
        tuned = str(models / "tuned_a"), str(models / "tuned_b")
        yield Case("tuned, 20 steps", ("align", *tuned, *data, "--steps", "20", "--batch", "4"), 0.4)


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--models", type=Path, help="what benchmarks.real_models wrote")
    parser.add_argument("--only", nargs="+", default=[], help="cases whose names begin like this")
    parser.add_argument("--old", default=OLD, help=f"commit to compare with (default: {OLD})")
    args = parser.parse_args()
    rows: list[Row] = []
    with checkout(args.old) as old:
        for case in cases(args.models, args.quick):
            if not args.only or case.name.startswith(tuple(args.only)):
                rows.append(measure(case, old, args.old))
                print(shown(rows[-1]), flush=True)
    if args.json:
        write_json(args.json, rows)
    elif not args.quick and not args.only:
        write_csv(RESULTS / "waiting.csv", rows)
    return 1 if args.check and not all(row["ok"] for row in rows) else 0


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A working tree of a commit, with the compiled solvers of this one: they have not changed since."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory) / "old"
        subprocess.run(["git", "worktree", "add", "--detach", "-q", place, commit], cwd=ROOT, check=True)
        try:
            for file in (ROOT / "lmc_fast").glob("_C*"):
                shutil.copy(file, place / "lmc_fast")
            yield place
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", place], cwd=ROOT, check=True)


def measure(case: Case, old: Path, commit: str) -> Row:
    taken: dict[str, list[tuple[float, float]]] = {"old": [], "new": []}
    for _ in range(case.repeats):
        for name, place in (("old", old), ("new", ROOT)):
            taken[name].append(run(case, place))
    row: Row = {"case": case.name, "old_commit": commit}
    for name, found in taken.items():
        row[f"{name}_s"] = round(statistics.median(seconds for seconds, _ in found), 2)
        row[f"{name}_mib"] = round(max(peak for _, peak in found) / MIB)
    row["ratio"], row["need"] = round(row["new_s"] / row["old_s"], 3), case.need
    limits = [(row["ratio"], case.need), (row["new_s"], case.most[0]), (row["new_mib"], case.most[1])]
    row["ok"] = all(limit is None or value <= limit for value, limit in limits)
    return row | {"most_s": case.most[0], "most_mib": case.most[1]} | provenance("lmc_fast", "csrc")


def run(case: Case, place: Path) -> tuple[float, float]:
    """(seconds, peak bytes) of the command, run from the package in `place`. Raises RuntimeError where it fails."""
    environment = os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryFile("w+") as said:
        arguments = [part.replace("OUT", f"{out}/out") for part in case.arguments]
        before = _cpu()
        command = [sys.executable, "-m", "lmc_fast", *arguments]
        process = subprocess.Popen(command, cwd=place, env=environment, stdout=said, stderr=said)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _high_water(process.pid))
            time.sleep(0.01)
        seconds = _cpu() - before
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{case.name} failed in {place}: {said.read()[-2000:]}")
    return seconds, peak


def _cpu() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _high_water(process: int) -> int:
    """Bytes; 0 where the process has just ended, or where there is no /proc."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def shown(row: Row) -> str:
    need = "" if row["need"] is None else f" (wanted {row['need']})"
    return (
        f"{row['case']:20} {row['old_s']:8.2f} -> {row['new_s']:8.2f} s, "
        f"ratio {row['ratio']:.2f}{need}; "
        f"{row['old_mib']} -> {row['new_mib']} MiB  {'ok' if row['ok'] else 'MISSED'}"
    )


if __name__ == "__main__":
    sys.exit(main())
