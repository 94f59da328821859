"""Tiny models of every family, built by transformers: config class, model class and options, random parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from conftest import VOCAB
from torch import nn

_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_DIMS = {"head_dim": 8}
_VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 3,
}
_LABELS = {"num_labels": 5}
_BERT = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 34,
    "type_vocab_size": 2,
    "pad_token_id": 1,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}


def _rope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | changes}


def _of(config: str, model: str, *options: dict[str, Any], **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        merged: dict[str, Any] = {}
        for part in (*options, more):
            merged |= part
        return getattr(transformers, model)(getattr(transformers, config)(**merged))

    return build


ZOO: dict[str, Callable[[], nn.Module]] = {
    "mistral": _of("MistralConfig", "MistralForCausalLM", _DECODER, _DIMS, sliding_window=6, tie_word_embeddings=False),
    "qwen2": _of("Qwen2Config", "Qwen2ForCausalLM", _DECODER, tie_word_embeddings=False),
    "qwen2-tied-window": _of(
        "Qwen2Config",
        "Qwen2ForCausalLM",
        _DECODER,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    "phi3": _of("Phi3Config", "Phi3ForCausalLM", _DECODER, sliding_window=7),
    "phi3-partial": _of(
        "Phi3Config",
        "Phi3ForCausalLM",
        _DECODER | {"hidden_size": 32},
        _rope(partial_rotary_factor=0.5),
        tie_word_embeddings=True,
    ),
    "stablelm": _of(
        "StableLmConfig", "StableLmForCausalLM", _DECODER | {"hidden_size": 32}, _rope(partial_rotary_factor=0.5)
    ),
    "stablelm-parallel-biased": _of(
        "StableLmConfig",
        "StableLmForCausalLM",
        _DECODER | {"hidden_size": 32},
        _rope(partial_rotary_factor=0.25),
        use_parallel_residual=True,
        use_qkv_bias=True,
    ),
    "olmo": _of("OlmoConfig", "OlmoForCausalLM", _DECODER),
    "olmo-clipped": _of("OlmoConfig", "OlmoForCausalLM", _DECODER, clip_qkv=0.8, tie_word_embeddings=True),
    "phi": _of("PhiConfig", "PhiForCausalLM", _DECODER | {"hidden_size": 32}, _rope(partial_rotary_factor=0.5)),
    "gptj": _of(
        "GPTJConfig",
        "GPTJForCausalLM",
        vocab_size=VOCAB,
        n_positions=32,
        n_embd=24,
        n_layer=2,
        n_head=3,
        rotary_dim=4,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "falcon-7b": _of(
        "FalconConfig",
        "FalconForCausalLM",
        _DECODER,
        multi_query=True,
        parallel_attn=True,
        bias=False,
        alibi=False,
        new_decoder_architecture=False,
    ),
    "falcon-40b": _of(
        "FalconConfig",
        "FalconForCausalLM",
        _DECODER,
        num_kv_heads=2,
        new_decoder_architecture=True,
        bias=False,
        alibi=False,
        tie_word_embeddings=False,
    ),
    "falcon-rw": _of(
        "FalconConfig",
        "FalconForCausalLM",
        _DECODER,
        multi_query=False,
        parallel_attn=False,
        bias=True,
        alibi=True,
        new_decoder_architecture=False,
    ),
    "opt": _of("OPTConfig", "OPTForCausalLM", _DECODER, ffn_dim=40, word_embed_proj_dim=24, tie_word_embeddings=False),
    "opt-tied": _of("OPTConfig", "OPTForCausalLM", _DECODER, ffn_dim=40, word_embed_proj_dim=24),
    "gemma": _of("GemmaConfig", "GemmaForCausalLM", _DECODER, _DIMS),
    "qwen3": _of("Qwen3Config", "Qwen3ForCausalLM", _DECODER, _DIMS, tie_word_embeddings=False),
    "qwen3-tied-biased": _of(
        "Qwen3Config", "Qwen3ForCausalLM", _DECODER, _DIMS, attention_bias=True, tie_word_embeddings=True
    ),
    "olmo2": _of("Olmo2Config", "Olmo2ForCausalLM", _DECODER),
    "gemma2": _of("Gemma2Config", "Gemma2ForCausalLM", _DECODER, _DIMS, sliding_window=6, query_pre_attn_scalar=12),
    "gemma3": _of(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        _DECODER,
        _DIMS,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mixtral": _of("MixtralConfig", "MixtralForCausalLM", _DECODER, _DIMS, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": _of("OlmoeConfig", "OlmoeForCausalLM", _DECODER, num_experts=4, num_experts_per_tok=2),
    "qwen2-moe": _of("Qwen2MoeConfig", "Qwen2MoeForCausalLM", _DECODER, _EXPERTS, shared_expert_intermediate_size=28),
    "qwen3-moe": _of("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _DECODER, _DIMS, _EXPERTS, norm_topk_prob=True),
    "bloom": _of("BloomConfig", "BloomForCausalLM", vocab_size=VOCAB, hidden_size=24, n_layer=2, n_head=3),
    "vit": _of("ViTConfig", "ViTForImageClassification", _VISION, _LABELS),
    "deit": _of("DeiTConfig", "DeiTForImageClassification", _VISION, _LABELS),
    "dinov2": _of("Dinov2Config", "Dinov2ForImageClassification", _VISION, _LABELS, mlp_ratio=2),
    "dinov2-swiglu": _of(
        "Dinov2Config", "Dinov2ForImageClassification", _VISION, _LABELS, mlp_ratio=2, use_swiglu_ffn=True
    ),
    "clip-vision": _of("CLIPVisionConfig", "CLIPVisionModelWithProjection", _VISION, projection_dim=12),
    "clip-text": _of(
        "CLIPTextConfig",
        "CLIPTextModelWithProjection",
        {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40},
        vocab_size=VOCAB,
        max_position_embeddings=32,
        projection_dim=12,
        eos_token_id=0,
        bos_token_id=1,
        pad_token_id=1,
    ),
    "bert": _of("BertConfig", "BertForMaskedLM", _BERT),
    "bert-pretraining": _of("BertConfig", "BertForPreTraining", _BERT),
    "roberta": _of("RobertaConfig", "RobertaForMaskedLM", _BERT),
}
