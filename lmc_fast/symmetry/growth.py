"""A smaller model as a larger one that computes the same: zero channels, heads, units and blocks.

Of a space that grows from n to N places, the first n hold what was there. The stream grows by c = sqrt(N/n) besides, so
that every norm sees the variance of before, epsilon included: what writes to it is multiplied by c, what reads a norm
by 1/c, and a norm's bias, which stands where its output does, by c. LayerNorm subtracts the mean: there the canonical
form grows, whose stream has none. A norm over all queries, or over all keys, is met in the same way. Where a group has
fewer queries in the larger shape, its key and value are repeated. A block whose output projections are 0 is the
identity, unless its norm stands behind the residual sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..architectures import Spec
from ..architectures.axes import END_SLOTS, STREAM, Move, axes_of, size_of, unfolded
from ..architectures.resize import sizes_of
from ..architectures.spec import POST_NORMS
from ..checkpoints.lazy import LazyBlocks, Slots
from ..checkpoints.weights import Weights
from .canonical import canonicalize
from .groups import residual_group, rotates

Places = tuple[int, ...]  # which block of the larger model each block of the smaller one becomes, in order


def obstacle(small: Spec, large: Spec) -> str | None:
    """Why a model of one spec is none of the other's sizes, whatever its weights; None where `Growth` makes it one."""
    a, b, ours, theirs = small.attention, large.attention, sizes_of(small), sizes_of(large)
    more = {name for name, size in ours.items() if theirs[name] != size}
    fewer = [name for name in more if theirs[name] < ours[name]]
    if fewer:
        return f"it has more {fewer[0]} ({ours[fewer[0]]} and {theirs[fewer[0]]})"
    if "experts" in more:
        return "more experts cannot be added: a router without a bias cannot be told to choose none of them"
    if "head_dim" in more and small.rope.inv_freq != large.rope.inv_freq:
        return f"head_dim cannot grow from {a.head_dim} to {b.head_dim}: RoPE turns each dimension at its own speed"
    if a.alibi and (a.heads, a.kv_heads) != (b.heads, b.kv_heads):
        return f"heads cannot grow from {a.heads} to {b.heads}: ALiBi's slopes depend on how many heads there are"
    if a.alibi != b.alibi:
        return f"head_dim cannot grow from {a.head_dim} to {b.head_dim}: ALiBi's penalty depends on it"
    if a.clip_qkv and _score_scale(small) != _score_scale(large):
        return (
            f"head_dim cannot grow from {a.head_dim} to {b.head_dim}: queries are clamped, so that none can be scaled"
        )
    if _copies(small, large) * a.kv_heads > b.kv_heads:
        return (
            f"{a.kv_heads} groups of {a.queries_per_group} heads find no room in {b.kv_heads} groups of "
            f"{b.queries_per_group}"
        )
    if "width" in more and small.headless:
        return "width cannot grow: the stream is the output, which would be wider"
    if "width" in more and small.norms.kind == "layernorm" and not rotates(small):
        return f"width cannot grow: LayerNorm subtracts the mean of a stream that has one ({residual_group(small)})"
    if "width" in more and small.head_transform and small.head_normed:
        return "width cannot grow: the norm in front of its head sees all channels"
    if "blocks" in more and small.norms.placement == "post":
        return "blocks cannot be added: behind every block a norm changes the stream"
    if "blocks" in more and place_evenly(small, large) is None:
        return "blocks cannot be added: the windows of its blocks, or those without RoPE, do not occur in that order"
    return None


def place_evenly(small: Spec, large: Spec) -> Places | None:
    """Where blocks go if nothing is known but their number: each to its share of the depth; None: nowhere."""
    near = torch.arange(small.layers + 1)[:, None] / small.layers - torch.arange(large.layers + 1) / large.layers
    return place_by(-near.square(), small, large)


