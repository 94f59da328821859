"""What a diagnosis means, in words."""

from __future__ import annotations

import math

from ..architectures import Spec
from .diagnosis import NO_PARTNER, Diagnosis

FLAT = 0.01  # nats: less is not worth repairing
HALF = 0.5  # of what single blocks cost
FADED = 0.8  # of the endpoints' variance
GUESSING = 0.9  # of log(vocabulary)
HELPS = 0.2  # of the excess, by which a temperature is worth naming


def advise(found: Diagnosis, spec: Spec, aligned: bool) -> list[str]:
    """Sentences, the most important first."""
    excess, losses, blocks = found.excess, found.losses, found.blocks
    out = [
        f"endpoint {name.upper()} predicts next to nothing (loss {losses[name]:.2f}, guessing gives "
        f"{math.log(spec.vocab):.2f}): look at it before anything else"
        for name in "ab"
        if losses[name] > GUESSING * math.log(spec.vocab)
    ]
    if excess <= FLAT:
        return [*out, f"the middle lies {excess:+.3f} nats from the line between its ends: there is nothing to repair"]
    if not aligned:
        out.append("the pair was looked at as it is: lmc-fast align, then diagnose with --alignment")
    costs = [max(0.0, block.own) for block in blocks]
    if sum(costs) > 0 and len(blocks) > 2:
        first, last = _shortest_run(costs, HALF * sum(costs))
        share = sum(costs[first : last + 1]) / sum(costs)
        where = f"block {first} carries" if first == last else f"blocks {first} to {last} carry"
        out.append(
            f"{where} {share:.0%} of what single blocks cost when they are averaged alone{_why(found, first, last)}"
        )
    part = max(found.parts, key=lambda name: found.parts[name])
    names = {"attention": "attention", "ffn": "the FFN", "ends": "what lies outside the blocks"}
    others = ", ".join(f"{names[name]} {cost:+.3f}" for name, cost in found.parts.items())
    out.append(f"averaged alone, {names[part]} costs most ({others} nats)")
    faded = [i for i, block in enumerate(blocks) if block.variance < FADED]
    if faded:
        out.append(
            f"features of the middle have {blocks[faded[-1]].variance:.0%} of the endpoints' variance behind block "
            f"{faded[-1]}: they cancel, so that units do not stand for the same thing in both"
        )
    gained = losses["middle"] - losses["calibrated"]
    if gained > HELPS * excess:
        out.append(
            f"a temperature of {found.temperature:.2f} alone lowers the middle's loss by {gained:.3f} nats; it lies "
            f"{excess:.3f} above the line: it is badly calibrated"
        )
    limit = losses["ensemble"] - (losses["a"] + losses["b"]) / 2
    out.append(f"the ensemble of both, which no average is expected to beat, is at {limit:+.3f} nats")
    return out


def _shortest_run(costs: list[float], wanted: float) -> tuple[int, int]:
    """(first, last) of the shortest run of blocks that costs as much as is wanted."""
    n = len(costs)
    runs = ((last - first, first, last) for first in range(n) for last in range(first, n))
    return next((f, t) for _, f, t in sorted(runs) if sum(costs[f : t + 1]) >= wanted - 1e-12)


def _why(found: Diagnosis, first: int, last: int) -> str:
    """Which units or heads have no partner there."""
    lost: dict[str, int] = {}
    for block in found.blocks[first : last + 1]:
        for space, count in block.unmatched.items():
            lost[space] = lost.get(space, 0) + count
    named = [f"{count} {space}" for space, count in lost.items() if count]
    return f": {' and '.join(named)} there have no partner (cosine below {NO_PARTNER})" if named else ""
