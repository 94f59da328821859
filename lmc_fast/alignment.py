"""The result of aligning a pair: one group element per endpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .architectures import Spec
from .checkpoints import Weights
from .errors import LmcError
from .symmetry.checksum import understood
from .symmetry.legality import check_legal
from .symmetry.storage import load_tensors, pack, save_tensors, unpack
from .symmetry.transform import Transform

FORMAT_VERSION = 2  # 1 had no checksum
_MOST_LAYERS = 10_000


@dataclass
class Alignment:
    """g_A and g_B: what to do to each endpoint's canonical form so that the line between them is flat.

    `matched` holds both as closed-form matching left them, before learning. `info` is JSON: method, schedule, history.
    """

    a: Transform
    b: Transform
    matched: tuple[Transform, Transform]
    info: dict[str, Any] = field(default_factory=dict)

    def save(self, file: str | Path) -> None:
        """Writes alignment.safetensors (float64 tensors, versioned JSON metadata), whole or not at all."""
        tensors = pack(self.a, "a") | pack(self.b, "b")
        tensors |= pack(self.matched[0], "matched.a") | pack(self.matched[1], "matched.b")
        metadata = {"version": FORMAT_VERSION, "layers": len(self.a.blocks), "info": self.info}
        save_tensors(Path(file), tensors, metadata)

    @staticmethod
    def load(file: str | Path, spec: Spec | None = None) -> Alignment:
        """Reads what `save` wrote; with `spec`, checks that both elements are symmetries of it. Raises LmcError."""
        tensors, metadata = load_tensors(Path(file))
        layers, info = metadata.get("layers"), metadata.get("info")
        if metadata.get("version") != FORMAT_VERSION:
            raise LmcError(f"{file} is not an alignment of format version {FORMAT_VERSION}")
        if not isinstance(layers, int) or isinstance(layers, bool) or not isinstance(info, dict):
            raise LmcError(f"{file} does not say its layers and info as an alignment does; make it again")
        if layers < 1 or layers != (spec.layers if spec else layers) or layers > _MOST_LAYERS:
            has = f", the model has {spec.layers}" if spec else ""
            raise LmcError(f"{file} is an alignment of {layers} blocks{has}; give the one that was made for this pair")
        for name, t in tensors.items():
            if t.dtype not in (torch.float64, torch.float32, torch.int64):
                raise LmcError(f"{file}: {name} is {t.dtype}, neither a map nor a permutation; make it again")
        with understood(Path(file), "an alignment"):
            parts = {name: unpack(tensors, name, layers) for name in ("a", "b", "matched.a", "matched.b")}
            known = {key for name, part in parts.items() for key in pack(part, name)}
            if spec:
                for part in parts.values():
                    check_legal(part, spec)
        for name in sorted(tensors.keys() - known):
            raise LmcError(f"{file} holds {name}, which is no part of an alignment; make it again")
        return Alignment(parts["a"], parts["b"], (parts["matched.a"], parts["matched.b"]), info)

    def apply(self, a: Weights, b: Weights) -> tuple[Weights, Weights]:
        """Both endpoints, given in canonical form, aligned."""
        return self.a.apply(a), self.b.apply(b)
