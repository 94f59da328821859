"""Where everything ends that goes wrong: one sentence on standard error and an exit code, never a traceback."""

from __future__ import annotations

import errno
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

from ..errors import LmcError, printable
from ..interrupts import number_of
from ..version import __version__

BAD_INPUT, SIGNALLED = 2, 128  # exit codes; the latter plus the signal's number
# of these the user's machine is the cause, and not the program
_OF_THE_MACHINE = frozenset(
    (
        *("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "EIO", "EMFILE", "ENFILE", "ENAMETOOLONG", "ELOOP"),
        *("ENOTDIR", "EISDIR", "ENOENT", "EEXIST", "ENOTEMPTY", "ESTALE", "ENODEV", "ENXIO", "EBUSY"),
    )
)


class Stream:
    """Standard output or error that may fail while the work goes on: whoever closes a pipe has seen enough."""

    def __init__(self, stream: TextIO | None):
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        if self.failure is None:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                code = self._stream.encoding or "ascii"
                self.write(text.encode(code, "backslashreplace").decode(code))
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        if self.failure is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.failure = error
        with suppress(OSError, ValueError):  # else Python would try, and complain, once more when it ends
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guarded(work: Callable[[], int]) -> int:
    """The exit code of `work`, or of what went wrong in it."""
    out, err = Stream(sys.stdout), Stream(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = _guarded(work)
        finally:  # also where argparse leaves
            out.flush()
            err.flush()
        if out.failure is not None and not isinstance(out.failure, BrokenPipeError):
            _complain(f"standard output takes no more ({out.failure.strerror}); but for that, the command has ended")
            code = code or BAD_INPUT
    return code


def _guarded(work: Callable[[], int]) -> int:
    try:
        return work()
    except LmcError as error:
        return _complain(str(error))
    except KeyboardInterrupt as error:
        print(f"lmc-fast: interrupted{'; ' if str(error) else ''}{printable(error)}", file=sys.stderr)
        return SIGNALLED + number_of(error)
    except (SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # also panics of libraries in Rust, which are no Exception
        return _complain(_sentence(error))


def _complain(sentence: str) -> int:
    print(f"lmc-fast: error: {printable(sentence)}", file=sys.stderr)
    return BAD_INPUT


def _sentence(error: BaseException) -> str:
    memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if memory or "can't allocate memory" in str(error):
        return "there is not enough memory; give --memory to go block by block, or free some"
    if isinstance(error, OSError) and errno.errorcode.get(error.errno or 0) in _OF_THE_MACHINE:
        return f"{error.filename or 'a file'} could not be read or written: {error.strerror}"
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"this is a bug, please report it with {_log()}: {what}"


def _log() -> str:
    """The name of a new file with the traceback that is being handled, or the reason why there is none."""
    lines = (
        f"lmc_fast {__version__}, Python {platform.python_version()}, {platform.platform()}\n"
        f"{' '.join(map(repr, sys.argv))}\n\n{traceback.format_exc()}"
    )
    try:
        handle, name = tempfile.mkstemp(".log", "lmc-fast-")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(lines)
    except OSError as error:
        return f"its message (no log could be written: {error.strerror})"
    return name
