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
from .heads import DECODER_HEADS
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


def _with_heads(family: Family) -> Family:
    decoder = "ForCausalLM" in family.architectures and not family.heads
    return replace(family, heads=DECODER_HEADS) if decoder else family


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
