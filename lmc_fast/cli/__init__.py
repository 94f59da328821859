"""The lmc-fast command. What computes is imported once it is known what to do: until then, in a moment, no torch is."""

from __future__ import annotations

from functools import partial
from importlib import import_module

from ..importing import release
from ..interrupts import interrupt_on_signals
from .arguments import parser
from .boundary import guarded


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code, see arguments.EXIT_CODES."""
    return guarded(partial(_main, argv))


def _main(argv: list[str] | None) -> int:
    args = parser().parse_args(argv)
    module, function = args.function
    command = getattr(import_module(f".{module}", __name__), function)
    from .console import Console
    from .start import start

    interrupt_on_signals()
    release()
    start(args)
    code: int = command(args, Console(args))
    return code
