"""What a device can do: named profiles, and the one at hand."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ..errors import LmcError
from .meter import UNCERTAIN, available_memory, counted_bytes, resident_bytes
from .profiles import SHEETS


@dataclass(frozen=True)
class Device:
    """Figures that the planner's predictions rest on.

    Attributes:
        name: for people.
        kind: "cuda" or "cpu".
        dtype: that a step computes in.
        memory: bytes.
        flops: per second, sustained, of large matrix products in `dtype`.
        bandwidth: bytes per second from where the weights are kept into a slot.
        source: where they are kept, and how that is known.
        base: bytes that the process takes before anything is loaded (CPU only).
        uncertain: bytes by which `base` may be more when the process is started again.
    """

    name: str
    kind: str
    dtype: torch.dtype
    memory: int
    flops: float
    bandwidth: float
    source: str
    base: int = 0
    uncertain: int = 0

    @property
    def itemsize(self) -> int:
        """Bytes of a number in `dtype`."""
        return self.dtype.itemsize


PROFILES = {
    name: Device(name, "cuda", getattr(torch, sheet.dtype), sheet.memory, sheet.flops, sheet.bandwidth, sheet.source)
    for name, sheet in SHEETS.items()
}
ASSUMED_DISK = 1e9  # bytes per second, where nothing was measured


def require_device(device: torch.device | str) -> torch.device:
    """Raises LmcError unless numbers can be put on a device and read back."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=device).item()
        torch.zeros(1, dtype=torch.float64, device=device).item()  # matching computes with these
    except (RuntimeError, AssertionError, ImportError, NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise LmcError(f"device {device} is not usable: {reason}") from error
    return found


@contextmanager
def device_errors() -> Iterator[None]:
    """What a device fails with, too little memory or anything else, as one sentence. Also a decorator."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
            where = " on the device" if isinstance(error, torch.OutOfMemoryError) else ""
            raise LmcError(
                f"there is not enough memory{where}; give --memory (memory=) to go block by block, or free some"
            ) from error
        if isinstance(error, torch.AcceleratorError):
            reason = str(error).strip().split("\n")[0]
            raise LmcError(f"the device failed ({reason}); what was saved is kept, start anew to go on") from error
        raise


def profile(name: str, device: torch.device | str = "cpu") -> Device:
    """A named profile; "here": the machine at hand, `device` measured for a moment. Raises LmcError for other names."""
    if name == "here":
        return here(torch.device(device))
    if name not in PROFILES:
        raise LmcError(f"device profile {name!r} is unknown; choose here, {', '.join(PROFILES)}")
    return PROFILES[name]


def here(device: torch.device, disk: float | None = None) -> Device:
    """The device at hand. disk: bytes per second that were measured, else ASSUMED_DISK is taken.

    On CUDA the link is measured too; on the CPU weights are in float32 and come from disk.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        flops, link = _flops(device, dtype, 4096), _link(device)
        source = "pinned memory (measured)"
        return Device(properties.name, "cuda", dtype, properties.total_memory, flops, link, source)
    memory = available_memory() + resident_bytes()
    flops = _flops(device, torch.float32, 512)
    source = "disk (assumed)" if disk is None else "disk (measured)"
    return Device(
        "this CPU", "cpu", torch.float32, memory, flops, disk or ASSUMED_DISK, source, counted_bytes(device), UNCERTAIN
    )


def _flops(device: torch.device, dtype: torch.dtype, size: int, seconds: float = 0.3) -> float:
    """Of square matrix products, the best of a few."""
    x = torch.randn(size, size, device=device).to(dtype)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    best, began = 0.0, time.perf_counter()
    while not best or time.perf_counter() - began < seconds:
        wait()
        start = time.perf_counter()
        x @ x
        wait()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _link(device: torch.device) -> float:
    """Bytes per second of copies from pinned memory."""
    from ..streaming.transport import Pinned

    size = 256 << 20
    pinned, there = Pinned(size), torch.empty(size, dtype=torch.uint8, device=device)
    try:
        best = 0.0
        for _ in range(4):
            torch.cuda.synchronize(device)
            start = time.perf_counter()
            there.copy_(pinned.buffer, non_blocking=True)
            torch.cuda.synchronize(device)
            best = max(best, size / (time.perf_counter() - start))
    finally:
        pinned.close()
    return best
