"""The tensors of checkpoint files, as transformers' own loader is handed them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


class Part:
    """A stored tensor, or rows of it, for a loader that asks for [...] once it is wanted."""

    def __init__(self, stored: Any, rows: Tensor | None):
        self._stored, self._numbers = stored, None if rows is None else rows.tolist()

    def __getitem__(self, key: Any) -> Tensor:
        numbers = self._numbers
        if numbers is None:
            return self._stored[key]
        if numbers[-1] - numbers[0] == len(numbers) - 1:  # they ascend
            return self._stored[numbers[0] : numbers[-1] + 1]
        return torch.cat([self._stored[n : n + 1] for n in numbers])


def names_in(file: str) -> list[str]:
    if file.endswith(".safetensors"):
        with safe_open(file, framework="pt") as tensors:
            return list(tensors.keys())
    return list(_pickled(file))


@contextmanager
def tensors_in(file: str) -> Iterator[Callable[[str], Any]]:
    """Name -> what transformers reads that tensor from."""
    if file.endswith(".safetensors"):
        with safe_open(file, framework="pt") as tensors:
            yield tensors.get_slice
    else:
        yield _pickled(file).__getitem__


def _pickled(file: str) -> dict[str, Tensor]:
    from transformers.modeling_utils import load_state_dict

    return load_state_dict(file)
