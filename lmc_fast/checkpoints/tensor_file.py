"""One safetensors file: names, kinds and shapes from its header, tensors and rows of them when they are asked for."""

from __future__ import annotations

import math
import os
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import LmcError
from ..files import MIB, parse_json, require_regular

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
OTHERS = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
DTYPE_NAMES = {dtype: name for name, dtype in (FLOATS | OTHERS).items()}  # as the format calls them
_LFS = b"version https://git-lfs"
HEADER_BYTES = 100_000_000  # the format allows no more
_USUAL_HEADER = 32 * MIB  # has room for a quarter of a million tensors
_CHECKED = 1 << 20  # elements that are looked at together for NaN


def torch_dtype(kind: str, file: Path, name: str) -> torch.dtype:
    """The dtype that the format calls `kind`. Raises LmcError for one that is not read."""
    if kind not in FLOATS | OTHERS:
        raise LmcError(f"{file}: tensor {name} is {kind}, which is not read; use the original checkpoint")
    return (FLOATS | OTHERS)[kind]


def require_writable(dtype: torch.dtype | None) -> None:
    """Raises LmcError unless weights can be written in a dtype; None stands for their own."""
    if dtype is not None and dtype not in FLOATS.values():
        names = ", ".join(str(known) for known in FLOATS.values())
        raise LmcError(f"dtype {dtype!r} is none that weights are written in; give one of {names}")


def read_elements(handle: FileIO, offset: int, count: int, dtype: torch.dtype) -> Tensor:
    """`count` numbers (count,) from byte `offset` of a file on. Raises LmcError where the file ends before."""
    flat = torch.empty(count, dtype=dtype)
    buffer, done = flat.view(torch.uint8).numpy().data, 0
    try:
        while done < len(buffer):  # one call reads 2 GiB at most
            got = os.preadv(handle.fileno(), [buffer[done:]], offset + done)
            if not got:
                raise OSError("the file has become shorter")
            done += got
    except OSError as error:
        raise LmcError(f"{handle.name} is corrupt ({error}); download it again") from error
    return flat


def require_weights(file: Path) -> None:
    """Raises LmcError where there is no ordinary file, or what git leaves in place of a large one."""
    require_regular(file, "download the checkpoint again")
    try:
        with FileIO(file) as handle:
            begin = handle.read(len(_LFS))
    except OSError as error:
        raise LmcError(f"{file} cannot be read ({error.strerror}); download the checkpoint again") from error
    if begin == _LFS:
        raise LmcError(f"{file} is a pointer of Git LFS, not the weights; run git lfs pull there")


def require_finite(file: Path, name: str, tensor: Tensor) -> None:
    """Raises LmcError where a contiguous tensor of floats holds NaN or infinity."""
    parts = tensor.view(-1).split(_CHECKED) if tensor.is_floating_point() and tensor.numel() else ()
    if not all(torch.stack(part.aminmax()).isfinite().all() for part in parts):  # NaN is both
        raise LmcError(f"{file}: tensor {name} holds NaN or infinity")


class TensorFile:
    """An open safetensors file. What is read is a copy: nothing of the file stays mapped. `metadata`: of its header.

    Raises LmcError for a missing, corrupt or truncated file.
    """

    def __init__(self, file: Path, header_bytes: int = _USUAL_HEADER):
        self.file = file
        require_weights(file)
        # the format: length of the header (8 bytes, little-endian), header in JSON, bytes of the tensors
        try:
            self._handle = FileIO(file)
            length = int.from_bytes(self._handle.read(8), "little")
            if length > header_bytes:
                raise SafetensorError(f"its header would have {length:,} bytes")
            with safe_open(file, framework="pt"):  # checks offsets, sizes and the file's length
                header = parse_json(self._handle.read(length), file)
        except (SafetensorError, OSError, MemoryError, UnicodeError) as error:  # the last: of a path's letters
            raise LmcError(f"{file} is corrupt or truncated ({error}); download it again") from error
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self._entries: dict[str, dict[str, Any]] = header
        self._first = 8 + length
        self._finite: set[tuple[str, int, int]] = set()  # what was read and looked at before

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def kind(self, name: str) -> str:
        """The dtype as the format calls it."""
        return str(self._entries[name]["dtype"])

    def dtype(self, name: str) -> torch.dtype:
        return torch_dtype(self.kind(name), self.file, name)

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
        dtype = self.dtype(name)
        offset = self._first + self._entries[name]["data_offsets"][0] + skipped * dtype.itemsize
        tensor = read_elements(self._handle, offset, math.prod(shape), dtype).view(shape)
        if (name, skipped, len(tensor.view(-1))) not in self._finite:
            require_finite(self.file, name, tensor)
            self._finite.add((name, skipped, len(tensor.view(-1))))
        return tensor
