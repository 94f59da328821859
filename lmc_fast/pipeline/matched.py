"""Closed-form matching of canonical models, with statistics of activations: two of them, or all at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from ..checkpoints import LazyBlocks, Slots, Weights
from ..errors import LmcError
from ..examples import Data, inputs_of
from ..matching.activations import STATISTICS_NAMES, gather_statistics
from ..matching.balance import balanced
from ..matching.closed_form import MAX_ROUNDS, Evidence, match
from ..matching.universe import match_all
from ..members import listed, member_names
from ..output import Workspace
from ..symmetry.storage import as_stored
from ..symmetry.transform import Transform
from .progress import MatchingWatch, Watch
from .run_directory import STATISTICS

STATISTICS_TOKENS = 32_768  # enough for cross-covariances; more changes the matching little


def match_members(
    members: Sequence[Weights],
    tokens: Data,
    evidence: Evidence,
    *,
    keep: Path | None = None,
    statistics_tokens: int = STATISTICS_TOKENS,
    rounds: int = MAX_ROUNDS,
    watch: Watch | None = None,
) -> tuple[Transform, ...]:
    """As `match_endpoints`, of any number: more than two are all matched to one another, see matching.universe.

    The tokens are shared by the statistics of all pairs, so that these take the time of one pass for each model.
    """
    if len(members) == 2:
        a, b, most = *members, statistics_tokens
        return match_endpoints(a, b, tokens, evidence, keep=keep, statistics_tokens=most, rounds=rounds, watch=watch)
    count, layers = len(members), members[0].spec.layers
    pairs = list(combinations(range(count), 2))
    told = MatchingWatch(watch or Watch(), layers, bool(evidence.activations), rounds)
    names = [name.upper() for name in member_names(count)]
    found = [_balanced(w, name) for w, name in zip(members, names, strict=True)]
    even, moved = [g for g, _ in found], [w for _, w in found]
    statistics = None
    if evidence.activations:
        some = _some(tokens, 2 * statistics_tokens // count, members[0])
        statistics = {
            (i, j): gather_statistics(moved[i], moved[j], some, keep=keep, name=f"{i}-{j}-", visited=told.gathered)
            for i, j in pairs
        }
    with _overflow(listed(names)):
        matched = match_all(moved, evidence, statistics, rounds, told.visited)
    return tuple(as_stored(g.compose(first)) for g, first in zip(matched, even, strict=True))


def match_endpoints(
    a: Weights,
    b: Weights,
    tokens: Data,
    evidence: Evidence,
    *,
    keep: Path | None = None,
    statistics_tokens: int = STATISTICS_TOKENS,
    rounds: int = MAX_ROUNDS,
    watch: Watch | None = None,
) -> tuple[Transform, Transform]:
    """(g_A, g_B) that balance both canonical endpoints and match B to A; one block of lazy endpoints at a time.

    keep: a directory for statistics of activations, by default in memory; statistics_tokens: how many tokens these are
    taken from at most; rounds: see match. watch: told how far it is.
    """
    told = MatchingWatch(watch or Watch(), a.spec.layers, bool(evidence.activations), rounds)
    (even_a, a), (even_b, b) = (_balanced(w, ends) for w, ends in ((a, "A"), (b, "B")))
    statistics = None
    if evidence.activations:
        some = _some(tokens, statistics_tokens, a)
        statistics = gather_statistics(a, b, some, keep=keep, visited=told.gathered)
    with _overflow("A and B"):
        found = match(a, b, evidence, statistics, rounds, told.visited).compose(even_b)
    return as_stored(even_a), as_stored(found)


def _some(tokens: Data, most: int, model: Weights) -> Data:
    """Data of about `most` tokens, spread over all."""
    count = max(1, min(len(tokens), most // model.spec.length(inputs_of(tokens).shape)))
    return tokens[:: len(tokens) // count][:count]


def _balanced(w: Weights, ends: str) -> tuple[Transform, Weights]:
    """As matching.balance.balanced, with the endpoint's name in errors."""
    even, moved = balanced(w)

    def block(i: int) -> Slots:
        with _overflow(ends):
            return moved.blocks[i]

    return even, replace(moved, blocks=LazyBlocks(w.spec.layers, block))


@contextmanager
def _overflow(ends: str) -> Iterator[None]:
    """What solvers say of NaN and infinity, as one sentence."""
    try:
        yield
    except (torch.linalg.LinAlgError, ValueError) as error:
        if isinstance(error, ValueError) and "finite" not in str(error):
            raise
        raise LmcError(f"{ends} cannot be matched: products of weights overflow; look for huge weights") from error


@contextmanager
def scratch(place: Path | None, needed: bool) -> Iterator[Path | None]:
    """A directory for statistics of activations, where they are not held in memory."""
    if not needed:
        yield None
    elif place is None:
        with TemporaryDirectory() as directory:
            yield Path(directory)
    else:
        with Workspace(place / STATISTICS, STATISTICS_NAMES) as work:
            yield work.result
