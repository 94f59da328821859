"""Model types by name: what people know of each one that is supported, and why some others are not. Without torch.

The keys of KNOWN_AS are those of architectures.FAMILIES, which says what each computes.
"""

from __future__ import annotations

KNOWN_AS = {
    "arcee": "AFM-4.5B",
    "bert": "BERT-base 110M, -large 340M, MiniLM and BGE encoders",
    "bloom": "BLOOM-560M ... 176B",
    "camembert": "CamemBERT-base 111M",
    "clip_text_model": "the text tower of CLIP ViT-B/32 ... ViT-L/14",
    "clip_vision_model": "the vision tower of CLIP ViT-B/32 ... ViT-L/14",
    "codegen": "CodeGen-350M ... 16B",
    "cohere": "Command R 35B, Aya-23 8B and 35B",
    "cohere2": "Command R7B, Command A 111B",
    "cwm": "CWM 32B",
    "data2vec-text": "data2vec-text-base 125M",
    "deberta-v2": "DeBERTa-v3-small 44M, -base 184M, -large 435M (not v2-xlarge)",
    "deit": "DeiT-tiny 5M, -small 22M, -base 87M",
    "dinov2": "DINOv2-small 22M ... -giant 1.1B",
    "distilbert": "DistilBERT-base 66M",
    "electra": "ELECTRA-base 110M, -large 335M (discriminators)",
    "ernie": "ERNIE 2.0 and 3.0",
    "ernie4_5": "ERNIE-4.5-0.3B",
    "exaone4": "EXAONE-4.0-1.2B, 32B",
    "falcon": "Falcon-RW-1B, Falcon-7B, 40B",
    "flex_olmo": "FlexOlmo-7x7B",
    "gemma": "Gemma-2B, 7B",
    "gemma2": "Gemma-2-2B, 9B, 27B",
    "gemma3_text": "Gemma-3-270M, 1B; the text half of 4B ... 27B",
    "glm": "GLM-4-9B",
    "glm4": "GLM-4-9B-0414, GLM-4-32B-0414",
    "gpt2": "GPT-2 124M, medium 355M, large 774M, XL 1.5B",
    "gpt_bigcode": "SantaCoder 1.1B, StarCoder 15B",
    "gpt_neo": "GPT-Neo-125M, 1.3B, 2.7B; TinyStories",
    "gpt_neox": "Pythia-14M ... 12B, GPT-NeoX-20B",
    "gpt_oss": "GPT-OSS-20B, 120B (in bfloat16)",
    "gptj": "GPT-J-6B",
    "granite": "Granite-3.x-2B, 8B",
    "granitemoe": "Granite-3.x-1B-A400M, 3B-A800M",
    "helium": "Helium-1-2B",
    "hunyuan_v1_dense": "Hunyuan-0.5B ... 7B",
    "hyperclovax": "HyperCLOVAX-SEED-Think-14B",
    "jais2": "Jais-2-8B, 70B",
    "llama": "Llama-2-7B ... Llama-3.3-70B, TinyLlama-1.1B, SmolLM 135M ... 1.7B, Yi, DeepSeek-Coder",
    "megatron-bert": "Megatron-BERT 345M",
    "ministral": "Ministral-8B",
    "mistral": "Mistral-7B, Mistral-Nemo-12B, Mistral-Small-24B, Zephyr",
    "mixtral": "Mixtral-8x7B, 8x22B",
    "modernbert": "ModernBERT-base 149M, -large 395M, GTE and Ettin encoders",
    "mpt": "MPT-7B, 30B",
    "nemotron": "Minitron-4B, 8B, Nemotron-4-340B",
    "olmo": "OLMo-1B, 7B",
    "olmo2": "OLMo-2-1B ... 32B",
    "olmo3": "OLMo-3-7B, 32B",
    "olmoe": "OLMoE-1B-7B",
    "opt": "OPT-125M, 1.3B ... 66B (not 350M)",
    "phi": "Phi-1, Phi-1.5 1.3B, Phi-2 2.7B",
    "phi3": "Phi-3-mini 3.8B, medium 14B, Phi-3.5-mini, Phi-4 14B, Phi-4-mini 3.8B",
    "qwen2": "Qwen1.5, Qwen2, Qwen2.5 0.5B ... 72B",
    "qwen2_moe": "Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
    "qwen3": "Qwen3-0.6B ... 32B",
    "qwen3_moe": "Qwen3-30B-A3B, 235B-A22B",
    "roberta": "RoBERTa-base 125M, -large 355M, all-distilroberta",
    "seed_oss": "Seed-OSS-36B",
    "smollm3": "SmolLM3-3B",
    "stablelm": "StableLM-2-1.6B, StableLM-3B-4E1T (not 12B)",
    "starcoder2": "StarCoder2-3B, 7B, 15B",
    "vaultgemma": "VaultGemma-1B",
    "vit": "ViT-base 86M, -large 304M, -huge 632M",
    "vit_msn": "ViT-MSN-small ... -large",
    "xlm-roberta": "XLM-R-base 278M, -large 560M, multilingual-E5, BGE-M3",
}

_TWO_STREAMS = (
    "it has an encoder and a decoder, two streams that cross-attention joins; models of one stream are computed"
)
_LATENTS = "its queries and keys pass through normed latents (MLA), for which there is no table yet"
_STATES = "some of its blocks keep a state instead of attending to tokens; blocks of attention are computed"
_TOWERS = "it is two towers; save one of them, such as CLIPVisionModelWithProjection"
_SIGMOID = "its router takes sigmoids and a bias that only chooses; softmax routers are computed"

REFUSED = {
    "albert": "all its blocks are one set of weights, which cannot move apart",
    "apertus": "its activation (xIELU) has parameters of its own",
    "bitnet": "its weights are ternary, so that no rotation fits them",
    "dbrx": "its norms stand around attention in a way that no table says yet",
    "deberta": "its queries, keys and values lie in one tensor beside biases of their own; -v2 and -v3 are read",
    "diffllama": "its attention is a difference of two softmaxes",
    "dots1": _SIGMOID,
    "esm": "it scales its embeddings by how many tokens are masked",
    "gemma3n": "its blocks mix several streams (AltUp)",
    "gemma3n_text": "its blocks mix several streams (AltUp)",
    "glm4_moe": _SIGMOID,
    "llama4_text": "its router scales what experts read, and its queries depend on where they stand",
    "mpnet": "its attention adds a learned bias for relative positions",
    "phimoe": "its router chooses with a threshold (SparseMixer)",
    "siglip": _TOWERS,
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3", "youtu"), _LATENTS),
    **dict.fromkeys(
        ("t5", "mt5", "umt5", "bart", "mbart", "pegasus", "marian", "whisper", "led", "m2m_100"), _TWO_STREAMS
    ),
    **dict.fromkeys(
        ("mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba2", "rwkv", "recurrent_gemma"), _STATES
    ),
    **dict.fromkeys(("qwen3_next", "falcon_h1", "nemotron_h", "granitemoehybrid", "lfm2", "olmo_hybrid"), _STATES),
}
"""Why a model type is not supported, where people ask for it."""
