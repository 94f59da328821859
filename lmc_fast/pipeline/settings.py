"""Settings of an alignment that are looked at before anything is read."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real

from ..errors import LmcError
from ..learning.schedule import CLOSED_FORMS
from ..learning.schedule import METHODS as LEARNING
from ..members import SCHEMES, STARTS

METHODS = (*LEARNING, *CLOSED_FORMS)
MOST_ACTIVATIONS = 1e6  # times the evidence of the weights


def require_settings(method: str, activations: float) -> None:
    """Raises LmcError for a method or a weight of activations that means nothing."""
    if method not in METHODS:
        raise LmcError(f"method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if not (isinstance(activations, Real) and 0 <= activations <= MOST_ACTIVATIONS):
        raise LmcError(
            f"activations must be a number from 0 (only weights count) to {MOST_ACTIVATIONS:g}, not {activations!r}"
        )


def require_scheme(scheme: str, start: str) -> None:
    """Raises LmcError for names that mean nothing."""
    for name, value, known in (("scheme", scheme, SCHEMES), ("start", start, STARTS)):
        if value not in known:
            raise LmcError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")


def blocks_chosen(blocks: Iterable[int], layers: int) -> list[int]:
    """Numbers of blocks, ascending. Raises LmcError for others."""
    given = list(blocks) if isinstance(blocks, Iterable) and not isinstance(blocks, str) else [blocks]
    found = sorted({i for i in given if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < layers})
    if len(found) < len(given):
        raise LmcError(f"blocks must be different numbers from 0 to {layers - 1}, not {given!r}")
    return found
