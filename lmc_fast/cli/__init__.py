"""The lmc-fast command."""

from __future__ import annotations

import warnings
from functools import partial

from ..backends import backends
from ..budget.devices import require_device
from ..checkpoints.hub import at_revision
from ..errors import LmcError
from ..importing import release
from ..interrupts import interrupt_on_signals
from ..kernels.dispatch import forced_route
from .arguments import parser
from .boundary import guarded
from .console import Console


def _require_settings() -> None:
    """Environment variables that would be found to be nonsense only after a while, or never on this machine."""
    try:
        forced_route()
        backends()
    except ValueError as error:
        raise LmcError(str(error)) from error


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code, see arguments.EXIT_CODES."""
    return guarded(partial(_main, argv))


def _main(argv: list[str] | None) -> int:
    interrupt_on_signals()
    release()
    args = parser().parse_args(argv)
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of what checkpoints say
    transformers.logging.set_verbosity_error()
    require_device(args.device)
    _require_settings()
    for name in ("a", "b"):
        revision = getattr(args, f"revision_{name}", None)
        if revision and getattr(args, name) is None:
            raise LmcError(f"--revision-{name} is given, but no {name.upper()}")
        if revision:
            setattr(args, name, at_revision(getattr(args, name), revision))
    code: int = args.function(args, Console(args))
    return code
