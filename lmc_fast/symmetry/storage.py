"""Group elements in safetensors files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..architectures.axes import BLOCK_SPACES, MODEL_SPACES
from ..checkpoints.tensor_file import HEADER_BYTES, TensorFile
from ..checkpoints.writer import save_tensor_file
from ..errors import LmcError
from ..files import parse_json, require_regular, to_json
from ..output import atomic_file
from .checksum import checksum
from .elements import Dense, Element, Scale, Wreath, orthogonal, units
from .transform import Transform


def pack(transform: Transform, prefix: str) -> dict[str, Tensor]:
    """The tensors of a transform, named prefix.space.part and prefix.blocks.i.space.part."""
    out: dict[str, Tensor] = {}
    for place, elements in _places(prefix, [transform.model, *transform.blocks]):
        for space, g in elements.items():
            out |= {f"{place}.{space}.{part}": t.detach().to("cpu").contiguous() for part, t in _parts(g).items()}
    return out


def as_stored(transform: Transform) -> Transform:
    """The transform laid out as it will be when read back: a transposed view multiplies to other last bits."""
    return unpack(pack(transform, ""), "", len(transform.blocks))


def digest_of(transforms: Sequence[Transform]) -> str:
    """Of every number of some transforms."""
    return checksum({n: t for i, g in enumerate(transforms) for n, t in pack(g, str(i)).items()}, "")


def unpack(tensors: dict[str, Tensor], prefix: str, layers: int) -> Transform:
    """The inverse of `pack`. Raises LmcError for parts that make no element."""
    model, *blocks = (
        _elements_at(tensors, place, spaces)
        for place, spaces in _places(prefix, [MODEL_SPACES, *[BLOCK_SPACES] * layers])
    )
    return Transform(model, blocks)


def _elements_at(tensors: dict[str, Tensor], place: str, spaces: Iterable[str]) -> dict[str, Element]:
    found = {}
    for space in spaces:
        parts = _within(tensors, f"{place}.{space}.")
        if parts:
            found[space] = _element(space, parts)
    return found


T = TypeVar("T")


def _places(prefix: str, model_and_blocks: Sequence[T]) -> Iterator[tuple[str, T]]:
    names = [prefix, *(f"{prefix}.blocks.{i}" for i in range(len(model_and_blocks) - 1))]
    return zip(names, model_and_blocks, strict=True)


def _within(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    parts = ("matrix", "back", "scale", "places")
    return {part: tensors[prefix + part] for part in parts if prefix + part in tensors}


def _parts(g: Element) -> dict[str, Tensor]:
    if isinstance(g, Dense):
        orthogonal = torch.equal(g.back, g.matrix.mT)
        return {"matrix": g.matrix} | ({} if orthogonal else {"back": g.back})
    if isinstance(g, Scale):
        return {"scale": g.scale}
    return {"places": g.places} | _parts(g.inner) if isinstance(g, Wreath) else {}


def _element(space: str, parts: dict[str, Tensor]) -> Element:
    if any(parts[part].dim() < 2 for part in ("matrix", "back") if part in parts):
        raise LmcError(f"{space} has a map that is no matrix")
    if "matrix" in parts and not parts.keys() & {"places", "scale"}:
        return Dense(parts["matrix"], parts["back"] if "back" in parts else parts["matrix"].mT)
    if "matrix" in parts or "back" in parts:
        raise LmcError(f"{space} has {', '.join(sorted(parts))}, which make no element of its group")
    return units(parts.get("places"), parts.get("scale"))


def unpack_version_1(tensors: dict[str, Tensor], prefix: str, layers: int) -> Transform:
    """What the first version of the format called prefix.rotation, prefix.blocks.i.vo_inverse, ..."""
    model: dict[str, Element] = {}
    if f"{prefix}.rotation" in tensors:
        model["stream"] = orthogonal(tensors[f"{prefix}.rotation"])
    if f"{prefix}.head_units" in tensors:
        model["head_units"] = Wreath(tensors[f"{prefix}.head_units"])
    blocks: list[dict[str, Element]] = []
    for i in range(layers):
        get = partial(_get, tensors, f"{prefix}.blocks.{i}.")
        block: dict[str, Element] = {}
        for space in ("heads", "queries", "experts"):
            if (places := get(space)) is not None:
                block[space] = Wreath(places)
        for space in ("vo", "qk"):
            matrix, back = get(space), get(f"{space}_inverse")
            if matrix is None and back is not None:
                raise LmcError(f"{prefix}.blocks.{i}.{space} is missing, but its inverse is there; make it again")
            if matrix is not None:
                block[space] = Dense.of(matrix) if back is None else Dense(matrix, back)
        for space, scale in (("units", get("unit_scale")), ("expert_units", get("expert_scale"))):
            if scale is not None or get(space) is not None:
                block[space] = units(get(space), scale)
        blocks.append(block)
    return Transform(model, blocks)


def _get(tensors: dict[str, Tensor], prefix: str, name: str) -> Tensor | None:
    return tensors.get(prefix + name)


def save_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes tensors and JSON metadata to `file`, whole or not at all. Raises LmcError if the disk does not take it."""
    text = to_json(metadata)
    with atomic_file(file) as partial:
        save_tensor_file(tensors, partial, {"lmc_fast": text, "checksum": checksum(tensors, text)})


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote. Raises LmcError for a file that it did not write, or that was damaged or edited."""
    if not file.exists():
        raise LmcError(f"{file} does not exist")
    require_regular(file)
    try:
        handle = TensorFile(file, HEADER_BYTES)
        if "lmc_fast" not in handle.metadata:
            raise LmcError("it has no metadata of its own")
        text = handle.metadata["lmc_fast"]
        metadata = parse_json(text, file)
        tensors = {name: handle.read(name) for name in handle.names}
    except LmcError as error:
        raise LmcError(f"{file} is damaged or not a file of lmc_fast ({error})") from error
    if not isinstance(metadata, dict):
        raise LmcError(f"{file} is damaged or not a file of lmc_fast (its metadata are no object)")
    whole = {"format": "pt", "lmc_fast": text, "checksum": checksum(tensors, text)}
    if handle.metadata != whole and metadata.get("version") != 1:  # which had no checksum
        raise LmcError(f"{file} is damaged, edited or of an older version: its checksum does not fit; make it again")
    return tensors, metadata
