"""The result of aligning a pair: one group element per endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .architectures import Spec
from .checkpoints import Stock, Weights, export_to_memory
from .errors import LmcError
from .pair import Pair
from .symmetry.canonical import canonicalize
from .symmetry.checksum import understood
from .symmetry.grown import as_recorded
from .symmetry.legality import check_legal
from .symmetry.storage import load_tensors, pack, save_tensors, unpack, unpack_version_1
from .symmetry.transform import Transform

FORMAT_VERSION = 2  # 1 had a and b for members, and no checksum
MEMBERS = [{"name": name, "element": f"members.{i}", "matched": f"matched.{i}"} for i, name in enumerate("ab")]
_MOST_LAYERS = 10_000
_FIRST_NAMES = (  # of a block's tensors in version 1
    *("heads", "queries", "vo", "vo_inverse", "qk", "qk_inverse", "units", "unit_scale"),
    *("experts", "expert_units", "expert_scale"),
)


@dataclass(repr=False)
class Alignment:
    """g_A and g_B: what to do to each endpoint's canonical form so that the line between them is flat.

    `matched` holds both as closed-form matching left them, before learning. `info` is JSON: method, schedule, history.
    """

    a: Transform
    b: Transform
    matched: tuple[Transform, Transform]
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        steps = len(self.info.get("history", {}).get("loss", []))
        how = self.info.get("method", "no method") + (f", {steps} steps" if steps else "")
        return f"Alignment({how}; a={self.a!r}, b={self.b!r})"

    @property
    def members(self) -> tuple[Transform, Transform]:
        """(a, b)."""
        return self.a, self.b

    def save(self, file: str | Path) -> None:
        """Writes alignment.safetensors, whole or not at all: float64 tensors, and versioned JSON metadata that name
        the members and where each one's tensors are.
        """
        tensors: dict[str, Tensor] = {}
        for member, element, matched in zip(MEMBERS, self.members, self.matched, strict=True):
            tensors |= pack(element, member["element"]) | pack(matched, member["matched"])
        metadata = {"version": FORMAT_VERSION, "members": MEMBERS, "layers": len(self.a.blocks), "info": self.info}
        save_tensors(Path(file), tensors, metadata)

    @staticmethod
    def load(file: str | Path, spec: Spec | None = None) -> Alignment:
        """Reads what `save` wrote, also in format version 1; with `spec`, checks that both elements are symmetries of
        it. Raises LmcError.
        """
        tensors, metadata = load_tensors(Path(file))
        layers, info, version = (metadata.get(name) for name in ("layers", "info", "version"))
        if version not in (1, FORMAT_VERSION) or isinstance(version, bool):
            raise LmcError(f"{file} is not an alignment of format version {FORMAT_VERSION} or 1")
        if version == FORMAT_VERSION and metadata.get("members") != MEMBERS:
            raise LmcError(f"{file} is not an alignment of two members; give the one that was made for this pair")
        if not isinstance(layers, int) or isinstance(layers, bool) or not isinstance(info, dict):
            raise LmcError(f"{file} does not say its layers and info as an alignment does; make it again")
        if layers < 1 or layers != (spec.layers if spec else layers) or layers > _MOST_LAYERS:
            has = f", the model has {spec.layers}" if spec else ""
            raise LmcError(f"{file} is an alignment of {layers} blocks{has}; give the one that was made for this pair")
        for name, t in tensors.items():
            if t.dtype not in (torch.float64, torch.float32, torch.int64):
                raise LmcError(f"{file}: {name} is {t.dtype}, neither a map nor a permutation; make it again")
        with understood(Path(file), "an alignment"):
            prefixes, read = [member[part] for part in ("element", "matched") for member in MEMBERS], unpack
            if version == 1:
                prefixes, read = ["a", "b", "matched.a", "matched.b"], unpack_version_1
            a, b, *matched = found = [read(tensors, prefix, layers) for prefix in prefixes]
            if version == 1:
                known = {name for prefix in prefixes for name in _first_names(prefix, layers)}
            else:
                known = {name for prefix, part in zip(prefixes, found, strict=True) for name in pack(part, prefix)}
            if spec:
                for part in found:
                    check_legal(part, spec)
        for name in sorted(tensors.keys() - known):
            raise LmcError(f"{file} holds {name}, which is no part of an alignment; make it again")
        return Alignment(a, b, (matched[0], matched[1]), info)

    def apply(self, a: Weights, b: Weights) -> tuple[Weights, Weights]:
        """Both endpoints, given in canonical form, aligned."""
        return self.a.apply(a), self.b.apply(b)

    def state_dicts(self, pair: Pair, dtype: torch.dtype | None = None) -> list[Stock]:
        """Both endpoints of the pair, aligned, as (config, state dict) of stock models in memory, on the CPU.

        The bits are those that `export` writes. dtype: of all tensors, by default as each endpoint stores them. Nothing
        is proven here, see export(..., in_memory=True). Raises LmcError where a weight overflows.
        """
        return [
            export_to_memory(g.apply(canonicalize(model.open_weights(torch.float64))), model, dtype)
            for model, g in zip(as_recorded((pair.a, pair.b), self.info.get("grown")), self.members, strict=True)
        ]


def _first_names(prefix: str, layers: int) -> Iterator[str]:
    """What version 1 may have called the tensors of a transform."""
    yield from (f"{prefix}.rotation", f"{prefix}.head_units")
    for i in range(layers):
        yield from (f"{prefix}.blocks.{i}.{name}" for name in _FIRST_NAMES)
