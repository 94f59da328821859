"""How much memory there is, and how much a stage really took."""

from __future__ import annotations

import ctypes
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..errors import LmcError
from ..sizes import show_bytes

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # cgroup v1 writes a number near 2^63 for "no limit"
_MMAP_THRESHOLD = -3  # of mallopt
LIBRARIES = 176 << 20  # pages of libraries that a process has when it begins to compute (measured)
FIRST_USE = 56 << 20  # code and buffers of libraries that come into memory with the first computation (measured)
UNCERTAIN = 16 << 20  # the process's own size is rounded up to multiples of it: it is never twice the same


def resident_bytes() -> int:
    """Main memory that this process holds now."""
    found = _status("VmRSS")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT if found is None else found


def counted_bytes(device: torch.device | str) -> int:
    """What a budget has to bear before anything is loaded: this process, or nothing where it is a GPU's memory.

    FIRST_USE comes on top of what the process took when it was first counted, not again in every stage.
    """
    global _first_counted
    if torch.device(device).type == "cuda":
        return 0
    _import_what_comes()
    now = resident_bytes() + libraries_to_come()
    _first_counted = min(now, _first_counted or now)
    return -(-max(now, _first_counted + FIRST_USE) // UNCERTAIN) * UNCERTAIN


def _import_what_comes() -> None:
    """Modules that later stages of a command import: they are to be a part of what is counted."""
    for name in ("scipy.optimize", "transformers.modeling_utils", "matplotlib.pyplot"):
        import_module(name)


def libraries_to_come() -> int:
    """Pages of libraries that come in only when they are used, since the system's cache did not have them."""
    files = _status("RssFile")
    return 0 if files is None else max(0, LIBRARIES - files)


_first_counted: int | None = None
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def _status(field: str) -> int | None:
    try:
        for line in (PROC / "self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def reset_peak() -> bool:
    """Makes peak_bytes count from now. False where the system does not allow it."""
    try:
        (PROC / "self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


def peak_bytes() -> int:
    """The most main memory that this process held since reset_peak (or since its start)."""
    found = _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT if found is None else found


@dataclass
class Stage:
    """What one stage took.

    Attributes:
        name: of the stage.
        seconds: wall-clock time.
        peak_rss: the most main memory that the process held, in bytes.
        peak_device: the most memory allocated on the GPU, in bytes; None without one.
        since_start: the system gave no figure for the stage alone: `peak_rss` is that since the process began.
    """

    name: str
    seconds: float = 0.0
    peak_rss: int = 0
    peak_device: int | None = None
    since_start: bool = False


class Meter:
    """What a run cost, for report.json: time and peak memory of each stage.

    Args:
        device: the GPU whose memory is measured too.

    Attributes:
        device: as given.
        stages: a Stage for each that was begun: name, seconds, peak_rss and peak_device in bytes.
        facts: what stages add, as JSON: the plan, the traffic.

    >>> meter = lmc.Meter()
    >>> with meter.stage("reading"):
    ...     model = lmc.Model("A")
    >>> meter.stages[0].name, meter.stages[0].peak_rss > 0
    ('reading', True)
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.stages: list[Stage] = []
        self.facts: dict[str, Any] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Measures what happens inside; the figures are there when it ends, however it ends. Not nested.

        Args:
            name: of the stage.

        Yields:
            The stage, whose figures are still 0.
        """
        stage = Stage(name, since_start=not reset_peak())
        self.stages.append(stage)
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        try:
            yield stage
        finally:
            stage.seconds = round(time.perf_counter() - start, 2)
            stage.peak_rss = peak_bytes()
            if cuda:
                stage.peak_device = torch.cuda.max_memory_allocated(self.device)

    def to_json(self) -> dict[str, Any]:
        """As report.json has it, under "costs".

        Returns:
            {"stages": ...} and all facts.
        """
        return {"stages": [asdict(stage) for stage in self.stages], **self.facts}


def cgroup_room() -> int | None:
    """Bytes that this process's control group, or one above it, still allows; None: no limit."""
    rooms = []
    for group, most, use in _groups():
        limit = _number(group / most)
        if limit is not None and limit < _UNLIMITED:
            rooms.append(limit - (_number(group / use) or 0))
    return max(0, min(rooms)) if rooms else None


def _groups() -> Iterator[tuple[Path, str, str]]:
    """(directory, its limit file, its usage file) of the group and those above it, of both versions."""
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, own = (line + "::").split(":")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        root = CGROUP / "memory" if controllers else CGROUP
        files = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        path = root / own.strip("/")
        while path != root.parent:
            yield path, *files
            path = path.parent


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def available_memory() -> int:
    """Main memory that this process can still take: what is free, within the control group's limit."""
    free = _UNLIMITED
    try:
        for line in (PROC / "meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    room = cgroup_room()
    return free if room is None else min(free, room)


def require_memory(size: int, file: Path) -> None:
    """Raises LmcError where `size` bytes that `file` claims are more than this process can still take."""
    if size > available_memory():
        raise LmcError(
            f"{file} holds {show_bytes(size)}, more than the {show_bytes(available_memory())} of free memory"
        )


def budget_warning(budget: int, device: torch.device | str = "cpu") -> str | None:
    """One sentence where a budget promises more memory than there is, else None."""
    device = torch.device(device)
    if device.type == "cuda":
        there, where = torch.cuda.get_device_properties(device).total_memory, "the device has"
    else:
        there, where = available_memory() + resident_bytes(), "this process can have (free memory and cgroup limit)"
    if budget <= there:
        return None
    return f"the budget of {show_bytes(budget)} is more than the {show_bytes(there)} that {where}; it may be killed"


def return_freed_memory() -> None:
    """Makes glibc give freed memory back to the system at once, and from now on for every block of 1 MiB or more.

    By default it keeps freed blocks of up to 32 MiB for later, which counts as memory that the process holds.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_MMAP_THRESHOLD, 1 << 20)
        libc.malloc_trim(0)
    except (OSError, AttributeError):  # another C library: it has its own ways
        return
