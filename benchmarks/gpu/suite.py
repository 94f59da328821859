"""Slice `tests`: the tests that need the device, file by file, each in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.common import ROOT, Row
from benchmarks.gpu.rows import Case, Unmeasured
from benchmarks.gpu.slices import Place

# Only with a GPU are the operations' tests collected in this process and in bfloat16 too, and the ring's copies tested.
OPERATIONS = "tests/kernels/test_op_*.py"
FILES = (OPERATIONS, "tests/streaming/test_ring.py", "tests/kernels/test_*.py", "tests/solvers/test_*.py")
QUICK = ("tests/streaming/test_schedule.py", "tests/kernels/test_op_softmax_loss.py")
LIMIT = 400.0  # seconds of one file


def cases(place: Place) -> Iterator[Case]:
    files: list[Path] = []
    for pattern in QUICK if place.quick else FILES:
        files += [file for file in sorted(ROOT.glob(pattern)) if file not in files]
    for file in files:
        key = str(file.relative_to(ROOT))
        yield Case(key, partial(_measure, file, key, place), seconds=60)


def _measure(file: Path, key: str, place: Place) -> list[Row]:
    if file.match(OPERATIONS):
        place.require_gpu()
    return [run(file, key, min(LIMIT, place.clock.left), place)]


def run(file: Path, key: str, limit: float, place: Place) -> Row:
    """Counts of one file's tests, and the names of those that failed."""
    if importlib.util.find_spec("pytest") is None:
        raise Unmeasured("pytest is not installed")
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", str(file)]
        hidden = {} if place.device.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | hidden, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            return {"key": key, "error": f"not finished after {limit:.0f} s", "trace": output[-2500:]}
        if process.returncode == 5:
            raise Unmeasured("no tests were collected here")
        lacking = re.findall(r"No module named '([\w.]+)'", output)
        if lacking and process.returncode not in (0, 1):
            raise Unmeasured(f"{', '.join(sorted(set(lacking)))} is not installed")
        if process.returncode not in (0, 1) or not report.exists():
            return {"key": key, "error": f"pytest ended with {process.returncode}", "trace": output[-2500:]}
        return {"key": key} | counts(report) | ({"trace": output[-2500:]} if process.returncode else {})


def counts(report: Path) -> Row:
    """Of a JUnit file."""
    found = list(ElementTree.parse(report).iter("testcase"))
    of = {tag: [t for t in found if t.find(tag) is not None] for tag in ("failure", "error", "skipped")}
    failed = of["failure"] + of["error"]
    return {
        "passed": len(found) - len(failed) - len(of["skipped"]),
        "failed": len(failed),
        "skipped": len(of["skipped"]),
        "seconds": round(sum(float(t.get("time", 0)) for t in found), 1),
        "failures": [str(t.get("name")) for t in failed][:20],
    }
