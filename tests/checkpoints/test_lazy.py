"""Lazy weights: sequences and tables made on demand, and how many of them are alive at a time."""

import pytest
import torch

from lmc_fast.checkpoints import LazyBlocks, Model, Table, Weights


def test_blocks_are_a_sequence_made_anew():
    made = []
    blocks = LazyBlocks(4, lambda i: made.append(i) or {"x": torch.full((2,), float(i))})
    assert len(blocks) == 4 and not made
    assert [float(w["x"][0]) for w in blocks] == [0, 1, 2, 3]
    assert float(blocks[-1]["x"][0]) == 3 and made == [0, 1, 2, 3, 3]
    assert [float(w["x"][0]) for w in blocks[1:3]] == [1, 2]
    with pytest.raises(IndexError):
        blocks[4]
    made.clear()
    twice = blocks.map(lambda i, w: {"x": w["x"] * 2 + i})
    assert not made and float(twice[2]["x"][0]) == 6 and made == [2]


def test_tables_by_rows():
    whole = torch.arange(30.0).view(10, 3)
    table = Table.of(whole).map(lambda t: t * 2).map(lambda t: t + 1)
    expected = whole * 2 + 1
    assert torch.equal(table.rows(2, 5), expected[2:5]) and table.rows(4, 4).shape == (0, 3)
    assert list(table.runs(4)) == [(0, 4), (4, 8), (8, 10)]
    assert torch.equal(torch.cat([rows for _, rows in table.chunks(4)]), expected)
    for rows in ([0, 1, 2, 5, 9], [3], [9], list(range(10))):
        assert torch.equal(table.pick(torch.tensor(rows)), expected[rows])


@pytest.mark.parametrize("variant", ["neox", "gpt2-tied", "llama-tied-biased"])
def test_opened_weights_are_the_loaded_ones(variant, make_checkpoint):
    model = Model(make_checkpoint(variant))
    lazy, eager = model.open_weights(torch.float64), model.load(torch.float64)
    assert not lazy.ends.keys() & {"embed", "head"} and lazy.spec == eager.spec
    again = lazy.load()
    for x, y in zip([again.ends, *again.blocks], [eager.ends, *eager.blocks], strict=True):
        assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
    head = lazy.table("head")
    assert head is not None and torch.equal(head.rows(3, 9), eager.ends["head"][3:9])
    assert eager.table("nothing") is None and isinstance(eager.blocks, list)


def test_functions_reach_every_row_and_keep_the_dtype(make_checkpoint):
    model = Model(make_checkpoint("gpt2"))
    seen = []

    def ends(w):
        seen.append({name: len(t) for name, t in w.items() if name in ("embed", "head")})
        assert all(t.dtype == torch.float64 for t in w.values())
        return {name: t + 1 for name, t in w.items()}

    def change(w):
        return w.in_dtype(torch.float64, ends, lambda i, b: {name: t * (i + 2) for name, t in b.items()})

    lazy, eager = change(model.open_weights()), change(model.load())
    assert isinstance(lazy.blocks, LazyBlocks) and isinstance(eager, Weights)
    seen.clear()
    for name in ("embed", "head"):
        parts = torch.cat([rows for _, rows in lazy.tables[name].chunks(7)])
        assert parts.dtype == torch.float32 and torch.equal(parts, eager.ends[name])
    assert {(s["embed"], s["head"]) for s in seen} == {(7, 0), (5, 0), (0, 7), (0, 5)}
    assert torch.equal(lazy.blocks[1]["q"], eager.blocks[1]["q"])
    assert torch.equal(lazy.ends["final_norm"], eager.ends["final_norm"])
