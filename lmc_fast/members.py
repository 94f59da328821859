"""What the models of a run are called: a, b, c, ..."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import LmcError

SCHEMES = ("joint", "hierarchical", "universe", "mergemany")  # how more than two models are brought together
CLOSED_SCHEMES = {"universe": "matching", "mergemany": "weight"}  # without learning, and by which method
STARTS = ("universe", "hierarchical")  # of joint learning
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
MOST_MEMBERS = len(_LETTERS)


def member_names(count: int) -> list[str]:
    """The names of `count` members, in their order. Raises LmcError for fewer than two, or more than there are."""
    if not 2 <= count <= MOST_MEMBERS:
        raise LmcError(f"{count} models make no alignment; give 2 to {MOST_MEMBERS}")
    return list(_LETTERS[:count])


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)
