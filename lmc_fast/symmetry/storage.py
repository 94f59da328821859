"""Group elements in safetensors files."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checkpoints.tensor_file import TensorFile
from ..checkpoints.writer import disk_errors, save_tensor_file
from ..errors import LmcError
from ..files import to_json
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
    partial = file.with_name(file.name + ".tmp")
    try:
        with disk_errors(file):
            save_tensor_file(tensors, partial, {"lmc_fast": to_json(metadata)})
            os.replace(partial, file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def load_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote. Raises LmcError for a file that it did not write or that is damaged."""
    try:
        with safe_open(file, framework="pt") as handle:
            metadata = json.loads((handle.metadata() or {})["lmc_fast"])
        tensors = TensorFile(file)
        return {name: tensors.read(name) for name in tensors.names}, metadata
    except FileNotFoundError:
        raise LmcError(f"{file} does not exist") from None
    except (SafetensorError, LmcError, OSError, KeyError, ValueError) as error:
        raise LmcError(f"{file} is damaged or not a file of lmc_fast ({error})") from error
