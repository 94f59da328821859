"""A directory beside a target where the target is made, and which is surely ours.

    TARGET.partial/
        lock             JSON that proves whose the directory is; held (flock) by the process that works in it
        result...        becomes TARGET by one rename
        publishing       written just before that: which directory TARGET will be

A name proves nothing. A directory that has no lock file of ours, or holds anything that its lock file does not list, is
refused and stays as it is; so are links. What a killed process left is recognised by the lock file that nobody holds.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from ..errors import LmcError
from .disk import disk_errors, sync, sync_tree, write_synced
from .names import (
    ANYTHING,
    DIRECTORY,
    LOCK,
    PUBLISHING,
    RESULT,
    Names,
    find_foreign,
    marker,
    not_ours,
    opened,
    read_marker,
    sweep,
)
from .targets import check_file_target, check_target, partial_of

_TRIES = 100  # to claim a directory that others come to and leave at the same moment


class Workspace:
    """Context manager: TARGET.partial, claimed for this process; it goes when the process leaves it, but for `kept`.

    target: what is made. result: what it may hold, or None for a file. more: what else the workspace may hold. kept:
    names that outlive the process, of which the first is the reason to keep them.

    Raises LmcError where TARGET.partial is not ours, is in use, or holds what an unfinished run kept (unless `resume`).
    """

    def __init__(
        self,
        target: Path,
        result: Names | None,
        more: Names | None = None,
        kept: Sequence[str] = (),
        resume: bool = False,
    ):
        self.target, self.path = target, partial_of(target)
        self.result = self.path / (RESULT if result is not None else f"new{target.suffix}")
        self._names: Names = {LOCK: None, PUBLISHING: None, self.result.name: result} | dict(more or {})
        self._kept, self._resume = tuple(kept), resume
        self._made: list[Path] = []  # parents of the target

    def __enter__(self) -> Workspace:
        with disk_errors(self.path):
            self._make_parents()
            try:
                self._claim()
                if self._names[self.result.name] is not None:
                    self.result.mkdir()
            except BaseException:
                self._drop_parents()
                raise
        return self

    def publish(self) -> None:
        """The result is complete: it takes the target's name. Raises LmcError where that is taken by now."""
        with disk_errors(self.target):
            if self.result.is_dir():
                sync_tree(self.result)
                status = self.result.stat()
                write_synced(self.path / PUBLISHING, json.dumps([status.st_dev, status.st_ino]).encode())
                check_target(self.target)
                os.rename(self.result, self.target)  # replaces an empty directory and nothing else
            else:
                sync(self.result)
                check_file_target(self.target)
                os.replace(self.result, self.target)
            self._kept = ()
            sync(self.target.absolute().parent)
        self._made = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # what cannot be removed now is recognised and removed by the next run
            self._leave()
        os.close(self._lock)
        os.close(self._fd)
        self._drop_parents()

    def expect(self, names: Names) -> None:
        """Before `with`: what else the result may hold."""
        self._names = {**self._names, self.result.name: {**(self._names[self.result.name] or {}), **names}}

    def require_free(self) -> None:
        """Raises LmcError where `with` would; touches nothing."""
        check = check_target if self._names[self.result.name] is not None else check_file_target
        check(self.target)
        with disk_errors(self.path), suppress(FileNotFoundError):
            self._fd = self._open()
            try:
                present = os.listdir(self._fd)
                if present and LOCK not in present:
                    raise LmcError(not_ours(self.path))
                self._lock = self._open_lock(os.O_RDWR)
                try:
                    self._hold(fcntl.LOCK_SH)
                    self._judge()
                finally:
                    os.close(self._lock)
            finally:
                os.close(self._fd)

    def _open(self) -> int:
        try:
            return os.open(self.path, DIRECTORY)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise LmcError(not_ours(self.path)) from error
            raise

    def _open_lock(self, flags: int) -> int:
        """Nothing of the file is changed, no link is followed, no pipe waited for."""
        try:
            lock = os.open(LOCK, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666, dir_fd=self._fd)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise LmcError(not_ours(self.path)) from error
            raise
        status = os.fstat(lock)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            os.close(lock)
            raise LmcError(not_ours(self.path, LOCK))
        return lock

    def _hold(self, kind: int) -> None:
        try:
            fcntl.flock(self._lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LmcError(f"another run is writing {self.target}; wait for it or choose another --out") from None

    def _judge(self) -> tuple[Names, list[str]] | None:
        """What a directory that was used before may hold, and what of it is kept; None of one that is new."""
        content, present = os.pread(self._lock, 1 << 20, 0), os.listdir(self._fd)
        if not content and present == [LOCK]:  # new, or its maker was killed at once
            return None
        found = read_marker(content)
        if found is None:
            raise LmcError(not_ours(self.path))
        names, kept = found.get("names", {}), found.get("kept", [])
        foreign = find_foreign(self._fd, names)
        if foreign is not None:
            raise LmcError(not_ours(self.path, foreign))
        if not kept or kept[0] not in present:
            return names, []
        if not self._resume:
            raise LmcError(f"{self.path} holds an unfinished run; continue it with --resume, or remove it")
        return names, kept

    def _claim(self) -> None:
        for _ in range(_TRIES):
            with suppress(FileExistsError):
                self.path.mkdir()
            try:
                self._fd = self._open()
            except FileNotFoundError:  # another process left at this moment
                continue
            try:
                if self._claim_opened():
                    return
            except BaseException:
                os.close(self._fd)
                raise
            os.close(self._fd)
        raise LmcError(f"{self.path} keeps changing; is another run writing {self.target}?")

    def _claim_opened(self) -> bool:
        """Takes the lock. False where the directory went, or was emptied of what is of no use: it is made anew."""
        present = os.listdir(self._fd)
        if present and LOCK not in present:
            raise LmcError(not_ours(self.path))
        try:
            self._lock = self._open_lock(os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            return False
        claimed = False
        try:
            claimed = self._claim_locked()
            return claimed
        finally:
            if not claimed:
                os.close(self._lock)

    def _claim_locked(self) -> bool:
        self._hold(fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            lock, directory = os.stat(LOCK, dir_fd=self._fd, follow_symlinks=False), os.lstat(self.path)
            same = os.path.samestat
            if same(lock, os.fstat(self._lock)) and same(directory, os.fstat(self._fd)):
                return self._take_over()
        return False

    def _take_over(self) -> bool:
        """Of a directory whose lock is held: what is there goes, but for what an unfinished run kept."""
        judged = self._judge()
        if judged is None:
            try:
                os.write(self._lock, marker(names=self._names, kept=self._kept))
                os.fsync(self._lock)
            except OSError:
                self._remove()
                raise
            sync(self.path)
            return True
        names, kept = judged
        sweep(self._fd, names, frozenset([LOCK, PUBLISHING, *kept] if kept else [LOCK]))
        if kept:
            self._names = names
            return True
        self._remove()
        return False

    def _leave(self) -> None:
        if self._kept and self._kept[0] in os.listdir(self._fd):
            sweep(self._fd, self._names, frozenset([LOCK, *self._kept]))
            return
        sweep(self._fd, self._names, frozenset([LOCK]))
        self._remove()

    def _remove(self) -> None:
        if os.listdir(self._fd) == [LOCK]:
            os.unlink(LOCK, dir_fd=self._fd)
            with suppress(OSError):  # another process comes at this moment
                self.path.rmdir()

    def _make_parents(self) -> None:
        home = self.path.absolute().parent
        missing = []
        while not home.exists():
            missing.append(home)
            home = home.parent
        for place in reversed(missing):
            with suppress(FileExistsError):
                place.mkdir()
                self._made.append(place)

    def _drop_parents(self) -> None:
        for place in reversed(self._made):
            with suppress(OSError):  # in use by now
                place.rmdir()


def workspace_names(name: str, result: Names | None) -> dict[str, Names]:
    """How a workspace for the target `name` shows in the Names of the directory around it."""
    made = RESULT if result is not None else f"new{Path(name).suffix}"
    return {partial_of(Path(name)).name: {LOCK: None, PUBLISHING: None, made: result}}


def was_published(target: Path) -> bool:
    """Whether TARGET.partial says that `target` is its finished result, of which only leftovers have to be removed."""
    try:
        with opened(partial_of(target)) as fd:
            found = read_marker(_content(fd, LOCK))
            if found is None or find_foreign(fd, found.get("names", {})) is not None:
                return False
            device, inode = json.loads(_content(fd, PUBLISHING))
        status = os.lstat(target)
    except (OSError, ValueError, TypeError):
        return False
    return stat.S_ISDIR(status.st_mode) and (status.st_dev, status.st_ino) == (device, inode)


def _content(fd: int, name: str) -> bytes:
    inner = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=fd)
    try:
        return os.read(inner, 1 << 20)
    finally:
        os.close(inner)


@contextmanager
def atomic_directory(target: Path, names: Names | None = None) -> Iterator[Path]:
    """A new directory that takes the target's name at the end, or vanishes on any error.

    names: what it may hold; by default anything.
    """
    check_target(target)
    with Workspace(target, names or {ANYTHING: None}) as work, disk_errors(target):
        yield work.result
        work.publish()


def write_whole(file: Path, text: str) -> None:
    """A text file that appears, or replaces the old one, as a whole."""
    with atomic_file(file) as new:
        new.write_text(text, encoding="utf-8")


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A file to write, with the target's suffix, that takes its name, and the old file's place, at the end."""
    check_file_target(target)
    with Workspace(target, None) as work, disk_errors(target):
        yield work.result
        work.publish()
