"""Kernels run on the GPU where there is one, else in Triton's interpreter; only the real compiler compiles.

Interpreter or compiler is settled when Triton is imported, once for a process. So without a GPU `test_interpreted.py`
starts this directory again with TRITON_INTERPRET=1, and the files named test_op_* are collected only there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_op_*.py"]
GUARD = 64


@pytest.fixture(autouse=True)
def kernels_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are off unless they are asked for."""
    monkeypatch.setenv("LMC_FAST_KERNELS", "1")


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every tensor made by torch.empty and torch.zeros lies between sentinels, which must survive; empty is NaN."""
    made: list[torch.Tensor] = []

    def between(fill: float):
        def make(*shape, dtype=None, device=None):
            shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
            flat = torch.full((shape.numel() + 2 * GUARD,), 12345.0, dtype=dtype, device=device)
            made.append(flat)
            return flat[GUARD : GUARD + shape.numel()].fill_(fill).view(shape)

        return make

    monkeypatch.setattr(torch, "empty", between(float("nan")))
    monkeypatch.setattr(torch, "zeros", between(0.0))
    yield
    monkeypatch.undo()
    for flat in made:
        edges = torch.cat([flat[:GUARD], flat[-GUARD:]])
        assert (edges == torch.tensor(12345.0).to(flat.dtype)).all(), "a kernel wrote outside its output"
