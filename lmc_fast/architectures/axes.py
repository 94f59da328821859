"""The one table: which space each axis of each weight slot lives in, and how a change of that space moves it.

A *space* is an index that activations have. Some spaces exist once in a model, the others once in each block:

    stream        channels of the residual stream                     (width)
    head_units    channels between a head transform and the head      (width)
    heads         key/value groups                                    (kv_heads)
      queries     query heads of a group                              (heads / kv_heads), one such space in each group
      qk, vo      what queries and keys, values and outputs share     (head_dim), one such space in each group
    units         FFN units                                           (ffn_width)
    experts                                                           (experts)
      expert_units  units of an expert                                (expert_width), one such space in each expert

A group element g of a space moves a *co* axis by g and a *contra* axis by g⁻ᵀ. A model's function is preserved because
every contracted pair of axes is one co and one contra. An *order* axis follows only the permutation in g: gains lie on
it, which act channel by channel, or another axis does the scaling (up does, gate does not).

An axis of a tensor may hold several indices, outermost first: rows of q are heads x queries x qk. A bias has its
matrix's first axis. Norms before readers have gain 1 in canonical form and do not move.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache

from .spec import Spec


class Move(Enum):
    """How an index moves under a group element g of its space."""

    CO = "by g"
    CONTRA = "by the inverse transpose of g"
    ORDER = "by the permutation in g"


@dataclass(frozen=True)
class Index:
    """One index of a slot. space: None where nothing acts (vocabulary, patches, ...)."""

    space: str | None
    move: Move = Move.CO


Axis = tuple[Index, ...]

STREAM, HEAD_UNITS = "stream", "head_units"
MODEL_SPACES = (STREAM, HEAD_UNITS)
PARENT = {"queries": "heads", "qk": "heads", "vo": "heads", "expert_units": "experts"}
BLOCK_SPACES = ("heads", "queries", "vo", "qk", "units", "experts", "expert_units")


def _axis(*spaces: str, move: Move = Move.CO) -> Axis:
    """Only the innermost index is multiplied with; the others are permuted."""
    return (*(Index(space, Move.ORDER) for space in spaces[:-1]), Index(spaces[-1], move))


_FREE: Axis = (Index(None),)
_WRITE, _READ, _GAIN = _axis(STREAM), _axis(STREAM, move=Move.CONTRA), _axis(STREAM, move=Move.ORDER)
_EXPERTS = _axis("experts", move=Move.ORDER)
_TABLE: dict[str, tuple[Axis, ...]] = {
    "q": (_axis("heads", "queries", "qk", move=Move.CONTRA), _READ),
    "k": (_axis("heads", "qk"), _READ),
    "v": (_axis("heads", "vo"), _READ),
    "o": (_WRITE, _axis("heads", "queries", "vo", move=Move.CONTRA)),
    "up": (_axis("units"), _READ),
    "gate": (_axis("units", move=Move.ORDER), _READ),
    "down": (_WRITE, _axis("units", move=Move.CONTRA)),
    "router": (_EXPERTS, _READ),
    "switch": (_FREE, _READ),
    "experts_up": (_EXPERTS, _axis("expert_units"), _READ),
    "experts_gate": (_EXPERTS, _axis("expert_units", move=Move.ORDER), _READ),
    "experts_down": (_EXPERTS, _WRITE, _axis("expert_units", move=Move.CONTRA)),
    "experts_up_bias": (_EXPERTS, _axis("expert_units")),
    "experts_gate_bias": (_EXPERTS, _axis("expert_units", move=Move.ORDER)),
    "experts_down_bias": (_EXPERTS, _WRITE),
    "sinks": (_axis("heads", "queries", move=Move.ORDER),),
    "attn_norm_bias": (_WRITE,),
    "ffn_norm_bias": (_WRITE,),
    "attn_post_norm": (_GAIN,),
    "attn_post_norm_bias": (_WRITE,),
    "ffn_post_norm": (_GAIN,),
    "ffn_post_norm_bias": (_WRITE,),
    "relative": (_FREE, _WRITE),
    "relative_norm": (_GAIN,),
    "relative_norm_bias": (_WRITE,),
    "embed": (_FREE, _WRITE),
    "positions": (_FREE, _WRITE),
    "types": (_FREE, _WRITE),
    "cls": (_FREE, _WRITE),
    "distill": (_FREE, _WRITE),
    "mask": (_FREE, _WRITE),
    "patch": (_WRITE, _FREE),
    "embed_norm": (_GAIN,),
    "embed_norm_bias": (_WRITE,),
    "final_norm_bias": (_WRITE,),
    "head": (_FREE, (Index(None), *_READ)),  # it may read several vectors side by side
    "pooler": (_FREE, _READ),
}
_WITH_HEAD_TRANSFORM = {
    "head_transform": (_axis(HEAD_UNITS), _READ),
    "head_norm": (_axis(HEAD_UNITS, move=Move.ORDER),),
    "head_norm_bias": (_axis(HEAD_UNITS),),
    "head": (_FREE, _axis(HEAD_UNITS, move=Move.CONTRA)),
}
_WITH_GAIN_PER_HEAD = {
    "q_norm": (_axis("heads", "queries", "qk", move=Move.ORDER),),
    "k_norm": (_axis("heads", "qk", move=Move.ORDER),),
}

_INPUTS = ("embed", "positions", "types", "cls", "distill", "mask", "patch", "embed_norm")
_OUTPUTS = ("final_norm", "head", "head_transform", "head_norm", "pooler", "relation")
END_SLOTS = frozenset(_INPUTS + _OUTPUTS)  # outside the blocks; their biases lie there, too
BLOCK_READERS = tuple(slot for slot, axes in _TABLE.items() if axes[-1] == _READ and slot not in END_SLOTS)
ATTN_READERS = tuple(slot for slot in BLOCK_READERS if _TABLE[slot][0][0].space == "heads")
FFN_READERS = tuple(slot for slot in BLOCK_READERS if slot not in ATTN_READERS)
# each row is added to the stream
END_ROWS = tuple(slot for slot, axes in _TABLE.items() if axes == (_FREE, _WRITE) and slot in END_SLOTS)
END_WRITERS = tuple(slot for slot, axes in _TABLE.items() if axes == (_WRITE, _FREE))  # writes with its columns


def axes_of(spec: Spec, slot: str) -> tuple[Axis, ...]:
    """The axes of a slot of this spec, () where no symmetry moves it."""
    if spec.headless and slot == "head":  # the identity stays what it is
        return ()
    return _axes(slot, spec.head_transform, spec.attention.qk_norm == "full")


@cache
def _axes(slot: str, head_transform: bool, gain_per_head: bool) -> tuple[Axis, ...]:
    table = _TABLE | (_WITH_HEAD_TRANSFORM if head_transform else {}) | (_WITH_GAIN_PER_HEAD if gain_per_head else {})
    if slot in table:
        return table[slot]
    rows = table.get(slot.removesuffix("_bias"), (_FREE,))[0]
    return () if rows == _FREE or not slot.endswith("_bias") else (rows,)


def size_of(spec: Spec, space: str) -> int:
    """How many places or channels a space has."""
    attention, ffn = spec.attention, spec.ffn
    sizes = {"heads": attention.kv_heads, "queries": attention.queries_per_group}
    sizes |= {"qk": attention.head_dim, "vo": attention.head_dim}
    sizes |= {"units": ffn.width, "experts": ffn.experts.count, "expert_units": ffn.experts.width}
    return sizes.get(space, spec.width)


def batch_of(spec: Spec, space: str) -> tuple[int, ...]:
    """How many such spaces there are side by side: () one, (G,) or (E,) one in each place of the parent."""
    return (size_of(spec, PARENT[space]),) if space in PARENT else ()


def unfolded(spec: Spec, slot: str) -> tuple[list[Index], list[int]]:
    """The indices of all axes of a slot in a row, and the shape in which each has a dimension (-1: free)."""
    indices = [index for axis in axes_of(spec, slot) for index in axis]
    free = [axis for axis in axes_of(spec, slot) if axis[0].space is None]
    shape = [size_of(spec, index.space) if index.space else -1 for index in indices]
    if len(free) > 1 and -1 in shape:  # of two free indices, the number of side by side vectors is known
        last = len(shape) - 1 - shape[::-1].index(-1)
        whole = spec.shape(slot)
        assert whole is not None
        shape[last] = whole[-1] // spec.width
    return indices, shape


def slots_of(spec: Spec, space: str, move: Move | None = None) -> Iterator[tuple[str, int]]:
    """(slot, axis) of everything that has this space, moved in this way if one is named; biases included."""
    for slot in spec.shapes:
        for number, axis in enumerate(axes_of(spec, slot)):
            if any(index.space == space and (move is None or index.move == move) for index in axis):
                yield slot, number
