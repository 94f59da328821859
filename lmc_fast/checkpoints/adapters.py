"""LoRA adapters as peft stores them: low-rank changes of a model's slots, read and written.

A module's A (r, in) and B (out, r), times a factor that adapter_config.json gives, are a change of its weight; those of
an embedding are (r, tokens) and (width, r). With lora_bias a module's B also has a bias, on which the factor acts, too.

Whatever else an adapter may hold or ask for changes the function in ways that are no low-rank change of a known slot;
it is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..architectures import Entry, Family
from ..architectures.layouts import Conv1D, LessOne, OfExpert, PatchConvolution, Shaped
from ..errors import LmcError
from ..files import read_object, to_json
from .adapter_config import MERGE, pattern, require_lora, require_targeted
from .coverage import spellings
from .lazy import LazyBlocks, Slots, Table
from .low_rank import LowRank
from .tensor_file import TensorFile
from .weights import Model, Weights
from .writer import save_tensor_file

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
NAMES: dict[str, None] = dict.fromkeys((CONFIG, TENSORS))  # of what `Adapter.write` writes

_PREFIX = "base_model.model."
_PARTS = {  # how a name ends -> (which factor, of an embedding)
    ".lora_A.weight": ("down", False),
    ".lora_B.weight": ("up", False),
    ".lora_B.bias": ("bias", False),
    ".lora_embedding_A": ("down", True),
    ".lora_embedding_B": ("up", True),
}
_MOST_ALPHA = 1e6

Place = tuple[Entry, int | None, str]  # of a weight: its row of the family's table, its block, its name there


@dataclass(frozen=True)
class Module:
    """One adapted module: its path in the model, its row of the family's table with the block's index, and the factors
    as they are stored, down (r, in), up (out, r), bias (out,). scaling: what the change is multiplied with.
    """

    path: str
    entry: Entry
    block: int | None
    down: Tensor
    up: Tensor
    scaling: float
    bias: Tensor | None = None
    embedding: bool = False

    def changes(self, model: Model, dtype: torch.dtype = torch.float64) -> dict[str, LowRank]:
        """What is added to each slot that the module holds, before `scaling`."""
        down, up = self.down.to(dtype), self.up.to(dtype)
        if self.embedding:
            return {self.entry.slots[0]: LowRank(down.mT, up.mT)}
        layout, spec = self.entry.layout, model.spec
        lefts = layout.split(up.mT if isinstance(layout, Conv1D) else up, spec)
        biases = [None] * len(lefts) if self.bias is None else layout.split(self.bias.to(dtype), spec)
        rows = zip(self.entry.slots, lefts, biases, strict=True)
        return {slot: LowRank(left.contiguous(), down, bias) for slot, left, bias in rows}

    def of(self, changes: Mapping[str, LowRank], model: Model, dtype: torch.dtype | None = None) -> Module:
        """The module that makes these changes, which share their right factor; dtype: by default that of this one."""
        parts, dtype = [changes[slot] for slot in self.entry.slots], dtype or self.up.dtype
        if self.embedding:
            return replace(self, down=parts[0].left.mT.to(dtype), up=parts[0].right.mT.to(dtype))
        layout, spec = self.entry.layout, model.spec
        up = layout.join([part.left for part in parts], spec)
        up = (up.mT if isinstance(layout, Conv1D) else up).to(dtype)
        bias = None
        if any(part.bias is not None for part in parts):
            biases = [p.left.new_zeros(len(p.left)) if p.bias is None else p.bias for p in parts]
            bias = layout.join(biases, spec).to(dtype)
        return replace(self, down=parts[0].right.to(dtype), up=up, bias=bias)


class Adapter:
    """An adapter of `model`, read from a directory. `modules`: in the order of the file.

    Raises LmcError for files that are missing or damaged, for another kind of adapter, for one of another model, and
    for what is no low-rank change of a slot of that model.
    """

    def __init__(self, path: Path, model: Model):
        self.path, self.model = path, model
        self.config = read_object(path / CONFIG, remedy="give the directory of a LoRA adapter that peft wrote")
        require_lora(self.config, path / CONFIG)
        if not (path / TENSORS).exists():
            other = next((file.name for file in path.glob("adapter_model.*")), None)
            raise LmcError(f"{path} has no {TENSORS}" + (f", only {other}; save it as safetensors" if other else ""))
        self.modules = self._read(TensorFile(path / TENSORS))
        for module in self.modules:
            self._check(module)

    @property
    def base(self) -> str:
        """The model that adapter_config.json says it was trained on; empty where it says nothing."""
        return str(self.config.get("base_model_name_or_path") or "")

    def changed(self, weights: Weights, weight: float = 1.0) -> Weights:
        """The model, given in normal form and lazy, with `weight` times the adapter's changes added to its slots."""
        found: dict[int | None, dict[str, LowRank]] = {}
        for module in self.modules:
            for slot, change in module.changes(self.model).items():
                found.setdefault(module.block, {})[slot] = change.scaled(weight * module.scaling)
        tables = dict(weights.tables)
        for slot, change in found.get(None, {}).items():
            if slot in tables:
                tables[slot] = _added(tables[slot], change)
        ends = _plus(weights.ends, found.get(None, {}))
        blocks = weights.blocks
        assert isinstance(blocks, LazyBlocks)
        return Weights(weights.spec, ends, blocks.map(lambda i, w: _plus(w, found.get(i, {}))), tables)

    def weighted(self, shares: Sequence[Mapping[str, float]]) -> Adapter:
        """The same with what it adds to a slot of block i times shares[i][slot], by default 1."""
        other = copy(self)
        other.modules = [self._weighted(m, {} if m.block is None else shares[m.block]) for m in self.modules]
        return other

    def _weighted(self, module: Module, shares: Mapping[str, float]) -> Module:
        if all(shares.get(slot, 1.0) == 1 for slot in module.entry.slots):
            return module
        changes = module.changes(self.model)
        return module.of({slot: change.scaled(shares.get(slot, 1.0)) for slot, change in changes.items()}, self.model)

    def write(self, directory: Path, modules: list[Module], base: str) -> None:
        """The same adapter with other factors, for the model `base`."""
        tensors: dict[str, Tensor] = {}
        biased = any(module.bias is not None for module in modules)
        for module in modules:
            stem = f"{_PREFIX}{module.path}"
            names = {part: end for end, (part, embedding) in _PARTS.items() if embedding == module.embedding}
            tensors |= {stem + names["down"]: module.down, stem + names["up"]: module.up}
            if biased:  # of all, or peft finds some missing
                bias = module.up.new_zeros(len(module.up)) if module.bias is None else module.bias
                tensors[stem + names["bias"]] = bias
        for name, t in tensors.items():
            if not t.isfinite().all():
                remedy = "use a smaller --weight" if t.dtype.itemsize >= 4 else "use --dtype float32"
                raise LmcError(f"{name} of the carried adapter overflows in {t.dtype}; {remedy}")
        config = self.config | {"base_model_name_or_path": base, "revision": None}
        if biased:
            config |= {"lora_bias": True, "init_lora_weights": True}
        directory.mkdir(parents=True, exist_ok=True)
        save_tensor_file({name: t.contiguous() for name, t in tensors.items()}, directory / TENSORS, {})
        (directory / CONFIG).write_text(to_json(config, indent=2) + "\n")

    def _read(self, file: TensorFile) -> list[Module]:
        found: dict[str, dict[str, Tensor]] = {}
        embeddings, table = set(), _table(self.model.family, self.model)
        for name in file.names:
            ending = next((end for end in _PARTS if name.endswith(end)), None)
            if ending is None and self._is_of_base(file, name, table):
                continue
            if ending is None:
                raise LmcError(f"{file.file}: {name} is no factor of a low-rank change; {MERGE}")
            part, embedding = _PARTS[ending]
            path = name.removesuffix(ending).removeprefix(_PREFIX)
            if file.kind(name) not in ("BF16", "F16", "F32", "F64"):
                raise LmcError(f"{file.file}: {name} is {file.kind(name)}, not a float; save it again")
            found.setdefault(path, {})[part] = file.read(name)
            embeddings |= {path} if embedding else set()
        if not found:
            raise LmcError(f"{file.file} holds nothing; save the adapter again")
        modules = []
        for path, parts in found.items():
            if path not in table:
                raise LmcError(
                    f"{file.file} changes {path}, which is no linear layer or embedding of {self.model.source} that "
                    f"can be carried; {MERGE}"
                )
            lost = {"down", "up"} - parts.keys()
            if lost:
                raise LmcError(f"{file.file} has only one of the two factors of {path}; save the adapter again")
            if parts["up"].dim() != 2 or parts["down"].dim() != 2:
                raise LmcError(f"{file.file}: a factor of {path} is no matrix; save the adapter again")
            scaling = self._scaling(path, len(parts["down"]))
            entry, block, _ = table[path]
            require_targeted(self.config, self.path / CONFIG, path, block)
            if self.config.get("lora_bias") and path in embeddings:
                raise LmcError(f"{self.path / CONFIG}: lora_bias is true, but {path}, an embedding, has none in peft")
            down, up, bias = parts["down"], parts["up"], parts.get("bias")
            if bias is not None and bias.shape == up.shape[:1] and not bias.any():
                bias = None  # as peft saves it for layers that need none
            modules.append(Module(path, entry, block, down, up, scaling, bias, path in embeddings))
        return modules

    def _is_of_base(self, file: TensorFile, name: str, table: Mapping[str, Place]) -> bool:
        """Whether it is the base's own weight, which peft saves beside the changes of an embedding or a head: it is not
        needed, and would take the place of the aligned one. Raises LmcError where it is another.
        """
        path = name.removeprefix(_PREFIX).removesuffix(".weight").removesuffix(".base_layer")
        if path not in table or not name.endswith(".weight"):
            return False
        stored, disk = self.model.checkpoint, self.model.coverage.names[table[path][2]]
        same = file.shape(name) == stored.shape(disk)
        if same:
            wide = torch.promote_types(file.dtype(name), stored.dtype(disk))
            runs, start = stored.read_runs(disk), 0
            for run in runs:
                same = same and torch.equal(file.read_rows(name, start, start + len(run)).to(wide), run.to(wide))
                start += len(run)
        if not same:
            raise LmcError(f"{file.file}: {name} is another than that of {self.model.source}; {MERGE}")
        return True

    def _scaling(self, path: str, rank: int) -> float:
        """As peft finds it: a pattern that the whole path ends with wins over what holds for all."""
        file = self.path / CONFIG
        values = {}
        for option, option_pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            patterns = self.config.get(option_pattern) or {}
            if not isinstance(patterns, dict):
                raise LmcError(f"{file}: {option_pattern} is no object; save the adapter again")
            found = (k for k in patterns if pattern(rf"(.*\.)?({k})$", k, file, option_pattern).match(path))
            key = next(found, None)
            value = patterns[key] if key is not None else self.config.get(option, 8)
            sound = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _MOST_ALPHA
            if not sound or (option == "r" and value != rank):
                what = f"the rank of {path} is {rank}, but" if sound else f"{path}:"
                raise LmcError(f"{file}: {what} {option} is {value!r}; save the adapter again")
            values[option] = value
        return float(values["lora_alpha"] / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def _check(self, module: Module) -> None:
        """Raises LmcError where the factors are not of this model's shapes."""
        entry, spec, file = module.entry, self.model.spec, self.path / TENSORS
        shape, rank = entry.shape(spec), len(module.down)
        if isinstance(entry.layout, Conv1D):
            shape = shape[::-1]
        if module.embedding:
            shape = shape[::-1]
        found = (module.up.shape[0], module.down.shape[1])
        if found != shape or module.up.shape[1] != rank or rank < 1:
            raise LmcError(
                f"{file} is an adapter of another model: its factors of {module.path} make {found[0]} x {found[1]} "
                f"(ranks {module.up.shape[1]} and {rank}), {self.model.source} has {shape[0]} x {shape[1]}"
            )
        if module.embedding != (entry.slots[0] in _LOOKED_UP):
            raise LmcError(f"{file}: {module.path} is not changed as its kind of layer is; save the adapter again")
        if module.bias is not None and (
            module.bias.shape != module.up.shape[:1] or any(f"{slot}_bias" not in spec.shapes for slot in entry.slots)
        ):
            raise LmcError(f"{file}: {module.path} adds a bias where {self.model.source} has none; {MERGE}")


_LOOKED_UP = ("embed", "positions", "types")


def _table(family: Family, model: Model) -> dict[str, Place]:
    """Path of a module in transformers' model -> its weight."""
    found: dict[str, Place] = {}
    for name, entry, index in family.entries(replace(model.spec, tied=False)):
        whole = not isinstance(entry.layout, (OfExpert, PatchConvolution, Shaped, LessOne))
        if whole and name.endswith(".weight") and len(model.spec.shapes[entry.slots[0]]) == 2:
            for spelt in spellings(name, family):
                found.setdefault(spelt.removesuffix(".weight"), (entry, index, name))
    return found


def _plus(slots: Slots, changes: Mapping[str, LowRank]) -> Slots:
    slots = dict(slots)
    for slot, change in changes.items():
        if slot in slots:
            slots[slot] = slots[slot] + (change.left @ change.right).to(slots[slot])
        if change.bias is not None:
            slots[f"{slot}_bias"] = slots[f"{slot}_bias"] + change.bias.to(slots[f"{slot}_bias"])
    return slots


def _added(table: Table, change: LowRank) -> Table:
    def rows(start: int, stop: int) -> Tensor:
        found = table.rows(start, stop)
        return found + change.rows(start, stop).to(found)

    return Table(table.shape, rows)


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter, or several in directories of their own, and no model."""
    return not (path / "config.json").exists() and bool(adapter_directories(path))


def adapter_directories(path: Path) -> list[Path]:
    """Where adapters lie: in the directory itself, and as peft saves several, in directories below it."""
    if not path.is_dir():
        return []
    places = [path, *sorted(place for place in path.iterdir() if place.is_dir() and not place.is_symlink())]
    return [place for place in places if (place / CONFIG).exists()]
