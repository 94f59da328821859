"""Checkpoints that are read as larger ones, so that everything behind the reading sees models of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..architectures import Spec
from ..architectures.resize import common_spec, resized, sizes_of
from ..checkpoints.configs import spec_of
from ..checkpoints.coverage import spellings
from ..checkpoints.weights import Model, Weights
from ..errors import LmcError
from .growth import Growth, Places, obstacle, place_evenly

Record = list[dict[str, Any] | None]  # of each model: how it was grown


class GrownModel(Model):
    """A model as one of a larger spec that computes the same, see growth. Files, tokenizer and dtypes are its own.

    chosen: how the places of its blocks were chosen.
    """

    def __init__(
        self,
        model: Model,
        spec: Spec,
        places: Places,
        config: Any,
        stored: dict[str, Any],
        chosen: str = "evenly, without data",
    ):
        self.source, self.checkpoint, self.family, self.coverage = (
            model.source,
            model.checkpoint,
            model.family,
            model.coverage,
        )
        self.spec = replace(spec, tied=model.spec.tied and spec.width == model.spec.width)
        self.config, self.chosen = config, chosen
        self._small, self._stored = model, stored
        self.growth = Growth(model.spec, self.spec, places)

    @property
    def original(self) -> Model:
        return self._small

    @property
    def stored_config(self) -> dict[str, Any]:
        return self._stored

    @property
    def buffers(self) -> list[str]:
        return []

    @property
    def adds_blocks(self) -> bool:
        return self._small.spec.layers < self.spec.layers

    @property
    def summary(self) -> str:
        """What grew, and where blocks were added."""
        before, after = sizes_of(self._small.spec), sizes_of(self.spec)
        parts = [f"{name} {before[name]} to {after[name]}" for name in before if before[name] != after[name]]
        text = f"{self.source} is grown: {', '.join(parts)}"
        if self.adds_blocks:
            empty = sorted(set(range(self.spec.layers)) - {*self.growth.places})
            text += f"; empty blocks, counted from 0, are {', '.join(map(str, empty))} (placed {self.chosen})"
        return text

    def placed(self, places: Places, chosen: str) -> GrownModel:
        """The same with its blocks in other places."""
        return GrownModel(self._small, self.spec, places, self.config, self._stored, chosen)

    def limited(self, vocabulary: int, positions: int) -> GrownModel:
        small, spec = self._small.limited(vocabulary, positions), super().limited(vocabulary, positions).spec
        return GrownModel(small, spec, self.growth.places, self.config, self._stored, self.chosen)

    def stored_as(self, name: str, block: int | None) -> tuple[str, torch.dtype]:
        """As the checkpoint would spell it; a block that it does not have is spelt, and stored, as its first one."""
        source = block
        if block is not None:
            places = self.growth.places
            source = places.index(block) if block in places else 0
        own = name if block is None else name.replace(f".{block}.", f".{source}.", 1)
        if own not in self._small.coverage.names:  # its first block has no such norm
            own = next(iter(self._small.coverage.own))
        disk, dtype = self._small.stored_as(own, source)
        manner = list(spellings(own, self.family)).index(disk) if disk != own else 0
        return list(spellings(name, self.family))[manner], dtype

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Weights:
        return self.open_weights(dtype, device).load()

    def open_weights(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Weights:
        return self.growth.grow(self._small.open_weights(dtype, device))


def alike(models: Sequence[Model]) -> list[Model]:
    """All of these; those that are smaller than the smallest common sizes as GrownModels of these sizes.

    Models of several families stay as they are. Raises LmcError where one cannot be grown, with the reason.
    """
    if len({model.family.name for model in models}) > 1:
        return list(models)
    target = common_spec([model.spec for model in models])
    return [model if sizes_of(model.spec) == sizes_of(target) else _grown(model, target) for model in models]


def _grown(model: Model, target: Spec) -> GrownModel:
    before, after = sizes_of(model.spec), sizes_of(target)
    wanted = ", ".join(f"{name} {after[name]}" for name in after if before[name] != after[name])
    refusal = f"{model.source} cannot be grown to {wanted}"
    why = obstacle(model.spec, target)
    if why:
        raise LmcError(f"{refusal}: {why}")
    stored = resized(model.stored_config, model.config, target)
    try:
        config = type(model.config).from_dict(stored)
        spec = spec_of(model.family, config, Path("config.json"))
    except Exception as error:  # transformers refuses sizes with many exception types
        raise LmcError(f"{refusal}: no {model.family.name} has these sizes ({error})") from error
    if sizes_of(spec) != after:
        name = next(name for name, size in sizes_of(spec).items() if size != after[name])
        raise LmcError(f"{refusal}: no {model.family.name} of these sizes has {name} {after[name]}")
    why = obstacle(model.spec, spec)
    if why:
        raise LmcError(f"{refusal}: {why}")
    places = place_evenly(model.spec, spec)
    assert places is not None
    spec = replace(spec, max_positions=model.spec.max_positions, vocab=model.spec.vocab, table=model.spec.table)
    return GrownModel(model, spec, places, config, stored)


def record_of(models: Sequence[Model]) -> dict[str, Any]:
    """How models were grown, for the facts of a run: {} where none was, else {"grown": a Record}."""
    record = [
        {"sizes": sizes_of(m.spec), "places": list(m.growth.places), "chosen": m.chosen}
        if isinstance(m, GrownModel)
        else None
        for m in models
    ]
    return {"grown": record} if any(record) else {}


def as_recorded(models: Sequence[Model], record: Record | None) -> list[Model]:
    """The same models with their blocks in the recorded places. Raises LmcError for a record of others."""
    if record is None:
        return list(models)
    try:
        return [_as_recorded(model, how) for model, how in zip(models, record, strict=True)]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise LmcError(f"how models were grown is not understood ({error}); make the alignment anew") from error


def _as_recorded(model: Model, how: dict[str, Any] | None) -> Model:
    if (how and how["sizes"]) != (sizes_of(model.spec) if isinstance(model, GrownModel) else None):
        raise LmcError(f"{model.source} had another size when this was made; give the models of before")
    if how is None or not isinstance(model, GrownModel):
        return model
    places, few, many = tuple(how["places"]), model.original.spec.layers, model.spec.layers
    if len(places) != few or [*places] != sorted({*places} & {*range(many)}):
        raise LmcError(f"{model.source} has {few} blocks, to which {[*places]} gives no places; make it anew")
    return model.placed(places, str(how["chosen"]))
