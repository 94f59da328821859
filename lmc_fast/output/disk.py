"""Failed writes as one sentence; writes that outlive a power cut."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import LmcError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turns a failed write into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number, text = getattr(error, "errno", None), str(error)
        if number in _FULL or "No space left" in text:
            text = "the disk is full; free some space"
        elif number == errno.EFBIG:
            text = "the file is larger than is allowed here (see ulimit -f)"
        elif number == errno.EROFS:
            text = "the disk is read-only; choose another place"
        raise LmcError(f"could not write {target}: {text}") from error


def write_synced(file: Path, content: bytes) -> None:
    """Writes a file and waits until it is on the disk. Raises OSError."""
    with open(file, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())


def sync(path: Path) -> None:
    """Waits until a file, or a directory's list of names, is on the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot
            raise
    finally:
        os.close(fd)


def sync_tree(directory: Path) -> None:
    """The same for all that a directory holds."""
    for home, _, files in os.walk(directory):
        for name in files:
            sync(Path(home, name))
        sync(Path(home))
