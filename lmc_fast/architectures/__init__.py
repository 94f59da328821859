"""Model families as tables: what a checkpoint computes and where its weights lie."""

from . import (
    cohere,
    falcon,
    gemma,
    glm,
    gpt2,
    gpt_neo,
    gpt_neox,
    gptj,
    llama,
    moe,
    olmo,
    opt,
    phi,
    relatives,
    stablelm,
    text,
    vision,
)
from .family import Entry, Family, Fold
from .spec import FFN, Attention, Experts, ImageInput, Norms, Rope, Spec, flat_fields

_TABLES = (
    *(gpt2, gpt_neo, gptj, falcon, opt, phi, stablelm, llama, relatives, gemma, olmo, cohere, glm, moe, text, vision),
)
FAMILIES: dict[str, Family] = {
    family.name: family for family in (gpt_neox.FAMILY, *(family for table in _TABLES for family in table.FAMILIES))
}

__all__ = [
    "FAMILIES",
    "FFN",
    "Attention",
    "Entry",
    "Experts",
    "Family",
    "Fold",
    "ImageInput",
    "Norms",
    "Rope",
    "Spec",
    "flat_fields",
]
