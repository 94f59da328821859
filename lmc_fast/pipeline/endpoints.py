"""Where the endpoints of an alignment are, and how they look in the aligned basis."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..alignment import Alignment
from ..checkpoints import Model, Weights
from ..errors import LmcError
from ..members import member_names
from ..symmetry import Transform, canonicalize
from ..symmetry.grown import alike, as_recorded

_CANONICAL = 2e-3  # of itself that a block in canonical form moves at most when that is made again: 16-bit rounding
_log = logging.getLogger("lmc_fast")


@dataclass(frozen=True)
class Endpoint:
    """A checkpoint and what brings it into the aligned basis; None: it is there already."""

    model: Model
    element: Transform | None

    def aligned(self) -> Weights:
        """It in the aligned basis: lazy, float64."""
        weights = self.model.open_weights(torch.float64)
        return weights if self.element is None else self.element.apply(canonicalize(weights))


@dataclass(frozen=True)
class Known:
    """An alignment and what its file tells of its members."""

    alignment: Alignment
    file: Path

    @staticmethod
    def load(file: Path) -> Known:
        found = Known(Alignment.load(file), file)
        if found.digests(found.names[0]) is None:
            _log.warning("%s holds no digests of its endpoints: that it belongs to them cannot be checked", file)
        return found

    @property
    def names(self) -> list[str]:
        """Of the endpoints."""
        return member_names(len(self.alignment.members))

    def element(self, name: str) -> Transform:
        return self.alignment.members[self.names.index(name)]

    def matched(self, name: str) -> Transform:
        """Where matching left it, before learning."""
        return self.alignment.matched[self.names.index(name)]

    @property
    def is_learned(self) -> bool:
        """Whether anything was learned after matching."""
        return "history" in self.alignment.info

    def digests(self, name: str) -> dict[str, str] | None:
        """Of the endpoint's files; None where the alignment does not say."""
        found = self._of("members", name)
        return found if isinstance(found, dict) and found else None

    def _of(self, key: str, name: str) -> Any:
        """What the run that made the alignment noted of a member; None where it noted nothing."""
        inputs = self.alignment.info.get("inputs")
        found = inputs.get(key) if isinstance(inputs, dict) else None
        return found[self.names.index(name)] if isinstance(found, list) and len(found) == len(self.names) else None

    def is_member(self, model: Model, name: str) -> bool:
        """Whether a checkpoint is an endpoint, told by digests."""
        return model.checkpoint.identity.digests() == self.digests(name)

    def fitted(self, model: Model, name: str) -> Model:
        """A model of a member's size as one of the size that all members were grown to, as that member was."""
        record = self.alignment.info.get("grown")
        if not isinstance(record, list) or len(record) != len(self.names):
            return model
        how = record[self.names.index(name)]
        if how is None:
            return model
        grown = next((place for n in self.names if (place := self.beside(n) / "config.json").exists()), None)
        if grown is None:
            raise LmcError(
                f"{name} of {self.file} was grown, and how large cannot be told without {self.beside(name)}; put the "
                "aligned endpoints back beside it"
            )
        return as_recorded([alike([model, Model(grown.parent)])[0]], [how])[0]

    def beside(self, name: str) -> Path:
        """Where `align` writes the aligned endpoint."""
        return self.file.absolute().parent / name

    def original(self, name: str, given: str | Path | None = None) -> Endpoint | None:
        """The endpoint itself: the one that is `given`, else from where it was; None where that is not there any more.

        Raises LmcError where what is given is another one.
        """
        if given is not None:
            model = Model(given)
            if self.digests(name) is None:
                return Endpoint(self.fitted(model, name), None if _is_canonical(model) else self.element(name))
            if not self.is_member(model, name):
                raise LmcError(
                    f"{given} is not the checkpoint that {self.file} was made for as {name}: its files differ; give "
                    f"that one (or leave --endpoint out, and {self.beside(name)} is used)"
                )
            return Endpoint(self.fitted(model, name), self.element(name))
        where = self._of("sources", name)
        if not isinstance(where, str) or not Path(where).is_dir():
            return None
        try:
            model = Model(where)
        except LmcError:
            return None
        return Endpoint(self.fitted(model, name), self.element(name)) if self.is_member(model, name) else None

    def endpoint(self, name: str, given: str | Path | None = None) -> Endpoint:
        """The endpoint itself, or the aligned one beside the alignment. Raises LmcError where neither is there."""
        found = self.original(name, given)
        if found is not None:
            return found
        if not (self.beside(name) / "config.json").exists():
            raise LmcError(
                f"the endpoint {name} of {self.file} is neither where it was nor at {self.beside(name)}; name it with "
                "--endpoint"
            )
        return Endpoint(Model(self.beside(name)), None)

    def target(self, path: str | Path) -> Endpoint:
        """A checkpoint of the aligned basis to add to: an aligned one, an average, or an endpoint, told by digests.

        Raises LmcError for one that is in no aligned basis.
        """
        model = Model(path)
        name = next((n for n in self.names if self.digests(n) and self.is_member(model, n)), None)
        if name is None and not _is_canonical(model):
            raise LmcError(
                f"{path} is not in the aligned basis: its norms have gains or its stream a mean; give what align wrote "
                f"({self.beside(self.names[0])})"
            )
        return Endpoint(model, None) if name is None else Endpoint(self.fitted(model, name), self.element(name))


def _is_canonical(model: Model) -> bool:
    """Whether the canonical form of the first and the last block is those blocks."""
    weights = model.open_weights(torch.float64)
    again = canonicalize(weights)
    for i in {0, model.spec.layers - 1}:
        before, after = weights.blocks[i], again.blocks[i]
        moved = sum(float((after[name] - x).square().sum()) for name, x in before.items())
        if not moved <= _CANONICAL**2 * sum(float(x.square().sum()) for x in before.values()):  # NaN, too
            return False
    return True
