"""Time and memory on the device."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.common import interleave

SECONDS_EACH = 0.4  # that each variant is timed for, at least FEWEST and at most MOST calls
FEWEST, MOST = 5, 30


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(calls: Mapping[str, Callable[[], object]], device: torch.device, quick: bool) -> dict[str, list[float]]:
    """Milliseconds of calls of each variant, in turns after two warm-up calls: CUDA events on a GPU, else CPU time.

    The first call may compile and tune, the second shows how many repetitions there is time for.
    """
    if device.type != "cuda":
        return interleave(calls, 2, time.process_time)
    longest = 0.0
    for call in calls.values():
        call()
    for call in calls.values():
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        longest = max(longest, time.perf_counter() - start)
    repeats = 3 if quick else min(max(int(SECONDS_EACH / longest), FEWEST), MOST)
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            call()
            after.record()
            events[name].append((before, after))
        synchronize(device)
    return {name: [x.elapsed_time(y) for x, y in pairs] for name, pairs in events.items()}


def runnable(
    calls: Mapping[str, Callable[[], object]], device: torch.device
) -> tuple[dict[str, Callable[[], object]], list[str]]:
    """(the calls that find enough memory, the names of the others)."""
    fit: dict[str, Callable[[], object]] = {}
    large = []
    for name, call in calls.items():
        try:
            call()
            synchronize(device)
            fit[name] = call
        except torch.OutOfMemoryError:
            large.append(name)
            release(device)
    return fit, large


def release(device: torch.device) -> None:
    """Memory that nothing needs any more goes back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak(call: Callable[[], object], device: torch.device) -> int:
    """Most bytes that torch had handed out at once during a call, above what was there before."""
    if device.type != "cuda":
        from benchmarks.step import peak_bytes

        return peak_bytes(call)
    release(device)
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
