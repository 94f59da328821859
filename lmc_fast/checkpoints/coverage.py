"""Which tensor of a checkpoint is which tensor of its family's table, as transformers decides it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from ..architectures import Entry, Family, Spec
from ..errors import LmcError
from .reader import Checkpoint

_OLDER = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))  # of every family


@dataclass(frozen=True)
class Coverage:
    """`names`: table name -> name on disk of every tensor to read, a tied one under the name that is stored. `own`: the
    same without the tied ones. `buffers`: names on disk of what is stored and carries no weights.
    """

    names: dict[str, str]
    own: dict[str, str]
    buffers: list[str]


def cover(checkpoint: Checkpoint, family: Family, spec: Spec) -> tuple[Coverage, Spec]:
    """Every expected tensor is there with its shape, and no other; the spec says whether the head is really tied.

    Under tie_word_embeddings transformers ties what is stored once, or twice with equal values; a copy that differs is
    used as it is stored. Raises LmcError for a tensor that is missing, unexpected, not a float or of another shape.
    """
    left = set(checkpoint.names)
    known = [re.compile(pattern) for pattern in family.buffers]
    own: dict[str, str] = {}
    missing: dict[str, Entry] = {}
    for name, entry, _ in family.entries(replace(spec, tied=False)):
        disk = next((n for n in spellings(name, family) if n in left), None)
        if disk is None:
            missing[name] = entry
            continue
        _check(checkpoint, disk, entry.shape(spec))
        left.remove(disk)
        own[name] = disk
    names = dict(own)
    tied = False
    for copy, original in family.ties(spec) if spec.tied else ():
        same = _same(checkpoint, own.get(copy.name), own.get(original.name))
        if same:
            names[copy.name] = names[original.name] = same
        tied |= bool(same) and copy.slots == ("head",)
    if not spec.tied:  # the original of an untied copy is not read by anyone
        for copy, original in family.ties(spec):
            if copy.slots == original.slots:
                missing.pop(original.name, None)
    for name, entry in missing.items():
        if name not in names and not entry.optional:
            raise LmcError(f"{checkpoint.path}: tensor {name} is missing; the {family.name} architecture needs it")
    buffers = sorted(n for n in left if any(p.search(n) for p in known))
    left -= set(buffers)
    if left:
        raise LmcError(
            f"{checkpoint.path}: tensor {min(left)} ({len(left)} in all) is not part of the {family.name} "
            "architecture and would be lost; use a plain language-model checkpoint"
        )
    return Coverage(names, own, buffers), replace(spec, tied=tied)


def spellings(name: str, family: Family) -> Iterator[str]:
    """How a checkpoint may call a tensor: with the family's prefix or without, by today's name or an older one."""
    others = [name.replace(here, there) for here, there in (*_OLDER, *family.other_names) if here in name]
    for spelt in (name, *others):
        yield spelt
        yield spelt.removeprefix(family.prefix)


def _check(checkpoint: Checkpoint, disk: str, expected: tuple[int, ...]) -> None:
    shape = checkpoint.shape(disk)
    if shape != expected:
        raise LmcError(f"{checkpoint.path}: tensor {disk} has shape {list(shape)}, config.json says {list(expected)}")
    checkpoint.dtype(disk)


def _same(checkpoint: Checkpoint, copy: str | None, original: str | None) -> str | None:
    """The name that both tied tensors are stored under, or None where both are and differ, or neither is."""
    if copy is None or original is None:
        return copy or original
    if not checkpoint.values:
        return None  # as it is stored, then: the function is the same
    pairs = zip(checkpoint.read_runs(copy), checkpoint.read_runs(original), strict=True)
    wide = torch.promote_types(checkpoint.dtype(copy), checkpoint.dtype(original))
    return original if all(torch.equal(x.to(wide), y.to(wide)) for x, y in pairs) else None
