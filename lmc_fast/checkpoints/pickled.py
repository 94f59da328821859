"""Weights in PyTorch's own format (pytorch_model.bin), read without running any code that the file may hold."""

from __future__ import annotations

import logging
import pickle
import re
import struct
import warnings
import zipfile
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from ..errors import LmcError
from ..sizes import show_bytes
from .tensor_file import DTYPE_NAMES, read_elements, require_finite, require_weights

_log = logging.getLogger("lmc_fast")
SAFE_TORCH = (2, 6)  # of torch: before, weights_only could be tricked into running code (CVE-2025-32434)
_REMEDY = "load it where you trust it and save it again with transformers' save_pretrained, as safetensors"


class PickledFile:
    """A file of torch.save that holds tensors by name. What is read is a copy; nothing of the file is mapped.

    Files from before torch 1.6, and any under a torch before 2.11, cannot be read in parts: they are held whole, and
    the log says so. Raises LmcError for a missing or damaged file, and for one that holds more than tensors by name.
    """

    def __init__(self, file: Path):
        self.file = file
        require_weights(file)
        if tuple(int(n) for n in torch.__version__.split(".")[:2]) < SAFE_TORCH:
            raise LmcError(f"{file} is not safe to read with torch {torch.__version__}; install torch 2.6 or later")
        as_they_are = _in_parts(file)
        self._tensors = _load(file, "meta") if as_they_are else {}  # places and shapes, without data
        if not self._tensors or any(_offset(t) is None for t in self._tensors.values()):
            why = f"torch {torch.__version__} does not tell where tensors lie" if as_they_are else "an old format"
            _log.info(
                "%s cannot be read in parts (%s): it is held whole, in %s", file, why, show_bytes(file.stat().st_size)
            )
            self._tensors = _load(file, "cpu")
        for name, tensor in self._tensors.items():
            if tensor.is_meta and _offset(tensor) is None:
                raise LmcError(f"{file}: tensor {name} has no values; use the original checkpoint")
        _require_room(file, self._tensors)
        self._handle = FileIO(file)

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def kind(self, name: str) -> str:
        """The dtype as safetensors calls it, or as torch does where safetensors does not have it."""
        return DTYPE_NAMES.get(self.dtype(name), str(self.dtype(name)))

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        """Raises LmcError for NaN or infinity, or a file that became shorter."""
        return self._read(name, self._tensors[name])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the first dimension."""
        rows = self.shape(name)[0]
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start} to {stop} of {name}, which has {rows}")
        return self._read(name, self._tensors[name][start:stop])

    def _read(self, name: str, part: Tensor) -> Tensor:
        """What a tensor, or a view of one, says of its place in the file."""
        if part.is_meta:
            last = sum((n - 1) * stride for n, stride in zip(part.shape, part.stride(), strict=True))
            offset = (_offset(part) or 0) + part.storage_offset() * part.element_size()
            span = read_elements(self._handle, int(offset), last + 1 if part.numel() else 0, part.dtype)
            part = span.as_strided(part.shape, part.stride()) if part.numel() else span.view(part.shape)
        tensor = part.contiguous() if part.untyped_storage().nbytes() == part.nbytes else part.clone()
        require_finite(self.file, name, tensor)
        return tensor


def _in_parts(file: Path) -> bool:
    """Whether each tensor's bytes lie in the file as they are."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        order = [name for name in archive.namelist() if name.endswith("/byteorder")]
        return plain and all(archive.read(name) == b"little" for name in order)


def _require_room(file: Path, tensors: dict[str, Tensor]) -> None:
    """Raises LmcError where a tensor that is not read yet would go beyond its entry of the archive."""
    placed = {name: tensor for name, tensor in tensors.items() if tensor.is_meta}
    if not placed:
        return
    sizes = {}
    with zipfile.ZipFile(file) as archive, file.open("rb") as handle:
        for entry in archive.infolist():
            handle.seek(entry.header_offset + 26)
            name, extra = struct.unpack("<HH", handle.read(4))  # their lengths; the data follows them
            sizes[entry.header_offset + 30 + name + extra] = entry.file_size
    for name, tensor in placed.items():
        needs, there = tensor.untyped_storage().nbytes(), sizes.get(int(_offset(tensor) or 0), 0)
        if there < needs:
            raise LmcError(f"{file} is truncated: {name} needs {needs} bytes, {there} are there; download it again")


def _offset(tensor: Tensor) -> int | None:
    """Where a tensor's storage begins in the file, if torch tells."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None)


def _load(file: Path, device: str) -> dict[str, Tensor]:
    """What torch.save wrote, if it is tensors by name and nothing else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        more = named[1] if named else "it is no plain dict of tensors"
        raise LmcError(
            f"{file} holds more than weights ({more}), and unpickling that could run code: not loaded; {_REMEDY}"
        ) from error
    except Exception as error:  # a damaged file fails anywhere in torch's or zlib's reader
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        raise LmcError(f"{file} is corrupt or truncated ({reason}); download it again") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise LmcError(f"{file} holds a {type(found).__name__}, not tensors by name; {_REMEDY}")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise LmcError(f"{file}: {name} is a {type(value).__name__}, not a tensor; {_REMEDY}")
        if value.layout is not torch.strided or value.is_quantized:
            raise LmcError(f"{file}: tensor {name} is sparse or quantised; use the original float checkpoint")
    return {name: value.detach() for name, value in found.items()}
