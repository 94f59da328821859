"""GPT-Neo: learned positions, unscaled scores, windows in every other block; MPT: ALiBi, LayerNorm without biases."""

from __future__ import annotations

from typing import Any

from ..errors import LmcError
from .checks import positive
from .family import Entry, Family, linear
from .layouts import Stacked
from .spec import FFN, Attention, Norms, Spec


def _gpt_neo(config: Any) -> Spec:
    unknown = set(config.attention_layers) - {"global", "local"}
    if unknown:
        raise LmcError(f"attention type {min(unknown)!r} is not supported; GPT-Neo has 'global' and 'local' layers")
    back = tuple(config.window_size if kind == "local" else 0 for kind in config.attention_layers)
    if any(back) and not (isinstance(config.window_size, int) and config.window_size > 0):
        raise LmcError(f"window_size is {config.window_size!r}; layers with local attention need a positive number")
    heads = config.num_heads
    return Spec(
        family="gpt_neo",
        layers=config.num_layers,
        width=config.hidden_size,
        vocab=config.vocab_size,
        attention=Attention(
            heads, heads, config.hidden_size // heads, logit_scale=1.0, windows=back if any(back) else ()
        ),
        ffn=FFN(width=config.intermediate_size or 4 * config.hidden_size, activation=config.activation_function),
        max_positions=config.max_position_embeddings,
        norms=Norms(kind="layernorm", eps=config.layer_norm_epsilon),
        tied=config.tie_word_embeddings,
        biases=frozenset({"o", "up", "down"}),
        position_table=True,
    )


def _mpt(config: Any) -> Spec:
    att = config.attn_config
    other = {"alibi": not att.alibi, "qk_ln": att.qk_ln, "prefix_lm": att.prefix_lm}
    other |= {"alibi_bias_max": att.alibi_bias_max != 8, "expansion_ratio": config.expansion_ratio != 4}
    other |= {"logit_scale": config.logit_scale is not None, "no_bias": not config.no_bias}
    wrong = [name for name, differs in other.items() if differs]
    if wrong:
        raise LmcError(
            f"MPT with another {wrong[0]} than MPT-7B's is not supported: transformers computes it without that option"
        )
    heads, head_dim = config.n_heads, config.d_model // config.n_heads
    return Spec(
        family="mpt",
        layers=config.n_layers,
        width=config.d_model,
        vocab=config.vocab_size,
        attention=Attention(
            heads,
            heads,
            head_dim,
            alibi=1.0,
            clip_qkv=positive(att, "clip_qkv"),
            logit_scale=positive(att, "softmax_scale"),
        ),
        ffn=FFN(width=4 * config.d_model, activation="gelu"),
        max_positions=config.max_seq_len,
        norms=Norms(kind="layernorm", eps=config.layer_norm_epsilon, biased=False),
        tied=config.tie_word_embeddings,
    )


_NEO, _MPT, _QKV = "transformer.h.{i}.", "transformer.blocks.{i}.", ("q", "k", "v")

FAMILIES = (
    Family(
        name="gpt_neo",
        spec=_gpt_neo,
        prefix="transformer.",
        ends=(
            Entry("transformer.wte.weight", ("embed",)),
            Entry("transformer.wpe.weight", ("positions",)),
            *linear("transformer.ln_f", "final_norm"),
            Entry("lm_head.weight", ("head",)),
        ),
        block=(
            *linear(_NEO + "ln_1", "attn_norm"),
            *linear(_NEO + "ln_2", "ffn_norm"),
            *(e for n in _QKV for e in linear(f"{_NEO}attn.attention.{n}_proj", n)),
            *linear(_NEO + "attn.attention.out_proj", "o"),
            *linear(_NEO + "mlp.c_fc", "up"),
            *linear(_NEO + "mlp.c_proj", "down"),
        ),
        buffers=(r"attn\.attention\.(bias|masked_bias)$",),
    ),
    Family(
        name="mpt",
        spec=_mpt,
        prefix="transformer.",
        ends=(
            Entry("transformer.wte.weight", ("embed",)),
            Entry("transformer.norm_f.weight", ("final_norm",)),
            Entry("lm_head.weight", ("head",)),
        ),
        block=(
            Entry(_MPT + "norm_1.weight", ("attn_norm",)),
            Entry(_MPT + "norm_2.weight", ("ffn_norm",)),
            Entry(_MPT + "attn.Wqkv.weight", _QKV, Stacked(_QKV)),
            Entry(_MPT + "attn.out_proj.weight", ("o",)),
            Entry(_MPT + "ffn.up_proj.weight", ("up",)),
            Entry(_MPT + "ffn.down_proj.weight", ("down",)),
        ),
    ),
)
