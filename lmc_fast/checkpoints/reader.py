"""Lazy reading of a Hugging Face checkpoint directory: safetensors only, single file or sharded, nothing unpickled.

Tensors are read into memory of their own, not mapped: mapped pages count as the process's memory for as long as the
file is open.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LmcError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_HUB_FILES = ["*.safetensors", _INDEX, "*.json", "*.txt", "*.model", "*.jinja"]
_GGUF = "GGUF is not read; convert with transformers: from_pretrained(DIR, gguf_file=FILE), then save_pretrained"
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_OTHERS = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
DTYPE_NAMES = {dtype: name for name, dtype in (_FLOATS | _OTHERS).items()}  # as the format calls them
_CHECKED = 1 << 20  # elements that are looked at together for NaN
RUN_ELEMENTS = 1 << 22  # of a tensor that is read by runs


def resolve(path: str | Path) -> Path:
    """A local directory, or the local copy of a hub repository (downloaded if need be). Raises LmcError."""
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.suffix == ".gguf":
        raise LmcError(f"{path}: {_GGUF}")
    if local.exists():
        raise LmcError(f"{path} is a file; give the directory that holds config.json and model.safetensors")
    if not _HUB_ID.match(str(path)) or str(path).startswith("."):
        raise LmcError(f"{path} does not exist; give a checkpoint directory or a hub id such as EleutherAI/pythia-160m")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub raises a dozen kinds; each means that the repository is not to be had
        raise LmcError(
            f"{path} is no local directory, and the hub did not deliver it ({type(error).__name__}); check the name"
        ) from error


class TensorFile:
    """An open safetensors file. What is read is a copy: nothing of the file stays mapped.

    Raises LmcError for a missing, corrupt or truncated file.
    """

    def __init__(self, file: Path):
        self.file = file
        if not file.is_file():
            raise LmcError(f"{file} is missing; download the checkpoint again")
        try:
            with safe_open(file, framework="pt"):  # checks offsets, sizes and the file's length
                self._handle = open(file, "rb", buffering=0)  # noqa: SIM115
        except (SafetensorError, OSError) as error:
            raise LmcError(f"{file} is corrupt or truncated ({error}); download it again") from error
        # the format: length of the header (8 bytes, little-endian), header in JSON, bytes of the tensors
        length = int.from_bytes(self._handle.read(8), "little")
        header = json.loads(self._handle.read(length))
        self._entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        self._first = 8 + length

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def kind(self, name: str) -> str:
        """The dtype as the format calls it."""
        return self._entries[name]["dtype"]

    def dtype(self, name: str) -> torch.dtype:
        kind = self.kind(name)
        if kind not in _FLOATS | _OTHERS:
            raise LmcError(f"{self.file}: tensor {name} is {kind}, which is not read; use the original checkpoint")
        return (_FLOATS | _OTHERS)[kind]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def read(self, name: str) -> Tensor:
        """Raises LmcError for NaN or infinity, a dtype that torch does not have, or a file that became shorter."""
        return self._read(name, self.shape(name), 0)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the first dimension."""
        rows, *rest = self.shape(name)
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start} to {stop} of {name}, which has {rows}")
        return self._read(name, (stop - start, *rest), start * math.prod(rest))

    def _read(self, name: str, shape: tuple[int, ...], skipped: int) -> Tensor:
        """`shape` elements of a tensor, from its element number `skipped` on."""
        tensor = torch.empty(shape, dtype=self.dtype(name))
        flat = tensor.view(-1)
        buffer, done = flat.view(torch.uint8).numpy().data, 0
        offset = self._first + self._entries[name]["data_offsets"][0] + skipped * tensor.element_size()
        try:
            while done < len(buffer):  # one call reads 2 GiB at most
                count = os.preadv(self._handle.fileno(), [buffer[done:]], offset + done)
                if not count:
                    raise OSError("the file has become shorter")
                done += count
        except OSError as error:
            raise LmcError(f"{self.file} is corrupt ({error}); download it again") from error
        if tensor.is_floating_point() and not all(part.isfinite().all() for part in flat.split(_CHECKED)):
            raise LmcError(f"{self.file}: tensor {name} holds NaN or infinity")
        return tensor


