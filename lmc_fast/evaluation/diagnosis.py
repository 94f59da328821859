"""Where and why the middle of a line is worse than its ends: block by block, on a sample of data.

Everything is measured in canonical form, on models that are in memory. References: layer-wise linear feature
connectivity (Zhou et al., arXiv 2307.08286), layer-wise barriers (Adilova et al., arXiv 2307.06966), the variance of
features (Jordan et al., arXiv 2211.08403).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..architectures import Spec
from ..architectures.axes import unfolded
from ..checkpoints import Weights, lerp
from ..engine.attention import Positions
from ..engine.block import block
from ..engine.head import capped
from ..engine.model import embed, head_input, labels, model_inputs, target_rows
from ..engine.slots import Slots
from ..errors import LmcError
from ..examples import Data
from ..symmetry import Transform
from ..symmetry.elements import Dense, Wreath

MIDDLE = 0.5
SPACES = ("units", "heads", "experts")
_TEMPERATURES = [2.0 ** (i / 10) for i in range(-10, 11)]
_NAMES = {"a": "A", "b": "B", "r": "B as it was", "m": "their middle"}  # of what walks
_FFN = ("up", "gate", "down", "router", "switch", "experts", "ffn")


@dataclass(frozen=True)
class BlockReport:
    """One block. Features are the stream behind it, without their mean over the sample; M is the middle of the line.

    Attributes:
        cosine: of M's features to the average of A's and B's.
        distance: of the same, relative to that average's norm.
        share_a: A's share of M's features, written as the least-squares sum of A's and B's.
        share_b: B's share.
        variance: of M's features over the mean of A's and B's: below 1 they have shrunk.
        own: excess in nats if this block alone is averaged, mean of A and B.
        matched: {space: mean cosine of its units, heads or experts in A with their partners in B}.
        matched_before: the same of B as it was.
        unmatched: {space: how many have a cosine below 0.2 with their partner}.
        stream: cosine of A's and B's features.
        stream_before: the same of B as it was.
        moved: {space: how far B's element is from the identity}: the share of places that moved, or |M - 1| / |1|.
    """

    cosine: float
    distance: float
    share_a: float
    share_b: float
    variance: float
    own: float
    matched: dict[str, float]
    matched_before: dict[str, float]
    unmatched: dict[str, int]
    stream: float
    stream_before: float
    moved: dict[str, float]


@dataclass(frozen=True)
class Diagnosis:
    """Where and why the middle of a line is worse than its ends.

    Attributes:
        losses: nats per prediction of A ("a"), B ("b"), the "middle", the "ensemble" of A and B, and the middle at its
            best temperature ("calibrated").
        temperature: that divides the middle's logits best.
        parts: excess in nats if only the "attention", the "ffn" or what lies outside the blocks ("ends") is averaged.
        stream_angle: mean angle of B's rotation, in radians.
        blocks: a report on each block.
        advice: sentences on what to try.

    >>> pair = lmc.open_pair("A", "B")
    >>> found = lmc.diagnose(pair, lmc.read_tokens("held-out.txt", pair.a, 16), sequences=4)
    >>> sorted(found.losses)
    ['a', 'b', 'calibrated', 'ensemble', 'middle']
    """

    losses: dict[str, float]
    temperature: float
    parts: dict[str, float]
    stream_angle: float
    blocks: list[BlockReport]
    advice: list[str] = field(default_factory=list)

    @property
    def excess(self) -> float:
        """Of the middle over the mean of both ends, in nats."""
        return self.losses["middle"] - (self.losses["a"] + self.losses["b"]) / 2

    def to_json(self) -> dict[str, Any]:
        """As `lmc-fast diagnose --json` prints it.

        Returns:
            All fields, and the excess.
        """
        return asdict(self) | {"excess": self.excess}


NO_PARTNER = 0.2  # cosine


class Walk:
    """A sample of data on its way through models of one spec."""

    def __init__(self, spec: Spec, data: Data):
        self.spec, self.data, self.inputs = spec, data, model_inputs(data)
        self.wanted = labels(data)

    def start(self, ends: Slots) -> Tensor:
        return embed(self.spec, ends, self.inputs)

    def through(self, slots: Slots, x: Tensor, i: int) -> Tensor:
        positions = Positions.of(self.spec, x.shape[1], x.dtype, x.device)
        return block(self.spec, slots, x, positions, i)

    def logits(self, ends: Slots, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their logits), some rows at a time."""
        rows = target_rows(head_input(self.spec, ends, x, self.inputs), self.data)
        size = max(1, (1 << 24) // len(ends["head"]))
        for start in range(0, len(rows), size):
            some = slice(start, start + size)
            out = F.linear(rows[some], ends["head"], ends.get("head_bias"))
            yield some, capped(out, self.spec.head_softcap)

    def loss(self, ends: Slots, x: Tensor) -> float:
        total = sum(
            F.cross_entropy(out, self.wanted[some], reduction="sum").double() for some, out in self.logits(ends, x)
        )
        return float(total) / len(self.wanted)


@torch.no_grad()
def diagnose_weights(
    a: Weights,
    b: Weights,
    raw: Weights,
    relative: Transform,
    data: Data,
    visited: Callable[[int, int], None] | None = None,
) -> Diagnosis:
    """a, b: in memory, canonical and aligned; raw: b as it was before; relative: what took it there, seen from A.

    visited: told how many blocks are done, and how many there are.
    """
    spec, walk, middle = a.spec, Walk(a.spec, data), lerp(a, b, MIDDLE)
    models = {"a": a, "b": b, "m": middle, "r": raw}
    streams = {name: [walk.start(w.ends)] for name, w in models.items()}
    for i in range(spec.layers):
        for name, w in models.items():
            streams[name].append(walk.through(w.blocks[i], streams[name][-1], i))
    losses = {name: walk.loss(models[key].ends, streams[key][-1]) for name, key in (("a", "a"), ("b", "b"))}
    found = _heads(walk, a, b, middle, [streams[key][-1] for key in "abm"])
    losses |= {name: found[name] for name in ("middle", "ensemble", "calibrated")}
    for name, text in _NAMES.items():
        if not all(x.isfinite().all() for x in streams[name]):
            raise _overflows(f"the stream of {text}")
    _require_finite(losses)
    both = [(a, streams["a"], losses["a"]), (b, streams["b"], losses["b"])]
    reports = []
    for i in range(spec.layers):
        if visited:
            visited(i, spec.layers)
        own = sum(_rest(walk, w, walk.through(middle.blocks[i], at[i], i), i + 1) - loss for w, at, loss in both)
        reports.append(_report(spec, i, models, {k: s[i + 1] for k, s in streams.items()}, own / 2, relative))
    parts = {name: _part(walk, both, middle, name) for name in ("attention", "ffn", "ends")}
    diagnosis = Diagnosis(losses, found["temperature"], parts, _angle(relative.stream), reports)
    _require_finite(diagnosis.to_json())
    return diagnosis


def _require_finite(found: Any, name: str = "") -> None:
    """Raises LmcError for a figure, in dicts and lists in each other, that is none."""
    if isinstance(found, dict | list):
        for key, value in found.items() if isinstance(found, dict) else enumerate(found):
            _require_finite(value, f"{name} {key}".strip())
    elif isinstance(found, float) and not math.isfinite(found):
        raise _overflows(f"what was measured ({name})")


def _overflows(what: str) -> LmcError:
    return LmcError(f"{what} is not finite: numbers overflow; look for huge weights")


def _rest(walk: Walk, w: Weights, x: Tensor, first: int) -> float:
    """Loss of the stream x in front of block `first` of w."""
    for i in range(first, walk.spec.layers):
        x = walk.through(w.blocks[i], x, i)
    return walk.loss(w.ends, x)


def _part(walk: Walk, both: Sequence[tuple[Weights, list[Tensor], float]], middle: Weights, part: str) -> float:
    """Mean excess of A and of B with one kind of their weights averaged."""
    total = 0.0
    for w, _, loss in both:
        ends = middle.ends if part == "ends" else w.ends
        blocks = [
            {n: y[n] if part_of(n) == part else x[n] for n in x} for x, y in zip(w.blocks, middle.blocks, strict=True)
        ]
        total += _rest(walk, Weights(w.spec, ends, blocks), walk.start(ends), 0) - loss
    return total / 2


def part_of(slot: str) -> str:
    """attention or ffn, of a block's slot."""
    return "ffn" if slot.startswith(_FFN) else "attention"


def _heads(walk: Walk, a: Weights, b: Weights, middle: Weights, streams: list[Tensor]) -> dict[str, float]:
    """Losses of the middle, of the ensemble, and of the middle at the best temperature, from one walk over logits."""
    totals, ensemble, n = torch.zeros(len(_TEMPERATURES), dtype=torch.float64), 0.0, len(walk.wanted)
    parts = (walk.logits(w.ends, x) for w, x in zip((a, b, middle), streams, strict=True))
    for (some, left), (_, right), (_, out) in zip(*parts, strict=True):
        wanted = walk.wanted[some, None]
        mixed = torch.logaddexp(*(x.log_softmax(1).gather(1, wanted) for x in (left, right))) - torch.log(
            torch.tensor(2.0)
        )
        ensemble -= mixed.double().sum().item()
        for k, t in enumerate(_TEMPERATURES):
            totals[k] += F.cross_entropy(out / t, wanted[:, 0], reduction="sum").double().item()
    best = int(totals.argmin())
    return {
        "middle": totals[_TEMPERATURES.index(1.0)].item() / n,
        "ensemble": ensemble / n,
        "calibrated": totals[best].item() / n,
        "temperature": _TEMPERATURES[best],
    }


def _report(
    spec: Spec, i: int, models: dict[str, Weights], streams: dict[str, Tensor], own: float, relative: Transform
) -> BlockReport:
    f = {name: (x.flatten(0, 1) - x.flatten(0, 1).mean(0)).double() for name, x in streams.items()}
    mean = (f["a"] + f["b"]) / 2
    gram = torch.stack([torch.stack([(f[x] * f[y]).sum() for y in "ab"]) for x in "ab"])
    shares = torch.linalg.lstsq(gram, torch.stack([(f[x] * f["m"]).sum() for x in "ab"])[:, None], driver="gelsd")
    share_a, share_b = shares.solution[:, 0].tolist()
    blocks = {name: w.blocks[i] for name, w in models.items()}
    now, before = ({s: partners(spec, s, blocks["a"], blocks[name]) for s in SPACES} for name in "br")
    return BlockReport(
        cosine=_cosine(f["m"], mean),
        distance=((f["m"] - mean).norm() / mean.norm().clamp(min=1e-30)).item(),
        share_a=share_a,
        share_b=share_b,
        variance=(2 * f["m"].square().sum() / (f["a"].square().sum() + f["b"].square().sum()).clamp(min=1e-30)).item(),
        own=own,
        matched={s: x.mean().item() for s, x in now.items() if x is not None},
        matched_before={s: x.mean().item() for s, x in before.items() if x is not None},
        unmatched={s: int((x < NO_PARTNER).sum()) for s, x in now.items() if x is not None},
        stream=_cosine(f["a"], f["b"]),
        stream_before=_cosine(f["a"], f["r"]),
        moved=_moved(relative.blocks[i]),
    )


def _cosine(x: Tensor, y: Tensor) -> float:
    return ((x * y).sum() / (x.norm() * y.norm()).clamp(min=1e-30)).item()


def partners(spec: Spec, space: str, a: Slots, b: Slots) -> Tensor | None:
    """Cosine of all weights of each unit, head group or expert in A with those in the same place in B: (n,) float64.

    None where a block has no such space, or has it but for biases that are zero.
    """
    pairs = []
    for name, x in a.items():
        indices, shape = unfolded(spec, name)
        places = [k for k, index in enumerate(indices) if index.space == space]
        if places:
            size = shape[places[0]]
            pairs.append([w.reshape(shape).movedim(places[0], 0).reshape(size, -1).double() for w in (x, b[name])])
    if not pairs:
        return None
    left, right = (torch.cat([pair[k] for pair in pairs], 1) for k in range(2))
    return (left * right).sum(1) / (left.norm(dim=1) * right.norm(dim=1)).clamp(min=1e-30)


def _moved(elements: dict[str, Any]) -> dict[str, float]:
    """How far each group's element is from the identity: share of places that moved, or |M - 1| relative to |1|."""
    found = {}
    for space, g in elements.items():
        if isinstance(g, Wreath):
            n = g.places.shape[-1]
            found[space] = (g.places != torch.arange(n, device=g.places.device)).double().mean().item()
        elif isinstance(g, Dense):
            eye = torch.eye(g.matrix.shape[-1], dtype=g.matrix.dtype, device=g.matrix.device)
            found[space] = ((g.matrix - eye).norm(dim=(-2, -1)) / eye.norm()).mean().item()
    return found


def _angle(stream: Any) -> float:
    """arccos of the mean cosine of the rotation's angles."""
    if not isinstance(stream, Dense):
        return 0.0
    cosine = stream.matrix.diagonal(dim1=-2, dim2=-1).mean().clamp(-1, 1)
    return float(torch.arccos(cosine))
