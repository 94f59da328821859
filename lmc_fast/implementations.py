"""Which implementation of the solvers is active, and why."""

import importlib
import importlib.util
import os
import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .kernels.enabled import MEASURED, OPERATIONS, SWITCH, capability, wanted

TRITON_LARGEST = 64
"""The largest n whose matrices the Triton solvers take: 128 x 128 does not fit in a program's registers."""
GPU_SOLVERS = "LMC_FAST_GPU_SOLVERS"
"""Environment variable: "triton", or "torch", the batched formulation. Unset: Triton where MEASURED_SOLVERS says so."""
MEASURED_SOLVERS = ((9, 0),)
"""Compute capabilities where the Triton solvers beat the batched formulation (benchmarks/results/gpu)."""
INSTRUCTIONS = "LMC_FAST_ISA"
"""Environment variable: the instruction set of the C++ solvers, "avx512", "avx2" or "generic" (default: the best)."""


@dataclass(frozen=True)
class Backends:
    """What `backends()` reports.

    Attributes:
        extension: the C++ solvers are built and can be imported.
        isa: the instruction set they run, "avx512", "avx2" or "generic" (LMC_FAST_ISA); "none" without the extension.
        threads: torch.get_num_threads(), which the C++ solvers obey too.
        triton: Triton can be imported.
        gpu_solvers: "torch" or "triton" (LMC_FAST_GPU_SOLVERS).
        kernels: operations of the engine that are Triton kernels on a GPU (LMC_FAST_KERNELS).
        without_kernels: why the others are not; "" where all are.
        cuda: the GPU's name, or "none".

    >>> lmc.backends().cpu in ("torch", "C++ (generic)", "C++ (avx2)", "C++ (avx512)")
    True
    """

    extension: bool
    isa: str
    threads: int
    triton: bool
    gpu_solvers: str
    kernels: tuple[str, ...]
    without_kernels: str
    cuda: str

    @property
    def cpu(self) -> str:
        """What `cayley` and `expm` run on CPU tensors."""
        return f"C++ ({self.isa})" if self.extension else "torch"

    @property
    def gpu(self) -> str:
        """What `cayley` and `expm` run on CUDA tensors."""
        return f"Triton (float32, n ≤ {TRITON_LARGEST}), else torch" if self.gpu_solvers == "triton" else "torch"


def backends() -> Backends:
    """The active implementations. Reports only: never warns, never builds.

    Returns:
        What runs here, and on which hardware.

    Raises:
        ValueError: LMC_FAST_ISA, LMC_FAST_GPU_SOLVERS or LMC_FAST_KERNELS asks for what there is not.

    >>> lmc.backends().threads == torch.get_num_threads()
    True
    """
    native = import_extension()
    return Backends(
        extension=native is not None,
        isa=native.isa() if native else "none",
        threads=torch.get_num_threads(),
        triton=has_triton(),
        gpu_solvers=_gpu_solvers(),
        kernels=wanted() if has_triton() else (),
        without_kernels=_without_kernels(),
        cuda=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    )


def _without_kernels() -> str:
    if not has_triton():
        return "Triton is not installed"
    if set(wanted()) == set(OPERATIONS):
        return ""
    if os.environ.get(SWITCH) is not None:
        return f"{SWITCH} leaves them off"
    known = ", ".join(f"{major}.{minor}" for major, minor in MEASURED)
    return f"not shown to be faster than torch here (measured: capability {known}); {SWITCH}=1 turns all of them on"


def triton_takes(X: Tensor) -> bool:  # (batch, n, n)
    """Whether the Triton solvers run on X: float32 on an NVIDIA GPU, n ≤ 64, not empty."""
    fits = X.is_cuda and torch.version.cuda is not None and X.dtype == torch.float32
    return fits and 0 < X.shape[-1] <= TRITON_LARGEST and X.shape[0] > 0 and _gpu_solvers(X.device) == "triton"


def _gpu_solvers(device: torch.device | None = None) -> str:
    wanted = os.environ.get(GPU_SOLVERS)
    if wanted is None:
        return "triton" if has_triton() and capability(device) in MEASURED_SOLVERS else "torch"
    if wanted not in ("triton", "torch"):
        raise ValueError(f'{GPU_SOLVERS} is "{wanted}"; expected "triton" or "torch"')
    if wanted == "triton" and not has_triton():
        raise ValueError(f"{GPU_SOLVERS} asks for Triton, which is not installed; pip install triton, or unset it")
    return wanted


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def extension() -> ModuleType | None:
    """The C++ solvers, or None after one RuntimeWarning that says how to get them."""
    native = import_extension()
    if native is None:
        warnings.warn(
            "lmc_fast: the C++ solvers (lmc_fast._C) are not built; the slower torch formulation is used. "
            "To build them, reinstall with a C++17 compiler at hand: pip install -e .",
            RuntimeWarning,
            stacklevel=2,
        )
    return native


@cache
def import_extension() -> ModuleType | None:
    try:
        native = importlib.import_module("lmc_fast._C")
    except ImportError:
        return None
    wanted = os.environ.get(INSTRUCTIONS)
    if wanted:
        try:
            native.use_isa(wanted)
        except ValueError as error:
            raise ValueError(f'{INSTRUCTIONS} is "{wanted}": {error}') from error
    return native
