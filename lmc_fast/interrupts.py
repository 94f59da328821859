"""Signals that end the work: where they may act, and what is said then."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_SOON = 0.2  # seconds: the finalizer, and what sends the signal again, have ended by then, on a busy machine too


class Interrupted(KeyboardInterrupt):
    """A signal wants the work to end. number: of the signal; the message, if there is one, says how to go on."""

    def __init__(self, number: int = signal.SIGINT, message: str = ""):
        super().__init__(message)
        self.number = number


def number_of(error: KeyboardInterrupt) -> int:
    """The signal behind an interruption; Python's own is Ctrl-C."""
    return error.number if isinstance(error, Interrupted) else signal.SIGINT


def _raise(number: int, _: FrameType | None) -> None:
    raise Interrupted(number)


class _Again:
    """Errors that nobody can catch: interruptions are sent once more, all else goes to the hook of before."""

    def __init__(self) -> None:
        self._before = sys.unraisablehook

    def __call__(self, lost: Any) -> None:
        error = lost.exc_value
        if not isinstance(error, KeyboardInterrupt):
            self._before(lost)
        while isinstance(error, KeyboardInterrupt):
            try:
                timer = threading.Timer(_SOON, os.kill, (os.getpid(), number_of(error)))
                timer.daemon = True
                timer.start()
                return
            except KeyboardInterrupt as another:  # here it would be lost, too
                error = another


def interrupt_on_signals() -> None:
    """SIGTERM and SIGHUP raise Interrupted, unless whoever started the process has them ignored (nohup).

    An interruption, of Ctrl-C too, that comes while Python runs a finalizer, where errors go nowhere, comes again.
    """
    if not isinstance(sys.unraisablehook, _Again):
        sys.unraisablehook = _Again()
    for number in SIGNALS:
        if number != signal.SIGINT and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _raise)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals that have a handler in Python wait until the end: nothing inside is left half done.

    Python handles signals in the main thread alone, so that nothing need be done in others.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {number: handler for number in SIGNALS if callable(handler := signal.getsignal(number))}

    def later(number: int, _: FrameType | None) -> None:
        came.append(number)

    try:
        for number in handlers:
            signal.signal(number, later)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came[:1]:
            handlers[signal.Signals(number)](number, None)
