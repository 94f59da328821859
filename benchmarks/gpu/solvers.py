"""Slice `solvers`: benchmarks.solvers on the device, forward and backward, wall-clock with the device synchronised."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import solvers
from benchmarks.common import Row
from benchmarks.gpu.rows import Case
from benchmarks.gpu.slices import Place

PROMISED = 10.0  # times torch.linalg, at 1024 x 64 x 64
SIZES = ((64, 1024), (32, 1024), (128, 256), (512, 16))
ROTATIONS = (2048, 4096)  # of both endpoints, as a step makes them: Cayley alone
REPEATS, FEW = 15, 3


def cases(place: Place) -> Iterator[Case]:
    gpu = place.device.type == "cuda"
    sizes = ((8, 16), (16, 4)) if place.quick else SIZES
    many = 2 if place.quick else REPEATS
    for n, batch in sizes:
        for op in ("cayley", "expm"):
            need = PROMISED if gpu and (n, batch) == (64, 1024) else None
            yield case_of(op, n, batch, place, many, need)
    for op in ("cayley", "expm"):
        n, batch = sizes[0]
        yield _case(solvers.Case(op, n, batch, None, dtype=torch.float64, device=place.device.type), many)
    for n in () if place.quick else ROTATIONS:
        yield _case(solvers.Case("cayley", n, 2, None, device=place.device.type), FEW)


def case_of(op: str, n: int, batch: int, place: Place, repeats: int, need: float | None = None) -> Case:
    """In float32."""
    return _case(solvers.Case(op, n, batch, need, device=place.device.type), repeats)


def _case(case: solvers.Case, repeats: int) -> Case:
    key = f"{case.op} {case.batch} x {case.n} x {case.n} {str(case.dtype).removeprefix('torch.')}"
    return Case(key, partial(_measure, key, case, repeats), seconds=90 if case.n >= 512 else 40)


def _measure(key: str, case: solvers.Case, repeats: int) -> list[Row]:
    row = solvers.measure(case, repeats)
    for name in ("case", "device"):  # every row of the harness has them
        row.pop(name, None)
    return [{"key": key, "n": case.n, "batch": case.batch} | row]
