"""LoRA adapters of an endpoint as adapters, of the same rank, for models of the aligned basis."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import Model, Slots, Weights
from ..checkpoints.adapters import NAMES, Adapter, Module, adapter_directories
from ..checkpoints.lazy import TABLES
from ..checkpoints.low_rank import LowRank
from ..errors import LmcError
from ..output import Names, atomic_directory
from ..pair import in_common, unlike
from ..symmetry import canonicalize, check_legal
from ..symmetry.low_rank import canonical_change, moved_change
from ..symmetry.transform import Transform
from .carry_basis import Addition, agreement, mean_agreement, place_in
from .endpoints import Endpoint, Known
from .progress import Visits, Watch

_ROUNDING = 16  # times the dtype's: of two factors, each rounded, and the sums over the rank
_EXACT = 1e-11  # of the weights, in float64
_REMEDY = "--full writes a checkpoint instead"


def carry_adapters(
    known: Known,
    member: str,
    base: Endpoint,
    source: Path,
    target: Path,
    *,
    onto: str | Path | None,
    how: Addition,
    dtype: torch.dtype | None,
    watch: Watch,
) -> dict[str, Any]:
    """Writes the adapters that lie in `source` anew for the aligned basis, in directories of the same names.

    base: the original endpoint. onto: the model that is named as theirs. Raises LmcError, and writes nothing, where one
    of them is not for this endpoint or cannot be carried exactly.
    """
    if onto is None:
        others = [name for name in known.names if name != member]
        onto = known.beside(others[0])
        if len(others) > 1:
            raise LmcError(f"{known.file} has {len(known.names)} members; name the aligned one to carry to with --onto")
        if not (onto / "config.json").exists():
            raise LmcError(f"there is no {onto} to carry the adapter to; name the aligned checkpoint with --onto")
    basis = known.target(onto)
    if basis.element is not None:
        raise LmcError(f"{onto} is not aligned; give what align wrote ({known.beside(known.names[0])})")
    assert base.element is not None
    if base.model.original is not base.model:
        raise LmcError(
            f"{base.model.source} was grown to the size of the other endpoint, and an adapter is one for its own size; "
            f"{_REMEDY}"
        )
    problem = unlike(*(model.spec for model in in_common(base.model, basis.model)))
    if problem:
        raise LmcError(f"an adapter of {base.model.source} cannot be one of {basis.model.source}: {problem}")
    found = place_in(known, how.basis, member, base, basis)
    base, element, weight = found.base, found.element, how.weight
    check_legal(element, base.model.spec)
    places = adapter_directories(source)
    adapters = [Adapter(place, base.model) for place in places]
    for adapter in adapters:
        _require_base(known, member, adapter)
    shares = None if how.evenly else agreement(basis, base, watch)
    adapters = adapters if shares is None else [adapter.weighted(shares) for adapter in adapters]
    inside = [place.relative_to(source) for place in places]
    names: dict[str, Names | None] = dict(NAMES) if source in places else {}
    names |= {str(path): NAMES for path in inside if path.parts}
    biased = False
    with atomic_directory(target, names) as work:
        for adapter, path in zip(adapters, inside, strict=True):
            modules = carried_modules(adapter, element, weight, dtype, watch)
            biased |= _writes_biases(adapter, modules)
            adapter.write(work / path, modules, str(basis.model.path.absolute()))
            _require_exact(adapter, Adapter(work / path, base.model), base, weight)
        base.model.checkpoint.identity.require_unchanged()
    return {
        "adapters": [str(path) for path in inside],
        "modules": sum(len(adapter.modules) for adapter in adapters),
        "ranks": sorted({len(module.down) for adapter in adapters for module in adapter.modules}),
        "biases": biased,
        "from": member,
        "endpoint": base.model.source,
        "onto": str(onto),
        "weight": weight,
        "basis": found.basis,
        "agreement": None if shares is None else mean_agreement(shares),
        "out": str(target),
    }


def carried_modules(
    adapter: Adapter,
    element: Transform,
    weight: float = 1.0,
    dtype: torch.dtype | None = None,
    watch: Watch | None = None,
) -> list[Module]:
    """The adapter's modules as canonical form and `element` move them, times `weight`; dtype: by default their own."""
    model, spec = adapter.model, adapter.model.spec
    weights = model.open_weights(torch.float64)
    before = element.apply(canonicalize(weights))
    after = element.apply(canonicalize(adapter.changed(weights, weight), weights))
    found: dict[str, Module] = {}
    places = list(dict.fromkeys(module.block for module in adapter.modules))
    visits = Visits(watch or Watch(), "writing", len(places))
    for block in places:
        visits()
        around = weights.small_ends if block is None else weights.blocks[block]
        elements = element.model if block is None else element.model | element.blocks[block]
        modules = [module for module in adapter.modules if module.block == block]
        changes: dict[str, LowRank] = {}
        for module in modules:
            for slot, change in module.changes(model).items():
                moved = moved_change(spec, elements, slot, canonical_change(spec, around, slot, change))
                changes[slot] = moved.scaled(weight)
        output = next((module for module in modules if "o" in module.entry.slots), None)
        if block is not None and output is not None and "v" in changes and "o_bias" in around:
            _fold_value_bias(changes, output.scaling, before.blocks[block], after.blocks[block])
        found |= {module.path: module.of(changes, model, dtype) for module in modules}
    return [found[module.path] for module in adapter.modules]


