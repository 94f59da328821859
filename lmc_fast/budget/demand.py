"""What a streamed learning step holds in memory, item by item, and what it computes. Formulas only, nothing is run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from ..architectures import Spec
from ..matching.evidence import work_dtype
from ..streaming.layout import arrange, block_bytes, head_rows, segment_bytes, slot_shapes
from ..symmetry.charts import Chart
from ..symmetry.groups import rotates

ACTIVATION, WEIGHT = "activation", "weight"  # rotate the stream, or transform one matrix at a time
FP32 = 4  # bytes of the transform's parameters and of logits
LOGITS = 6  # tensors of a chunk's size, generously: logits, target, a teacher's or room for the loss, rounded copies
_TAPE = 30  # matrices that a head map's forward and backward keep, for each of its own (measured 26)
_UPDATE = 6  # (d, d) matrices of one side that Muon and the Cayley transform need beside their operands (measured 4.1)
SLACK = 0.03  # allocators round up and fragment
_HEAD_MAPS = ("vo", "qk")


@dataclass(frozen=True)
class Job:
    """A learning step.

    Attributes:
        tokens: read in a step.
        length: tokens of a sequence.
        sides: members that move: all, or all but the first.
        teachers: of each sequence; 0 where text teaches.
        members: models that are aligned.
        places: between the members, that it visits.
    """

    tokens: int
    length: int
    sides: int = 2
    teachers: int = 2
    members: int = 2
    places: int = 1

    @property
    def sequences(self) -> int:
        """In a step."""
        return max(1, -(-self.tokens // self.length))


@dataclass(frozen=True)
class Item:
    """Some bytes.

    Attributes:
        name: what they hold.
        bytes: how many.
        phase: "always", or the part of a step that needs them: "block", "head", "update".
    """

    name: str
    bytes: int
    phase: str = "always"


@dataclass(frozen=True)
class Demand:
    """The needs of a pair, or of more members, for one kind of step. itemsize: bytes of a weight as computed with."""

    spec: Spec
    job: Job
    itemsize: int
    base: int = 0

    @cached_property
    def segments(self) -> list[int]:
        """Bytes of each segment: blocks, then parts of the head."""
        return segment_bytes(self.spec, self.itemsize, members=self.job.members)

    @cached_property
    def head_part_rows(self) -> int:
        return max(head_rows(self.spec, self.itemsize, members=self.job.members))

    @cached_property
    def store_bytes(self) -> int:
        """All members on disk."""
        ends, _ = slot_shapes(self.spec)
        rest = {name: shape for name, shape in ends.items() if name not in ("head", "head_bias")}
        return sum(self.segments) + arrange(rest, self.itemsize, self.job.members)[1]

    @cached_property
    def _leaves(self) -> dict[str, int]:
        """Numbers in each of the chart's leaves."""
        chart = Chart(self.spec, self.job.sides, device="meta", members=self.job.members)
        return {name: t.numel() for name, t in chart.tensors.items()}

    def fixed(self) -> list[Item]:
        """What every plan needs, whatever its choices."""
        spec, d = self.spec, self.spec.width
        ends, _ = slot_shapes(spec)
        small = {name: shape for name, shape in ends.items() if name not in ("embed", "head", "head_bias")}
        stream = self.job.tokens * d * self.itemsize
        matrices = sum(self._leaves.get(name, 0) for name in _HEAD_MAPS)
        scales = sum(n for name, n in self._leaves.items() if name not in (*_HEAD_MAPS, "rotation"))
        turns = self._leaves.get("rotation", 0)
        # leaf, momentum, gradient and the best validated copy; Adam has one moment more; then every member's element,
        # relative transforms and their gradients, and those transforms in the dtype of the computation
        others = self.job.members - 1
        rotation = 4 * turns + ((self.job.members + 2 * others) * d * d if turns else 0)
        items = [
            Item("interpreter and libraries", self.base),
            Item("ends without tables", arrange(small, self.itemsize, self.job.members)[1]),
            Item("position tables", self._position_bytes()),
            Item("streams: the line's model, its gradient", 2 * stream),
            Item("streams: teachers", self.job.teachers * stream),
            Item("token ids", 32 * self.job.tokens),
            Item(
                "rotation: parameters and optimiser", rotation * FP32 + 2 * others * d * d * self.itemsize * bool(turns)
            ),
            Item("block maps: parameters and optimiser", (4 * matrices + 5 * scales) * FP32),
            Item("what matching found", self._found_bytes(turns)),
            Item("update of the parameters", self._update_bytes(turns, matrices), "update"),
        ]
        return [item for item in items if item.bytes]

    def _found_bytes(self, turns: int) -> int:
        """Transforms in float64: rotations of all but the first, and in each head maps of keys and values both ways."""
        spec, count, kinds = self.spec, self.job.members, sum(name in self._leaves for name in _HEAD_MAPS)
        maps = count * 2 * kinds * spec.layers * spec.attention.kv_heads * spec.attention.head_dim**2
        return 8 * (maps + (count - 1) * spec.width**2 * bool(turns))

    def _update_bytes(self, turns: int, matrices: int) -> int:
        return _UPDATE * max(turns, matrices // self.job.sides) * FP32  # head maps: of one side after the other

    def _position_bytes(self) -> int:
        """cos and sin, and the biases added to attention scores, of which some are made in float64."""
        spec, n = self.spec, self.job.length
        tables = 2 * n * (len(spec.rope.inv_freq) + len(spec.rope.local_inv_freq)) * self.itemsize
        att = spec.attention
        windows = set(att.windows) if att.windows else {0}
        special = [w for w in windows if w or att.alibi or att.softcap or att.sinks]
        tables += 8 * n * n * bool(att.distances)
        return tables + len(special) * n * n * (self.itemsize * (att.heads if att.alibi else 1) + 16)

    @cached_property
    def statistics_bytes(self) -> int:
        """Statistics of activations on disk, of every two members, as long as these are matched."""
        spec, att = self.spec, self.spec.attention
        pairs = 2 * att.query_width**2 + 2 * att.kv_width**2 + spec.ffn.width**2
        count = self.job.members
        return count * (count - 1) // 2 * spec.layers * pairs * work_dtype(spec).itemsize

    @cached_property
    def boundary_bytes(self) -> int:
        """The stream in front of every block, of all tokens of a step."""
        return self.spec.layers * self.job.tokens * self.spec.width * self.itemsize

    def step(self, route: str, micro: int, chunk: int, on_host: bool = False) -> list[Item]:
        """What a way of computing needs. micro: sequences at a time; chunk: logits at a time.

        on_host: boundary activations lie in main memory, and a few micro-batches of them on the device.
        """
        spec, d = self.spec, self.spec.width
        tokens = micro * self.job.length
        maps = sum(self._leaves.get(name, 0) for name in _HEAD_MAPS) // spec.layers
        rows = min(self.head_part_rows, spec.vocab)
        width = (spec.shape("head") or (0, d))[1]
        heads = (2 * self.job.members if route == ACTIVATION else 2) + self.job.teachers
        vocab = (spec.shape("embed") or (0, d))[0]
        table = 6 * min(tokens, vocab) * d * self.itemsize
        boundaries = 4 * tokens * d * self.itemsize if on_host else self.boundary_bytes
        items = [
            Item("boundary activations" + " on their way" * on_host, boundaries),
            Item("one block's activations and gradients", tokens * self.block_floats(route) * self.itemsize, "block"),
            Item("one block's maps and their gradients", _TAPE * maps * FP32, "block"),
            Item("embedding rows", max(0, table - tokens * self.block_floats(route) * self.itemsize), "block"),
            Item("logits", LOGITS * min(chunk, tokens * rows) * FP32, "head"),
            Item("normed streams", heads * tokens * width * self.itemsize, "head"),
            Item("sums over the vocabulary", 8 * FP32 * self.job.tokens, "head"),
        ]
        if route == WEIGHT:
            count = self.job.members
            largest = (count + 1) * block_bytes(spec, self.itemsize, count) // count
            items += [
                Item("transformed weights of one block", largest, "block"),
                Item("transformed rows of the head", 3 * rows * width * self.itemsize, "head"),
            ]
        return [item for item in items if item.bytes]

    def block_floats(self, route: str) -> int:
        """Numbers per token that one block's forward and backward hold, by the tensors that engine/block.py saves.

        Weights are taken to need gradients, as transformed ones do. The activation route adds the rotated copies and
        what B's maps act on.
        """
        spec, d, narrow = self.spec, self.spec.width, self.itemsize < FP32
        att, experts = spec.attention, spec.ffn.experts
        q, kv, f = att.query_width, att.kv_width, spec.ffn.width
        norms = {"pre": 2, "branch": 2, "sandwich": 4, "post": 2}[spec.norms.placement] - spec.norms.shared
        # RMSNorm also keeps the rescaled input, in float32
        each = 1 if spec.norms.kind == "layernorm" else 4 if narrow else 3
        total = d * (1 + each * norms + 1)  # the input, norms, the stream between the branches
        total += q + 2 * kv + 2 * q  # queries, keys, values; their mixture and its copy
        if att.queries_per_group > 1:
            total += 2 * q  # keys and values, repeated
        if att.qk_norm or att.clip_qkv:
            total += 2 * each * (q + kv)
        if att.distances:  # their scores, by query and by row of the table
            total += 2 * att.heads * (2 * self.job.length + att.distance_rows)
        if att.softcap or att.alibi or att.sinks or any(att.windows):
            total += (3 if narrow else 2) * att.heads * self.job.length  # scores
        total += (4 if spec.ffn.gated else 2) * f
        if experts.count:
            total += experts.per_token * (4 * experts.width + 2 * d) + 3 * experts.count
        total += 2 * max(f, experts.width, 2 * q)  # gradients on their way back
        if route == ACTIVATION:
            others = self.job.members - 1  # of each:
            total += others * (2 * 3 * d + 2 * d)  # rotated inputs beside the plain ones; results, not yet turned back
            total += others * (q + 2 * kv + q + (2 if spec.ffn.gated else 1) * f)
        return total

    def macs(self, route: str, micro: int) -> float:
        """Multiply-adds of a step: forward, recompute and backward of the line's model, forward of the teachers."""
        spec, job, d = self.spec, self.job, self.spec.width
        tokens, turns = job.sequences * job.length, rotates(spec)
        batches = max(-(-job.sequences // micro), job.places)
        every = active = 0
        for shape in slot_shapes(spec)[1].values():
            if len(shape) == 2:
                every, active = every + math.prod(shape), active + math.prod(shape)
            elif len(shape) == 3:
                every += math.prod(shape)
                active += math.prod(shape) * spec.ffn.experts.per_token // spec.ffn.experts.count
        attention = (job.length / (2 if spec.attention.causal else 1)) * 2 * spec.attention.query_width
        others = job.members - 1
        student = 3 * job.members * active + 16 * others * d * d * turns if route == ACTIVATION else 4 * active
        per_token = student + job.teachers * active + (4.5 + job.teachers) * attention
        fixed = 3 * others * every * d * turns if route == WEIGHT else 0
        rows, width = spec.shape("head") or (0, 0)
        passes = 2 if len(self.segments) > spec.layers + 1 else 1
        forward = (job.members if route == ACTIVATION else 1) + job.teachers
        # gradients of weights and stream, or of all members' rows
        head = rows * width * (forward * passes + (job.members if route == ACTIVATION else 2))
        head_fixed = 2 * others * rows * width * d * turns if route == WEIGHT else 0
        update = 21 * job.sides * d**3 * turns
        return tokens * (spec.layers * per_token + head) + batches * (spec.layers * fixed + head_fixed) + update
