"""Rows as they are measured: appended to a file at once, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Row, quantiles

IDENTITY = ("sources", "device", "torch", "triton", "quick")  # rows that agree in these are of one kind


@dataclass(frozen=True)
class Case:
    """Something that is measured in one go. measure: makes its rows, whose keys are the case's, or `key/...`."""

    key: str
    measure: Callable[[], list[Row]]
    seconds: float = 15.0  # what it is expected to take
    resumes: bool = False  # it watches the clock itself and raises Unfinished


class Unfinished(Exception):
    """A case stopped in the middle, its state is saved: call it again."""


class Unmeasured(Exception):
    """Why a case cannot be measured here."""


class Clock:
    """Time that is left."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


class Journal:
    """The rows of one slice. stamp: what all rows of this run have in common: at least IDENTITY and `run`."""

    def __init__(self, file: Path, stamp: Row):
        self.file, self.stamp = file, stamp
        self._settled = {row["case"] for row in read_rows(file) if self._settles(row)}

    def _settles(self, row: Row) -> bool:
        """Whether a row's case needs no other attempt: measured by the same sources, or tried in this run."""
        if any(row.get(name) != self.stamp[name] for name in IDENTITY):
            return False
        return row["run"] == self.stamp["run"] or not ("error" in row or "unmeasured" in row)

    def settled(self, case: str) -> bool:
        return case in self._settled

    def add(self, case: str, rows: Sequence[Row]) -> None:
        """Appends all rows of a case in one write."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row | {"case": case} | self.stamp) + "\n" for row in rows]
        with self.file.open("ab+") as out:
            if out.tell() and out.seek(-1, os.SEEK_END) >= 0 and out.read(1) != b"\n":
                out.write(b"\n")  # a kill cut the last line off
            out.write("".join(lines).encode())
            out.flush()
            os.fsync(out.fileno())
        self._settled.add(case)


def read_rows(file: Path) -> list[Row]:
    """What Journals wrote. The last line may have been cut off by a kill; it is left out."""
    if not file.exists():
        return []
    rows = []
    for line in file.read_text().split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict) and {"case", "key", "run"} <= row.keys()]


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last attempt at every case, in the order of first appearance."""
    rows, last = list(rows), dict[str, Row]()
    for row in rows:
        last[row["case"]] = row
    newest = {case: tuple(row.get(name) for name in (*IDENTITY, "run")) for case, row in last.items()}
    kept: dict[str, dict[str, Row]] = {case: {} for case in last}
    for row in rows:
        if tuple(row.get(name) for name in (*IDENTITY, "run")) == newest[row["case"]]:
            kept[row["case"]][row["key"]] = row
    return [row for some in kept.values() for row in some.values()]


def fingerprint(sources: Sequence[str]) -> str:
    """Of the files that rows depend on: where it differs, they are measured again. Needs no git."""
    digest = hashlib.sha256()
    for name in sources:
        place = ROOT / name
        files = sorted(p for p in place.rglob("*") if p.suffix in (".py", ".cpp", ".h")) if place.is_dir() else [place]
        for file in files:
            digest.update(f"{file.relative_to(ROOT)}\0".encode())
            digest.update(file.read_bytes() if file.exists() else b"")
    return digest.hexdigest()[:12]


def spread(name: str, times: Sequence[float]) -> dict[str, Any]:
    """Median and 20th and 80th percentile of milliseconds, as fields of a row; name: what they begin with."""
    low, middle, high = (round(t, 4) for t in quantiles(list(times)))
    name = f"{name}_" if name else ""
    return {f"{name}ms": middle, f"{name}p20_ms": low, f"{name}p80_ms": high}
