"""The shipped model pool in fusion_bench itself: its fusion methods see aligned models."""

import numpy as np
import pytest
import torch
import zoo
from fusion_bench.method import SimpleAverageAlgorithm

import lmc_fast as lmc
from examples.fusion_bench_pool import AlignedCausalLMPool


@pytest.mark.parametrize("name", ["llama", "gpt2-tied"])
def test_its_average_is_that_of_aligned_models(name, tmp_path):
    for side, seed in (("a", 1), ("b", 2)):
        zoo.write(name, tmp_path / side, seed)
    tokens = torch.randint(40, (40, 16), generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "ids.npy", tokens.numpy())
    models = {side: str(tmp_path / side) for side in "ab"}
    pool = AlignedCausalLMPool(
        models, tokenizer=None, data=str(tmp_path / "ids.npy"), length=16, options={"method": "activation"}
    )
    merged = SimpleAverageAlgorithm().run(pool)
    pair = lmc.open_pair(*models.values())
    found = lmc.align(pair, tokens, method="activation")
    first, second = (stock.model().state_dict() for stock in found.state_dicts(pair))
    for key, t in merged.state_dict().items():
        wanted = (first[key].double() + second[key].double()) / 2
        assert (t - wanted).abs().max() <= 1e-6 * wanted.abs().max(), key
    a, b = (zoo.stock(tmp_path / side, torch.float32).state_dict() for side in "ab")
    key = next(k for k in a if k.endswith("mlp.down_proj.weight") or k.endswith("mlp.c_proj.weight"))
    assert (merged.state_dict()[key] - (a[key] + b[key]) / 2).abs().max() > 0.01  # which the plain average is not
