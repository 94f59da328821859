"""Lazy reading of a Hugging Face checkpoint directory: safetensors or, where there are none, weights of torch.save.

Tensors are read into memory of their own, not mapped: mapped pages count as the process's memory for as long as the
file is open.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LmcError
from ..files import MIB, read_object
from .identity import Identity
from .pickled import PickledFile
from .tensor_file import FLOATS, TensorFile

_SINGLE = "model.safetensors"
_INDEX = f"{_SINGLE}.index.json"
_PICKLED = "pytorch_model.bin"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_HUB_FILES = ["*.safetensors", _INDEX, "*.json", "*.txt", "*.model", "*.jinja"]
_GGUF = "GGUF is not read; convert with transformers: from_pretrained(DIR, gguf_file=FILE), then save_pretrained"
_INDEX_BYTES = 64 * MIB
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
        self.config = read_object(self.path / "config.json", remedy=f"is {self.source} a checkpoint directory?")
        if self.config.get("quantization_config") is not None:
            method = self.config["quantization_config"]
            method = method.get("quant_method", "") if isinstance(method, dict) else ""
            raise LmcError(
                f"{path} is quantised ({method or 'unknown method'}); alignment needs float weights: use the original "
                "checkpoint, or save a dequantised copy with transformers first"
            )
        files, promised = self._locate()
        self._files = {name: _opened(self.path / name) for name in files}
        self.identity = Identity((self.path / "config.json", *(self.path / name for name in files)))
        # as transformers does: every tensor of every file counts, wherever the index sends it; the last file wins
        self._file_of = {tensor: name for name in files for tensor in self._files[name].names}
        lost = sorted(promised - self._file_of.keys())
        if lost:
            raise LmcError(f"{self.path} lacks tensor {lost[0]} that its index promises; download it again")

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._home(name).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        kind = self._home(name).kind(name)
        if kind not in FLOATS:
            raise LmcError(f"{self.path}: tensor {name} is {kind}, not a float; use the original float checkpoint")
        return FLOATS[kind]

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

    def _home(self, name: str) -> TensorFile | PickledFile:
        return self._files[self._file_of[name]]

    def _locate(self) -> tuple[list[str], set[str]]:
        """(names of the files to read, in order; tensors that an index promises), as transformers chooses them.

        A file that config.json's transformers_weights names comes first, then a single file before an index, and
        safetensors before weights of torch.save.
        """
        chosen, ends, listing = self.config.get("transformers_weights"), ".safetensors", ".safetensors.index.json"
        if chosen is not None:
            if not isinstance(chosen, str) or Path(chosen).name != chosen or not chosen.endswith((ends, listing)):
                raise LmcError(
                    f"{self.path / 'config.json'}: transformers_weights is {chosen!r}, which is no safetensors file"
                )
            return self._indexed(chosen, ends) if chosen.endswith(listing) else ([chosen], set())
        for single, ending in ((_SINGLE, ends), (_PICKLED, ".bin")):
            if (self.path / single).is_file():
                return [single], set()
            if (self.path / f"{single}.index.json").is_file():
                return self._indexed(f"{single}.index.json", ending)
        raise LmcError(f"{self.path} has no {_SINGLE}, no {_PICKLED} and no index of either")

    def _indexed(self, name: str, ending: str) -> tuple[list[str], set[str]]:
        """As _locate, from an index, which names no file outside the directory."""
        index = self.path / name
        content = read_object(index, _INDEX_BYTES, "download it again")
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise LmcError(f"{index} has no weight_map; download it again")
        for tensor, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
                raise LmcError(f"{index} sends tensor {tensor} to '{file}', outside the directory; refused")
            if not file.endswith(ending):
                raise LmcError(f"{index} names '{file}', which does not end in {ending}; refused")
        if not isinstance(content.get("metadata"), dict):  # transformers does without the rest, but not without this
            raise LmcError(f"{index} has no metadata, without which transformers does not load it; download it again")
        return sorted(set(weight_map.values())), set(weight_map)


def _opened(file: Path) -> TensorFile | PickledFile:
    return PickledFile(file) if file.suffix == ".bin" else TensorFile(file)
