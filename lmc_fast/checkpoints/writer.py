"""Writing stock checkpoints: sharded safetensors."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LmcError
from ..files import read_json, to_json
from ..output import Names
from .tensor_file import DTYPE_NAMES

SHARD_BYTES = 5_000_000_000
# What belongs to weights that are new: tokenizers, preprocessors, generation, licence. Not what describes other files
# (indices, adapters, training logs, model cards) or needs Python files beside it.
COMPANIONS = (
    *("tokenizer*", "vocab*", "merges.txt", "*tokens*.json", "*.model", "*.jinja", "chat_template.json"),
    *("generation_config.json", "*processor_config.json", "LICENSE*", "NOTICE*"),
)
_ELSEWHERE = ("_name_or_path", "auto_map", "transformers_weights")  # keys of config.json that point at other files
_INDEX = "model.safetensors.index.json"
_log = logging.getLogger("lmc_fast")


def save_tensor_file(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """A safetensors file of tensors in memory, without a copy of them all (safetensors' own writer makes one)."""
    write_file(
        file, [Stored(name, t.dtype, tuple(t.shape), partial(iter, (t,))) for name, t in tensors.items()], metadata
    )


@dataclass(frozen=True)
class Stored:
    """A tensor to be written, made only then: `parts` yields runs of it along the first dimension, all in `dtype`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(file: Path, tensors: Sequence[Stored], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, written part by part. Raises OSError where the disk does."""
    ordered = sorted(tensors, key=lambda t: -t.dtype.itemsize)  # keeps every tensor aligned; stable otherwise
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    end = 0
    for t in ordered:
        header[t.name] = {"dtype": DTYPE_NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for t in ordered:
            left = t.nbytes
            for part in t.parts():
                if part.dtype != t.dtype or part.nbytes > left:
                    raise ValueError(f"{t.name} is not what was announced")
                handle.write(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
                left -= part.nbytes
                del part
            if left:
                raise ValueError(f"{t.name} lacks {left} bytes")


def write_checkpoint(
    directory: Path,
    tensors: Iterable[Stored],
    config: dict[str, Any],
    companions_from: Path | None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Fills an empty `directory` with a checkpoint that transformers loads; one part of a tensor at a time is held.

    Tokenizer, generation config and the like are copied from `companions_from`, if that is a directory.
    """
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[list[Stored]] = []
    size = total = 0
    for t in tensors:
        if not shards or size + t.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(t)
        size += t.nbytes
        total += t.nbytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        write_file(directory / file, shard)
        weight_map |= dict.fromkeys([t.name for t in shard], file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (directory / "config.json").write_text(to_json(own_config(config), indent=2) + "\n")
    companions, linked = _companions(companions_from)
    for link in linked:
        _log.warning("%s is a link to another place; it is not copied", link)
    for companion in companions:
        _copy_companion(companion, directory / companion.name)


def own_config(config: dict[str, Any]) -> dict[str, Any]:
    """Without what points at other files."""
    return {key: value for key, value in config.items() if key not in _ELSEWHERE}


def checkpoint_names(companions_from: Path | None) -> Names:
    """What a directory that write_checkpoint fills may hold."""
    names = ["config.json", _INDEX, "model.safetensors", "model-?????-of-?????.safetensors"]
    return dict.fromkeys(names + [companion.name for companion in _companions(companions_from)[0]])


def companion_bytes(companions_from: Path | None) -> int:
    """Of what is copied beside the weights."""
    return sum(file.stat().st_size for file in _companions(companions_from)[0])


def _companions(source: Path | None) -> tuple[list[Path], list[Path]]:
    """Those to copy, and links out of the checkpoint, other than the hub's cache makes to its blobs."""
    if source is None:
        return [], []
    home = Path(os.path.realpath(source))
    allowed = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
    own: list[Path] = []
    linked: list[Path] = []
    for file in sorted({file for pattern in COMPANIONS for file in source.glob(pattern) if file.is_file()}):
        inside = any(Path(os.path.realpath(file)).is_relative_to(place) for place in allowed)
        (own if inside else linked).append(file)
    return own, linked


def _copy_companion(file: Path, target: Path) -> None:
    """A copy, without an `auto_map`: the Python files that it names are not copied."""
    if file.suffix == ".json":
        try:
            content = read_json(file)
        except LmcError:
            content = None  # not ours to mend
        if isinstance(content, dict) and content.pop("auto_map", None):
            target.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            return
    shutil.copyfile(file, target)
