"""A checkpoint as transformers itself reads and runs it, with one block's weights in memory at a time.

Everything that decides the function is transformers' own: which files are read, which parameter a stored name becomes,
what is tied or fused, and the forward pass. Here parameters are only given their stored values before the block that
owns them runs, and lose them behind it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.lazy import CHUNK_ELEMENTS
from ..engine.model import model_inputs, target_rows
from ..errors import LmcError
from ..examples import Data, inputs_of
from .stored import Part, names_in, tensors_in

_AUTO = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "image": "AutoModelForImageClassification"}


def output_of(out: Any) -> Tensor:
    """What a class without a language model's head computes: (n, V), or (n, T, V) of tokens.

    Of models without any head: the last hidden state, and below it the pooled output, if there is one.
    """
    for name in ("logits", "image_embeds", "text_embeds"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    if getattr(out, "start_logits", None) is not None:
        return torch.stack([out.start_logits, out.end_logits], -1)
    hidden, pooled = out.last_hidden_state, getattr(out, "pooler_output", None)
    return hidden if pooled is None else torch.cat([hidden, pooled[:, None]], 1)


class Unreadable(Exception):
    """transformers cannot be made to run a checkpoint block by block; the text says why."""


class _Stopped(BaseException):
    """Carries what `visited` raised past everything that takes an exception for a fault of transformers."""


class _HeadReached(Exception):
    """Ends a forward pass where the head would begin."""


@dataclass(frozen=True)
class _Place:
    """Where a parameter or buffer is, and what stands for it while it has no value. Tied places share that."""

    module: nn.Module
    name: str
    empty: Tensor

    @property
    def value(self) -> Tensor:
        return getattr(self.module, self.name)

    def put(self, value: Tensor) -> None:
        buffers, parameters = self.module._buffers, self.module._parameters
        (buffers if self.name in buffers else parameters)[self.name] = value  # type: ignore[assignment]


class Reference:
    """What from_pretrained makes of a directory, in `dtype`, answering as evaluation.function wants.

    task: as in Spec. names: model classes, of which the first that transformers has is taken instead of the task's.
    columns: how many of the head's, by default all. visited: called whenever a block is about to run.
    Raises Unreadable, and LmcError where transformers refuses the checkpoint or would make weights up.
    """

    def __init__(
        self,
        path: Path,
        task: str,
        names: Sequence[str] = (),
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        columns: int | None = None,
        visited: Callable[[], None] | None = None,
    ):
        self.path, self.task, self.device, self._dtype = path, task, torch.device(device), dtype
        self._columns, self._visited = columns, visited
        self._source: tuple[list[str], Any] = ([], None)
        with quiet(), _unreadable():
            self._stock = _class_of(path, task, names)
            self.model = self._open()
            self._arrange()
        self.by = f"transformers {version()}"

    # What transformers loads, and where it belongs

    def _open(self) -> Any:
        """The model with all stored weights on the meta device, by from_pretrained, whose loading alone differs."""
        stock, opened = self._stock, self

        def load(model: Any, state: Any, files: Any, config: Any, *more: Any, **options: Any) -> Any:
            opened._source = ([str(file) for file in files], config)
            return stock._load_pretrained_model(model, state, files, _onto_meta(config), *more, **options)

        members = {"_load_pretrained_model": staticmethod(load), "__module__": stock.__module__}
        lazy: Any = type(stock.__name__, (stock,), members)
        try:
            model, info = lazy.from_pretrained(self.path, dtype=self._dtype, output_loading_info=True)
        except (OSError, ValueError) as error:
            raise LmcError(f"transformers does not load {self.path} ({_first_line(error)})") from error
        lost = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"], *info["error_msgs"])))
        if lost:
            raise LmcError(f"{self.path}: transformers finds no weights for {lost[0]} ({len(lost)} in all)")
        model.config.use_cache, model.config.return_dict = False, True
        for module in model.modules():  # what is not stored, such as the frequencies of RoPE
            for name, value in module._buffers.items():
                if value is not None and not value.is_meta:
                    module._buffers[name] = value.to(self.device)
        return model.eval()

    @property
    def width(self) -> int:
        return 1 if self.head is None else self.head.weight.shape[1]

    def _arrange(self) -> None:
        """Finds out which stored tensors fill which block, the token embedding, the head, and the rest."""
        model, layers = self.model, self.model.config.num_hidden_layers
        lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
        if not lists:
            raise Unreadable(f"{type(model).__name__} has no list of {layers} blocks")
        blocks = min(lists, key=lambda item: item[0].count("."))[1]
        self._file_of = {name: file for file in self._source[0] for name in names_in(file)}
        groups: dict[int, list[str]] = {}
        for name in self._file_of:
            number = re.search(r"(?:^|\.)(\d+)\.", name)  # the first number of a name is its block's
            groups.setdefault(int(number[1]) if number else -1, []).append(name)
        rest = groups.pop(-1, [])
        inner = {id(module) for block in blocks for module in block.modules()}
        self._outer = [place for place in _places(model) if id(place.module) not in inner]
        embed = model.get_input_embeddings()
        self.head = model.get_output_embeddings() if self.task in ("causal", "masked") else None
        self._table = self._tables(rest, [m for m in (embed, self.head) if isinstance(m, (nn.Embedding, nn.Linear))])
        self._fill([n for n in rest if n not in self._table.values()], self._outer)
        self._require(p for p in self._outer if id(p.empty) not in self._table)
        if isinstance(embed, nn.Embedding):
            self._hook_embedding(embed)
        sizes = [1]
        for i, block in enumerate(blocks):
            places, names = _places(block), groups.get(i, [])
            self._hook_block(block, names, places)
            sizes.append((2 if len(names) <= len(places) else 4) * sum(p.empty.numel() for p in places))
        self.block_bytes = max(sizes) * self._dtype.itemsize  # with what it is read from, or fused of

    def _tables(self, names: Sequence[str], modules: Sequence[nn.Module]) -> dict[int, str]:
        """id of the empty value of each module's weight -> the stored tensor that becomes it."""
        found: dict[int, str] = {}
        for name in names:
            self._load([name], None, _onto_meta(self._source[1]))
            found |= {id(p.empty): name for p in self._outer if p.value is not p.empty}
            _clear(self._outer)
        lost = [m for m in modules if id(m.weight) not in found]
        if lost:
            raise Unreadable(f"the weights of a {type(lost[0]).__name__} do not lie in one tensor")
        return {key: name for key, name in found.items() if key in {id(m.weight) for m in modules}}

    # Weights in and out

    def _fill(self, names: Sequence[str], places: Sequence[_Place]) -> None:
        """Gives places their stored values; tied places share one."""
        self._load(names, None, self._source[1])
        values = {id(p.empty): p.value.to(self.device) for p in places if p.value is not p.empty}
        for place in places:
            if id(place.empty) in values:
                place.put(values[id(place.empty)])

    def _rows(self, module: Any, rows: Tensor) -> Tensor:
        """Rows of the table that becomes a module's weight, whichever of the tied parameters it is stored for."""
        places = [p for p in self._outer if p.empty is module.weight]
        short = torch.empty(len(rows), module.weight.shape[1], dtype=self._dtype, device="meta")
        for place in places:
            place.put(nn.Parameter(short, requires_grad=False))
        before = [place.value for place in places]
        self._load([self._table[id(places[0].empty)]], rows, self._source[1])
        found = [p.value for p, old in zip(places, before, strict=True) if p.value is not old]
        _clear(places)
        return found[0].detach().to(self.device)

    def _load(self, names: Sequence[str], rows: Tensor | None, config: Any) -> None:
        """Stored tensors, or some rows of them, into the model, by transformers' own loading."""
        with ExitStack() as stack, quiet():
            files = {f: stack.enter_context(tensors_in(f)) for f in {self._file_of[name] for name in names}}
            state = {name: Part(files[self._file_of[name]](name), rows) for name in names}
            found = self._stock._load_pretrained_model(self.model, state, None, config)
        info = found[0] if isinstance(found, tuple) else found
        bad = sorted(map(str, (*info.mismatched_keys, *info.conversion_errors)))
        if bad:
            raise Unreadable(f"{bad[0]} cannot be loaded alone")

    def _require(self, places: Iterable[_Place]) -> None:
        for place in places:
            if place.value.is_meta:
                raise Unreadable(f"no stored tensor becomes {place.name} of a {type(place.module).__name__}")

    def _hook_block(self, block: nn.Module, names: Sequence[str], places: Sequence[_Place]) -> None:
        def fill(*_: Any) -> None:
            try:
                if self._visited is not None:
                    self._visited()
            except Exception as error:
                raise _Stopped from error
            self._fill(names, places)
            self._require(places)

        def clear(*_: Any) -> None:
            _clear(places)

        block.register_forward_pre_hook(fill)
        block.register_forward_hook(clear, always_call=True)

    def _hook_embedding(self, embed: nn.Embedding) -> None:
        (place,) = (p for p in self._outer if p.module is embed)
        padding = embed.padding_idx

        def fill(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            tokens, picked = args[0].unique(return_inverse=True)
            place.put(nn.Parameter(self._rows(embed, tokens), requires_grad=False))
            embed.padding_idx = None  # it matters to gradients only, and may lie beyond these rows
            return picked, *args[1:]

        def clear(*_: Any) -> None:
            embed.padding_idx = padding
            place.put(place.empty)

        embed.register_forward_pre_hook(fill)
        embed.register_forward_hook(clear, always_call=True)

    # Forward passes

    @torch.no_grad()
    def head_inputs(self, data: Data, batch: int) -> Tensor:
        """As Answering; of models whose whole output is small, that."""
        try:
            if self.head is None:
                return torch.cat([self._picked(self._outputs(inputs_of(part)), part) for part in data.split(batch)])
            return torch.cat(
                [target_rows(self._hidden(model_inputs(part)), part) for part in data.to(self.device).split(batch)]
            )
        except _Stopped as stopped:
            assert stopped.__cause__ is not None
            raise stopped.__cause__ from None

    @torch.no_grad()
    def logits(self, rows: Tensor, columns: int) -> Iterator[tuple[int, Tensor]]:
        """As Answering."""
        if self.head is None:
            for start in range(0, rows.shape[1], columns):
                yield start, rows[:, start : start + columns]
            return
        head = {p.name: p for p in self._outer if p.module is self.head}
        bias, count = self.head.bias, min(self.head.weight.shape[0], self._columns or sys.maxsize)
        for first in range(0, count, size := max(1, CHUNK_ELEMENTS // self.width // columns) * columns):
            with _unreadable():
                table = self._rows(self.head, torch.arange(first, min(first + size, count)))
            for start in range(0, len(table), columns):
                part = table[start : start + columns]
                with _unreadable(), self._trunk_gives(rows[None]):
                    head["weight"].put(nn.Parameter(part, requires_grad=False))
                    if bias is not None:
                        head["bias"].put(bias[first + start :][: len(part)])
                    found = self.model(input_ids=torch.zeros(1, len(rows), dtype=torch.int64, device=self.device))
                    head["weight"].put(head["weight"].empty)
                    if bias is not None:
                        head["bias"].put(bias)
                yield first + start, found.logits[0]

    def _outputs(self, inputs: Tensor) -> Tensor:
        """Logits or features (n, V) of token ids (n, T) or images (n, c, size, size)."""
        name, dtype = ("pixel_values", self._dtype) if inputs.is_floating_point() else ("input_ids", torch.int64)
        with _unreadable():
            return output_of(self.model(**{name: inputs.to(self.device, dtype)}))

    def _picked(self, out: Tensor, data: Data) -> Tensor:
        return out.flatten(0, -2) if self.task == "features" else target_rows(out, data)

    def _hidden(self, tokens: Tensor) -> Tensor:
        """Token ids (n, T) -> what the trunk of a language model gives its head (n, T, d)."""
        seen: list[tuple[nn.Module, Any]] = []

        def record(module: nn.Module, _: Any, out: Any) -> None:
            if getattr(out, "last_hidden_state", None) is not None:
                seen.append((module, out))

        def stop(*_: Any) -> None:
            raise _HeadReached

        assert self.head is not None
        handles = [m.register_forward_hook(record) for m in self.model.modules() if m is not self.model]
        handles.append(self.head.register_forward_pre_hook(stop))
        try:
            with suppress(_HeadReached), _unreadable():
                self.model(input_ids=tokens.to(self.device))
        finally:
            for handle in handles:
                handle.remove()
        if not seen:
            raise Unreadable(f"the head of a {type(self.model).__name__} is not reached by way of hidden states")
        trunk, out = seen[-1]  # what encloses the others ends last
        self._trunk = trunk, replace(out, last_hidden_state=None)
        return out.last_hidden_state

    @contextmanager
    def _trunk_gives(self, hidden: Tensor) -> Iterator[None]:
        """Where a forward pass asks the trunk, it gets this."""
        trunk, out = self._trunk
        trunk.forward = partial(_given, replace(out, last_hidden_state=hidden))
        try:
            yield
        finally:
            del trunk.forward


def _given(out: Any, *_: Any, **__: Any) -> Any:
    return out


def _class_of(path: Path, task: str, names: Sequence[str]) -> Any:
    import transformers

    for name in names:
        if hasattr(transformers, name):
            return getattr(transformers, name)
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(path)
        return type(getattr(transformers, _AUTO[task]).from_config(config))


def version() -> str:
    import transformers

    return transformers.__version__


def _onto_meta(config: Any) -> Any:
    return replace(config, device_map={"": "meta"})


def _places(module: nn.Module) -> list[_Place]:
    """All that has no value yet."""
    return [
        _Place(owner, name, value)
        for owner in module.modules()
        for name, value in (*owner._parameters.items(), *owner._buffers.items())
        if value is not None and value.is_meta
    ]


def _clear(places: Sequence[_Place]) -> None:
    for place in places:
        place.put(place.empty)


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars and reports: a model is loaded in many parts here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _unreadable() -> Iterator[None]:
    """Whatever transformers fails with means that it cannot be used like this."""
    try:
        yield
    except (LmcError, Unreadable, _HeadReached):
        raise
    except Exception as error:
        raise Unreadable(f"transformers {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
