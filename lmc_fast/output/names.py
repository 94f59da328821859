"""What a directory of ours may hold, and how that and nothing else is removed.

`Names` maps a name, or a pattern of names, to None (a regular file) or to the Names of a directory; {ANYTHING: None}
stands for whatever is there. A directory whose Names have one of MARKERS is ours only if that file says so.

Every step works on an open directory (`dir_fd`) and follows no link.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Union

from ..errors import LmcError

Names = Mapping[str, Union["Names", None]]

ANYTHING = "**"
LOCK = "lock"  # of a workspace, held by the process that works in it
OWNER = "lmc_fast.json"  # of a directory that outlives its workspace inside another one
MARKERS = (LOCK, OWNER)
RESULT = "result"  # of a workspace: the directory that takes the target's name
PUBLISHING = "publishing"  # of a workspace: which directory its finished result is
_LAST = (PUBLISHING, *MARKERS)  # to be removed: as long as anything is there, it can be told whose it is
_MAGIC, _VERSION = "lmc_fast", 1
_MOST = 1 << 20  # bytes of a marker
_MISSING = object()
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def marker(**facts: Any) -> bytes:
    """The content of a marker file."""
    return (json.dumps({"made by": _MAGIC, "version": _VERSION, "id": os.urandom(16).hex(), **facts}) + "\n").encode()


def read_marker(content: bytes) -> dict[str, Any] | None:
    """What `marker` was told, or None if it did not write this."""
    try:
        found = json.loads(content)
        known = isinstance(found, dict) and (found.get("made by"), found.get("version")) == (_MAGIC, _VERSION)
        sound = known and _are_names(found.get("names", {})) and _are_texts(found.get("kept", []))
    except (ValueError, RecursionError):
        return None
    return found if sound and isinstance(found.get("id"), str) and len(found["id"]) == 32 else None


def _are_names(value: object) -> bool:
    return isinstance(value, dict) and all(below is None or _are_names(below) for below in value.values())


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


@contextmanager
def opened(path: str | Path, dir_fd: int | None = None) -> Iterator[int]:
    """A descriptor of a directory. Raises OSError, also where the last part of `path` is a link."""
    fd = os.open(path, DIRECTORY, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def find_foreign(fd: int, names: Names, proven: bool = False) -> str | None:
    """The first thing in an open directory that is not in `names`, as a relative path; "" for the directory itself.

    proven: it is ours whatever its marker says, as the result in a workspace is.
    """
    if ANYTHING in names:
        return None
    present = sorted(os.listdir(fd))
    proof = next((name for name in MARKERS if name in names), None)
    if proof and not proven and present and not _is_marked(fd, proof, present):
        return ""
    for name in present:
        below = _look_up(names, name)
        mode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode
        if below is None and stat.S_ISREG(mode):
            continue
        if not isinstance(below, Mapping) or not stat.S_ISDIR(mode):
            return name
        with opened(name, fd) as inner:
            found = find_foreign(inner, below, _is_result(name, names))
        if found is not None:
            return f"{name}/{found}" if found else name
    return None


def sweep(fd: int, names: Names, keep: frozenset[str] = frozenset()) -> None:
    """Removes what is in `names` from an open directory; leaves `keep`, and all else, where it is.

    Its marker goes last, and only if nothing else is left: a directory that stays can still be told to be ours.
    """
    anything = ANYTHING in names
    for name in sorted(os.listdir(fd), key=_removal_order):
        below = names if anything else _look_up(names, name)
        if name in keep or below is _MISSING or (name in MARKERS and set(os.listdir(fd)) - {name}):
            continue
        is_directory = stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode)
        if not is_directory and (anything or below is None):
            os.unlink(name, dir_fd=fd)
        elif is_directory and isinstance(below, Mapping):
            with opened(name, fd) as inner:
                if find_foreign(inner, below, _is_result(name, names)) != "":
                    sweep(inner, below)
                emptied = not os.listdir(inner)
            if emptied:
                os.rmdir(name, dir_fd=fd)


def remove_own(directory: Path, names: Names) -> None:
    """Removes a directory of ours. Raises LmcError where it is not, or holds something that is not."""
    try:
        with opened(directory) as fd:
            found = find_foreign(fd, names)
            if found is not None:
                raise LmcError(not_ours(directory, found))
            sweep(fd, names)
        directory.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        raise LmcError(f"{directory} cannot be removed ({error.strerror}); remove it") from error


def not_ours(directory: Path, found: str = "") -> str:
    """The sentence about `found`, as find_foreign gives it."""
    what = f"{directory} holds {found}, which lmc-fast did not make" if found else f"lmc-fast did not make {directory}"
    return f"{what}; move it away, or choose another place for the output"


def _is_result(name: str, names: Names) -> bool:
    return LOCK in names and name == RESULT


def _removal_order(name: str) -> tuple[int, str]:
    return (1 + _LAST.index(name) if name in _LAST else 0), name


def _look_up(names: Names, name: str) -> Any:
    if name in names:
        return names[name]
    return next((below for pattern, below in names.items() if fnmatchcase(name, pattern)), _MISSING)


def _is_marked(fd: int, name: str, present: list[str]) -> bool:
    """A marker without content is that of a process that was killed before it wrote anything."""
    try:
        inner = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
    except OSError:
        return False
    try:
        content = os.read(inner, _MOST) if stat.S_ISREG(os.fstat(inner).st_mode) else b"-"
    finally:
        os.close(inner)
    return read_marker(content) is not None or (not content and present == [name])
