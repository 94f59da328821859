"""Tiny models of every family, built by transformers with random parameters, and what transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints_tiny import VARIANTS, VOCAB, randomize, true_float64
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()

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
_BIASES = {"attention_bias": True, "mlp_bias": True}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 1.7,
}
_GPT = {
    "vocab_size": VOCAB,
    "n_positions": 32,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
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
_DISTIL = {
    "vocab_size": VOCAB,
    "dim": 24,
    "n_layers": 2,
    "n_heads": 3,
    "hidden_dim": 40,
    "max_position_embeddings": 32,
}
_MODERN = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "local_attention": 8,
    "layer_types": ["full_attention", "sliding_attention"],
    "pad_token_id": 0,
    "classifier_pooling": "mean",
    **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
}
_DEBERTA = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "relative_attention": True,
    "position_buckets": 6,
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "pad_token_id": 0,
    "type_vocab_size": 0,
}
_CLIP_TEXT = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}


def _rope(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4} | changes}


_HALF_TURNED = _rope(partial_rotary_factor=0.5)


def _of(config: str, model: str, *options: dict[str, Any], **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        merged: dict[str, Any] = {}
        for part in (*options, more):
            merged |= part
        return getattr(transformers, model)(getattr(transformers, config)(**merged))

    return build


ZOO: dict[str, Callable[[], nn.Module]] = {
    **{name: VARIANTS[name] for name in ("llama", "llama-tied-biased", "neox", "neox-sequential", "gpt2", "gpt2-tied")},
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
        _HALF_TURNED,
        tie_word_embeddings=True,
    ),
    "stablelm": _of("StableLmConfig", "StableLmForCausalLM", _DECODER | {"hidden_size": 32}, _HALF_TURNED),
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
    "phi": _of("PhiConfig", "PhiForCausalLM", _DECODER | {"hidden_size": 32}, _HALF_TURNED),
    "gptj": _of("GPTJConfig", "GPTJForCausalLM", _GPT, rotary_dim=4),
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
    "ministral": _of(
        "MinistralConfig",
        "MinistralForCausalLM",
        _DECODER,
        _DIMS,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "cwm": _of(
        "CwmConfig",
        "CwmForCausalLM",
        _DECODER,
        _DIMS,
        _rope(),
        sliding_window=6,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "seed-oss": _of(
        "SeedOssConfig",
        "SeedOssForCausalLM",
        _DECODER,
        _DIMS,
        _BIASES,
        attention_out_bias=True,
        tie_word_embeddings=True,
    ),
    "smollm3": _of(
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        _DECODER,
        _BIASES,
        no_rope_layers=[1, 0],
        use_sliding_window=True,
        sliding_window=6,
    ),
    "helium": _of("HeliumConfig", "HeliumForCausalLM", _DECODER, _BIASES, head_dim=6),
    "ernie": _of("Ernie4_5Config", "Ernie4_5ForCausalLM", _DECODER, _DIMS, use_bias=True),
    "arcee": _of("ArceeConfig", "ArceeForCausalLM", _DECODER, _DIMS, _BIASES),
    "granite": _of("GraniteConfig", "GraniteForCausalLM", _DECODER, _BIASES, _MULTIPLIERS, tie_word_embeddings=True),
    "hyperclovax": _of("HyperCLOVAXConfig", "HyperCLOVAXForCausalLM", _DECODER, _DIMS, _BIASES, _MULTIPLIERS),
    "hunyuan": _of("HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM", _DECODER, _DIMS, attention_bias=True),
    "jais2": _of("Jais2Config", "Jais2ForCausalLM", _DECODER, _DIMS),
    "starcoder2": _of("Starcoder2Config", "Starcoder2ForCausalLM", _DECODER, sliding_window=6),
    "nemotron": _of("NemotronConfig", "NemotronForCausalLM", _DECODER, _DIMS, _BIASES, _HALF_TURNED),
    "cohere": _of("CohereConfig", "CohereForCausalLM", _DECODER, attention_bias=True, logit_scale=0.4),
    "cohere2": _of(
        "Cohere2Config",
        "Cohere2ForCausalLM",
        _DECODER,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "glm": _of("GlmConfig", "GlmForCausalLM", _DECODER, _DIMS, _HALF_TURNED),
    "glm4": _of("Glm4Config", "Glm4ForCausalLM", _DECODER, _DIMS, _HALF_TURNED, tie_word_embeddings=True),
    "olmo3": _of(
        "Olmo3Config",
        "Olmo3ForCausalLM",
        _DECODER,
        attention_bias=True,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 2.0},
        },
    ),
    "exaone4": _of(
        "Exaone4Config",
        "Exaone4ForCausalLM",
        _DECODER,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "vaultgemma": _of(
        "VaultGemmaConfig", "VaultGemmaForCausalLM", _DECODER, _DIMS, sliding_window=6, query_pre_attn_scalar=12
    ),
    "granitemoe": _of(
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        _DECODER,
        _MULTIPLIERS,
        attention_bias=True,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "gpt-oss": _of(
        "GptOssConfig",
        "GptOssForCausalLM",
        _DECODER,
        _DIMS,
        _rope(),
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=6,
        swiglu_limit=0.6,
    ),
    "flex-olmo": _of("FlexOlmoConfig", "FlexOlmoForCausalLM", _DECODER, num_experts=4, num_experts_per_tok=2),
    "gpt-bigcode": _of("GPTBigCodeConfig", "GPTBigCodeForCausalLM", _GPT),
    "gpt-bigcode-heads": _of("GPTBigCodeConfig", "GPTBigCodeForCausalLM", _GPT, multi_query=False, n_inner=40),
    "codegen": _of("CodeGenConfig", "CodeGenForCausalLM", _GPT | {"n_head": 4, "n_embd": 32}, rotary_dim=4),
    "gpt-neo": _of(
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        vocab_size=VOCAB,
        hidden_size=24,
        num_layers=2,
        num_heads=3,
        max_position_embeddings=32,
        attention_types=[[["global", "local"], 1]],
        window_size=6,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "mpt": _of("MptConfig", "MptForCausalLM", vocab_size=VOCAB, d_model=24, n_heads=3, n_layers=2, max_seq_len=32),
    "mpt-clipped": _of(
        "MptConfig",
        "MptForCausalLM",
        vocab_size=VOCAB,
        d_model=24,
        n_heads=3,
        n_layers=2,
        max_seq_len=32,
        tie_word_embeddings=False,
        attn_config={"clip_qkv": 0.8, "softmax_scale": 0.3},
    ),
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
        _CLIP_TEXT,
        projection_dim=12,
        eos_token_id=0,
        bos_token_id=1,
        pad_token_id=1,
    ),
    "clip-text-argmax": _of(
        "CLIPTextConfig",
        "CLIPTextModelWithProjection",
        _CLIP_TEXT,
        projection_dim=12,
        eos_token_id=2,
    ),
    "bert": _of("BertConfig", "BertForMaskedLM", _BERT),
    "bert-pretraining": _of("BertConfig", "BertForPreTraining", _BERT),
    "roberta": _of("RobertaConfig", "RobertaForMaskedLM", _BERT),
    "ernie-bert": _of("ErnieConfig", "ErnieForMaskedLM", _BERT),
    "megatron-bert": _of("MegatronBertConfig", "MegatronBertForMaskedLM", _BERT),
    "xlm-roberta": _of("XLMRobertaConfig", "XLMRobertaForMaskedLM", _BERT, hidden_act="relu"),
    "camembert": _of("CamembertConfig", "CamembertForMaskedLM", _BERT),
    "data2vec-text": _of("Data2VecTextConfig", "Data2VecTextForMaskedLM", _BERT),
    "electra": _of("ElectraConfig", "ElectraForMaskedLM", _BERT, embedding_size=24),
    "distilbert": _of("DistilBertConfig", "DistilBertForMaskedLM", _DISTIL),
    "modernbert": _of("ModernBertConfig", "ModernBertForMaskedLM", _MODERN),
    "modernbert-biased": _of(
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        _MODERN,
        tie_word_embeddings=False,
        **dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True),
    ),
    "deberta": _of("DebertaV2Config", "DebertaV2ForMaskedLM", _DEBERTA),
    "deberta-unbucketed": _of(
        "DebertaV2Config",
        "DebertaV2ForMaskedLM",
        _DEBERTA,
        position_buckets=-1,
        max_relative_positions=9,
        norm_rel_ebd="none",
        pos_att_type="c2p",
        position_biased_input=True,
        type_vocab_size=2,
    ),
    "vit-msn": _of("ViTMSNConfig", "ViTMSNForImageClassification", _VISION, _LABELS),
    **{
        f"{name}-{kind}": _of(config, model, options, *([_LABELS] if kind in ("label", "tags") else []))
        for name, config, options, models in (
            ("bert", "BertConfig", _BERT, ("BertModel", "BertForSequenceClassification", "BertForTokenClassification")),
            ("megatron", "MegatronBertConfig", _BERT, ("MegatronBertModel", "MegatronBertForSequenceClassification")),
            ("xlmr", "XLMRobertaConfig", _BERT, ("XLMRobertaModel", "XLMRobertaForSequenceClassification")),
            (
                "electra",
                "ElectraConfig",
                _BERT | {"embedding_size": 24},
                ("ElectraModel", "ElectraForSequenceClassification"),
            ),
            ("distilbert", "DistilBertConfig", _DISTIL, ("DistilBertModel", "DistilBertForSequenceClassification")),
            (
                "modernbert",
                "ModernBertConfig",
                _MODERN,
                ("ModernBertModel", "ModernBertForSequenceClassification", "ModernBertForTokenClassification"),
            ),
            (
                "deberta",
                "DebertaV2Config",
                _DEBERTA,
                ("DebertaV2Model", "DebertaV2ForSequenceClassification", "DebertaV2ForTokenClassification"),
            ),
            ("llama", "LlamaConfig", _DECODER, ("LlamaModel", "LlamaForSequenceClassification")),
            ("gpt2", "GPT2Config", _GPT | {"pad_token_id": 3}, (None, "GPT2ForSequenceClassification")),
            ("vit", "ViTConfig", _VISION, ("ViTModel",)),
            ("deit", "DeiTConfig", _VISION, ("DeiTModel",)),
            ("dinov2", "Dinov2Config", _VISION | {"mlp_ratio": 2}, ("Dinov2Model",)),
            ("clip-vision", "CLIPVisionConfig", _VISION, ("CLIPVisionModel",)),
            ("clip-text", "CLIPTextConfig", _CLIP_TEXT | {"eos_token_id": 0}, ("CLIPTextModel",)),
        )
        for kind, model in zip(("headless", "label", "tags"), models, strict=False)
        if model
    },
    "bert-answers": _of("BertConfig", "BertForQuestionAnswering", _BERT),
    "bert-score": _of("BertConfig", "BertForSequenceClassification", _BERT, num_labels=1),
}


# nothing but names and layouts is new in these: what depends on values alone is tested with the others
ROWS_ONLY = {
    *("ernie-bert", "xlm-roberta", "camembert", "data2vec-text", "electra", "vit-msn", "xlmr-headless", "xlmr-label"),
    *("electra-headless", "electra-label", "distilbert-headless", "llama-headless", "gpt2-label", "deit-headless"),
    *("megatron-headless", "bert-answers", "bert-score", "clip-text-headless", "dinov2-headless"),
    *("ministral", "cwm", "seed-oss", "helium", "ernie", "jais2", "starcoder2", "glm", "glm4", "exaone4", "vaultgemma"),
    *(
        "granitemoe",
        "flex-olmo",
        "gpt-bigcode",
        "gpt-bigcode-heads",
        "codegen",
        "gpt-neo",
        "arcee",
        "hyperclovax",
        "mpt",
    ),
}
DISTINCT = [name for name in ZOO if name not in ROWS_ONLY]


def write(name: str, directory: Path, seed: int = 1, dtype: torch.dtype = torch.float32) -> None:
    """A checkpoint with random parameters, some gains of queries and keys negative."""
    model = ZOO[name]()
    randomize(model, seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if any(part in key for part in ("q_norm", "k_norm", "query_layernorm", "key_layernorm")):
                p[::3] *= -1
    model.to(dtype).save_pretrained(directory)


def inputs(name: str) -> Tensor:
    """Random token ids, the last one 0 (CLIP's end), or random images."""
    generator = torch.Generator().manual_seed(5)
    if name.split("-")[0] in ("vit", "deit", "dinov2") or name.startswith("clip-vision"):
        return torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)
    least = 1 if name.startswith("clip") else 0
    tokens = torch.randint(least, VOCAB, (3, 20), generator=generator)
    tokens[:, -1] = 0
    return tokens


