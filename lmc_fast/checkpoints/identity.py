"""Whether files are still what they were: when a run goes on another day, and when it ends."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import LmcError
from ..files import MIB

_WHOLE = 64 * MIB  # files up to this size are looked at in full
_HEAD = MIB  # of a larger one, beside a sample of every stretch
_STRETCH, _SAMPLE = 4 * MIB, 4096


class Identity:
    """What files are when this is made. Raises LmcError where one cannot be read."""

    def __init__(self, files: Iterable[Path]):
        self._stamps = {file: _stamp(file) for file in files}
        self._digests: dict[Path, str] = {}

    @property
    def files(self) -> list[Path]:
        return list(self._stamps)

    def digests(self) -> dict[str, str]:
        """File name -> SHA-256 of its size and content; of a large file, of its beginning and samples."""
        if not self._digests:
            self._digests = {file: _digest(file) for file in self._stamps}
            for file, stamp in self._stamps.items():
                if _stamp(file) != stamp:
                    raise LmcError(_changed(file))
        return {file.name: digest for file, digest in self._digests.items()}

    def require_unchanged(self) -> None:
        """Raises LmcError where a file was written, or replaced, since: what was read and what is there differ.

        A file that looks written but has the same content is the same; of a large one that cannot be told.
        """
        for file, stamp in self._stamps.items():
            now = _stamp(file)
            if now == stamp:
                continue
            written, small = now[:2] != stamp[:2], now[0] <= _WHOLE
            digest = self._digests.get(file)
            # another number alone may be a file system that gives numbers anew
            same = digest == _digest(file) if digest and (small or not written) else not written
            if not same:
                raise LmcError(_changed(file))


def _changed(file: Path) -> str:
    return f"{file} was changed while it was in use; put the file of before back and go on, or start anew"


def _stamp(file: Path) -> tuple[int, int, int, int]:
    """(size, time of the last write, device and number of the file)."""
    try:
        status = os.stat(file)
    except OSError as error:
        raise LmcError(f"{file} cannot be read any more ({error.strerror}); put it back") from error
    return status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(file, "rb", buffering=0) as handle:
            size = os.fstat(handle.fileno()).st_size
            digest.update(f"{size}:".encode())
            head = size if size <= _WHOLE else _HEAD
            for at in range(0, head, MIB):
                digest.update(os.pread(handle.fileno(), min(MIB, head - at), at))
            for at in range(head, size, _STRETCH):
                digest.update(os.pread(handle.fileno(), _SAMPLE, at))
    except OSError as error:
        raise LmcError(f"{file} cannot be read ({error.strerror})") from error
    return digest.hexdigest()