class Checkpoint:
    """Names, shapes and tensors of one checkpoint directory. Opening reads headers only.

    Raises LmcError for a missing, corrupt or truncated file, pickled weights, quantised weights, and index entries that
    point outside the directory.
    """

    def __init__(self, path: str | Path):
        self.source = str(path)
        self.path = resolve(path)
        if any(self.path.glob("*.gguf")) and not any(self.path.glob("*.safetensors")):
            raise LmcError(f"{path}: {_GGUF}")
        self.config = self._read_json(self.path / "config.json")
        if self.config.get("quantization_config"):
            method = self.config["quantization_config"]
            method = method.get("quant_method", "") if isinstance(method, dict) else ""
            raise LmcError(
                f"{path} is quantised ({method or 'unknown method'}); alignment needs float weights: use the original "
                "checkpoint, or save a dequantised copy with transformers first"
            )
        files, promised = self._locate()
        self._files = {name: TensorFile(self.path / name) for name in files}
        # as transformers does: every tensor of every file counts, wherever the index sends it; the last file wins
        self._file_of = {tensor: name for name in files for tensor in self._files[name].names}
        lost = sorted(promised - self._file_of.keys())
        if lost:
            raise LmcError(f"{self.path} lacks tensor {lost[0]} that {_INDEX} promises; download it again")

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._home(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        kind = self._home(name).kind(name)
        if kind not in _FLOATS:
            raise LmcError(f"{self.path}: tensor {name} is {kind}, not a float; use the original float checkpoint")
        return _FLOATS[kind]

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype. Raises LmcError if it holds NaN or infinity, or cannot be read."""
        return self._home(name).read(name)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor's first dimension, and nothing else of it; otherwise as `read`."""
        return self._home(name).read_rows(name, start, stop)

    def read_runs(self, name: str) -> Iterator[Tensor]:
        """All of a tensor, by runs of its first dimension that have RUN_ELEMENTS, or one row."""
        if not self.shape(name):
            yield self.read(name)
            return
        rows, *rest = self.shape(name)
        size = max(1, RUN_ELEMENTS // max(1, math.prod(rest)))
        for start in range(0, rows, size):
            yield self.read_rows(name, start, min(start + size, rows))

    def stored_dtype(self, name: str) -> torch.dtype:
        """As `dtype`, but not only floats."""
        return self._home(name).dtype(name)

    def _home(self, name: str) -> TensorFile:
        return self._files[self._file_of[name]]

    def _locate(self) -> tuple[list[str], set[str]]:
        """(names of the files to read, in order; tensors that an index promises), as transformers chooses them.

        A file that config.json's transformers_weights names comes first, then a single file, then an index.
        """
        chosen = self.config.get("transformers_weights") or _SINGLE
        if not isinstance(chosen, str) or Path(chosen).name != chosen or not chosen.endswith((".safetensors", _INDEX)):
            raise LmcError(
                f"{self.path / 'config.json'}: transformers_weights is {chosen!r}, which is no safetensors file there"
            )
        if chosen.endswith(".safetensors") and ((self.path / chosen).is_file() or chosen != _SINGLE):
            return [chosen], set()
        index = self.path / (_INDEX if chosen == _SINGLE else chosen)
        if index.is_file():
            weight_map = self._read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise LmcError(f"{index} has no weight_map; download it again")
            for tensor, file in weight_map.items():
                if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
                    raise LmcError(f"{index} sends tensor {tensor} to '{file}', outside the directory; refused")
                if not file.endswith(".safetensors"):
                    raise LmcError(f"{index} names '{file}', which is not safetensors; refused")
            return sorted(set(weight_map.values())), set(weight_map)
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.pt*")):
            raise LmcError(f"{self.path} has only pickled weights, which are not loaded; convert to safetensors first")
        raise LmcError(f"{self.path} has no {_SINGLE} and no {_INDEX}")

    def _read_json(self, file: Path) -> dict[str, Any]:
        if not file.exists():
            raise LmcError(f"{file} is missing; is {self.source} a checkpoint directory?")
        try:
            value = json.loads(file.read_text())
        except (ValueError, OSError) as error:
            raise LmcError(f"{file} is not valid JSON ({error})") from error
        if not isinstance(value, dict):
            raise LmcError(f"{file} is not a JSON object")
        return value
