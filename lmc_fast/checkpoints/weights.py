"""From a checkpoint to the normal form (named slots) and back, with nothing dropped on the way."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architectures import FAMILIES, Family, Spec
from ..architectures.layouts import OfExpert
from ..errors import LmcError
from .reader import Checkpoint
from .writer import write_checkpoint

Slots = dict[str, Tensor]


@dataclass
class Weights:
    """One model in normal form (slots as in architectures.spec): `ends`, and one dict of slots per block."""

    spec: Spec
    ends: Slots
    blocks: list[Slots]

    def map(self, function: Callable[[Tensor], Tensor]) -> Weights:
        apply = lambda slots: {name: function(tensor) for name, tensor in slots.items()}  # noqa: E731
        return Weights(self.spec, apply(self.ends), [apply(block) for block in self.blocks])

    def in_dtype(
        self, dtype: torch.dtype, ends: Callable[[Slots], Slots], block: Callable[[int, Slots], Slots]
    ) -> Weights:
        """Applies functions to the ends and to each (index, block), in at least `dtype`; the result keeps its own."""

        def wide(function: Callable[[Slots], Slots], slots: Slots) -> Slots:
            own = {name: t.dtype for name, t in slots.items()}
            work = {name: t.to(torch.promote_types(t.dtype, dtype)) for name, t in slots.items()}
            return {name: t.to(own[name]) for name, t in function(work).items()}

        blocks = [wide(lambda w, i=i: block(i, w), w) for i, w in enumerate(self.blocks)]  # type: ignore[misc]
        return Weights(self.spec, wide(ends, self.ends), blocks)

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Weights:
        return self.map(lambda t: t.to(device=device, dtype=dtype))


def lerp(a: Weights, b: Weights, weight: float) -> Weights:
    """(1 - weight) a + weight b, slot by slot."""
    mix = lambda x, y: {name: torch.lerp(x[name], y[name], weight) for name in x}  # noqa: E731
    return Weights(a.spec, mix(a.ends, b.ends), [mix(x, y) for x, y in zip(a.blocks, b.blocks, strict=True)])


class Model:
    """A checkpoint whose architecture is known and whose tensors are exactly the expected ones.

    Raises LmcError if the architecture or one of its options is unknown, or if a tensor is missing, unexpected, not a
    float or of another shape than the config says.
    """

    def __init__(self, path: str | Path):
        self.checkpoint = Checkpoint(path)
        self.family, self.spec = read_spec(self.checkpoint)
        self._disk_name = self._check_coverage()

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the checkpoint is stored in: that of its embedding table."""
        return self.checkpoint.dtype(self._disk_name[self.family.ends[0].name])

    def load(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Weights:
        """All weights in normal form. A tied head is materialised, and the result's spec says untied."""
        ends = self._load(None, dtype, device)
        if self.spec.tied:
            ends.setdefault("head", ends["embed"])
        blocks = [self._load(i, dtype, device) for i in range(self.spec.layers)]
        return Weights(replace(self.spec, tied=False), ends, blocks)

    def _load(self, block: int | None, dtype: torch.dtype, device: torch.device | str) -> Slots:
        slots: Slots = {}
        experts: dict[str, list[Tensor]] = {}
        for name, entry, index in self.family.entries(self.spec, self.spec.tied):
            if index == block and name in self._disk_name:
                tensor = self.checkpoint.read(self._disk_name[name]).to(device=device, dtype=dtype)
                if isinstance(entry.layout, OfExpert):
                    experts.setdefault(entry.slots[0], []).append(tensor)
                else:
                    slots |= zip(entry.slots, entry.layout.split(tensor, self.spec), strict=True)
        slots |= {slot: torch.stack(parts) for slot, parts in experts.items()}
        return {name: tensor.contiguous() for name, tensor in slots.items()}

    def _check_coverage(self) -> dict[str, str]:
        """Table name -> name on disk. Every expected tensor is there with its shape, and no other."""
        left = set(self.checkpoint.names)
        prefix = self.family.prefix
        bare = not any(name.startswith(prefix) for name in left)
        found = {}
        for name, entry, _ in self.family.entries(self.spec, self.spec.tied):
            disk = name.removeprefix(prefix) if bare else name
            for now, before in self.family.older_names:
                if disk not in left:
                    disk = disk.replace(now, before)
            if disk not in left and entry.optional:
                continue
            if disk not in left:
                raise LmcError(f"{self.path}: tensor {disk} is missing; the {self.family.name} architecture needs it")
            shape, expected = self.checkpoint.shape(disk), entry.shape(self.spec)
            if shape != expected:
                raise LmcError(f"{self.path}: tensor {disk} has shape {list(shape)}, config.json says {list(expected)}")
            self.checkpoint.dtype(disk)
            left.remove(disk)
            found[name] = disk
        known = [re.compile(pattern) for pattern in self.family.buffers]
        left = {n for n in left if not any(p.search(n) for p in known)}
        if self.spec.tied:
            left -= {e.name for e in self.family.ends if e.slots == ("head",)}
        if left:
            raise LmcError(
                f"{self.path}: tensor {min(left)} ({len(left)} in all) is not part of the {self.family.name} "
                "architecture and would be lost; use a plain language-model checkpoint"
            )
        return found


def read_spec(checkpoint: Checkpoint) -> tuple[Family, Spec]:
    """Raises LmcError for an unknown architecture or a config that transformers refuses."""
    from transformers import AutoConfig

    kind = checkpoint.config.get("model_type")
    nested = [name for name in ("text_config", "vision_config") if name in checkpoint.config]
    if nested and kind not in FAMILIES:
        raise LmcError(
            f"{checkpoint.path}: model_type {kind!r} nests several models ({', '.join(nested)}); save the one to align "
            "on its own with transformers (for example model.language_model.save_pretrained) and give that directory"
        )
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise LmcError(f"{checkpoint.path}: model_type {kind!r} is not supported; supported are {known}")
    family = FAMILIES[kind]
    names = checkpoint.config.get("architectures") or []
    if names and not any(name.endswith(family.architectures) for name in names):
        ends = " or ".join(family.architectures)
        wanted = "causal language model" if "ForCausalLM" in family.architectures else f"{kind} model with its head"
        raise LmcError(f"{checkpoint.path}: {names[0]} is not a {wanted}; give a checkpoint of a class named ...{ends}")
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
    except Exception as error:  # transformers validates with many exception types
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise LmcError(f"{checkpoint.path / 'config.json'} is refused by transformers: {reason}") from error
    return family, family.spec(config)


def export(
    weights: Weights, like: Model, directory: Path, dtype: torch.dtype | None = None, shard_bytes: int | None = None
) -> None:
    """Writes `weights` as a stock checkpoint with the config and tokenizer of `like`; dtype: that of `like`."""
    dtype = dtype or like.dtype
    config = dict(like.checkpoint.config)
    if "tie_word_embeddings" in config or like.spec.tied:
        config["tie_word_embeddings"] = weights.spec.tied
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config.pop("_name_or_path", None)
    options: dict[str, Any] = {} if shard_bytes is None else {"shard_bytes": shard_bytes}
    write_checkpoint(directory, _stored(weights, like.family, dtype), config, like.path, **options)


def _stored(weights: Weights, family: Family, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    spec = weights.spec
    for name, entry, index in family.entries(spec, spec.tied):
        slots = weights.ends if index is None else weights.blocks[index]
        if entry.optional and entry.slots[0] not in slots:
            continue
        tensor = entry.layout.join([slots[slot] for slot in entry.slots], spec).to("cpu", dtype)
        if not tensor.isfinite().all():
            raise LmcError(
                f"tensor {name} overflows in {str(dtype).removeprefix('torch.')}; export with --dtype float32"
            )
        yield name, tensor
