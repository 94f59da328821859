"""Lazy reading of a Hugging Face checkpoint directory: safetensors or, where there are none, weights of torch.save.

Tensors are read into memory of their own, not mapped: mapped pages count as the process's memory for as long as the
file is open.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import LmcError
from ..files import read_object, require_regular
from .hub import GGUF, INDEX_BYTES, PICKLED, SINGLE, Repository, download, find, headers
from .identity import Identity
from .pickled import PickledFile
from .tensor_file import FLOATS, TensorFile

_WEIGHTS = (".safetensors", ".bin", ".index.json")
RUN_ELEMENTS = 1 << 22  # of a tensor that is read by runs


class Tensors(Protocol):
    """Tensors by name, each a copy where it is read: a TensorFile and what answers like one."""

    @property
    def names(self) -> list[str]: ...
    def kind(self, name: str) -> str: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> Tensor: ...
    def read_rows(self, name: str, start: int, stop: int) -> Tensor: ...


class Checkpoint:
    """Names, shapes and tensors of one checkpoint directory. Opening reads headers only.

    headers_only: of repositories on the hub, read no weights, only what is known of them (`values` is false).
    Raises LmcError for a missing, corrupt or truncated file, an adapter, GGUF, quantised weights, and index entries
    that point outside the directory.
    """

    def __init__(self, path: str | Path, headers_only: bool = False):
        place = find(path)
        self.source, self.remote = str(path), None
        if headers_only and isinstance(place, Repository):
            self.remote = headers(place)
        if self.remote:
            self.path = self.remote[0]
        else:
            self.path = place if isinstance(place, Path) else download(place)
        self.home: Path | None = self.path  # the directory, of what has one
        self._refuse_others()
        self.config = read_object(self.path / "config.json", remedy=f"is {self.source} a checkpoint directory?")
        refuse_quantised(self.config, self.source)
        files, promised = (list(self.remote[1]), set[str]()) if self.remote else self._locate()
        self._files: Mapping[str, Tensors] = (
            self.remote[1] if self.remote else {name: _opened(self.path / name) for name in files}
        )
        read = [] if self.remote else files
        self.identity = Identity((self.path / "config.json", *(self.path / name for name in read)))
        # as transformers does: every tensor of every file counts, wherever the index sends it; the last file wins
        self._file_of = {tensor: name for name in files for tensor in self._files[name].names}
        lost = sorted(promised - self._file_of.keys())
        if lost:
            raise LmcError(f"{self.path} lacks tensor {lost[0]} that its index promises; download it again")

    @property
    def values(self) -> bool:
        """Whether tensors can be read."""
        return self.remote is None

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

    def _home(self, name: str) -> Tensors:
        return self._files[self._file_of[name]]

    def _refuse_others(self) -> None:
        """Raises LmcError for what is no model's weights."""
        present = {file.name for file in self.path.iterdir()}
        own = [n for n in present if n.startswith(("model", "pytorch_model")) and n.endswith(_WEIGHTS)]
        if own or self.remote:
            return
        if "adapter_config.json" in present:
            base = read_object(self.path / "adapter_config.json").get("base_model_name_or_path") or "its base model"
            raise LmcError(
                f"{self.source} is an adapter for {base}, not a model: merge it first with peft: PeftModel."
                "from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), ADAPTER).merge_and_unload()"
                ".save_pretrained(NEW), and give NEW"
            )
        if any(name.endswith(".gguf") for name in present):
            raise LmcError(f"{self.source}: {GGUF}")

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
        for single, ending in ((SINGLE, ends), (PICKLED, ".bin")):
            if _is_there(self.path / single):
                return [single], set()
            if _is_there(self.path / f"{single}.index.json"):
                return self._indexed(f"{single}.index.json", ending)
        raise LmcError(f"{self.path} has no {SINGLE}, no {PICKLED} and no index of either")

    def _indexed(self, name: str, ending: str) -> tuple[list[str], set[str]]:
        """As _locate, from an index, which names no file outside the directory."""
        index = self.path / name
        content = read_object(index, INDEX_BYTES, "download it again")
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


def _is_there(file: Path) -> bool:
    """Whether a file can be read. Raises LmcError for what stands in its place: pipes, devices."""
    if file.exists() and not file.is_dir():  # a directory is passed over, as transformers does
        require_regular(file)
    return file.is_file()


def refuse_quantised(config: dict[str, Any], source: str) -> None:
    """Raises LmcError where config.json says that weights are quantised."""
    method = config.get("quantization_config")
    if method is not None:
        method = method.get("quant_method", "") if isinstance(method, dict) else ""
        raise LmcError(
            f"{source} is quantised ({method or 'unknown method'}); alignment needs float weights: use the original "
            "checkpoint, or save a dequantised copy with transformers first"
        )


def _opened(file: Path) -> TensorFile | PickledFile:
    return PickledFile(file) if file.suffix == ".bin" else TensorFile(file)
