"""What adapter_config.json of peft may say: options that would make peft do something else, or fail, are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import LmcError

MERGE = (
    "merge it with peft (PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), ADAPTER)"
    ".merge_and_unload().save_pretrained(NEW)), and carry NEW"
)
# options that say nothing about the function, that are written down as they are, or that are read
_KNOWN = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out"),
    *("use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "runtime_config", "lora_bias", "bias", "modules_to_save"),
}
_TASKS = (None, "SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_SLOW = re.compile(r"\)[*+{]")  # in a pattern of modules
_REPEATS, _MOST_REPEATS = re.compile(r"[*+{]"), 4  # of n characters each, up to n^4 ways to match are tried
_START_ONLY = (True, False, None, "gaussian", "orthogonal", "eva")  # ways to begin that leave the base as it is


def require_lora(config: Mapping[str, Any], file: Path) -> None:
    """Raises LmcError unless it is of a LoRA adapter that is nothing but changes of low rank."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise LmcError(f"{file}: an adapter of type {kind!r} is no low-rank change of weights; {MERGE}")
    reasons = {
        "use_dora": "DoRA rescales whole rows of the weights, which is no change of low rank",
        "modules_to_save": "it holds whole modules beside its low-rank changes",
        "ensure_weight_tying": "it ties the changes of embedding and head, which are apart in an aligned model",
        "megatron_config": "its layers are those of Megatron",
    }
    for option, reason in reasons.items():
        if config.get(option):
            raise LmcError(f"{file}: {option} is {config[option]!r}: {reason}; {MERGE}")
    if config.get("bias") not in (None, "none"):
        raise LmcError(f"{file}: bias is {config['bias']!r}: it holds the model's own biases, trained; {MERGE}")
    begun = config.get("init_lora_weights")
    if begun not in _START_ONLY:
        raise LmcError(f"{file}: init_lora_weights is {begun!r}, which also changes the base; {MERGE}")
    for option, value in config.items():
        if option not in _KNOWN and value:
            raise LmcError(f"{file}: {option} is {value!r}, which is not known here; {MERGE}")
    for option, sound in _soundness(config).items():
        if not sound:
            raise LmcError(f"{file}: {option} is {config.get(option)!r}, which peft does not take; save it again")


def _soundness(config: Mapping[str, Any]) -> dict[str, bool]:
    """Option -> whether peft could load an adapter with its value."""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    excluded, pattern = config.get("exclude_modules"), config.get("layers_pattern")
    numbers = layers if isinstance(layers, list) else [layers]
    return {
        "task_type": config.get("task_type") in _TASKS,
        "megatron_config": config.get("megatron_config") is None,
        "lora_bias": isinstance(config.get("lora_bias", False), bool | None),
        "trainable_token_indices": config.get("trainable_token_indices") is None,
        "target_modules": bool(targets) and _are_texts(targets),
        "exclude_modules": excluded is None or _are_texts(excluded),
        "layers_to_transform": layers is None or (isinstance(targets, list) and all(type(n) is int for n in numbers)),
        "layers_pattern": pattern is None or (_are_texts(pattern) and (not pattern or layers is not None)),
    }


def _are_texts(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(text, str) for text in value))


def require_targeted(config: Mapping[str, Any], file: Path, path: str, block: int | None) -> None:
    """Raises LmcError for factors of a module that peft would leave out: it loads the others, and says nothing.

    path: of the module; block: its number, None outside of all.
    """
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    if targets == "all-linear":
        named = block is not None
    else:
        named = _names(targets, path, file, "target_modules")
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not named or (numbers and block not in numbers):
        option = "layers_to_transform" if named else "target_modules"
        raise LmcError(f"{file}: {option} leaves out {path}, of which there are factors; save the adapter again")
    excluded = config.get("exclude_modules")
    if excluded and _names(excluded, path, file, "exclude_modules"):
        raise LmcError(f"{file}: exclude_modules leaves out {path}, of which there are factors; save the adapter again")


def _names(given: str | list[str], path: str, file: Path, option: str) -> bool:
    """Whether a pattern, or one of some names, is that of a module."""
    if isinstance(given, str):
        return bool(pattern(given, given, file, option).fullmatch(path))
    return any(path == name or path.endswith(f".{name}") for name in given)


def pattern(text: str, shown: str, file: Path, option: str) -> re.Pattern[str]:
    """A regular expression; shown: the part of it that is `option`'s. Raises LmcError for none, or one that is slow."""
    if _SLOW.search(shown) or len(_REPEATS.findall(shown)) > _MOST_REPEATS:
        raise LmcError(f"{file}: {option} holds {shown!r}, whose repetitions can take for ever; {MERGE}")
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise LmcError(f"{file}: {option} holds no pattern ({error}); save the adapter again") from error
