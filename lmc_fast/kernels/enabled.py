"""Whether the engine's operations run as Triton kernels, and a warning where they should and cannot."""

from __future__ import annotations

import math
import os
import warnings
from functools import cache

import torch
from torch import Tensor

SWITCH = "LMC_FAST_KERNELS"
"""Environment variable: "1" for all OPERATIONS, "0" for none, or some of them, separated by commas; unset: MEASURED."""
MEASURED = {(9, 0): ("softmax_loss", "head_maps")}
"""By compute capability: the operations that beat the best torch formulation there (benchmarks/results/gpu)."""
OPERATIONS = ("softmax_loss", "interpolate_weight", "dual_gemm", "head_maps")


def engaged(operation: str, *tensors: Tensor | None) -> bool:
    """Whether `operation` (of OPERATIONS) runs as a kernel on these tensors: switched on, and on an NVIDIA GPU, or
    under TRITON_INTERPRET=1.

    False without a word for float64, which no kernel takes, and on a CPU, where Triton is not even imported. Where
    kernels are wanted and cannot run, one RuntimeWarning says why. Raises ValueError if LMC_FAST_KERNELS is nonsense.
    """
    given = [t for t in tensors if t is not None]
    if not (given[0].is_cuda or _interpreter_wanted()) or operation not in wanted(given[0].device):
        return False
    from .runtime import DTYPES, usable

    if any(t.dtype not in DTYPES for t in given):
        return False
    problem = obstacle(given[0].device)
    if problem is None and not usable(*given):
        problem = "Triton's interpreter rounds bfloat16 wrongly"
    if problem is not None:
        fall_back(problem)
    return problem is None


def wanted(device: torch.device | None = None) -> tuple[str, ...]:
    """The operations that LMC_FAST_KERNELS turns on, on `device` (default: the present GPU)."""
    value = os.environ.get(SWITCH)
    if value is None:
        return MEASURED.get(capability(device), ())
    if value in ("0", "1"):
        return OPERATIONS if value == "1" else ()
    names = tuple(name.strip() for name in value.split(","))
    unknown = [name for name in names if name not in OPERATIONS]
    if unknown:
        raise ValueError(f'{SWITCH} names "{unknown[0]}"; it takes 0, 1, or some of {", ".join(OPERATIONS)}')
    return names


@cache
def capability(device: torch.device | None = None) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU (default: the present one); (0, 0) for other devices."""
    if torch.version.cuda is None or not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return 0, 0
    return torch.cuda.get_device_capability(device)


@cache
def obstacle(device: torch.device) -> str | None:
    """Why no kernel runs on `device`, or None; the first call for a device tries one."""
    from . import runtime, softmax_loss

    if runtime.triton is None:
        return "Triton is not installed (pip install triton)"
    if not runtime.INTERPRETED:
        if device.type != "cuda":
            return "TRITON_INTERPRET was set after Triton had been imported"
        if torch.version.cuda is None:
            return "the Triton kernels are made for NVIDIA GPUs"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "the Triton kernels need compute capability 8.0, and this GPU has less"
    try:
        (found,) = softmax_loss.row_statistics(torch.zeros(1, 32, device=device))[0].tolist()
    except Exception as error:  # no C compiler, no room for the cache, a driver of another age, ...
        return (
            f"a Triton kernel fails here ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        )
    return None if abs(found - math.log(32)) < 1e-5 else f"a Triton kernel finds {found} for log 32"


@cache
def fall_back(problem: str) -> None:
    """Warns, once for each problem, that torch does the work of a kernel."""
    warnings.warn(
        f"lmc_fast: {problem}; plain torch operations, which move more memory, do the work of Triton kernels. "
        f"{SWITCH}=0 chooses them without this warning.",
        RuntimeWarning,
        stacklevel=3,
    )


def _interpreter_wanted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
