"""Numbers of bytes as people write them."""

from __future__ import annotations

import math
import re

from .errors import LmcError

_MOST, _DIGITS = 1 << 60, 40
_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{ending}": base**power
    for power, prefix in enumerate("kmgt", 1)
    for ending, base in (("b", 1000), ("ib", 1024), ("", 1024))
}


def parse_bytes(text: str | int, what: str = "memory") -> int:
    """8GiB, 3GB, 512MiB, 1.5g (GiB) or plain bytes -> bytes. Raises LmcError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower())
    if not match or match[2] not in _UNITS or ("." in match[1] and not match[2]):
        raise LmcError(f"{what} {str(text)!r} is not a size; write for example 8GiB, 3GB, 512MiB or a number of bytes")
    number: float = math.inf if len(match[1]) > _DIGITS else float(match[1]) if "." in match[1] else int(match[1])
    size = number * _UNITS[match[2]]
    if size > _MOST:
        raise LmcError(f"{what} {match[1][:9]}{match[2]} is more than any machine has; write for example 8GiB")
    if size < 1:
        raise LmcError(f"{what} {str(text)!r} must be more than nothing; write for example 8GiB")
    return int(size)


def require_bytes(memory: object) -> None:
    """Raises LmcError unless a budget is a number of bytes, or None: there is no limit."""
    if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int)):
        raise LmcError(f"memory is a number of bytes, not {memory!r}")


def show_bytes(size: float) -> str:
    """With three figures: 2.81 GiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(size) < 999.5:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.0f} TiB" if size >= 100 else f"{size:.3g} TiB"
