"""Options that were once read otherwise than transformers reads them, each judged by transformers."""

import pytest

from benchmarks.reading import TIES, Variant, judge, variants

LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [4.0] * 4}
SHORT = "original_max_position_embeddings"
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}

EQUAL = [
    *[(name, {"partial_rotary_factor": 0.5}) for name in ("llama", "gemma2", "mixtral", "falcon-7b", "gpt2", "phi")],
    ("llama", {"rope_parameters": LONG | {"original_max_position_embeddings": 16, "factor": 2.0}}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}}),
    ("qwen2", {"head_dim": 12}),
    ("phi3", {"rope_parameters": LONG | {"short_factor": [1.0, 2.0, 3.0], "long_factor": [4.0] * 3}} | {SHORT: 16}),
    ("neox", {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}),
    ("neox", {"head_dim": 6}),
    ("vit", {"head_dim": 12}),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("mistral", {"attention_bias": True}),
    ("gemma", {"hidden_activation": "silu"}),
    ("roberta", {"hidden_act": "relu"}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"reorder_and_upcast_attn": True}),
    ("gpt2", {"scale_attn_weights": False}),
    *[("llama", {"hidden_act": act}) for act in ("relu2", "tanh", "gelu_10", "leaky_relu", "mish", "sigmoid", "relu6")],
]
REFUSED = [
    ("llama", {"rope_theta": 0.0}, "rope_theta"),
    ("llama", {"rope_theta": -1.0}, "rope_theta"),
    ("llama", {"rope_theta": 1e-300}, "no numbers"),
    ("llama", {"rope_parameters": YARN | {"factor": 0.0}}, "factor"),
    ("llama", {"rope_parameters": YARN | {"partial_rotary_factor": 0.5}}, "rope_parameters turn 4 of the 8"),
    ("neox", {"rotary_pct": 1.5}, "at most 1"),
    ("neox", {"head_dim": 64}, "rope_parameters turn 32 of the 8"),
    ("llama", {"hidden_act": "laplace"}, "activation"),
    ("gpt2", {"activation_function": "nonsense"}, "activation"),
    ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping"),
    ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping"),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
    ("gemma3", {"attn_logit_softcapping": 1.0}, "attn_logit_softcapping"),
    ("olmo", {"clip_qkv": 0.0}, "clip_qkv"),
    ("mistral", {"sliding_window": 0}, "sliding_window"),
    ("gptj", {"rotary_dim": 3}, "rotary_dim"),
    ("falcon-7b", {"output_attentions": True}, "output_attentions"),
    ("llama", {"num_key_value_heads": 3}, "heads"),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads"),
    ("llama", {"hidden_size": -24}, "hidden_size"),
    ("llama", {"max_position_embeddings": 1}, "max_position_embeddings"),
    ("llama", {"rms_norm_eps": -1.0}, "epsilon"),
    ("llama", {"is_causal": False}, "is_causal"),
    ("deit", {"is_causal": True}, "is_causal"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
    ("roberta", {"pad_token_id": None}, "pad_token_id"),
    ("bert", {"type_vocab_size": 0}, "type_vocab_size"),
    ("vit", {"image_size": 0}, "image_size"),
]


@pytest.mark.parametrize(("name", "changes"), EQUAL)
def test_the_same_function(name, changes):
    row = judge(Variant(name, changes))
    if row["why"] == "transformers disagrees with itself":  # Gemma 2's partial rotary in 5.20, the last for Python 3.10
        pytest.skip(row["why"])
    assert row["outcome"] == "equal", row


@pytest.mark.parametrize(("name", "changes", "word"), REFUSED)
def test_refused_by_name(name, changes, word):
    row = judge(Variant(name, changes))
    assert row["outcome"] in ("refused", "refused by both") and word in row["why"], row


def test_the_judge_sees_differences(monkeypatch):
    """A reader that drops an option, and one that breaks, are found."""
    import benchmarks.reading as reading

    logits = reading.logits
    monkeypatch.setattr(reading, "logits", lambda *a: logits(*a) * 1.01)
    assert judge(Variant("llama"))["outcome"] == "difference"
    monkeypatch.setattr(reading, "logits", lambda *a: 1 / 0)
    assert judge(Variant("llama"))["outcome"] == "traceback"


def test_there_are_enough_variants():
    every = [str(v) for v in variants(quick=False)]
    assert len(every) == len(set(every)) >= 1500
    assert all(any(tie in text for text in every) for tie in TIES[1:])
