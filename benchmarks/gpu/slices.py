"""The slices: what the harness can measure, and where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu.rows import Clock, Unmeasured

HARNESS = ("benchmarks/common.py", "benchmarks/gpu/device.py")


@dataclass(frozen=True)
class Slice:
    """minutes: the most that one process takes. sources: what its rows depend on, beside HARNESS. like: the slice whose
    promises and table its rows belong to, if another."""

    module: str  # in benchmarks.gpu, with cases(place) -> Iterable[Case]
    what: str
    minutes: float
    sources: tuple[str, ...]
    cases: str = "cases"  # the function's name
    like: str = ""


SLICES = {
    "tests": Slice("suite", "tests of kernels, solvers and the ring on the device", 8.2, ("lmc_fast", "csrc", "tests")),
    "kernels": Slice(
        "kernels",
        "Triton kernels and interp_linear beside cuBLAS",
        8.2,
        ("lmc_fast/kernels", "lmc_fast/engine", "benchmarks/gpu/kernels.py", "benchmarks/gpu/contests.py"),
    ),
    "solvers": Slice(
        "solvers",
        "cayley and expm beside torch.linalg",
        8.2,
        (
            "lmc_fast/solvers",
            "lmc_fast/implementations.py",
            "csrc",
            "benchmarks/solvers.py",
            "benchmarks/gpu/solvers.py",
        ),
    ),
    "step": Slice(
        "step",
        "a step of learning beside an ordinary training step",
        8.2,
        ("lmc_fast", "benchmarks/synthetic.py", "benchmarks/gpu/models.py", "benchmarks/gpu/step.py"),
    ),
    "streaming": Slice(
        "streaming",
        "a step whose weights are streamed beside one in memory",
        8.2,
        ("lmc_fast", "benchmarks/synthetic.py", "benchmarks/gpu/models.py", "benchmarks/gpu/streaming.py"),
    ),
    "pair": Slice(
        "pair",
        "a pair trained here and aligned",
        8.2,
        ("lmc_fast", "csrc", "benchmarks/gpu/pair.py", "benchmarks/gpu/training.py"),
    ),
}


_ALL = ("lmc_fast", "csrc", "benchmarks/gpu", "benchmarks/solvers.py", "benchmarks/synthetic.py")
FIRST_LIGHT = {  # `make first-light`: in this order, eight minutes in all
    f"first-{name}": Slice("first_light", what, seconds / 60, _ALL, name, like)
    for name, like, what, seconds in (
        ("imports", "first-imports", "imports, and a small alignment with kernels and without", 50),
        ("operations", "kernels", "every Triton operation once at a shape of 7B", 70),
        ("floor", "step", "a step beside the floor", 80),
        ("streamed", "streaming", "streamed beside resident", 80),
        ("solved", "solvers", "cayley and expm", 50),
        ("aligned", "pair", "two models trained and aligned", 150),
    )
}
EVERY = SLICES | FIRST_LIGHT


def kind(name: str) -> str:
    """The slice of SLICES whose rows those of a slice are like; first-imports is like none."""
    return EVERY[name].like or name


@dataclass(frozen=True)
class Place:
    """Where and how a slice is measured."""

    device: torch.device
    quick: bool
    scratch: Path  # for large files, which may be deleted between slices, not between processes of one
    clock: Clock
    run: str  # names the invocation of the harness

    def require_gpu(self) -> None:
        if self.device.type != "cuda":
            raise Unmeasured("needs a GPU")
