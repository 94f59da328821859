"""Where the kernels can run, and how they are launched.

Triton has no wheel for some platforms: without it every module here still imports, and its `reference` works.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

# Fixed when this module is imported: from then on every kernel here runs as plain Python, or none does.
INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def jit(function: Callable) -> Any:
    """triton.jit, or nothing where there is no Triton."""
    return function if triton is None else triton.jit(function)


def usable(*tensors: Tensor | None) -> bool:
    """Whether the kernels can take these tensors: Triton and an NVIDIA GPU of compute capability 8 or more, or anywhere
    under TRITON_INTERPRET=1.

    Kernels compute in float16, bfloat16 and float32; the interpreter gets bfloat16 wrong, so not there.
    """
    if triton is None:
        return False
    given = [t for t in tensors if t is not None]
    if any(t.dtype not in DTYPES for t in given):
        return False
    if INTERPRETED:
        return all(t.dtype != torch.bfloat16 for t in given)
    if torch.version.cuda is None:  # a ROCm build calls its tensors CUDA's too; nothing here was compiled for it
        return False
    return all(t.is_cuda and torch.cuda.get_device_capability(t.device) >= (8, 0) for t in given)


class Tile(NamedTuple):
    """One way to cut a matrix product: (m, k) @ (k, n) at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k}


# Of two-byte types, by compute capability. tests/kernels/test_compile.py holds them to no spills and to shared memory.
TILES = {
    8: (Tile(128, 128, 32, 8, 4), Tile(128, 128, 64, 8, 3), Tile(64, 128, 32, 4, 4), Tile(64, 64, 32, 4, 4)),
    9: (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4), Tile(64, 64, 64, 4, 4)),
}
EXACT = Tile(64, 64, 32, 4, 3)  # of float32, which is here to be right, not fast
TINY = Tile(16, 16, 16, 4, 1)  # of the interpreter: many tiles even in small tests


def tiles(major: int, itemsize: int = 2, largest: int = 128 * 256) -> tuple[Tile, ...]:
    """What to try on compute capability `major` (8: A100 and the like; 9 and above: H100), of at most `largest` m n."""
    if itemsize > 2:
        return (EXACT,)
    return tuple(t for t in TILES[8 if major < 9 else 9] if t.m * t.n <= largest)


@cache
def _tuned(kernel: Any, choices: tuple[Tile, ...], key: tuple[str, ...], zeroed: tuple[str, ...]) -> Any:
    configs = [triton.Config(t.blocks(), num_warps=t.warps, num_stages=t.stages) for t in choices]
    made = triton.autotune(configs=configs, key=list(key), reset_to_zero=list(zeroed) or None, do_bench=milliseconds)
    return made(kernel)


def milliseconds(launch: Callable[[], object], quantiles: tuple[float, ...]) -> list[float]:
    """Of one launch, at its best, once for each quantile.

    Triton's own timer clears the cache with a buffer of 256 MiB, which no memory budget has room for.
    """
    launch()
    times = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(5):
            launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 5)
    return [min(times)] * len(quantiles)


def launch_tiled(
    kernel: Any,
    grid: Callable[[dict], tuple],
    like: Tensor,
    key: tuple[str, ...],
    zeroed: tuple[str, ...] = (),
    largest: int = 128 * 256,
    **arguments: Any,
) -> None:
    """Launch a kernel with BLOCK_M, BLOCK_N, BLOCK_K: the fastest tile for each new value of the arguments in `key`.

    The first launch with a new key times the choices, so results of different processes may differ in the last bits.
    zeroed: names of arguments that the kernel only partly writes and that are zero before it. largest: of a tile's m n,
    where the kernel needs registers for more than its product.
    """
    with on(like):
        if INTERPRETED:
            kernel[grid](**arguments, **TINY.blocks())
        else:
            major, _ = torch.cuda.get_device_capability(like.device)
            _tuned(kernel, tiles(major, like.element_size(), largest), key, zeroed)[grid](**arguments)


def on(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 exactly, unless torch is told that TF32 is good enough."""
    return "tf32" if dtype != torch.float32 or torch.backends.cuda.matmul.allow_tf32 else "ieee"


def bucket(rows: int) -> int:
    """Row counts of one bucket share a tuned tile."""
    return 1 << max(rows - 1, 0).bit_length()


def mix(lam: Tensor | tuple[float, float], device: torch.device) -> tuple[Tensor | None, float, float]:
    """(lambda or None, A's factor, B's factor) as kernels take them; the factors count where there is no lambda."""
    if isinstance(lam, tuple):
        return None, float(lam[0]), float(lam[1])
    if lam.numel() != 1:
        raise ValueError(f"lambda is one number, not a tensor of shape {tuple(lam.shape)}")
    return lam.detach().to(device=device, dtype=torch.float32), 0.0, 0.0


def factors(lam: Tensor | tuple[float, float]) -> tuple[Tensor | float, Tensor | float]:
    """A's and B's factor for torch operations."""
    return lam if isinstance(lam, tuple) else (1 - lam, lam)


def rows_of(t: Tensor) -> Tensor:
    """The same matrix with adjacent columns: itself if it has them, else a copy."""
    return t if t.stride(-1) == 1 and t.stride(0) > 0 else t.contiguous()


def vector(t: Tensor | None) -> Tensor | None:
    """A vector as kernels read it: entries adjacent."""
    return None if t is None else t.detach().contiguous()


def stride(t: Tensor | None, dim: int = 0) -> int:
    return 0 if t is None else t.stride(dim)
