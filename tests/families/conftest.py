"""Checkpoints of the zoo, each written once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory) -> Callable[..., Path]:
    """checkpoint_of(name, seed, dtype) -> a directory that transformers wrote; never write into it."""
    made: dict[tuple, Path] = {}

    def make(name: str, seed: int = 1, dtype: torch.dtype = torch.float32) -> Path:
        key = (name, seed, dtype)
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{name}-{seed}")
            zoo.write(name, made[key], seed, dtype)
        return made[key]

    return make


@pytest.fixture(scope="session")
def expected_of(checkpoint_of) -> Callable[..., torch.Tensor]:
    """expected_of(name) -> what transformers alone computes in float64."""
    known: dict[tuple, torch.Tensor] = {}

    def compute(name: str, seed: int = 1) -> torch.Tensor:
        if (name, seed) not in known:
            known[name, seed] = zoo.reference(checkpoint_of(name, seed), zoo.inputs(name))
        return known[name, seed]

    return compute
