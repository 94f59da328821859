"""Kills and full disks, put into a process at a chosen file operation below its working directory.

Operations are what changes a disk or waits for it: files opened to be written, writes, fsync, locks, directories made,
renames and removals. The working directory is the whole world: relative paths count, others only below it. For Linux.
"""

import builtins
import errno
import fcntl
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_AUDITED = {"os.mkdir": True, "os.rename": False, "os.remove": False, "os.rmdir": False, "os.truncate": True}


class Faults:
    """Counts operations in this process from now on: `kill` at the `at`-th, or the disk is `full` from it on."""

    def __init__(self, at: int = 0, how: str = "count"):
        self.at, self.how, self.count = at, how, 0
        self.written: list[int] = []  # for each operation the number of the open file that it writes to, else 0
        self._opened = 0
        self._home = os.getcwd()
        sys.addaudithook(self._audit)
        self._patch(os, "fsync", True)
        self._patch(os, "write", True)
        self._patch(fcntl, "flock", False)
        real = io.open

        def opened(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            handle = real(file, mode, *arguments, **options)
            if not (set(mode) & set("wax+") and self._is_here(file)):
                return handle
            self._opened += 1
            return _Counted(handle, self, self._opened)

        io.open = builtins.open = opened  # type: ignore[assignment]

    def happens(self, needs_room: bool, into: int = 0) -> None:
        """One operation. into: the open file that it writes to."""
        self.count += 1
        self.written.append(into)
        if self.how == "kill" and self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "full" and self.count >= self.at and needs_room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _is_here(self, path: Any) -> bool:
        if isinstance(path, int):
            return False
        text = os.fsdecode(path)
        return not os.path.isabs(text) or text.startswith(self._home)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & _WRITES and path is not None and self._is_here(path):
                self.happens(bool(flags & os.O_CREAT))
        elif event in _AUDITED and self._is_here(arguments[0]):
            self.happens(_AUDITED[event])

    def _patch(self, module: Any, name: str, needs_room: bool) -> None:
        real: Callable[..., Any] = getattr(module, name)

        def counted(fd: Any, *arguments: Any) -> Any:
            number = fd if isinstance(fd, int) else fd.fileno()
            if os.readlink(f"/proc/self/fd/{number}").startswith(self._home):  # no pipe, no cache elsewhere
                self.happens(needs_room)
            return real(fd, *arguments)

        setattr(module, name, counted)


class _Counted:
    """A file whose writes count; a full disk takes half of the last one."""

    def __init__(self, handle: Any, faults: Faults, number: int):
        self._handle, self._faults, self._number = handle, faults, number

    def write(self, content: Any) -> int:
        try:
            self._faults.happens(True, self._number)
        except OSError:
            self._handle.write(content[: len(content) // 2])
            self._handle.flush()
            raise
        return self._handle.write(content)

    def __enter__(self) -> "_Counted":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)