def _fold_value_bias(changes: dict[str, LowRank], scaling: float, before: Slots, after: Slots) -> None:
    """What values get as a bias becomes one of outputs, as in canonical form, where outputs are adapted, too: then the
    adapter is exactly the difference of the two models. scaling: of the change of outputs.
    """
    gained = after["o_bias"] - before["o_bias"]
    if scaling and (changes["v"].bias is not None or changes["o"].bias is not None) and not after["v_bias"].any():
        changes["v"] = replace(changes["v"], bias=None)
        changes["o"] = replace(changes["o"], bias=gained / scaling)


def _writes_biases(adapter: Adapter, modules: list[Module]) -> bool:
    """Whether the adapter gets biases. Raises LmcError where it cannot have any."""
    module = next((m for m in modules if m.bias is not None), None)
    if module is None:
        return False
    table = next((m for m in modules if m.embedding), None)
    if table is not None:
        raise LmcError(
            f"{adapter.path} cannot be carried exactly as an adapter: what stands before {module.path} (the bias of a "
            f"norm, or of values) makes its change one of that layer's bias, too, and peft has no biases in adapters "
            f"that change an embedding, as this one does ({table.path}); {_REMEDY}"
        )
    return True


def _require_base(known: Known, member: str, adapter: Adapter) -> None:
    """Raises LmcError where the adapter says that it was trained on another member."""
    if not adapter.base or not Path(adapter.base).is_dir():
        return
    try:
        model = Model(adapter.base)
    except LmcError:
        return
    for name in known.names:
        if name != member and known.digests(name) and known.is_member(model, name):
            raise LmcError(
                f"{adapter.path} says that it is an adapter of {adapter.base}, which is {name}: use --from {name}"
            )


def _require_exact(adapter: Adapter, carried: Adapter, base: Endpoint, weight: float) -> None:
    """Endpoint and adapter, brought into the aligned basis, are the aligned endpoint and the carried adapter as read
    back, slot by slot. Raises LmcError where they are not.
    """
    original, element = base.model.open_weights(torch.float64), base.element
    assert element is not None
    aligned = element.apply(canonicalize(original))
    wanted = element.apply(canonicalize(adapter.changed(original, weight), original))
    found = canonicalize(carried.changed(aligned))  # once more: a bias that values have counts as one of outputs
    plain = canonicalize(aligned)
    eps = max(torch.finfo(module.up.dtype).eps for module in carried.modules)
    for block in sorted({module.block for module in carried.modules if module.block is not None}):
        _compare_slots(adapter, eps, wanted.blocks[block], found.blocks[block], plain.blocks[block])
    if any(module.block is None for module in carried.modules):
        _compare_slots(adapter, eps, wanted.small_ends, found.small_ends, plain.small_ends)
        for name in TABLES:
            _compare_tables(adapter, eps, name, wanted, found, plain)


def _compare_tables(adapter: Adapter, eps: float, name: str, wanted: Weights, found: Weights, plain: Weights) -> None:
    table = wanted.table(name)
    for start, stop in table.runs() if table else ():
        _compare_slots(adapter, eps, *({name: w.tables[name].rows(start, stop)} for w in (wanted, found, plain)))


def _compare_slots(adapter: Adapter, eps: float, wanted: Slots, found: Slots, plain: Slots) -> None:
    """All three: what should be, what is, what was without the change."""
    change = sum(float((wanted[name] - t).square().sum()) for name, t in plain.items()) ** 0.5
    for name, t in plain.items():
        off = float((found[name] - wanted[name]).norm())
        if not off <= _ROUNDING * eps * (change + float((wanted[name] - t).norm())) + _EXACT * float(t.norm() + 1):
            raise LmcError(
                f"{adapter.path} cannot be carried exactly as an adapter: {name} would be {off:.1e} off, since what "
                f"becomes of it in the aligned basis is no change of low rank; {_REMEDY}"
            )
