"""A model family: how its config becomes a Spec, and the table of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, empty

from .layouts import Layout, OfExpert, Plain
from .spec import Spec


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint: its name on disk ({i} the block's index, {j} the expert's) and the slots it holds."""

    name: str
    slots: tuple[str, ...]
    layout: Layout = field(default_factory=Plain)
    optional: bool = False  # some checkpoints leave it out
    when: Callable[[Spec], bool] | None = None  # holds where a slot has this name and not another
    first: int = 0  # the first block that has it: those before compute without the norm that it belongs to

    def present(self, spec: Spec) -> bool:
        return spec.shape(self.slots[0]) is not None and (self.when is None or self.when(spec))

    def shape(self, spec: Spec) -> tuple[int, ...]:
        """Shape on disk."""
        shapes = [spec.shape(slot) for slot in self.slots]
        assert None not in shapes, self
        return tuple(self.layout.join([empty(s, device="meta") for s in shapes if s], spec).shape)


@dataclass(frozen=True)
class Fold:
    """An option of config.json that is folded into the weights when they are read, and is off in what is written."""

    option: str
    change: Callable[[int, dict[str, Tensor]], dict[str, Tensor]]  # (block's index, its slots) -> the changed slots


@dataclass(frozen=True)
class Head:
    """What classes of a family have behind the final norm instead of its usual head: classifiers, or nothing."""

    endings: tuple[str, ...]  # class names end in one of these
    change: Callable[[Spec, Any], Spec]  # the usual head's spec and the config -> this one's
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Family:
    """One model family: how its config becomes a Spec, and the table of its tensors."""

    name: str  # config.json's model_type
    spec: Callable[[Any], Spec]  # from a transformers config; raises LmcError for options we do not compute
    ends: tuple[Entry, ...]
    block: tuple[Entry, ...]
    prefix: str  # in front of every name but the head's; some hub checkpoints leave it out
    buffers: tuple[str, ...] = ()  # regular expressions of stored tensors that carry no weights
    architectures: tuple[str, ...] = ("ForCausalLM", "LMHeadModel", "Model")  # class names end in one of these
    folds: tuple[Fold, ...] = ()
    heads: tuple[Head, ...] = ()  # the other ones
    other_names: tuple[tuple[str, str], ...] = ()  # (here, there): parts of names that some checkpoints spell otherwise

    def of_class(self, name: str) -> Family | None:
        """The family with the head that a class of this name has; None where it is none of its classes."""
        if name.endswith(self.architectures):
            return self
        head = next((head for head in self.heads if name.endswith(head.endings)), None)
        return None if head is None else self.with_head(head, name)

    def with_head(self, head: Head, name: str) -> Family:
        ends = tuple(entry for entry in self.ends if not entry.slots[0].startswith(_HEADS)) + head.entries
        usual = self.spec

        def spec(config: Any) -> Spec:
            return head.change(usual(config), config)

        return replace(self, spec=spec, ends=ends, architectures=(name,), heads=())

    def ties(self, spec: Spec) -> list[tuple[Entry, Entry]]:
        """(copy, original) of the ends that tie_word_embeddings makes one: the head, a bias that is stored twice."""
        present = [e for e in self.ends if e.present(replace(spec, tied=False))]
        table = {e.slots: e for e in reversed(present)}  # the first of each
        copies = [(e, table[e.slots]) for e in present if table[e.slots] is not e]
        head, embed = table.get(("head",)), table.get(("embed",))
        return [(head, embed), *copies] if head and embed else copies

    def entries(self, spec: Spec, tied: bool = False) -> list[tuple[str, Entry, int | None]]:
        """(name on disk, entry, block index or None) of every tensor that a checkpoint of this spec must hold."""
        rows: list[tuple[str, Entry, int | None]] = [
            (e.name, e, None) for e in self.ends if e.present(spec) and not (tied and e.slots == ("head",))
        ]
        for i in range(spec.layers):
            for e in self.block:
                if i < e.first or not e.present(spec):
                    continue
                if "{j}" in e.name:
                    experts = (replace(e, layout=OfExpert(j)) for j in range(spec.ffn.experts.count))
                    rows += [(x.name.format(i=i, j=j), x, i) for j, x in enumerate(experts)]
                else:
                    rows.append((e.name.format(i=i), e, i))
        return rows


_HEADS = ("head", "pooler", "relation")  # slots behind the final norm begin like this


def linear(name: str, slot: str) -> tuple[Entry, Entry]:
    """The weight and, where the spec has it, the bias of one linear layer."""
    return Entry(f"{name}.weight", (slot,)), Entry(f"{name}.bias", (f"{slot}_bias",))
