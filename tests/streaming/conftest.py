"""A tiny pair in memory and in a store."""

import pytest
import torch

from lmc_fast.checkpoints import Model
from lmc_fast.streaming.packing import pieces
from lmc_fast.streaming.store import Store


@pytest.fixture(scope="session")
def make_pair(make_checkpoint):
    """make_pair(variant, dtype) -> (A, B) in memory."""

    def make(variant="neox", dtype=torch.float32):
        return [Model(make_checkpoint(variant, seed)).load(dtype) for seed in (1, 2)]

    return make


@pytest.fixture
def make_store(make_pair, tmp_path):
    """make_store(variant, dtype, ...) -> (store, A, B)."""

    def make(variant="neox", dtype=torch.float32, name="store", **options):
        a, b = make_pair(variant)
        store = Store.create(tmp_path / name, a.spec, pieces(a, b), dtype, **options)
        return store, a.to(dtype), b.to(dtype)

    return make
