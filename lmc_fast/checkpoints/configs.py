"""From a checkpoint's config.json to its family and its spec, with everything refused that does not fit."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from ..architectures import FAMILIES, Family, Spec
from ..architectures.checks import check_kind, check_sizes, check_spec
from ..architectures.heads import NO_HEAD
from ..errors import LmcError
from ..model_types import REFUSED
from .memory import MemoryCheckpoint
from .plain_config import require_plain
from .reader import Checkpoint

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_experts", "num_local_experts")
_MOST_LABELS = 10_000_000


def read_config(checkpoint: Checkpoint) -> tuple[Family, Any]:
    """The family, its configuration as transformers reads it, and what that makes of the model.

    Raises LmcError for an unknown architecture, and for a config that transformers refuses or that makes no sense.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    kind, file = checkpoint.config.get("model_type"), checkpoint.path / "config.json"
    if not isinstance(kind, str):
        raise LmcError(f"{file}: model_type is {kind!r}, not a name; is {checkpoint.source} a model?")
    nested = [name for name in ("text_config", "vision_config") if name in checkpoint.config]
    known = isinstance(kind, str) and kind in FAMILIES
    if nested and not known:
        raise LmcError(
            f"{checkpoint.path}: model_type {kind!r} nests several models ({', '.join(nested)}); {_alone(kind)}"
        )
    if kind in REFUSED and not known:
        raise LmcError(
            f"{checkpoint.path}: model_type {kind!r} is not supported: {REFUSED[kind]}; see lmc-fast families"
        )
    if not known:
        raise LmcError(
            f"{checkpoint.path}: model_type {kind!r} is not supported; supported are {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[str(kind)]
    names = checkpoint.config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise LmcError(f"{file}: architectures is {names!r}, not a list of class names")
    found = [one for one in map(family.of_class, names) if one]
    if names and not found:
        ends = " or ".join((*family.architectures, *(end for head in family.heads for end in head.endings)))
        wanted = "causal language model" if "ForCausalLM" in family.architectures else f"{kind} model with its head"
        raise LmcError(f"{checkpoint.path}: {names[0]} is not a {wanted}; give a checkpoint of a class named ...{ends}")
    family = found[0] if found else family
    _require_countable(checkpoint)
    require_plain(checkpoint.config, file)
    try:
        check_sizes(checkpoint.config, CONFIG_MAPPING[kind])
    except LmcError as error:
        raise LmcError(f"{file}: {error}") from error
    try:
        if checkpoint.home is None:
            config = CONFIG_MAPPING[kind].from_dict(deepcopy(checkpoint.config))
        else:
            config = AutoConfig.from_pretrained(checkpoint.home, trust_remote_code=False)
    except Exception as error:  # transformers validates with many exception types
        raise LmcError(f"{file} is refused by transformers: {_last_line(error)}") from error
    if names and _lacks_head(names[0], family, checkpoint) and not getattr(config, "tie_word_embeddings", False):
        family = family.with_head(NO_HEAD, names[0])
    return family, config


def _lacks_head(name: str, family: Family, checkpoint: Checkpoint | MemoryCheckpoint) -> bool:
    """Of a class that may be read as a decoder's trunk or, where its head is tied, as the whole."""
    trunk = name.endswith("Model") and "Head" not in name and "ForCausalLM" in family.architectures
    heads = [entry.name for entry in family.ends if entry.slots == ("head",)]
    return trunk and not any(head in checkpoint for head in heads)


def spec_of(family: Family, config: Any, file: Path) -> Spec:
    """What a transformers config, as it stands in `file`, makes of a model. Raises LmcError."""
    try:
        check_sizes(vars(config), type(config))
        spec = family.spec(config)
        check_kind(config, spec)
        check_spec(spec)
        return spec
    except LmcError as error:
        raise LmcError(f"{file}: {error}") from error
    except Exception as error:  # a value of a type or size that transformers let pass
        raise LmcError(f"{file} describes no {family.name} model ({_last_line(error)}); download it again") from error


def _require_countable(checkpoint: Checkpoint) -> None:
    """Raises LmcError for numbers that transformers would count to before it looks at anything else."""
    tensors = len(checkpoint.names)  # every block and every expert has one at least
    limits = dict.fromkeys(_COUNTS, tensors) | {"num_labels": _MOST_LABELS}
    for key, most in limits.items():
        value = checkpoint.config.get(key)
        if isinstance(value, (int, float)) and value > most:
            raise LmcError(
                f"{checkpoint.path / 'config.json'}: {key} is {value}, which does not fit files of {tensors} tensors"
            )


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def _alone(kind: str) -> str:
    """How to save one of the models that a checkpoint nests, with its head."""
    if kind == "clip":
        return "save one tower: transformers.CLIPVisionModelWithProjection.from_pretrained(DIR).save_pretrained(NEW)"
    return (
        "save its language model: m = AutoModelForImageTextToText.from_pretrained(DIR, dtype='float32'); "
        "t = AutoModelForCausalLM.from_config(m.config.text_config); "
        "t.model.load_state_dict(m.model.language_model.state_dict()); "
        "t.lm_head.load_state_dict(m.lm_head.state_dict()); t.save_pretrained(NEW)"
    )