def place_by(similarity: Tensor, small: Spec, large: Spec) -> Places | None:
    """The places with the greatest sum of similarities of streams; the earliest where several have it.

    similarity (l + 1, L + 1): of the smaller model's stream behind its first i blocks and the larger one's behind its
    first j. A block goes only where blocks see as far back, by the same positions. None where there is no such way.
    """
    few, many = small.layers, large.layers
    best = torch.full((few + 1, many + 1), -math.inf, dtype=torch.float64)
    used = torch.zeros(few + 1, many + 1, dtype=torch.bool)
    best[0, 0] = similarity[0, 0]
    for j in range(1, many + 1):
        for i in range(few + 1):
            skip = float(best[i, j - 1])
            fits = i > 0 and _positions(small, i - 1) == _positions(large, j - 1)
            take = float(best[i - 1, j - 1]) if fits else -math.inf
            used[i, j] = take > skip
            best[i, j] = max(take, skip) + similarity[i, j]
    if best[few, many] == -math.inf:
        return None
    places, i = [], few
    for j in range(many, 0, -1):
        if used[i, j]:
            places.append(j - 1)
            i -= 1
    return tuple(reversed(places))


def _positions(spec: Spec, block: int) -> tuple[int, bool, bool]:
    """How far back a block sees, whether it has rotary positions, and whether it is a first one without a norm."""
    return spec.attention.window(block), spec.rope.turns(block), spec.norms.bare_start and block == 0


