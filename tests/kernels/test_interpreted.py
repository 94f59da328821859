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
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout) and "skipped" not in result.stdout, result.stdout[-2000:]


def test_without_triton():
    """The package imports none, and its modules work where there is none."""
    program = """
import sys
import lmc_fast, lmc_fast.kernels
assert "triton" not in sys.modules
sys.modules["triton"] = None
assert not lmc_fast.kernels.available()
import torch
from lmc_fast.kernels import dual_gemm, head_maps, norm_concat, runtime, softmax_loss, transient
x = torch.eye(4)
assert not runtime.usable(x)
assert torch.equal(dual_gemm.dual_linear(x, x, x, x, torch.tensor(0.5)), x)
assert norm_concat.norm_concat(x, x, (1, 1)).shape == (4, 8)
assert torch.equal(head_maps.head_maps(x, x, (0.5, 0.5), heads=2), x)
assert torch.equal(transient.interpolate(x, x, x, torch.tensor(0.5)), x)
assert softmax_loss.cross_entropy_(x, torch.arange(4)).shape == (4,)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=HERE.parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
