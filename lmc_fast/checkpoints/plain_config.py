"""What any config.json must say for transformers to build and run a model of it, whatever the family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import LmcError

_SWITCHES = ("output_attentions", "output_hidden_states", "return_dict", "use_cache")
_NAMES = ("attn_implementation", "_attn_implementation", "transformers_weights")
_NESTED = ("text_config", "vision_config")
# models of these take the head size as it is given, also if that is null
_HEAD_SIZE_AS_GIVEN = (
    *("gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "olmo3", "olmoe", "flex_olmo", "phi", "phi3"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "cohere", "cohere2", "exaone4", "granite", "granitemoe"),
    *("hunyuan_v1_dense", "ministral", "smollm3"),
)
_WITHOUT_PADDING = ("falcon", "gpt2", "gpt_neox", "gptj", "bloom")  # their embeddings know no padding token
_CHUNKED = ("bert", "roberta")  # their FFN is computed in runs of chunk_size_feed_forward positions
_LARGEST = 2**31 - 1
_PLACES = ("image_size", "patch_size", "num_channels")


def require_plain(config: dict[str, Any], file: Path) -> None:
    """Raises LmcError for options of a type or size with which transformers fails, often only when it computes."""

    def refuse(key: str, wanted: str) -> None:
        raise LmcError(f"{file}: {key} is {config[key]!r}, not {wanted}; correct it, or download the file again")

    for key, value in config.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        chance = "dropout" in key or key.endswith(("_pdrop", "layerdrop"))
        if value is None and not chance:
            continue
        if key in _SWITCHES and not isinstance(value, bool):
            refuse(key, "true or false")
        if key in _NAMES and (not isinstance(value, str) or not value):
            refuse(key, "a name")
        if chance and not key.startswith(("classifier", "summary")) and not (number and 0 <= value <= 1):
            refuse(key, "a probability")
        if key == "architectures" and not (isinstance(value, list) and all(isinstance(x, str) and x for x in value)):
            refuse(key, "a list of class names")
        unused = value == 0 and "use_sliding_window" in config  # as transformers writes it
        if key == "sliding_window" and not (_positive(value) or unused):
            refuse(key, "a number of tokens")
        if key in _PLACES and not all(_positive(part) for part in (value if isinstance(value, list) else [value])):
            refuse(key, "a positive whole number")
        if key in _NESTED:
            refuse(key, "absent from a model of one part")
        if key == "num_ln_in_parallel_attn" and value not in (1, 2):
            refuse(key, "1 or 2")
    if config.get("head_dim", 0) is None and config.get("model_type") in _HEAD_SIZE_AS_GIVEN:
        refuse("head_dim", "a positive whole number, or absent")
    chunk = config.get("chunk_size_feed_forward", 0)
    if config.get("model_type") in _CHUNKED and not (type(chunk) is int and chunk <= 1):
        refuse("chunk_size_feed_forward", "0, which computes the same for inputs of every length")
    _require_tokens(config, file)


def _require_tokens(config: dict[str, Any], file: Path) -> None:
    """Ids that a model itself looks at lie in its vocabulary."""
    vocab, kind = config.get("vocab_size"), config.get("model_type")
    if not isinstance(vocab, int):
        return
    key = "eos_token_id" if kind == "clip_text_model" else "pad_token_id"
    if kind not in _WITHOUT_PADDING:
        value = config.get(key)
        least = 0 if key == "eos_token_id" else -vocab  # counted from the end, as some old files do with -1
        if value is not None and not (isinstance(value, int) and least <= value < vocab):
            raise LmcError(f"{file}: {key} is {value!r}, which is no token of a vocabulary of {vocab}; correct it")


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST
