"""Files that others made: only regular ones are opened, and sizes are checked before they are believed."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from .errors import LmcError

MIB = 1 << 20
JSON_BYTES = 16 * MIB  # config.json and its like; the largest on the hub have 2 MiB
JSON_DEPTH = 64  # of objects and lists in each other
_DIGITS = 40  # of a whole number; transformers writes 10^30 for "no limit"


def require_regular(file: Path, remedy: str = "check the path") -> int:
    """Size of an ordinary file, links followed. Raises LmcError for anything else: opening a pipe or a device would
    wait, or read for ever.
    """
    try:
        found = os.stat(file)
    except FileNotFoundError:
        raise LmcError(f"{file} is missing; {remedy}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise LmcError(f"{file} cannot be read ({_reason(error)}); {remedy}") from error
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "a pipe, a socket or a device"
        raise LmcError(f"{file} is {kind}, not a file; {remedy}")
    return found.st_size


def read_bytes(file: Path, most: int, remedy: str = "check the path") -> bytes:
    """All of a file that has `most` bytes at most. Raises LmcError."""
    size = require_regular(file, remedy)
    if size > most:
        raise LmcError(f"{file} has {size:,} bytes, more than such a file ever has ({most:,}); {remedy}")
    try:
        with open(file, "rb") as handle:
            return handle.read(most)
    except OSError as error:
        raise LmcError(f"{file} cannot be read ({_reason(error)}); {remedy}") from error


def read_json(file: Path, most: int = JSON_BYTES, remedy: str = "check the path") -> Any:
    """The value in a JSON file: UTF-8, finite numbers, nested JSON_DEPTH deep at most. Raises LmcError."""
    return parse_json(read_bytes(file, most, remedy), file)


def read_object(
    file: Path, most: int = JSON_BYTES, remedy: str = "check the path", once: bool = False
) -> dict[str, Any]:
    """As read_json, and the value is an object. once: no name may be said twice, which JSON allows: the last counts."""
    value = parse_json(read_bytes(file, most, remedy), file, once)
    if not isinstance(value, dict):
        raise LmcError(f"{file} is not a JSON object; {remedy}")
    return value


def parse_json(text: bytes | str, source: object, once: bool = False) -> Any:
    """As read_json and read_object; `source` is named in errors."""
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        pairs = _once if once else None
        value = json.loads(
            decoded, parse_constant=_refused, parse_float=_finite, parse_int=_whole, object_pairs_hook=pairs
        )
    except ValueError as error:
        raise LmcError(f"{source} is not valid JSON ({error})") from error
    except RecursionError:
        raise LmcError(f"{source} is not valid JSON: it is nested too deeply") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > JSON_DEPTH + 1:
            raise LmcError(f"{source} is not valid JSON: it is nested more than {JSON_DEPTH} deep")
        inner = (x.values() if isinstance(x, dict) else x for x in level if isinstance(x, (dict, list)))
        level = [x for values in inner for x in values if isinstance(x, (dict, list))]
    return value


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text, which has neither NaN nor infinity. Raises ValueError for them."""
    return json.dumps(value, indent=indent, allow_nan=False)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is said twice")
        found[name] = value
    return found


def _refused(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"{text[:_DIGITS]}... is too large")
    return int(text)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
