"""The result of aligning models: one group element for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .architectures import Spec
from .checkpoints import Stock, Weights, export_to_memory
from .errors import LmcError
from .members import MOST_MEMBERS, member_names
from .output import user_path
from .pair import Models
from .symmetry.canonical import canonicalize
from .symmetry.checksum import understood
from .symmetry.grown import as_recorded
from .symmetry.legality import check_legal
from .symmetry.storage import load_tensors, pack, save_tensors, unpack, unpack_version_1
from .symmetry.transform import Transform

FORMAT_VERSION = 2  # 1 had a and b for members, and no checksum
_MOST_LAYERS = 10_000
_FIRST_NAMES = (  # of a block's tensors in version 1
    *("heads", "queries", "vo", "vo_inverse", "qk", "qk_inverse", "units", "unit_scale"),
    *("experts", "expert_units", "expert_scale"),
)


def _listed(count: int, learned: Sequence[bool]) -> list[dict[str, str]]:
    """What a file says of its members: their names, and where the tensors of each are; an element that was not
    learned is where matching left it, and written once.
    """
    return [
        {"name": name, "element": f"members.{i}", "matched": f"{'matched' if more else 'members'}.{i}"}
        for i, (name, more) in enumerate(zip(member_names(count), learned, strict=True))
    ]


def _read_list(listed: Any, file: str | Path) -> list[dict[str, str]]:
    """Raises LmcError unless it is a list that `_listed` made."""
    if isinstance(listed, list) and 2 <= len(listed) <= MOST_MEMBERS and all(isinstance(m, dict) for m in listed):
        learned = [member.get("matched") != f"members.{i}" for i, member in enumerate(listed)]
        if listed == _listed(len(listed), learned):
            return listed
    raise LmcError(f"{file} does not say its members as an alignment does; make it again")


def _same(x: dict[str, Tensor], y: dict[str, Tensor]) -> bool:
    return x.keys() == y.keys() and all(torch.equal(t, y[name]) for name, t in x.items())


class Alignment:
    """g_A and g_B, or more: what to do to each model's canonical form so that everything between them is flat.

    Args:
        *parts: an element for each model, in their order; `matched` and `info` may follow them without their names.
        matched: the same as closed-form matching left them, before learning; by default the elements themselves.
        info: what is known of the run, as JSON: method, schedule, history.

    Attributes:
        members: one element for each model.
        matched: one for each model, as matching left it.
        info: as given; {} by default.

    Raises:
        ValueError: there are not as many of `matched` as elements.

    >>> alignment = lmc.Alignment.load("DIR/alignment.safetensors")
    >>> len(alignment.members), alignment.info["method"]
    (2, 'dual')
    """

    def __init__(self, *parts: Any, matched: Sequence[Transform] | None = None, info: dict[str, Any] | None = None):
        self.members: tuple[Transform, ...] = tuple(part for part in parts if isinstance(part, Transform))
        for part in parts[len(self.members) :]:
            matched, info = (matched, part) if isinstance(part, dict) else (part, info)
        self.matched: tuple[Transform, ...] = self.members if matched is None else tuple(matched)
        self.info: dict[str, Any] = {} if info is None else info
        if len(self.members) != len(self.matched):
            raise ValueError(f"{len(self.members)} elements, and {len(self.matched)} of matching")

    @property
    def a(self) -> Transform:
        """The first model's element."""
        return self.members[0]

    @property
    def b(self) -> Transform:
        """The second model's element."""
        return self.members[1]

    def __repr__(self) -> str:
        steps = len(self.info.get("history", {}).get("loss", []))
        how = self.info.get("method", "no method") + (f", {steps} steps" if steps else "")
        shown = ", ".join(f"{n}={g!r}" for n, g in zip(member_names(len(self.members)), self.members, strict=True))
        return f"Alignment({how}; {shown})"

    def save(self, file: str | Path) -> None:
        """Writes alignment.safetensors, whole or not at all: tensors in the dtypes they have (float64 after `align`),
        and versioned JSON metadata that name the members and where each one's tensors are.

        Args:
            file: where to.

        Raises:
            LmcError: the disk does not take it.
        """
        tensors: dict[str, Tensor] = {}
        packed = [(pack(g, ""), pack(m, "")) for g, m in zip(self.members, self.matched, strict=True)]
        members = _listed(len(packed), [not _same(*both) for both in packed])
        for member, (element, matched) in zip(members, packed, strict=True):
            tensors |= {member["matched"] + name: t for name, t in matched.items()}
            tensors |= {member["element"] + name: t for name, t in element.items()}
        metadata = {"version": FORMAT_VERSION, "members": members, "layers": len(self.a.blocks), "info": self.info}
        save_tensors(Path(file), tensors, metadata)

    @staticmethod
    def load(file: str | Path, spec: Spec | None = None, count: int | None = None) -> Alignment:
        """Reads what `save` wrote, also in format version 1.

        Args:
            file: what `align`, `run` or `save` wrote.
            spec: of the models (Model.spec): all elements must be symmetries of it. None: not checked.
            count: how many models it must be an alignment of. None: any number.

        Returns:
            The alignment, on the CPU.

        Raises:
            LmcError: the file is missing, damaged or edited, no alignment, or one of other models.
        """
        tensors, metadata = load_tensors(user_path(file))
        layers, info, version = (metadata.get(name) for name in ("layers", "info", "version"))
        if version not in (1, FORMAT_VERSION) or isinstance(version, bool):
            raise LmcError(f"{file} is not an alignment of format version {FORMAT_VERSION} or 1")
        listed = _read_list(metadata.get("members"), file) if version == FORMAT_VERSION else _listed(2, [True, True])
        if count not in (None, len(listed)):
            raise LmcError(f"{file} is an alignment of {len(listed)} models, not of {count}; give that of these models")
        if not isinstance(layers, int) or isinstance(layers, bool) or not isinstance(info, dict):
            raise LmcError(f"{file} does not say its layers and info as an alignment does; make it again")
        if layers < 1 or layers != (spec.layers if spec else layers) or layers > _MOST_LAYERS:
            has = f", the model has {spec.layers}" if spec else ""
            raise LmcError(f"{file} is an alignment of {layers} blocks{has}; give the one that was made for this pair")
        for name, t in tensors.items():
            if t.dtype not in (torch.float64, torch.float32, torch.int64):
                raise LmcError(f"{file}: {name} is {t.dtype}, neither a map nor a permutation; make it again")
        with understood(Path(file), "an alignment"):
            prefixes, read = [member[part] for part in ("element", "matched") for member in listed], unpack
            if version == 1:
                prefixes, read = ["a", "b", "matched.a", "matched.b"], unpack_version_1
            found = [read(tensors, prefix, layers) for prefix in prefixes]
            if version == 1:
                known = {name for prefix in prefixes for name in _first_names(prefix, layers)}
            else:
                known = {name for prefix, part in zip(prefixes, found, strict=True) for name in pack(part, prefix)}
            if spec:
                for part in found:
                    check_legal(part, spec)
        for name in sorted(tensors.keys() - known):
            raise LmcError(f"{file} holds {name}, which is no part of an alignment; make it again")
        return Alignment(*found[: len(listed)], found[len(listed) :], info)

    def apply(self, *members: Weights) -> tuple[Weights, ...]:
        """All models, aligned.

        Args:
            *members: the weights of each model in canonical form, in order.

        Returns:
            The same aligned, in the dtypes and on the devices they came in.

        Raises:
            ValueError: there are not as many models as elements.
        """
        return tuple(g.apply(w) for g, w in zip(self.members, members, strict=True))

    def state_dicts(self, models: Models, dtype: torch.dtype | None = None) -> list[Stock]:
        """All models, aligned, in memory on the CPU: the bits that `export` writes. Nothing is proven here, see
        export(..., in_memory=True).

        Args:
            models: those that were aligned, in order.
            dtype: of all tensors; None: as each model stores them.

        Returns:
            (config, state dict) of a stock model for each.

        Raises:
            LmcError: a weight overflows `dtype`.
            ValueError: there are not as many models as elements.
        """
        return [
            export_to_memory(g.apply(canonicalize(model.open_weights(torch.float64))), model, dtype)
            for model, g in zip(as_recorded(models.members, self.info.get("grown")), self.members, strict=True)
        ]


def require_alignment(found: object) -> None:
    """Raises LmcError for what is no Alignment."""
    if not isinstance(found, Alignment):
        raise LmcError(f"an alignment is what align returns or Alignment.load reads, not {found!r}")


def _first_names(prefix: str, layers: int) -> Iterator[str]:
    """What version 1 may have called the tensors of a transform."""
    yield from (f"{prefix}.rotation", f"{prefix}.head_units")
    for i in range(layers):
        yield from (f"{prefix}.blocks.{i}.{name}" for name in _FIRST_NAMES)
