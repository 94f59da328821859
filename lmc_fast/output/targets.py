"""Where output may go: everything about a place that can be refused is refused before any work."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from ..errors import LmcError

PARTIAL = ".partial"
_LONGEST_BELOW = 120  # bytes that the longest path inside an output directory adds to its own


def user_path(text: str | Path) -> Path:
    """A path as people write it: ~ is expanded. Raises LmcError where it names nothing that a file can be called."""
    if not isinstance(text, str | Path):
        raise LmcError(f"a path is a str or a Path, not {text!r}")
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise LmcError(f"{text}: there is no such user; write the path in full") from error
    if not str(text):
        raise LmcError("a path is empty; name a file or directory")
    if "\0" in str(path):
        raise LmcError(f"{str(path)!r} holds a zero byte; choose another name")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise LmcError(f"{str(path)!r} holds what no file can be called by; choose another name") from error
    return path


def partial_of(target: Path) -> Path:
    """The directory beside a target where the target is made. Raises LmcError for ., .. and /, which have no side."""
    if target.name in ("", ".."):
        raise LmcError(f"{target} has no name of its own; give a new name, for example {target / 'aligned'}")
    return target.with_name(target.name + PARTIAL)


def check_target(target: Path) -> None:
    """Raises LmcError unless `target` can become a new directory: absent or empty, in a writable place."""
    status = _check_name(target)
    if status is None:
        return
    if stat.S_ISREG(status.st_mode):
        raise LmcError(f"{target} is a file; choose another output directory")
    if not stat.S_ISDIR(status.st_mode):
        raise LmcError(f"{target} is neither a file nor a directory; choose another output directory")
    try:
        taken = any(os.scandir(target))
    except OSError as error:
        raise LmcError(f"{target} cannot be read ({error.strerror}); choose another output directory") from error
    if taken:
        raise LmcError(f"{target} exists and is not empty; choose another output directory or remove it")
    home = target.absolute().parent.stat()
    if status.st_dev != home.st_dev or os.path.ismount(target):
        raise LmcError(f"{target} is where a disk is mounted; choose a new directory inside it")
    if home.st_mode & stat.S_ISVTX and os.geteuid() not in (0, status.st_uid, home.st_uid):
        raise LmcError(f"{target} belongs to another user; choose another output directory")


def check_file_target(file: Path) -> None:
    """Raises LmcError unless `file` is a regular file or absent, in a writable place that exists."""
    home = file.absolute().parent
    if not home.is_dir():
        raise LmcError(f"{home} does not exist; create it first")
    status = _check_name(file)
    if status is not None and not stat.S_ISREG(status.st_mode):
        raise LmcError(f"{file} is not a file; choose another name")


def require_apart(outputs: Iterable[Path], inputs: Iterable[str | Path | None]) -> None:
    """Raises LmcError where an output is an input or lies inside one, or an input lies inside an output.

    Inputs that do not exist (names on the hub) and None count as nowhere.
    """
    known = [(path, real) for path in inputs if path is not None and (real := _existing(path))]
    for output in outputs:
        real = Path(os.path.realpath(output.parent), output.name)
        for path, other in known:
            if _within(real, other):
                where = "is an input" if real == other else f"lies inside {path}, which is an input"
                raise LmcError(f"{output} {where}; choose another place for the output")
            if _within(other, real):
                raise LmcError(f"the input {path} lies inside {output}, where output is made; choose another place")


def _check_name(target: Path) -> os.stat_result | None:
    """What is at `target`, if its name can be used at all and its home can be written."""
    partial = partial_of(target)
    whole = target.absolute()
    try:
        size = len(str(whole).encode("utf-8"))
    except UnicodeEncodeError as error:
        raise LmcError(f"{str(whole)!r} is not valid UTF-8; choose another name") from error
    try:
        home = whole.parent
        while not os.path.lexists(home):
            home = home.parent
        if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
            raise LmcError(f"{home} is not a writable directory; choose another output directory")
        most = os.pathconf(home, "PC_NAME_MAX"), os.pathconf(home, "PC_PATH_MAX")
        longest = max(len(part.encode()) for part in (*whole.parent.parts, partial.name))
        if longest > most[0] or size + _LONGEST_BELOW > most[1]:
            raise LmcError(f"the name {_short(target)} is too long; choose a shorter one")
        status = os.lstat(target)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LmcError(f"{_short(target)} cannot be used ({error.strerror}); choose another place") from error
    if stat.S_ISLNK(status.st_mode):
        raise LmcError(f"{target} is a link; give the place itself, or remove the link")
    return status


def _short(target: Path) -> str:
    text = str(target)
    return text if len(text) < 80 else f"{text[:60]}..."


def _existing(path: str | Path) -> Path | None:
    real = Path(os.path.realpath(user_path(path)))
    return real if os.path.lexists(real) else None


def _within(path: Path, directory: Path) -> bool:
    """Also where names differ by case only, or a directory is mounted twice."""
    if directory in (path, *path.parents):
        return True
    try:
        wanted = directory.stat()
    except OSError:
        return False
    for place in (path, *path.parents):
        try:
            if os.path.samestat(place.stat(), wanted):
                return True
        except OSError:
            continue
    return False
