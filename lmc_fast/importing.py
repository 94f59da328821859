"""What holds while the command is being imported, which takes seconds: a signal ends it in one line.

Nothing has begun then, so that nothing can be lost. Once everything is imported, the command has handlers of its own.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def is_command() -> bool:
    """Whether this process is lmc-fast, and not a program that uses the library."""
    name = os.path.basename(sys.argv[0]) if getattr(sys, "argv", None) else ""
    as_module = name in ("-m", "__main__.py") and "lmc_fast" in " ".join(sys.orig_argv[:4])
    return as_module or name.removesuffix(".exe") == "lmc-fast"


def _end(number: int, _: FrameType | None) -> None:
    os.write(2, b"lmc-fast: interrupted\n")
    os._exit(128 + number)


def end_on_signals() -> None:
    """Until `release`. Signals that whoever started the command ignores (nohup) stay ignored."""
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _end)


def release() -> None:
    """Gives the signals back to Python."""
    for number in _SIGNALS:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


if is_command():
    end_on_signals()
