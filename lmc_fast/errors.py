from __future__ import annotations

from typing import Any

_LONGEST = 1000  # characters of a message: names in hostile files may have megabytes


class LmcError(Exception):
    """Something the user can mend. The message is one sentence that names the culprit and the remedy.

    Names in it come from files: what would act on a terminal (line breaks, escape codes) is shown as an escape.

    Args:
        message: the sentence.

    >>> try:
    ...     lmc.open_pair("A", "nowhere/at/all")
    ... except lmc.LmcError as error:
    ...     print("nowhere/at/all" in str(error))
    True
    """

    def __init__(self, message: str = ""):
        super().__init__(printable(message))


class Cancelled(LmcError):
    """What was given as `cancel` said that the work is to end. The message says what is kept and how to go on.

    Attributes:
        alignment: what was learned until then (an Alignment), where learning was cancelled, else None; `align` can
            start from it (`base`).

    >>> pair = lmc.open_pair("A", "B")
    >>> tokens = lmc.read_tokens("text.txt", pair.a, 16)
    >>> try:
    ...     lmc.align(pair, tokens, steps=9, batch=2, cancel=lambda: True)
    ... except lmc.Cancelled as stopped:
    ...     print(stopped.alignment)
    None
    """

    alignment: Any = None


def printable(text: object) -> str:
    """One line without control characters, cut in the middle where it is very long."""
    line = escaped(text)
    half = _LONGEST // 2
    return line if len(line) <= _LONGEST else f"{line[:half]} [...] {line[-half:]}"


def escaped(text: object) -> str:
    """One line in which what would act on a terminal is shown as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))
