"""The Triton solvers without a GPU. Whether kernels are interpreted or compiled is settled when triton is imported, so
both kinds of test run in processes of their own, whatever else this one has imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lmc_fast import implementations

TESTS = Path(__file__).resolve().parent
needs_triton = pytest.mark.skipif(not implementations.backends().triton, reason="triton is not installed")


def run(command: list[str], **environment: str) -> None:
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", implementations.GPU_SOLVERS)}
    done = subprocess.run(
        [sys.executable, *command], env=kept | environment, cwd=TESTS.parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


@needs_triton
@pytest.mark.parametrize("file, interpret", (("triton_interpreted.py", "1"), ("triton_compiled.py", "0")))
def test_kernels(file, interpret):
    run(
        ["-m", "pytest", "-q", "-x", "--noconftest", "-p", "no:cacheprovider", str(TESTS / file)],
        TRITON_INTERPRET=interpret,
        OMP_NUM_THREADS="1",
    )


def test_importing_the_package_does_not_import_triton():
    imports = "import sys, lmc_fast.implementations, lmc_fast.solvers; "
    run(["-c", imports + "sys.exit('lmc_fast.solvers.triton_matrices' in sys.modules)"])


class OnGpu:
    """What `triton_takes` asks of a tensor."""

    is_cuda = True

    def __init__(self, n, dtype=torch.float32, batch=3):
        self.shape, self.dtype, self.device = torch.Size((batch, n, n)), dtype, torch.device("cuda")


@pytest.fixture
def cuda_build(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.delenv(implementations.GPU_SOLVERS, raising=False)
    return monkeypatch


def test_which_tensors_triton_takes(cuda_build):
    cuda_build.setattr(implementations, "has_triton", lambda: True)
    for found in ((8, 0), (9, 0)):
        cuda_build.setattr(implementations, "capability", lambda _, found=found: found)
        assert implementations.triton_takes(OnGpu(64)) is (found in implementations.MEASURED_SOLVERS)
    cuda_build.setenv(implementations.GPU_SOLVERS, "triton")
    assert implementations.triton_takes(OnGpu(64)) and implementations.triton_takes(OnGpu(1))
    assert not implementations.triton_takes(OnGpu(65))
    assert not implementations.triton_takes(OnGpu(0))
    assert not implementations.triton_takes(OnGpu(8, batch=0))
    assert not implementations.triton_takes(OnGpu(8, torch.float64))
    assert not implementations.triton_takes(torch.zeros(3, 8, 8))
    cuda_build.setattr(torch.version, "cuda", None)  # a ROCm build also says is_cuda
    assert not implementations.triton_takes(OnGpu(8))


def test_the_environment_chooses(cuda_build):
    cuda_build.setattr(implementations, "has_triton", lambda: True)
    cuda_build.setenv(implementations.GPU_SOLVERS, "triton")
    assert implementations.backends().gpu.startswith("Triton")
    cuda_build.setenv(implementations.GPU_SOLVERS, "torch")
    assert implementations.backends().gpu == "torch" and not implementations.triton_takes(OnGpu(8))
    cuda_build.setenv(implementations.GPU_SOLVERS, "cublas")
    with pytest.raises(ValueError, match='"cublas"; expected'):
        implementations.triton_takes(OnGpu(8))


def test_without_triton_the_torch_formulation(cuda_build):
    cuda_build.setattr(implementations, "has_triton", lambda: False)
    assert implementations.backends().gpu == "torch" and not implementations.triton_takes(OnGpu(8))
    cuda_build.setenv(implementations.GPU_SOLVERS, "triton")
    with pytest.raises(ValueError, match="not installed"):
        implementations.triton_takes(OnGpu(8))
