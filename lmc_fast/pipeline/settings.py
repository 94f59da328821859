"""Settings of an alignment that are looked at before anything is read."""

from __future__ import annotations

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
