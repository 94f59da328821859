"""Group elements in safetensors files."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoints.tensor_file import HEADER_BYTES, TensorFile
from ..checkpoints.writer import save_tensor_file
from ..errors import LmcError
from ..files import parse_json, to_json
from ..output import atomic_file
from .checksum import checksum
from .transform import BlockTransform, Transform


def pack(transform: Transform, prefix: str) -> dict[str, Tensor]:
    """The tensors of a transform, named prefix.rotation, prefix.head_units and prefix.blocks.i.part."""
    out = {} if transform.rotation is None else {f"{prefix}.rotation": transform.rotation}
    if transform.head_units is not None:
        out[f"{prefix}.head_units"] = transform.head_units
    for i, block in enumerate(transform.blocks):
        parts = {f.name: getattr(block, f.name) for f in fields(BlockTransform)}
        out |= {f"{prefix}.blocks.{i}.{name}": t for name, t in parts.items() if t is not None}
    return {name: t.detach().to("cpu").contiguous() for name, t in out.items()}


def unpack(tensors: dict[str, Tensor], prefix: str, layers: int) -> Transform:
    """The inverse of `pack`."""
    names = [f.name for f in fields(BlockTransform)]
    blocks = [
        BlockTransform(**{name: tensors.get(f"{prefix}.blocks.{i}.{name}") for name in names}) for i in range(layers)
    ]
    return Transform(tensors.get(f"{prefix}.rotation"), blocks, tensors.get(f"{prefix}.head_units"))


def save_tensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes tensors and JSON metadata to `file`, whole or not at all. Raises LmcError if the disk does not take it."""
    text = to_json(metadata)
    with atomic_file(file) as partial:
        save_tensor_file(tensors, partial, {"lmc_fast": text, "checksum": checksum(tensors, text)})


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote. Raises LmcError for a file that it did not write, or that was damaged or edited."""
    if not file.exists():
        raise LmcError(f"{file} does not exist")
    try:
        handle = TensorFile(file, HEADER_BYTES)
        text = handle.metadata["lmc_fast"]
        metadata = parse_json(text, file)
        tensors = {name: handle.read(name) for name in handle.names}
    except (LmcError, KeyError) as error:
        raise LmcError(f"{file} is damaged or not a file of lmc_fast ({error})") from error
    if not isinstance(metadata, dict):
        raise LmcError(f"{file} is damaged or not a file of lmc_fast (its metadata are no object)")
    # the first version of alignments had none
    if handle.metadata.get("checksum") != checksum(tensors, text) and metadata.get("version") != 1:
        raise LmcError(f"{file} is damaged, edited or of an older version: its checksum does not fit; make it again")
    return tensors, metadata
