"""From a memory budget to a plan: what is resident, how much is computed at a time, how long a step should take.

Everything here is arithmetic on shapes. The prediction is the larger of the time to compute and the time to move the
weights, since one hides the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..architectures import Spec
from ..engine.passes import visit_order
from ..sizes import show_bytes
from ..streaming.layout import ALIGNMENT
from ..streaming.schedule import steady_loads
from ..symmetry.groups import rotates
from .demand import ACTIVATION, SLACK, WEIGHT, Demand, Item, Job
from .devices import Device
from .stages import Stages, TooSmall

BUFFERS = 2  # one to compute with, one to load: what is left is better spent on resident blocks
_CHUNKS = tuple(1 << power for power in (24, 23, 22, 21, 20, 19, 18))  # logits at a time
_REPORTED = (
    *("buffers", "resident", "layers", "head_parts", "loads", "moved"),
    *("compute_seconds", "transfer_seconds", "step_seconds", "share", "tokens_to_hide"),
    *("host_bytes", "store_bytes", "statistics_bytes", "stages"),
)


class Strategy(NamedTuple):
    """How a step computes. Its results' last bits depend on it.

    Attributes:
        route: "activation" (the stream is rotated) or "weight" (one matrix at a time is transformed).
        micro_batch: sequences at a time.
        logits: at a time.
        boundaries_on_host: activations between blocks lie in pinned main memory (CUDA).
    """

    route: str
    micro_batch: int
    logits: int
    boundaries_on_host: bool


@dataclass(frozen=True)
class Plan:
    """How models are learned within a budget, and what to expect. Segments are blocks, then parts of the head.

    Attributes:
        budget: bytes that were given.
        total: bytes that are taken: all that is always there, and the phase that needs most.
        items: what takes them, each with name, bytes and phase.
        device: the figures that predictions rest on.
        job: the step that was planned.
        strategy: how it computes.
        buffers: segments that are loaded into, in turn, beside the resident ones.
        resident: numbers of the segments that stay.
        layers: blocks of a model.
        head_parts: into how many the head is cut.
        loads: of segments, per step.
        moved: bytes that reach the device per step.
        compute_seconds: of a step, computing alone.
        transfer_seconds: of a step, moving alone.
        host_bytes: pinned main memory beside the budget (CUDA): segments, and boundary activations if they are there.
        store_bytes: the prepared models on disk.
        statistics_bytes: statistics of activations on disk, before that.
        stages: {stage: the least memory in bytes that it works with}, of all stages but learning.

    >>> print(lmc.plan("A", "B", memory="2GiB", length=16).table()[0])
    memory on this CPU, budget 2 GiB
    """

    budget: int
    total: int
    items: tuple[Item, ...]
    device: Device
    job: Job
    strategy: Strategy
    buffers: int
    resident: tuple[int, ...]
    layers: int
    head_parts: int
    loads: float
    moved: float
    compute_seconds: float
    transfer_seconds: float
    host_bytes: int
    store_bytes: int
    statistics_bytes: int
    stages: dict[str, int]

    @property
    def step_seconds(self) -> float:
        """Of a step: the longer of computing and moving, since one hides the other."""
        return max(self.compute_seconds, self.transfer_seconds)

    @property
    def share(self) -> float:
        """Expected speed as a share of that of a run whose weights are all in memory."""
        return self.compute_seconds / self.step_seconds

    @property
    def tokens_to_hide(self) -> int:
        """Tokens per step at which the transfers are just hidden behind the computation."""
        return round(self.job.tokens * self.transfer_seconds / self.compute_seconds)

    def phase(self, name: str) -> int:
        """What a phase takes.

        Args:
            name: "always", "block", "head" or "update".

        Returns:
            Bytes of its items.
        """
        return sum(item.bytes for item in self.items if item.phase == name)

    def to_json(self) -> dict[str, Any]:
        """As `lmc-fast plan --json` prints it.

        Returns:
            Bytes and seconds by name, and the items, device and job.
        """
        return {
            "budget": self.budget,
            "total": self.total,
            "items": [vars(item) for item in self.items],
            "device": vars(self.device) | {"dtype": str(self.device.dtype).removeprefix("torch.")},
            "job": vars(self.job),
            **self.strategy._asdict(),
            **{name: getattr(self, name) for name in _REPORTED},
        }

    def table(self) -> list[str]:
        """For people: every item, then the summary.

        Returns:
            Lines without line ends.
        """
        lines = [f"memory on {self.device.name}, budget {show_bytes(self.budget)}"]
        most = max(("block", "head", "update"), key=self.phase)
        for phase, title in [("always", None), ("block", "a block"), ("head", "the head"), ("update", "the update")]:
            if title:
                used = "counts, it is the largest" if phase == most else "not at the same time"
                lines.append(f"  while computing {title}: {show_bytes(self.phase(phase))} ({used})")
            for item in self.items:
                if item.phase == phase:
                    indent = "  " if phase == "always" else "    "
                    lines.append(f"{indent}{item.name:<42}{show_bytes(item.bytes):>12}")
        lines.append(f"  {'in all':<42}{show_bytes(self.total):>12}")
        return lines + self.summary()

    def summary(self) -> list[str]:
        """For people: what was decided and what is expected, without the items.

        Returns:
            Lines without line ends.
        """
        blocks = sum(segment < self.layers for segment in self.resident)
        route, micro, _, _ = self.strategy
        how = "the stream is rotated" if route == ACTIVATION else "weights are transformed one block at a time"
        parts = f"head in {self.head_parts} parts" if self.head_parts > 1 else "head in one part"
        lines = [
            f"resident: {blocks} of {self.layers} blocks, {len(self.resident) - blocks} of {self.head_parts} parts of "
            f"the head; {self.buffers} buffers for the others",
            f"micro-batches of {micro} x {self.job.length} tokens, {parts}, {route} route ({how})",
            f"a step of {self.job.tokens:,} tokens: computes {_show_seconds(self.compute_seconds)}, moves "
            f"{show_bytes(self.moved)} in {_show_seconds(self.transfer_seconds)} from {self.device.source} -> "
            f"{_show_seconds(self.step_seconds)}, {self.share:.0%} of in-memory speed",
            "the other stages need at least: "
            + ", ".join(f"{name} {show_bytes(size)}" for name, size in self.stages.items()),
            f"transfers are hidden from {self.tokens_to_hide:,} tokens per step on",
            f"figures: {self.device.flops:.3g} flop/s in {str(self.device.dtype).removeprefix('torch.')}, "
            f"{self.device.bandwidth:.3g} byte/s; disk space for the pair {show_bytes(self.store_bytes)}, "
            f"before that {show_bytes(self.statistics_bytes)} for statistics of activations",
        ]
        if self.host_bytes:
            lines.append(f"beside it: {show_bytes(self.host_bytes)} of pinned main memory, or reading from disk")
        return lines


def plan(spec: Spec, job: Job, device: Device, budget: int, strategy: Strategy | None = None) -> Plan:
    """The plan with the shortest predicted step within `budget` bytes of memory; of equals the one that needs less.

    strategy: computes like this and nothing else, as a run that goes on must; it has matched already.

    Raises TooSmall, which names the smallest budget that works for every stage of a run, not only for learning.
    """
    demand = Demand(spec, job, device.itemsize, device.base)
    fixed, choices = demand.fixed(), list(_residents(demand))
    segments, layers = demand.segments, spec.layers
    stages = Stages(spec, job.length, device.base, job.members).all(device.kind, matched=strategy is not None)
    best: tuple[tuple[float, ...], Plan] | None = None
    smallest: int | None = None
    for chosen in [strategy] if strategy else _strategies(spec, job, device):
        route, micro, chunk, on_host = chosen
        step = demand.step(route, micro, chunk, on_host)
        boundaries = demand.boundary_bytes if on_host else 0
        host = sum(segments) + boundaries if device.kind == "cuda" else 0
        compute = 2 * demand.macs(route, micro) / device.flops
        for resident, held, loads, loaded in choices:
            total, items = _total([*fixed, *held, *step], device.base)
            smallest = total if smallest is None else min(smallest, total)
            moved = loaded + boundaries
            transfer = moved / device.bandwidth
            rank = (max(compute, transfer), moved, total, -micro)
            if total > budget or (best is not None and rank >= best[0]):
                continue
            found = Plan(
                budget=budget,
                total=total,
                items=tuple(items),
                device=device,
                job=job,
                strategy=chosen,
                buffers=BUFFERS if len(resident) < len(segments) else 0,
                resident=resident,
                layers=layers,
                head_parts=len(segments) - layers,
                loads=loads,
                moved=moved,
                compute_seconds=compute,
                transfer_seconds=transfer,
                host_bytes=host,
                store_bytes=demand.store_bytes,
                statistics_bytes=demand.statistics_bytes,
                stages=stages,
            )
            best = rank, found
    assert smallest is not None
    if best is None or max(stages.values()) > budget:
        raise TooSmall(budget, max(smallest, *stages.values()), device.uncertain, learning=True)
    return best[1]


def _strategies(spec: Spec, job: Job, device: Device) -> Iterator[Strategy]:
    """All that a plan may choose."""
    micros = {min(1 << power, job.sequences) for power in range(job.sequences.bit_length() + 1)}
    for route in (ACTIVATION, WEIGHT) if rotates(spec) else (WEIGHT,):
        for micro in sorted(micros):
            for chunk in _CHUNKS:
                for on_host in (False, True) if device.kind == "cuda" else (False,):
                    yield Strategy(route, micro, chunk, on_host)


def _residents(demand: Demand) -> Iterator[tuple[tuple[int, ...], list[Item], float, float]]:
    """(resident segments, their and the ring's bytes, loads and bytes moved per step) for every number of them."""
    segments, layers = demand.segments, demand.spec.layers
    order = residency(layers, len(segments))
    visits = visit_order(layers, len(segments) - layers, learn=True)
    for count in range(len(segments) + 1):
        resident = order[:count]
        largest = max((segments[segment] for segment in order[count:]), default=0)
        items = [
            Item(f"ring: {BUFFERS} buffers of {show_bytes(largest)}", BUFFERS * (largest + ALIGNMENT)),
            Item("resident segments", sum(segments[segment] + ALIGNMENT for segment in resident)),
        ]
        loads = steady_loads(visits, BUFFERS if largest else 0, resident)
        moved = sum(segments[segment] * times for segment, times in loads.items())
        kept = [item for item in items if (largest if item is items[0] else count)]
        yield tuple(sorted(resident)), kept, sum(loads.values()), moved


def residency(layers: int, segments: int) -> list[int]:
    """The order in which segments become resident: blocks far from one another first, then parts of the head.

    Spread evenly they give the loader time to bring the next segment while a resident one computes.
    """
    bits = max(1, (layers - 1).bit_length())
    spread = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))
    return [segment for segment in spread if segment < layers] + list(range(layers, segments))


def _total(items: list[Item], base: int) -> tuple[int, list[Item]]:
    """What is needed at the worst moment, and the items with the allocator's share."""

    def phase(name: str) -> int:
        return sum(item.bytes for item in items if item.phase == name)

    needed = phase("always") + max(phase("block"), phase("head"), phase("update"))
    slack = math.ceil(SLACK * (needed - base))
    return needed + slack, [*items, Item("allocator's slack", slack)]


def _show_seconds(seconds: float) -> str:
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
