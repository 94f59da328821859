"""What is settled before any command begins to work."""

from __future__ import annotations

import argparse
import warnings

from ..budget.devices import require_device
from ..checkpoints.hub import at_revision
from ..errors import LmcError
from ..implementations import backends
from ..kernels.dispatch import forced_route


def start(args: argparse.Namespace) -> None:
    """Checks the device, settings and revisions; puts the revisions into the models' names. Raises LmcError."""
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # of what checkpoints say
    transformers.logging.set_verbosity_error()
    require_device(args.device)
    _require_settings()
    for option, revision in list(vars(args).items()):
        name = option.removeprefix("revision_")
        if name == option or revision is None:
            continue
        if getattr(args, name) is None:
            raise LmcError(f"--revision-{name} is given, but no {name.upper()}")
        setattr(args, name, at_revision(getattr(args, name), revision))


def _require_settings() -> None:
    """Environment variables that would be found to be nonsense only after a while, or never on this machine."""
    try:
        forced_route()
        backends()
    except ValueError as error:
        raise LmcError(str(error)) from error
