"""On every family: what is computed from lazy weights is what is computed from loaded ones."""

import pytest
import torch
import zoo
from elements import KNOWN, random_element

from lmc_fast.checkpoints import LazyBlocks, Model, lazy
from lmc_fast.symmetry import canonicalize


@pytest.fixture(params=[None, 100], ids=["whole", "chunks"])
def chunked(request, monkeypatch):
    """Whether tables are read by runs of a few rows; eager results are then equal up to rounding only."""
    if request.param:
        monkeypatch.setattr(lazy, "CHUNK_ELEMENTS", request.param)
    return bool(request.param)


def apart(x, y):
    pairs = list(zip([x.ends, *x.blocks], [y.ends, *y.blocks], strict=True))
    assert all(a.keys() == b.keys() and all(a[n].dtype == b[n].dtype for n in a) for a, b in pairs)
    return max((a[name] - b[name]).abs().max().item() for a, b in pairs for name in a if a[name].numel())


@pytest.mark.parametrize("name", zoo.ZOO)
def test_canonical_form_and_transforms(name, checkpoint_of, chunked):
    model = Model(checkpoint_of(name))
    element = random_element(KNOWN[name], model.spec, 3)
    moved = [element.apply(canonicalize(w)) for w in (model.load(torch.float64), model.open_weights(torch.float64))]
    assert isinstance(moved[1].blocks, LazyBlocks) and not moved[1].ends.keys() & moved[1].tables.keys()
    assert apart(moved[0], moved[1].load()) <= (1e-12 if chunked else 0)
