"""Every family by transformers' own forward pass, block by block: the same outputs as of the whole model."""

import pytest
import torch
import zoo

from lmc_fast.checkpoints import Model
from lmc_fast.evaluation import reference
from lmc_fast.evaluation.reference import Reference
from lmc_fast.examples import Examples


def whole(directory, x):
    """What from_pretrained computes with its defaults, in float32."""
    cls = type(zoo.stock(directory, torch.float32))
    model = cls.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        out = model(**({"pixel_values": x.float()} if x.is_floating_point() else {"input_ids": x}))
    return zoo.output_of(out)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_block_by_block_it_is_the_whole_model(name, checkpoint_of, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 24 * 7)
    directory, x = checkpoint_of(name), zoo.inputs(name)
    model = Model(directory)
    found = Reference(directory, model.spec.task, model.family.architectures)
    data = x
    if model.spec.task not in ("causal", "features"):
        tokens = model.spec.task in ("masked", "tags")
        data = Examples(x, torch.zeros(x.shape if tokens else len(x), dtype=torch.int64))
    rows = found.head_inputs(data, 2)
    starts, parts = zip(*found.logits(rows, 3), strict=True)
    expected = whole(directory, x)
    expected = expected[:, :-1] if model.spec.task == "causal" else expected
    out = torch.cat(parts, 1)
    assert list(starts) == list(range(0, out.shape[1], 3)) and found.by.startswith("transformers ")
    assert (out - expected.flatten(0, -2)).abs().max() < 2e-5
    assert all(p.is_meta for p in found.model.get_input_embeddings().parameters() if not x.is_floating_point())
