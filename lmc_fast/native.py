"""Which implementation of the solvers is active, and why."""

import importlib
import importlib.util
import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch


@dataclass(frozen=True)
class Backends:
    """What `backends()` reports."""

    extension: bool  # the C++ solvers are built and importable
    isa: str  # instruction set they run: "avx512", "avx2", "generic", or "none" without the extension
    threads: int  # torch.get_num_threads(), which the C++ solvers obey too
    triton: bool  # importable
    cuda: str  # the GPU's name, or "none"

    @property
    def cpu(self) -> str:
        """What `cayley` and `expm` run on CPU tensors."""
        return f"C++ ({self.isa})" if self.extension else "torch"


def backends() -> Backends:
    """The active implementations. Reports only: never warns, never builds."""
    native = _import_extension()
    return Backends(
        extension=native is not None,
        isa=native.isa() if native else "none",
        threads=torch.get_num_threads(),
        triton=importlib.util.find_spec("triton") is not None,
        cuda=torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    )


@cache
def extension() -> ModuleType | None:
    """The C++ solvers, or None after one RuntimeWarning that says how to get them."""
    native = _import_extension()
    if native is None:
        warnings.warn(
            "lmc_fast: the C++ solvers (lmc_fast._C) are not built; the slower torch formulation is used. "
            "To build them, reinstall with a C++17 compiler at hand: pip install -e .",
            RuntimeWarning,
            stacklevel=2,
        )
    return native


@cache
def _import_extension() -> ModuleType | None:
    try:
        return importlib.import_module("lmc_fast._C")
    except ImportError:
        return None
