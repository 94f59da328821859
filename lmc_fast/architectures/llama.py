"""Llama, TinyLlama, SmolLM; Mistral (sliding window); Qwen2 (biases); Qwen3 (norms on queries and keys by head)."""

from __future__ import annotations

from typing import Any

from .decoder import ATTENTION, GATED, PRE_NORMS, QK_NORMS, ROPE_BUFFERS, block_norms, decoder_spec, embeddings, windows
from .family import Family
from .spec import Spec


def _llama(config: Any) -> Spec:
    biases = {"q", "k", "v", "o"} if config.attention_bias else set()
    if config.mlp_bias:
        biases |= {"up", "gate", "down"}
    return decoder_spec(config, biases=frozenset(biases))


def _mistral(config: Any) -> Spec:
    return decoder_spec(config, attention={"windows": windows(config, by_layer=False)})


def _qwen2(config: Any) -> Spec:
    return decoder_spec(config, biases=frozenset("qkv"), attention={"windows": windows(config, by_layer=True)})


def _qwen3(config: Any) -> Spec:
    return decoder_spec(config, attention={"qk_norm": "head", "windows": windows(config, by_layer=True)})


_BLOCK = (*block_norms(PRE_NORMS, "weight"), *ATTENTION, *GATED)
_SHARED: dict[str, Any] = {"ends": embeddings("weight"), "prefix": "model.", "buffers": ROPE_BUFFERS}

FAMILIES = (
    Family(name="llama", spec=_llama, block=_BLOCK, **_SHARED),
    Family(name="mistral", spec=_mistral, block=_BLOCK, **_SHARED),
    Family(name="qwen2", spec=_qwen2, block=_BLOCK, **_SHARED),
    Family(name="qwen3", spec=_qwen3, block=_BLOCK + QK_NORMS, **_SHARED),
)
