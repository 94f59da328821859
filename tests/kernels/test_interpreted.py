"""Starts the tests of the operations again in a process where Triton interprets them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreted process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the operations' tests run on the GPU")
def test_operations_in_the_interpreter():
    pytest.importorskip("triton")
    files = sorted(str(f) for f in HERE.glob("test_op_*.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = os.environ | {"TRITON_INTERPRET": "1", "LMC_FAST_KERNELS": "1"}
    result = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout) and "skipped" not in result.stdout, result.stdout[-2000:]


def test_without_triton():
    """The package imports none, and its modules work where there is none."""
    program = """
import os, sys, warnings
import lmc_fast, lmc_fast.kernels, torch
from lmc_fast.engine.head import HeadLoss, VocabChunk, HeadInputs
from lmc_fast.kernels.enabled import engaged

def use_the_engine():
    x = torch.eye(4)
    for route in ("fused", "weight"):
        assert torch.equal(lmc_fast.interp_linear(x, x, x, 0.5, left=torch.ones(4), right=x, route=route), x)
    h = HeadLoss(HeadInputs([x], [1.0]), torch.arange(4), learn=True)
    h.whole(VocabChunk([x], None), [])
    return h.gradients[0]

plain = use_the_engine()
assert "triton" not in sys.modules, "on a CPU nothing imports it"
sys.modules["triton"] = None
os.environ["TRITON_INTERPRET"] = os.environ["LMC_FAST_KERNELS"] = "1"  # kernels are wanted, and cannot run
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    assert torch.equal(use_the_engine(), plain)
(warning,) = seen
assert warning.category is RuntimeWarning and "Triton is not installed" in str(warning.message), warning
from lmc_fast.kernels import dual_gemm, head_maps, runtime, softmax_loss
from lmc_fast.kernels import interpolate_weight
x = torch.eye(4)
assert not runtime.usable(x)
assert torch.equal(dual_gemm.dual_linear(x, x, x, x, torch.tensor(0.5)), x)
assert torch.equal(head_maps.head_maps(x, x, (0.5, 0.5), heads=2), x)
assert torch.equal(interpolate_weight.interpolate(x, x, x, torch.tensor(0.5)), x)
assert softmax_loss.cross_entropy_(x, torch.arange(4)).shape == (4,)
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LMC_FAST_KERNELS")}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
