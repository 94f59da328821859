"""Streams come back: last block first, in a block in the order in which they were put."""

import pytest
import torch

from lmc_fast.learning.activation_checkpoints import ActivationCheckpoints

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("counts", [(1,), (3, 3), (2, 1, 4)])
def test_order(counts, offload, device):
    boundaries = ActivationCheckpoints(offload)
    blocks = [[torch.randn(5, 3, device=device) for _ in range(count)] for count in counts]
    for block in blocks:
        boundaries.next_block()
        for x in block:
            boundaries.put(x)
    for block in reversed(blocks):
        for x in block:
            found = boundaries.take()
            assert found.device == x.device and torch.equal(found, x)
