"""What the stages around learning hold in memory, and how much of the data those that measure take at a time.

Formulas only, nothing is run. E is the number of elements of one endpoint's block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from ..architectures import Spec
from ..checkpoints.lazy import CHUNK_ELEMENTS, TABLES
from ..errors import LmcError
from ..matching.activations import GATHERED
from ..matching.evidence import work_dtype
from ..places import simplex_places
from ..sizes import show_bytes
from ..streaming.layout import block_bytes, slot_shapes
from ..symmetry.groups import rotates
from .demand import FP32, LOGITS, SLACK, WEIGHT, Demand, Job

POINTS = 11  # of a curve, where nothing else is said
ELEMENTS = 1 << 20  # logits of one model that a comparison holds at a time
_FP64 = 8
_LOGITS = tuple(1 << power for power in (24, 23, 22, 21, 20, 19, 18))  # that a measurement may hold at a time
_LINE = 2  # streams of each place of a line: the stream, and what the head reads of it
_COMPARED = 6  # float64 tensors of a run of logits: both models', in their own dtype before, their gap, a share
_PAIRS = 10  # bytes that matching takes for a pair of FFN units: float64, a sign, a check for NaN
_HEAD_PAIRS = 10 * 8  # and for a pair of coordinates of heads: evidence from q, k, v, o, their sums, singular values
_SQUARES = 8 * 8  # and for a pair of the stream's: evidence and rotations
_TABLE_COPIES = 5  # float64 copies of a run of a table's rows (measured 4.5)
_MOVED_COPIES = 5  # the same where they are also moved, but not surveyed (measured 4)
_SPARE = 0.1  # of what is left for a measurement: its formulas are coarse
_KINDS = 2  # of maps inside heads: of values, and of queries and keys


class TooSmall(LmcError):
    """No plan fits.

    Args:
        budget: bytes that were given.
        smallest: the least budget, in bytes, for which there is a plan.
        uncertain: bytes by which the process may be larger when it is started again; the sentence counts them in, so
            that the budget it names works.
        learning: whether the number of tokens per step is what needs so much.

    Attributes:
        smallest: as given.

    >>> try:
    ...     lmc.plan("A", "B", memory="1MiB", length=16)
    ... except lmc.TooSmall as error:
    ...     print(error.smallest > 1 << 20)
    True
    """

    def __init__(self, budget: int, smallest: int, uncertain: int = 0, learning: bool = False):
        self.smallest = smallest
        named = smallest + uncertain
        needed = f"{-(-named // (1 << 20))}MiB"
        if named >= 1 << 30:
            needed += f" ({show_bytes(named)})"
        super().__init__(
            f"{show_bytes(budget)} of memory is too small for these models; the smallest budget that works is {needed}"
            + (" with this many tokens per step" if learning else "")
        )


@dataclass(frozen=True)
class Portions:
    """How much of the data a measurement takes at a time: inputs through a block together, inputs whose streams are
    held, logits. See engine.evaluate.line_scores and evaluation.function.difference.
    """

    batch: int
    rows: int
    logits: int


@dataclass(frozen=True)
class Stages:
    """The needs of a pair, or of more members, with data of `length` positions. base: bytes that the process takes
    before.
    """

    spec: Spec
    length: int
    base: int = 0
    members: int = 2

    def all(self, kind: str = "cpu", matched: bool = False) -> dict[str, int]:
        """The least that each stage works with. kind: of device; matched: that is done already.

        On a GPU its memory is counted, of which writing takes nothing.
        """
        found = {} if matched else {"matching": self.matching()}
        found["preparing"] = self.preparing()
        places = POINTS if self.members == 2 else len(simplex_places(self.members, POINTS))
        found["measuring"] = self.measuring(places)
        if kind == "cpu":
            found["writing"] = self.writing()
        return found | {"verifying": self.verifying()}

    def matching(self, tokens: int = GATHERED) -> int:
        """tokens: how many statistics of activations are taken from."""
        return self._with_slack(max(self._gathering(tokens), self._comparing(), self._tables))

    def preparing(self) -> int:
        """All members' canonical block, or runs of a table, moved by what matching found, on their way to disk."""
        moved = self._moved + (self.members - 1) * FP32 * self._elements  # the others' are there while one is made
        return self._with_slack(self.transforms(1) + max(moved, self._moved_rows))

    def writing(self) -> int:
        """One endpoint's block, or a run of a table, canonical and moved in float64."""
        return self._with_slack(self.alignment + max(self._moved, self._moved_rows))

    def carrying(self) -> int:
        """As `writing`, of three models at once: a child, its endpoint, and what the difference is added to."""
        return self._with_slack(self.alignment + 3 * max(self._moved, self._moved_rows))

    def measuring(self, points: int, aligned: bool = True, held: bool = False) -> int:
        """A curve by the smallest portions. aligned: the endpoints are moved on the way; held: `base` has what by."""
        always, streams, each = self._line(points, aligned)
        least = streams + each + _LOGITS[-1] * LOGITS * FP32
        return self._measurement(always, least, self.alignment * (aligned and not held))

    def verifying(self, held: bool = False) -> int:
        """A comparison of two checkpoints by the smallest portions, within a run or (held) alone."""
        always, streams, each = self._comparison
        return self._measurement(always, streams + each, self.alignment * (not held))

    def _measurement(self, always: int, least: int, alignment: int) -> int:
        return self.base + alignment + always + math.ceil(least / (1 - _SPARE)) + 1

    def portions_of_line(self, points: int, budget: int, aligned: bool = False) -> Portions:
        """For a curve within `budget` bytes; the smallest where even they take more, which is for `measuring` to say.

        Blocks are read one by one, in float32; what moves them is in `base`.
        """
        held, streams, each = self._line(points, aligned)
        room = math.floor((budget - self.base - held) * (1 - _SPARE))
        fewest = _LOGITS[-1] * LOGITS * FP32
        logits = max(_LOGITS[-1], min(_LOGITS[0], max(fewest, room // 4) // (LOGITS * FP32)))
        return _shared(room - logits * LOGITS * FP32, streams, each, logits, 32)

    def portions_of_comparison(self, budget: int) -> Portions:
        """For a comparison of two checkpoints within `budget` bytes; the smallest where even they take more."""
        held, streams, each = self._comparison
        room = math.floor((budget - self.base - held) * (1 - _SPARE))
        return _shared(room, streams, each, ELEMENTS, 8)

    @cached_property
    def alignment(self) -> int:
        """Transforms of all members in float64, as matched and as learned."""
        return self.transforms(2)

    def transforms(self, times: int) -> int:
        """`times` one of each member: float64 rotations, and in each head maps of keys and values both ways."""
        turns, count = self.spec.width**2 * rotates(self.spec), times * self.members
        return _FP64 * count * turns + self._maps(count * 2)

    def _maps(self, count: int) -> int:
        """`count` float64 maps of all heads, of values and of keys."""
        att = self.spec.attention
        return _FP64 * _KINDS * count * self.spec.layers * att.kv_heads * att.head_dim**2

    def _with_slack(self, needed: int) -> int:
        return self.base + math.ceil((1 + SLACK) * needed)

    @cached_property
    def _elements(self) -> int:
        return block_bytes(self.spec, 1) // 2

    @cached_property
    def _largest(self) -> int:
        """Elements of the largest slot of a block."""
        return max(math.prod(shape) for shape in slot_shapes(self.spec)[1].values())

    @cached_property
    def _moved(self) -> int:
        """A block in float64, the same moved, and a slot between both (measured 16 E and 8 for the largest slot)."""
        return _FP64 * (2 * self._elements + self._largest) + _FP64 * self.spec.width**2

    @cached_property
    def _run(self) -> int:
        """Elements of the longest run of rows of the embedding or the head that is held."""
        shapes = [self.spec.shape(name) for name in TABLES]
        return min(CHUNK_ELEMENTS, max((math.prod(shape) for shape in shapes if shape), default=0))

    @cached_property
    def _moved_rows(self) -> int:
        """Such rows, canonical and moved, and the same of the other members."""
        return _MOVED_COPIES * _FP64 * self._run + (self.members - 2) * FP32 * self._run

    @cached_property
    def _tables(self) -> int:
        """Such rows on their way to the canonical form, while what is found of all of them is kept."""
        return _TABLE_COPIES * _FP64 * self._run

    def _gathering(self, tokens: int) -> int:
        """Statistics of activations: both endpoints' block, streams of all tokens and parts of those at work."""
        spec = self.spec
        heads, kv, units = spec.attention.query_width, spec.attention.kv_width, spec.ffn.width
        sums = _FP64 * (2 * heads**2 + 2 * kv**2 + units**2 + spec.width**2)
        seen = 2 * heads + 2 * kv + 2 * spec.width + 2 * units
        streams = 2 * FP32 * (tokens * spec.width + max(GATHERED, self.length) * seen)
        return block_bytes(spec, FP32) + sums + streams + self._maps(2 * self.members)

    def _comparing(self) -> int:
        """Every pair of a block's FFN units, experts or heads: both endpoints' block, and B's turned one.

        Maps are those of what balances both endpoints, with inverses, and what was found.
        """
        spec, size = self.spec, work_dtype(self.spec).itemsize
        heads = _HEAD_PAIRS * spec.attention.query_width**2
        experts = spec.ffn.experts.count * (size + 1) * spec.ffn.experts.width**2
        pairs = max(_PAIRS * spec.ffn.width**2, heads, experts)
        rest = _SQUARES * spec.width**2 + 4 * _FP64 * CHUNK_ELEMENTS
        if self.members == 2:
            return 3 * block_bytes(spec, size) // 2 + pairs + rest + self._maps(2 * 2 + 1)
        # all members' blocks as they stand, the sum of all but one, that one, and room to make it; evidence from
        # activations, as read, moved and by itself; of every two members' streams, from the ends and from all; what
        # balances each member, with inverses, and what is found of it
        blocks = (self.members + 3) * self._elements * size
        pairs = max(pairs, 4 * size * spec.ffn.width**2)
        kinds = 2 if rotates(spec) else 4
        stream = (self.members * (self.members - 1) // 2 * kinds + self.members) * _FP64 * spec.width**2
        return blocks + pairs + rest + stream + self._maps(3 * self.members + 1)

    def _activations(self) -> int:
        """Of one input on its way through a block, with its rows of the embedding."""
        demand = Demand(self.spec, Job(self.length, self.length), FP32)
        return self.length * demand.block_floats(WEIGHT) * FP32

    def _line(self, points: int, aligned: bool) -> tuple[int, int, int]:
        """(what is held whatever the portions, for each input whose streams are held, for each that is at work)."""
        count = self.members
        blocks = 3 * count * FP32 * self._elements  # all members'; what they are made of is still there
        moved = self._moved + (count - 1) * FP32 * self._elements if aligned else 0
        table = self._moved_rows if aligned else 2 * count * FP32 * self._run
        row = _LINE * points * self.length * self.spec.width * FP32
        return max(blocks, moved, table), row, self._activations()

    @cached_property
    def _comparison(self) -> tuple[int, int, int]:
        """The same of a comparison: a model's block with its largest tensor twice, or a run of logits."""
        block = FP32 * (self._elements + 2 * self._largest)
        head = _COMPARED * _FP64 * ELEMENTS + 2 * FP32 * self._run
        streams = 4 * self.length * self.spec.width * FP32  # A's, of B the stream and what its head reads, twice
        return max(block, head), streams, self._activations()


def _shared(room: int, streams: int, each: int, logits: int, most: int) -> Portions:
    """At most half of the room for inputs at work, the rest for streams, theirs before all."""
    batch = max(1, min(most, room // 2 // each, room // (streams + each)))
    return Portions(batch, max(batch, (room - batch * each) // streams), logits)
