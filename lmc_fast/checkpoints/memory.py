"""Models in memory as checkpoints: what save_pretrained would write of them is read as if it had been written."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LmcError
from ..files import parse_json, to_json
from .identity import Identity
from .reader import Checkpoint, refuse_quantised
from .tensor_file import DTYPE_NAMES, require_finite

_WHOLE = 1 << 24  # numbers of a tensor that are all digested; of a larger one, a run of every stretch
_STRETCH, _SAMPLE = 1 << 20, 1 << 12


@dataclass(frozen=True)
class Stock:
    """A stock model in memory. Unpacks as config, state_dict = stock.

    Attributes:
        config: of transformers.
        state_dict: what save_pretrained would write, by name; on the CPU where `export` made it.

    >>> pair = lmc.open_pair("A", "B")
    >>> alignment = lmc.Alignment.load("DIR/alignment.safetensors")
    >>> stock = lmc.export(pair, alignment, in_memory=True)[1]
    >>> stock.config.model_type, type(stock.model()).__name__
    ('gpt_neox', 'GPTNeoXForCausalLM')
    """

    config: Any
    state_dict: dict[str, Tensor]

    def __iter__(self) -> Iterator[Any]:
        """config, state_dict = stock."""
        return iter((self.config, self.state_dict))

    def __repr__(self) -> str:
        return f"Stock({(self.config.architectures or [self.config.model_type])[0]}, {len(self.state_dict)} tensors)"

    def model(self, **options: Any) -> Any:
        """The transformers model, as from_pretrained makes it.

        Args:
            **options: of from_pretrained, e.g. dtype.

        Returns:
            A model of the class that the config's `architectures` name.

        Raises:
            LmcError: the config names no class of transformers, or tensors are missing or of other shapes.
        """
        import transformers

        names = self.config.architectures or [""]
        kind = getattr(transformers, names[0], None)
        if kind is None:
            raise LmcError(f"the config names no class of transformers that this is a model of ({names[0]!r}); set it")
        tensors = dict(self.state_dict)  # from_pretrained uses it up
        model, info = kind.from_pretrained(
            None, config=self.config, state_dict=tensors, output_loading_info=True, **options
        )
        lost = sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"], *info["error_msgs"])))
        if lost:
            raise LmcError(f"a {names[0]} in memory lacks weights for {lost[0]} ({len(lost)} in all)")
        return model


class MemoryCheckpoint(Checkpoint):
    """A transformers model, or (config, state dict), as a checkpoint. Nothing is copied until it is read; no disk.

    config: of transformers, or config.json as a dict; state dict: as save_pretrained would write it, or as the model
    of `config.architectures` has it. `path` is what messages call it, `home` (its directory) is None.

    Raises LmcError for anything else, for weights that are not there (offloaded), and for quantised ones.
    """

    def __init__(self, model: Any):
        self.remote, self.home = None, None
        config, tensors, owner = _parts(model)
        names = config.get("architectures")
        kind = owner or (names[0] if isinstance(names, list) and names else None) or config.get("model_type")
        self.source = f"{kind} in memory"
        self.path = Path(f"<{self.source}>")
        self.config = config
        refuse_quantised(config, self.source)
        file = _MemoryFile(self.source, tensors)
        self._files, self._file_of = {"": file}, dict.fromkeys(tensors, "")
        self.tensors = tensors
        self.identity = _MemoryIdentity(self.source, config, tensors)


class _MemoryFile:
    """Tensors by name, answering as TensorFile does: what is read is a copy."""

    def __init__(self, source: str, tensors: Mapping[str, Tensor]):
        self.source, self._tensors = source, tensors

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def kind(self, name: str) -> str:
        return DTYPE_NAMES.get(self.dtype(name), str(self.dtype(name)))

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self._copy(name, self._tensors[name])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        rows = self.shape(name)[0]
        if not 0 <= start <= stop <= rows:
            raise IndexError(f"rows {start} to {stop} of {name}, which has {rows}")
        return self._copy(name, self._tensors[name][start:stop])

    def _copy(self, name: str, part: Tensor) -> Tensor:
        found = part.detach().clone(memory_format=torch.contiguous_format)
        require_finite(Path(f"<{self.source}>"), name, found)
        return found


class _MemoryIdentity(Identity):
    """Whether tensors are still what they were; their content by samples, as of large files."""

    def __init__(self, source: str, config: dict[str, Any], tensors: Mapping[str, Tensor]):
        super().__init__(())
        self._source, self._config, self._tensors = source, to_json(config), tensors
        self._versions = self._seen()
        self._found: str | None = None

    def digests(self) -> dict[str, str]:
        self._found = self._found or self._digest()
        return {"config.json": hashlib.sha256(self._config.encode()).hexdigest(), "weights": self._found}

    def require_unchanged(self) -> None:
        if self._seen() != self._versions or (self._found and self._found != self._digest()):
            raise LmcError(f"the weights of the {self._source} were changed while they were in use; start anew")

    def _seen(self) -> dict[str, tuple[int, int]]:
        """Of each tensor, where it is and how often it was written to."""
        return {n: (t.data_ptr(), 0 if t.is_inference() else t._version) for n, t in self._tensors.items()}

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for name, t in sorted(self._tensors.items()):
            digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
            flat = t.detach().reshape(-1)
            whole = flat.numel() <= _WHOLE
            runs = [(0, flat.numel())] if whole else [(i, i + _SAMPLE) for i in range(0, flat.numel(), _STRETCH)]
            for start, stop in runs:
                part = flat[start:stop].cpu().contiguous()
                digest.update(part.view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _parts(model: Any) -> tuple[dict[str, Any], dict[str, Tensor], str | None]:
    """(config.json, the tensors beside it, the name of the model's class) as save_pretrained would write them."""
    from transformers import PreTrainedConfig, PreTrainedModel

    if isinstance(model, PreTrainedModel):
        name = type(model).__name__
        config = copy.deepcopy(model.config)
        config.dtype, config.architectures = str(model.dtype).removeprefix("torch."), [name]
        ignored = model._keys_to_ignore_on_save or ()
        tensors = {key: t for key, t in model.state_dict().items() if key not in ignored}
        return _json(config), _as_stored(model, _sound(tensors, name)), name
    if not isinstance(model, Stock) and (not isinstance(model, tuple) or len(model) != 2):
        raise LmcError(
            f"a {type(model).__name__} is no model; give a checkpoint directory, a name on the hub, a transformers "
            "model, or (config, state dict)"
        )
    config, tensors = model
    if not isinstance(config, PreTrainedConfig | dict) or not isinstance(tensors, Mapping):
        raise LmcError(
            "of (config, state dict), the first is a transformers config or config.json as a dict, the second maps "
            f"names to tensors; not {type(config).__name__} and {type(tensors).__name__}"
        )
    return _json(config), _sound(tensors, "the state dict"), None


def _json(config: Any) -> dict[str, Any]:
    """config.json, parsed as if it had been written."""
    try:
        text = to_json(config) if isinstance(config, dict) else config.to_json_string(use_diff=True)
    except (TypeError, ValueError) as error:
        raise LmcError(f"the config cannot be written as JSON ({error}); give config.json's content") from error
    found: dict[str, Any] = parse_json(text, "the config")
    return found


def _sound(tensors: Mapping[str, Any], owner: str) -> dict[str, Tensor]:
    for name, t in tensors.items():
        if not isinstance(t, Tensor) or not isinstance(name, str):
            raise LmcError(f"{name} of {owner} is a {type(t).__name__}, not a tensor")
        if t.is_meta:
            raise LmcError(f"{name} of {owner} has no values in memory; load the model without offloading")
        plain = type(t) in (Tensor, torch.nn.Parameter) and t.layout is torch.strided
        if not plain or t.is_quantized or t.is_nested:
            raise LmcError(f"{name} of {owner} is a {type(t).__name__}, not a plain tensor; gather or dequantise it")
    return dict(tensors)


def _as_stored(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What save_pretrained makes of a state dict: no tied copies, names and shapes of checkpoints."""
    from transformers import core_model_loading, modeling_utils

    without_ties = getattr(modeling_utils, "remove_tied_weights_from_state_dict", None)
    with_names = getattr(core_model_loading, "revert_weight_conversion", None)
    for step in (without_ties and (lambda t: without_ties(t, model)), with_names and (lambda t: with_names(model, t))):
        tensors = tensors if step is None else step(tensors)
    return tensors
