"""Model families as tables: what a checkpoint computes and where its weights lie."""

from dataclasses import replace

from . import (
    cohere,
    deberta,
    falcon,
    gemma,
    glm,
    gpt2,
    gpt_neo,
    gpt_neox,
    gptj,
    llama,
    modernbert,
    moe,
    olmo,
    opt,
    phi,
    relatives,
    stablelm,
    text,
    vision,
)
from .family import Entry, Family, Fold, Head
from .heads import decoder_heads
from .spec import FFN, Attention, Experts, ImageInput, Norms, Rope, Spec, flat_fields

_TABLES = (
    *(
        gpt2,
        gpt_neo,
        gptj,
        falcon,
        opt,
        phi,
        stablelm,
        llama,
        relatives,
        gemma,
        olmo,
        cohere,
        glm,
        moe,
        text,
        vision,
        modernbert,
        deberta,
    ),
)


# whose classifiers of tokens transformers wrote before it had one class for all
_OWN_CLASSIFIERS = ("gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "bloom", "falcon", "mpt")


def _with_heads(family: Family) -> Family:
    decoder = "ForCausalLM" in family.architectures and not family.heads
    tag = "classifier" if family.name in _OWN_CLASSIFIERS else "score"
    return replace(family, heads=decoder_heads(tag)) if decoder else family


FAMILIES: dict[str, Family] = {
    family.name: _with_heads(family)
    for family in (gpt_neox.FAMILY, *(family for table in _TABLES for family in table.FAMILIES))
}

__all__ = [
    "FAMILIES",
    "FFN",
    "Attention",
    "Entry",
    "Experts",
    "Family",
    "Fold",
    "Head",
    "ImageInput",
    "Norms",
    "Rope",
    "Spec",
    "flat_fields",
]
