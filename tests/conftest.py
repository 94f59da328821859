"""Fixtures of all tests: tiny checkpoints, trained pairs where there are some, poisoned memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoints_tiny import VARIANTS, VOCAB, randomize, save_tokenizer
from torch import Tensor

SHARED = "LMC_FAST_SHARED"  # names a directory with trained pairs: pairs/NAME/{a,b,train.npy,...}
torch.set_num_threads(1)  # the models of most tests are too small to share


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory) -> Callable[..., Path]:
    """make_checkpoint(variant, seed, dtype) -> a directory that transformers wrote; cached, so never write into it."""
    made: dict[tuple, Path] = {}

    def make(variant: str = "neox", seed: int = 1, dtype: torch.dtype = torch.float32) -> Path:
        key = (variant, seed, dtype)
        if key not in made:
            directory = tmp_path_factory.mktemp(f"{variant}-{seed}")
            model = VARIANTS[variant]()
            randomize(model, seed)
            model.to(dtype).save_pretrained(directory)
            save_tokenizer(directory)
            made[key] = directory
        return made[key]

    return make


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCAB, (3, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared_pair() -> Callable[[str], Path]:
    """shared_pair(name) -> the directory of a really trained pair, or a skip where there is none."""

    def find(name: str) -> Path:
        if not os.environ.get(SHARED):
            pytest.skip(f"needs a trained pair: set {SHARED} to a directory that holds pairs/{name}")
        directory = Path(os.environ[SHARED]) / "pairs" / name
        if not directory.is_dir():
            pytest.skip(f"no trained pair at {directory}")
        return directory

    return find
