"""What is promised of a GPU, and what the rows say about it. Data and arithmetic only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.common import Row
from benchmarks.gpu.slices import kind

MET, MISSED, OPEN = "met", "MISSED", "not yet measured"


@dataclass(frozen=True)
class Promise:
    """value: the figure of a row, None where it says nothing. most: an upper limit. The worst row counts, or `best`."""

    slice: str
    text: str
    limit: float
    value: Callable[[Row], float | None]
    most: bool = False
    best: bool = False

    def measured(self, rows: Sequence[Row]) -> float | None:
        values = [v for row in rows if kind(row["slice"]) == self.slice and (v := self.value(row)) is not None]
        if not values:
            return None
        return max(values) if self.most != self.best else min(values)

    def verdict(self, rows: Sequence[Row]) -> str:
        value = self.measured(rows)
        if value is None:
            return OPEN
        return MET if (value <= self.limit if self.most else value >= self.limit) else MISSED

    @property
    def limit_text(self) -> str:
        return f"{'≤' if self.most else '≥'} {self.limit:g}"


def on_gpu(row: Row) -> bool:
    """Whether a row is a measurement of a GPU at a real shape."""
    return not row.get("quick") and row.get("cuda", "none") != "none" and "error" not in row and "unmeasured" not in row


def _of(field: str, **wanted: object) -> Callable[[Row], float | None]:
    """`field` of rows whose other fields are as wanted."""

    def value(row: Row) -> float | None:
        if not on_gpu(row) or any(row.get(name) != what for name, what in wanted.items()):
            return None
        return None if row.get(field) is None else float(row[field])

    return value


def _solver(op: str) -> Callable[[Row], float | None]:
    found = _of("ratio", n=64, batch=1024, dtype="float32")
    return lambda row: found(row) if str(row.get("key", "")).startswith(op) else None


def _flag(field: str) -> Callable[[Row], float | None]:
    return lambda row: float(row[field]) if on_gpu(row) and row.get(field) is not None else None


def _blocks_7b(row: Row) -> float | None:
    found = _of("per_floor", variant="ours", tokens=16384, width=4096)
    return found(row)


PROMISES = (
    Promise("tests", "failed tests on the device", 0, _of("failed"), most=True),
    Promise("kernels", "every operation as accurate as torch in the same dtype (1: all)", 1, _flag("accurate")),
    Promise("solvers", "cayley 1024 x 64 x 64, forward + backward: times torch.linalg", 10, _solver("cayley")),
    Promise("solvers", "expm 1024 x 64 x 64, forward + backward: times torch.linalg", 10, _solver("expm")),
    Promise("solvers", "solvers as accurate as torch.linalg, and as fast as promised (1: all)", 1, _flag("ok")),
    Promise("step", "a step with 7B blocks, 16384 tokens: times an ordinary training step", 1.5, _blocks_7b, most=True),
    Promise(
        "streaming",
        "a step of 16384 tokens streamed within 8 GiB: times the speed in memory (best way that fits)",
        0.9,
        _of("ratio", tokens=16384, within_budget=True),
        best=True,
    ),
    Promise("streaming", "peak memory as planned: share of the budget", 1, _of("peak_share", variant="planned"), True),
    Promise("pair", "learned barrier: times the naive one", 0.5, _of("ratio"), most=True),
)


def problems(rows: Sequence[Row]) -> list[str]:
    """Promises that the rows miss, and rows that went wrong."""
    out = []
    for promise in PROMISES:
        if promise.verdict(rows) == MISSED:
            out.append(f"{promise.text}: {promise.measured(rows):g}, promised {promise.limit_text}")
    out += [f"{row['key']}: {row['error'].splitlines()[0][:200]}" for row in rows if "error" in row]
    failed = [row for row in rows if row.get("quick") and (row.get("failed") or row.get("accurate") is False)]
    return out + [f"{row['key']}: wrong in the quick run" for row in failed]
