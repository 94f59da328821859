"""What was trained on one endpoint, brought to the others: fine-tuned checkpoints, and adapters (carry_adapters)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..budget.devices import require_device
from ..budget.meter import UNCERTAIN, counted_bytes, return_freed_memory
from ..budget.stages import Stages, TooSmall
from ..checkpoints import LazyBlocks, Model, Slots, Table, Weights, checkpoint_names
from ..checkpoints import export as export_weights
from ..checkpoints.adapters import Adapter, adapter_directories, is_adapter
from ..checkpoints.tensor_file import require_writable
from ..data import Given, as_data
from ..errors import LmcError
from ..examples import Data
from ..output import Names, atomic_directory, check_target, partial_of, remove_own, require_apart, user_path
from ..pair import in_common, pair_of, unlike
from ..sizes import require_bytes
from ..symmetry import canonicalize, check_legal
from ..symmetry.grown import GrownModel
from .carry_adapters import carry_adapters
from .carry_basis import Addition, Agreement, agreement, distance_between, mean_agreement, place_in, share_of
from .endpoints import Endpoint, Known
from .evaluate import compare
from .progress import Cancel, Progress, Visits, Watch
from .room import endpoint_bytes, largest_file, require_room

UNRELATED = 0.9  # of how far unrelated weights are apart: what is as far is no child
FAR = 0.5  # and what is farther than this is a strange one
PROOF_SEQUENCES = 16
_CHILD = "child"  # where it lies while it is proven
_log = logging.getLogger("lmc_fast")


@dataclass(frozen=True)
class Child:
    """What was trained from an endpoint: `weights` in normal form, lazy, float64; `model`: whose names and config its
    checkpoint has. adapter: it is the model with this one merged into it.
    """

    source: str
    model: Model
    adapter: Adapter | None = None

    @property
    def weights(self) -> Weights:
        if self.adapter is None:
            return self.model.open_weights(torch.float64)
        weights = self.adapter.changed(self.model.original.open_weights(torch.float64))
        return self.model.growth.grow(weights) if isinstance(self.model, GrownModel) else weights


def carry(
    alignment: str | Path,
    child: str | Path,
    out: str | Path,
    *,
    member: str,
    endpoint: str | Path | None = None,
    onto: str | Path | None = None,
    weight: float = 1.0,
    full: bool = False,
    basis: str = "auto",
    evenly: bool = False,
    dtype: torch.dtype | None = None,
    tokens: Given | None = None,
    device: torch.device | str = "cpu",
    memory: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    cancel: Cancel | None = None,
) -> dict[str, Any]:
    """Brings what was trained on an endpoint into the aligned basis, where it can be added to the other endpoint.

    Of a checkpoint C, `out` becomes the stock checkpoint C' = g C, which computes what C does; with `onto`, an aligned
    checkpoint T, it becomes T + weight (C' - B') with B' the aligned endpoint. Of an adapter `out` becomes an adapter
    of the same rank for `onto`, which changes B' as the given one changes B.

    Args:
        alignment: the file that `align` wrote; best beside a/ and b/.
        child: a checkpoint fine-tuned from an endpoint, or the directory of a LoRA adapter for it.
        out: the directory to create.
        member: the endpoint it was trained on: "a", "b", ...
        endpoint: the original of that endpoint; None: where it was when it was aligned, else the aligned one beside
            `alignment`.
        onto: an aligned checkpoint to add to; None: nothing is added, or, of an adapter, the other aligned endpoint.
        weight: how much is added.
        full: take an adapter as the checkpoint that it makes of its endpoint.
        basis: of C' and B' where they are added: "aligned", as DIR/b is; "matched", where matching alone laid b on the
            other endpoint; "auto", the one of both in which B' is nearer to `onto`.
        evenly: add every difference in full. Else those of matrices that read into heads, units or experts count as
            much as the same matrices of `onto` and B' agree (their cosine).
        dtype: of what is written; None: that of the child, of `onto`, or of the adapter.
        tokens: data to prove on that C' computes what C does; None: random.
        device: where to prove it.
        memory: bytes that this process (on a GPU: its memory there) may take; None: what is convenient.
        progress: called in every stage of carrying a checkpoint, see Progress.
        cancel: called, or a threading.Event looked at, then; True ends the work.

    Returns:
        What was done: "distance" (of the child from its endpoint, 1 being that of unrelated weights), "proof", and with
        `onto` how far `out` is from it ("moved"), the "basis" and by slot the mean "agreement".

    Raises:
        LmcError: something does not fit together: a child of another model, an adapter that cannot be carried exactly,
            a target that is not aligned. Nothing is left behind.
        TooSmall: `memory` is too little; `smallest` is enough.
        Cancelled: `cancel` says so; nothing is left behind.

    >>> done = lmc.carry("DIR/alignment.safetensors", "CHILD", "CARRIED", member="b")
    >>> done["distance"] < 0.1
    True
    """
    require_device(device)
    require_writable(dtype)
    require_bytes(memory)
    how, watch = Addition(weight, basis, evenly), Watch(progress, cancel)
    file, target = user_path(alignment), user_path(out)
    require_apart((target, partial_of(target)), (file, child, endpoint, onto))
    check_target(target)
    known, place = Known.load(file), user_path(child)
    if member not in known.names:
        raise LmcError(f"the endpoint is {member!r}; give one of {', '.join(known.names)}")
    if is_adapter(place):
        base = _base_of_adapter(known, member, endpoint)
        if not full:
            return carry_adapters(known, member, base, place, target, onto=onto, how=how, dtype=dtype, watch=watch)
        if adapter_directories(place) != [place]:
            raise LmcError(f"{child} holds several adapters; carry them one by one with --full")
        source, found = Child(str(child), base.model, Adapter(place, base.model.original)), base
    else:
        if full:
            raise LmcError(f"{child} is a checkpoint, which is carried whole anyway; --full is for adapters")
        source, found = Child(str(child), known.fitted(Model(child), member)), known.endpoint(member, endpoint)
    if weight != 1 and onto is None:
        raise LmcError("a weight is one of what is added; give --onto, too")
    return _carry_checkpoint(known, member, source, found, target, onto, how, dtype, tokens, device, memory, watch)


def _base_of_adapter(known: Known, member: str, given: str | Path | None) -> Endpoint:
    """An adapter's factors read what the original's norms yield: the aligned endpoint has none of their gains left."""
    found = known.original(member, given)
    if found is not None and found.element is not None:
        return found
    raise LmcError(
        f"an adapter can only be carried with the checkpoint it was trained on, and {member} of {known.file} is not "
        "where it was; name it with --endpoint"
    )


def _carry_checkpoint(
    known: Known,
    member: str,
    child: Child,
    base: Endpoint,
    target: Path,
    onto: str | Path | None,
    how: Addition,
    dtype: torch.dtype | None,
    tokens: Given | None,
    device: torch.device | str,
    memory: int | None,
    watch: Watch,
) -> dict[str, Any]:
    element = known.element(member)
    if child.adapter is None:
        _require_alike(base, child)
    check_legal(element, child.model.spec)
    like = base.model.open_weights(torch.float64) if base.element is not None else None
    _require_memory(child.model, memory, device)
    tokens = None if tokens is None else as_data(tokens, child.model)

    def moved(stage: str) -> Weights:
        weights = element.apply(canonicalize(child.weights, like))
        return Visits(watch, stage, len(weights.blocks)).of(weights)

    distance = distance_between(moved("comparing"), base.aligned())
    _judge(known, member, child, base, distance)
    basis = None if onto is None else known.target(onto)
    found = within = shares = None  # within: what is still to be weighed when it is added
    if basis is not None:
        _fitting(basis, child)
        found = place_in(known, how.basis, member, base, basis)
        element, base = found.element, found.base
        check_legal(element, child.model.spec)
        within = shares = None if how.evenly else agreement(basis, base, watch)
        if shares is not None and child.adapter is not None and not isinstance(child.model, GrownModel):
            child, within = replace(child, adapter=child.adapter.weighted(shares)), None
    names, needed = _planned(child, basis, dtype)
    require_room(partial_of(target), needed, largest_file(child.model, dtype))
    report = {"child": child.source, "from": member, "endpoint": base.model.source, "distance": distance}
    with atomic_directory(target, names) as work:
        place = work if basis is None else work / _CHILD
        export_weights(moved("writing"), child.model, place, dtype if basis is None else torch.float32)
        proof = _prove(child, place, work / "merged", tokens, device, memory, watch)
        report["proof"] = proof
        if basis is not None and found is not None:
            remove_own(place, checkpoint_names(child.model.path))
            report |= {"onto": basis.model.source, "weight": how.weight, "basis": found.basis}
            report |= {"agreement": None if shares is None else mean_agreement(shares)}
            total = partial(_sum, weight=how.weight, shares=within)
            report["moved"] = _write_sum(
                basis, child, moved("writing"), base, total, work, dtype, tokens, device, memory, watch
            )
        for model in (child.model, base.model, *(() if basis is None else (basis.model,))):
            model.checkpoint.identity.require_unchanged()
    return report | {"out": str(target)}


def _planned(child: Child, basis: Endpoint | None, dtype: torch.dtype | None) -> tuple[Names, int]:
    """What the output may hold on the way, and how many bytes."""
    inside: dict[str, Names | None] = dict(checkpoint_names(child.model.path))
    needed = endpoint_bytes(child.model, dtype)
    if basis is not None:
        inside = {**checkpoint_names(basis.model.path), _CHILD: checkpoint_names(child.model.path)}
        needed = max(endpoint_bytes(child.model, torch.float32), endpoint_bytes(basis.model, dtype))
    if child.adapter is not None:
        inside["merged"] = checkpoint_names(child.model.path)
        needed += endpoint_bytes(child.model, torch.float32)
    return inside, needed


def _prove(
    child: Child,
    written: Path,
    scratch: Path,
    tokens: Data | None,
    device: torch.device | str,
    memory: int | None,
    watch: Watch,
) -> dict[str, Any]:
    """How far what was written is from the child, by transformers. Raises LmcError where its function is not kept."""
    original = child.model
    if child.adapter is not None:  # the model with the adapter merged into it lies on no disk yet
        export_weights(child.weights, child.model, scratch, torch.float32)
        original = Model(scratch)
    sample = None if tokens is None else tokens[:PROOF_SEQUENCES]
    carried = Model(written)
    visits = Visits.of_models(watch, "verifying", original, carried)
    found, same = compare(original, carried, sample, device, memory, visits)
    if child.adapter is not None:
        remove_own(scratch, checkpoint_names(child.model.path))
    if not same:
        raise LmcError(
            f"{child.source} would not keep its function: KL {found.kl:.1e} nats to the original; nothing is written; "
            "use --dtype float32, and report it as a bug if that does not help"
        )
    return found.to_json()


def _write_sum(
    basis: Endpoint,
    child: Child,
    moved: Weights,
    base: Endpoint,
    add: Callable[[Weights, Weights, Weights], Weights],
    work: Path,
    dtype: torch.dtype | None,
    tokens: Data | None,
    device: torch.device | str,
    memory: int | None,
    watch: Watch,
) -> dict[str, Any]:
    """Writes what `add` makes of basis, child and base. Returns how far its function is from that of the basis."""
    model = in_common(_fitting(basis, child), base.model)[0]
    total = Endpoint(model, basis.element).aligned()
    export_weights(add(total, moved, base.aligned()), model, work, dtype)
    sample = None if tokens is None else tokens[:PROOF_SEQUENCES]
    written = Model(work)
    visits = Visits.of_models(watch, "verifying", basis.model, written)
    return compare(basis.model, written, sample, device, memory, visits)[0].to_json()


def _fitting(basis: Endpoint, child: Child) -> Model:
    """The model of `basis` as far as the child has it, too. Raises LmcError where they do not fit together."""
    try:
        return pair_of(basis.model, child.model, grow=False).a
    except LmcError as error:
        raise LmcError(f"{child.source} cannot be added to {basis.model.source}: {error}") from error


def _sum(basis: Weights, child: Weights, base: Weights, weight: float, shares: Agreement | None) -> Weights:
    """basis + weight (child - base), one block, or one run of a table's rows, at a time. shares: of the weight, by
    block and slot.
    """

    def add(x: Slots, y: Slots, z: Slots, part: Mapping[str, float]) -> Slots:
        return {
            name: x.pop(name) + weight * share_of(part, name) * (_cut(y.pop(name), t) - _cut(z.pop(name), t))
            for name, t in list(x.items())
        }

    def block(i: int) -> Slots:
        return add(basis.blocks[i], child.blocks[i], base.blocks[i], {} if shares is None else shares[i])

    def run(name: str, start: int, stop: int) -> Tensor:
        x, y, z = (w.tables[name].rows(start, stop) for w in (basis, child, base))
        return x + weight * (y - z)

    tables = {name: Table(table.shape, partial(run, name)) for name, table in basis.tables.items()}
    ends = add(dict(basis.ends), dict(child.ends), dict(base.ends), {})
    return Weights(basis.spec, ends, LazyBlocks(len(basis.blocks), block), tables)


def _cut(t: Tensor, like: Tensor) -> Tensor:
    """A head's bias may have more entries than that of a model with a smaller vocabulary."""
    return t[: len(like)] if t.dim() else t