def reference(directory: Path, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits, or features, of transformers alone, its casts to float32 taken out for float64."""
    model = stock(directory, dtype)
    argument = {"pixel_values": x.to(dtype)} if x.is_floating_point() else {"input_ids": x}
    with torch.no_grad():
        if dtype == torch.float64:
            with pytest.MonkeyPatch.context() as patch, true_float64():
                patch.setattr(torch, "float", torch.float64)
                out = model(**argument)
        else:
            out = model(**argument)
    return output_of(out)


def output_of(out: Any) -> Tensor:
    """What a class computes; of one without a head the last hidden state and, below it, the pooled output."""
    for name in ("logits", "prediction_logits", "image_embeds", "text_embeds"):
        if getattr(out, name, None) is not None:
            return getattr(out, name)
    if getattr(out, "start_logits", None) is not None:
        return torch.stack([out.start_logits, out.end_logits], dim=-1)
    pooled = getattr(out, "pooler_output", None)
    return out.last_hidden_state if pooled is None else torch.cat([out.last_hidden_state, pooled[:, None]], dim=1)


def stock(directory: Path, dtype: torch.dtype) -> nn.Module:
    """The class that config.json names, loaded with every tensor in place or else an error."""
    config = transformers.AutoConfig.from_pretrained(directory)
    cls = getattr(transformers, config.architectures[0])
    # Falcon's eager attention adds ALiBi twice; Gemma-2's soft cap needs eager attention
    options = {} if config.model_type == "falcon" else {"attn_implementation": "eager"}
    if "moe" in config.model_type or config.model_type in ("mixtral", "flex_olmo", "gpt_oss"):
        options["experts_implementation"] = "eager"
    model, info = cls.from_pretrained(directory, dtype=dtype, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    if config.model_type in ("gptj", "codegen") and dtype == torch.float64:
        _exact_positions(model, config)
    return model.eval()


def _exact_positions(model: nn.Module, config: Any) -> None:
    """GPT-J tabulates sines in float32 when it is built; here the same frequencies in float64."""
    frequencies = 1.0 / 10000 ** (torch.arange(0, config.rotary_dim, 2).float() / config.rotary_dim)
    angles = torch.arange(config.n_positions).double()[:, None] * frequencies.double()
    for block in model.transformer.h:
        block.attn.embed_positions = torch.cat([angles.sin(), angles.cos()], dim=1)


def outcome(name: str, y: Tensor) -> Tensor:
    """What must not change: log-probabilities of language models, raw outputs of all others."""
    raw = name.split("-")[0] in ("vit", "deit", "dinov2", "clip")
    raw |= name.split("-")[-1] in ("headless", "label", "tags", "answers", "score")
    return y if raw else y.log_softmax(-1)
