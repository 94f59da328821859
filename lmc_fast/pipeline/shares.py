"""How much each model counts in a merge: of everything, or block by block."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import LmcError

Row = tuple[float, ...]  # a weight for each model
ByBlock = Mapping[str, float | Sequence[float]]
_AFTER = ("final_norm", "head", "pooler", "relation")  # slots behind the last block begin like this
_LARGEST = 1e6
_NAMES = "embed, head, a block's number or a range such as 0-3"


@dataclass(frozen=True)
class Shares:
    """`weights` of each model; those of some `blocks`, of what lies before (`embed`) and behind them (`head`)."""

    weights: Row
    blocks: Mapping[int, Row] = field(default_factory=dict)
    embed: Row | None = None
    head: Row | None = None

    def of(self, block: int | None, slot: str) -> Row:
        """Those of a tensor: block None is outside of all, where the slot's name tells on which side."""
        if block is not None:
            return self.blocks.get(block, self.weights)
        return (self.head if is_behind(slot) else self.embed) or self.weights


def is_behind(slot: str) -> bool:
    """Whether a slot outside the blocks lies behind the last one."""
    return slot.startswith(_AFTER)


@dataclass(frozen=True)
class Rule:
    """What rows of weights must be. count: models. average: weights sum to 1, else they scale task vectors.

    extrapolate: weights outside [0, 1] are wanted.
    """

    count: int
    average: bool = True
    extrapolate: bool = False

    def row(self, given: Sequence[float] | float, where: str, notes: list[str]) -> Row:
        """Weights as they will be used, normalised with a note if need be. Raises LmcError, naming `where`."""
        shown = given
        if isinstance(given, int | float) and _is_number(given) and self.average and self.count == 2:
            given = (1 - given, given)
        if isinstance(given, str) or not isinstance(given, Sequence) or not all(map(_is_number, given)):
            raise LmcError(f"{where} must be {self.count} finite numbers, one for each model, not {shown!r}")
        row = tuple(map(float, given))
        if len(row) != self.count:
            raise LmcError(f"{where} has {len(row)} numbers for {self.count} models; give one for each")
        if any(abs(weight) > _LARGEST for weight in row):
            raise LmcError(f"{where} {shown} are larger than any that make sense; give weights of 1 and thereabouts")
        total = math.fsum(row)
        if self.average and total <= 0:
            raise LmcError(f"{where} sum to {total:g}, so that they share nothing out; give weights that sum to 1")
        if self.average and abs(total - 1) > 1e-9:
            notes.append(f"{where} sum to {total:g}: each is divided by that")
            row = tuple(w / total for w in row)
        if not self.extrapolate and not all(0 <= weight <= 1 for weight in row):
            raise LmcError(
                f"{where} {shown} leaves the range from 0 to 1, that is, what lies between the models; --extrapolate "
                "(extrapolate=True) allows it"
            )
        return row


def shares_by_block(rule: Rule, weights: Row, given: ByBlock, layers: int, where: str, notes: list[str]) -> Shares:
    """`given`: rows of some of the `layers` blocks, of "embed" and of "head". Raises LmcError, naming `where`."""
    blocks: dict[int, Row] = {}
    ends: dict[str, Row] = {}
    if not isinstance(given, Mapping) or not given:
        raise LmcError(f"{where} is not an object of weights; its names are {_NAMES}")
    for key, value in given.items():
        row = rule.row(value, f"{where}: weights of {key}", notes)
        if key in ("embed", "head"):
            ends[key] = row
            continue
        found = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", str(key))
        if not found:
            raise LmcError(f"{where} has weights of {key!r}, which is nothing that a model has; its names are {_NAMES}")
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < layers:
            raise LmcError(f"{where} has weights of {key}, but blocks are 0 to {layers - 1}; correct it")
        for block in range(first, last + 1):
            if block in blocks:
                raise LmcError(f"{where} says twice what block {block} is made of; remove one")
            blocks[block] = row
    return Shares(weights, blocks, ends.get("embed"), ends.get("head"))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