def _require_alike(base: Endpoint, child: Child) -> None:
    """Raises LmcError where child and endpoint are not of one architecture."""
    problem = unlike(*(model.spec for model in in_common(base.model, child.model)))
    if problem:
        raise LmcError(f"{child.source} was not trained from {base.model.source}: {problem}; name its own endpoint")


def _judge(known: Known, member: str, child: Child, base: Endpoint, distance: float) -> None:
    """Raises LmcError for weights that are no nearer to the endpoint than unrelated ones; warns of odd ones."""
    apart = (
        f"{child.source} is {distance:.2f} away from {base.model.source}, "
        "where 0 is the same weights and 1 unrelated ones"
    )
    if not distance < UNRELATED:  # NaN, too
        others = [name for name in known.names if name != member]
        near = next((name for name in others if _is_near(known, name, child)), None)
        remedy = f"it is near to {near}: use --from {near}" if near else "give a checkpoint that was trained from it"
        raise LmcError(f"{apart}: it is no child of it; {remedy}")
    if distance >= FAR:
        _log.warning("%s: was it really trained from it? what is carried may be of little use", apart)


def _is_near(known: Known, name: str, child: Child) -> bool:
    try:
        other = known.endpoint(name)
        if unlike(*(model.spec for model in in_common(other.model, child.model))):
            return False
        moved = known.element(name).apply(canonicalize(child.weights))
        return distance_between(moved, other.aligned()) < UNRELATED
    except LmcError:
        return False


def _require_memory(model: Model, memory: int | None, device: torch.device | str) -> None:
    """Raises TooSmall where `memory` is less than what three models' blocks, moved, or the proof take."""
    if memory is None:
        return
    return_freed_memory()
    stages = Stages(model.spec, min(128, model.spec.max_positions), counted_bytes("cpu"))
    least = max(stages.carrying(), stages.verifying(held=True))
    if least > memory:
        raise TooSmall(memory, least, 0 if torch.device(device).type == "cuda" else UNCERTAIN)
