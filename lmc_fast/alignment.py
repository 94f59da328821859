"""The result of aligning a pair: one group element per endpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .architectures import Spec
from .checkpoints import Weights
from .errors import LmcError
from .symmetry.legality import check_legal
from .symmetry.storage import load_tensors, pack, save_tensors, unpack
from .symmetry.transform import Transform

FORMAT_VERSION = 1


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
        if metadata.get("version") != FORMAT_VERSION or "layers" not in metadata:
            raise LmcError(f"{file} is not an alignment of format version {FORMAT_VERSION}")
        parts = [unpack(tensors, name, metadata["layers"]) for name in ("a", "b", "matched.a", "matched.b")]
        if spec:
            for part in parts:
                check_legal(part, spec)
        return Alignment(parts[0], parts[1], (parts[2], parts[3]), metadata["info"])

    def apply(self, a: Weights, b: Weights) -> tuple[Weights, Weights]:
        """Both endpoints, given in canonical form, aligned."""
        return self.a.apply(a), self.b.apply(b)
