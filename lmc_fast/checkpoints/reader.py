"""Lazy reading of a Hugging Face checkpoint directory: safetensors only, single file or sharded, nothing unpickled."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LmcError

_INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_HUB_FILES = ["*.safetensors", _INDEX, "*.json", "*.txt", "*.model", "*.jinja"]
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_GGUF = "GGUF is not read; convert with transformers: from_pretrained(DIR, gguf_file=FILE), then save_pretrained"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


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
        self._file_of = self._locate()
        self._open: dict[str, Any] = {name: self._open_file(name) for name in sorted(set(self._file_of.values()))}
        for tensor, file in self._file_of.items():
            if tensor not in self._keys[file]:
                raise LmcError(f"{self.path / file} lacks tensor {tensor} that {_INDEX} promises; download it again")
        if not self._file_of:
            self._file_of = {name: file for file, names in self._keys.items() for name in names}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        kind = self._slice(name).get_dtype()
        if kind not in _DTYPES:
            raise LmcError(f"{self.path}: tensor {name} is {kind}, not a float; use the original float checkpoint")
        return _DTYPES[kind]

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype. Raises LmcError if it holds NaN or infinity."""
        try:
            tensor = self._handle(name).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise LmcError(f"{self.path / self._file_of[name]} is corrupt ({error}); download it again") from error
        if tensor.dtype in _FLOATS and not tensor.isfinite().all():
            raise LmcError(f"{self.path / self._file_of[name]}: tensor {name} holds NaN or infinity")
        return tensor

    def _handle(self, name: str) -> Any:
        return self._open[self._file_of[name]]

    def _slice(self, name: str) -> Any:
        return self._handle(name).get_slice(name)

    def _locate(self) -> dict[str, str]:
        """Tensor name -> file name, both checked; empty where a single file tells by itself."""
        self._keys: dict[str, set[str]] = {}
        index = self.path / _INDEX
        if index.exists():
            weight_map = self._read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise LmcError(f"{index} has no weight_map; download it again")
            for tensor, file in weight_map.items():
                if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
                    raise LmcError(f"{index} sends tensor {tensor} to '{file}', outside the directory; refused")
                if not file.endswith(".safetensors"):
                    raise LmcError(f"{index} names '{file}', which is not safetensors; refused")
            return dict(weight_map)
        if (self.path / "model.safetensors").exists():
            self._open_file("model.safetensors")
            return dict.fromkeys(self._keys["model.safetensors"], "model.safetensors")
        if any(self.path.glob("*.bin")) or any(self.path.glob("*.pt*")):
            raise LmcError(f"{self.path} has only pickled weights, which are not loaded; convert to safetensors first")
        raise LmcError(f"{self.path} has no model.safetensors and no {_INDEX}")

    def _open_file(self, name: str) -> Any:
        file = self.path / name
        if not file.exists():
            raise LmcError(f"{file} is missing; download the checkpoint again")
        try:
            handle = safe_open(file, framework="pt")
            self._keys[name] = set(handle.keys())
        except (SafetensorError, OSError) as error:
            raise LmcError(f"{file} is corrupt or truncated ({error}); download it again") from error
        return handle

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