@dataclass(frozen=True)
class Growth:
    """From models of `small` to models of `large` with the same function; there is no `obstacle` between the two."""

    small: Spec
    large: Spec
    places: Places

    def grow(self, weights: Weights) -> Weights:
        """The larger model, computed in float64 one block at a time, in the dtype of `weights`; lazy if those are."""
        if self.centred:
            weights = canonicalize(weights)
        small = weights.in_dtype(torch.float64, self._grown_ends, lambda _, block: self._each(block))
        tables = {n: replace(t, shape=(t.shape[0], self.large.shapes[n][1])) for n, t in small.tables.items()}
        spec = replace(self.large, tied=False)
        return Weights(spec, small.ends, self._spread(small, _sample(weights)), tables)

    def shrink(self, weights: Weights) -> Weights:
        """The smaller model that `weights`, as `grow` gave them, were grown from; not lazy."""
        ends = {name: self._shrunk(name, w) for name, w in weights.load().ends.items()}
        blocks = [{name: self._shrunk(name, w) for name, w in weights.blocks[j].items()} for j in self.places]
        return Weights(replace(self.small, tied=False), ends, blocks)

    @property
    def centred(self) -> bool:
        """What grows is the canonical form, and not the weights as they are."""
        return self.small.width != self.large.width and self.small.norms.kind == "layernorm"

    def _spread(self, small: Weights, sample: Tensor) -> Sequence[Slots]:
        """The blocks in their places, and between them those that do nothing."""
        source = {place: i for i, place in enumerate(self.places)}

        def make(place: int) -> Slots:
            if place in source:
                return small.blocks[source[place]]
            return {name: self._idle(name, sample) for name in self._block_slots}

        blocks = LazyBlocks(self.large.layers, make)
        return blocks if isinstance(small.blocks, LazyBlocks) else list(blocks)

    @property
    def _block_slots(self) -> list[str]:
        return [name for name in self.large.shapes if name.removesuffix("_bias") not in END_SLOTS]

    def _idle(self, name: str, sample: Tensor) -> Tensor:
        """A slot of a block that adds nothing. Gains in the stream's own path are 0, so that half of one does half."""
        shape = self.large.shapes[name]
        return sample.new_ones(shape) if _is_gain(shape, name) and name not in POST_NORMS else sample.new_zeros(shape)

    def _grown_ends(self, ends: Slots) -> Slots:
        return self._each(ends)

    def _each(self, slots: Slots) -> Slots:
        return {name: self._slot(name, w) for name, w in slots.items()}

    def _slot(self, name: str, w: Tensor) -> Tensor:
        w = w * self._factor(name)
        filled = w.mean() if _is_gain(w.shape, name) else w.new_zeros(())
        x, sizes = self._unfolded(name, w, self.small)
        for dim, (space, size) in enumerate(sizes):
            if space == "heads":
                x = self._spread_heads(x, dim, name, sizes, filled)
            elif space != "queries":
                x = _padded(x, dim, size, filled)
        return x.reshape([-1 if n is None else n for n in self._whole(name, self.large)])

    def _spread_heads(
        self, x: Tensor, dim: int, name: str, sizes: list[tuple[str | None, int]], filled: Tensor
    ) -> Tensor:
        """Groups, at `dim`, and the queries in each, at the next one, in their new number."""
        copies, per_group = _copies(self.small, self.large), self.large.attention.queries_per_group
        if dim + 1 < len(sizes) and sizes[dim + 1][0] == "queries":
            x = _padded(x, dim + 1, copies * per_group, filled)
            x = x.unflatten(dim + 1, (copies, per_group)).flatten(dim, dim + 1)
        else:
            x = x.repeat_interleave(copies, dim)
        return _padded(x, dim, self.large.attention.kv_heads, filled)

    def _shrunk(self, name: str, w: Tensor) -> Tensor:
        x, sizes = self._unfolded(name, w, self.large)
        copies, per_group = _copies(self.small, self.large), self.small.attention.queries_per_group
        for dim, (space, size) in enumerate(sizes):
            if space == "heads":
                x = x.narrow(dim, 0, copies * size)
                if dim + 1 < len(sizes) and sizes[dim + 1][0] == "queries":
                    x = x.unflatten(dim, (size, copies)).flatten(dim + 1, dim + 2).narrow(dim + 1, 0, per_group)
                else:
                    x = x[(slice(None),) * dim + (slice(0, None, copies),)]
            elif space not in ("queries", None):
                x = x.narrow(dim, 0, size)
        return x.reshape([-1 if n is None else n for n in self._whole(name, self.small)]) / self._factor(name)

    def _unfolded(self, name: str, w: Tensor, spec: Spec) -> tuple[Tensor, list[tuple[str | None, int]]]:
        """A slot of `spec` with a dimension for each index; the space of each, and its size in the other spec."""
        other = self.large if spec is self.small else self.small
        if not axes_of(self.small, name):  # gains that no symmetry moves, and what has no space at all
            return w, [(f"its axis {dim}", n) for dim, n in enumerate(other.shapes[name])]
        indices, shape = unfolded(spec, name)
        return w.reshape(shape), [(i.space, size_of(other, i.space) if i.space else -1) for i in indices]

    def _whole(self, name: str, spec: Spec) -> list[int | None]:
        """The shape of a slot; None where nothing grows: a run of a table's rows has fewer of them."""
        axes, shape = axes_of(spec, name), spec.shapes[name]
        return [None if axes and axes[dim][0].space is None and dim == 0 else n for dim, n in enumerate(shape)]

    def _factor(self, name: str) -> float:
        """What a slot is multiplied with."""
        small, large, base = self.small, self.large, name.removesuffix("_bias")
        factor = 1.0
        for axis in axes_of(small, name):
            if axis[-1].space == STREAM and axis[-1].move != Move.ORDER:
                factor *= (large.width / small.width) ** (0.5 if axis[-1].move == Move.CO else -0.5)
        if name == "embed":
            factor *= small.embed_scale / large.embed_scale
        normed = small.attention.qk_norm
        if base in ("q", "k") and normed:
            factor *= self._norm_growth(base)
        if name in ("q_norm", "k_norm"):
            factor /= self._norm_growth(name[0])
        if (name == "q_norm") if normed else (base == "q"):
            factor *= _score_scale(small) / _score_scale(large)
        return factor

    def _norm_growth(self, of: str) -> float:
        """How much longer queries (q), or keys (k), must be for the norm over them to see the mean square of before."""
        a, b = self.small.attention, self.large.attention
        if a.qk_norm == "head":
            return float((b.head_dim / a.head_dim) ** 0.5)
        if of == "q":
            return float((b.query_width / a.query_width) ** 0.5)
        return float((b.kv_width / (a.kv_width * _copies(self.small, self.large))) ** 0.5)


def _score_scale(spec: Spec) -> float:
    return spec.attention.logit_scale or float(spec.attention.head_dim**-0.5)


def _copies(small: Spec, large: Spec) -> int:
    """How many groups of the larger model hold the queries of one of the smaller model's."""
    return -(-small.attention.queries_per_group // large.attention.queries_per_group)


def _is_gain(shape: Sequence[int], name: str) -> bool:
    return len(shape) == 1 and not name.endswith("_bias")


def _padded(x: Tensor, dim: int, size: int, value: Tensor) -> Tensor:
    """With `value` behind what is there, up to `size` places; -1: as many as there are."""
    missing = 0 if size < 0 else size - x.shape[dim]
    if not missing:
        return x
    shape = [*x.shape]
    shape[dim] = missing
    return torch.cat([x, value.expand(shape).to(x)], dim)


def _sample(weights: Weights) -> Tensor:
    """No numbers, in the dtype and on the device of all."""
    for table in (weights.table(name) for name in ("head", "embed")):
        if table is not None:
            return table.rows(0, 0)
    raise AssertionError("a model has a head")
