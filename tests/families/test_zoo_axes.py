"""The table of axes alone: whatever is contracted in a forward pass is one co and one contra index of one space.

What is contracted with what is written down here from the forward pass, not read off the table.
"""

import pytest
import zoo

from lmc_fast.architectures.axes import (
    BLOCK_SPACES,
    MODEL_SPACES,
    PARENT,
    Move,
    axes_of,
    batch_of,
    size_of,
    slots_of,
    unfolded,
)
from lmc_fast.checkpoints import Model

WRITES = {  # slot -> the dimension along which it is added to the stream
    **{"o": 0, "down": 0, "experts_down": 1, "patch": 0, "embed": 1, "positions": 1, "types": 1, "cls": 1, "mask": 1},
    **{"distill": 1, "o_bias": 0, "down_bias": 0, "patch_bias": 0, "embed_norm_bias": 0, "attn_norm_bias": 0},
    **{"ffn_norm_bias": 0, "attn_post_norm_bias": 0, "ffn_post_norm_bias": 0, "final_norm_bias": 0},
    **{"experts_down_bias": 1, "relative": 1, "relative_norm_bias": 0},
}
READS = {  # slot -> the dimension that is summed with the stream
    **{"q": 1, "k": 1, "v": 1, "up": 1, "gate": 1, "router": 1, "switch": 1, "experts_up": 2, "experts_gate": 2},
    **{"head": 1, "head_transform": 1, "pooler": 1},
}
INSIDE = [  # (writer, its dimension, reader, its dimension, how many outer indices only the reader has)
    *[(slot, 0, "k", 0) for slot in ("q", "q_bias")],
    ("q", 0, "k_bias", 0),
    *[(slot, 0, "o", 1) for slot in ("v", "v_bias")],
    *[(slot, 0, "down", 1) for slot in ("up", "up_bias")],
    *[(slot, 1, "experts_down", 2) for slot in ("experts_up", "experts_up_bias")],
    *[(slot, 0, "head", 1) for slot in ("head_transform", "head_transform_bias", "head_norm_bias")],
]
FOLLOWS = [  # acts channel by channel on what the other moves: follows its order, and no more
    ("gate", 0, "up", 0),
    ("gate_bias", 0, "up", 0),
    ("experts_gate", 1, "experts_up", 1),
    ("experts_gate_bias", 1, "experts_up", 1),
    *[(slot, 0, "experts_up", 0) for slot in ("router", "router_bias")],
    ("head_norm", 0, "head_transform", 0),
    ("attn_post_norm", 0, "o", 0),
    ("ffn_post_norm", 0, "o", 0),
    ("embed_norm", 0, "embed", 1),
    ("relative_norm", 0, "relative", 1),
]


def last(spec, slot, dim):
    return axes_of(spec, slot)[dim][-1]


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_contraction_is_one_co_and_one_contra(name, checkpoint_of):
    spec = Model(checkpoint_of(name)).spec
    written = [last(spec, slot, dim) for slot, dim in WRITES.items() if spec.shape(slot)]
    read = [
        last(spec, slot, dim)
        for slot, dim in READS.items()
        if spec.shape(slot) and not (slot == "head" and (spec.head_transform or spec.headless))
    ]
    assert {(i.space, i.move) for i in written} == {("stream", Move.CO)}
    assert {(i.space, i.move) for i in read} == {("stream", Move.CONTRA)}
    for slot, dim, other, other_dim in INSIDE:
        if spec.shape(slot) and spec.shape(other) and not (other == "head" and not spec.head_transform):
            x, y = last(spec, slot, dim), last(spec, other, other_dim)
            assert x.space == y.space and {x.move, y.move} == {Move.CO, Move.CONTRA}, (slot, other)
    for slot, dim, other, other_dim in FOLLOWS:
        if spec.shape(slot) and spec.shape(other):
            x, y = last(spec, slot, dim), last(spec, other, other_dim)
            assert x.space == y.space and x.move is Move.ORDER, slot


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_table_fits_every_slot(name, checkpoint_of):
    spec = Model(checkpoint_of(name)).spec
    moved = {slot for space in (*MODEL_SPACES, *BLOCK_SPACES) for slot, _ in slots_of(spec, space)}
    for slot, shape in spec.shapes.items():
        axes = axes_of(spec, slot)
        assert bool(axes) == (slot in moved)
        if not axes:
            continue
        assert len(axes) == len(shape)
        indices, sizes = unfolded(spec, slot)
        assert len(indices) == len(sizes) and sizes.count(-1) <= 1
        start = 0
        for axis, length in zip(axes, shape, strict=True):
            mine, start = sizes[start : start + len(axis)], start + len(axis)
            product = 1
            for size in mine:
                product *= size
            assert product == length or (-1 in mine and length % -product == 0), slot
        spaces = [index.space for index in indices if index.space]
        assert len(set(spaces)) == len(spaces)
        for space in spaces:  # what lies in a place of another space has that space before it
            assert space not in PARENT or spaces.index(PARENT[space]) < spaces.index(space)
            assert batch_of(spec, space) == ((size_of(spec, PARENT[space]),) if space in PARENT else ())
    for slot in WRITES.keys() | READS.keys():
        assert not spec.shape(slot) or axes_of(spec, slot) or (slot == "head" and spec.headless), slot
