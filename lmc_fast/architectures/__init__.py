"""Model families as tables: what a checkpoint computes and where its weights lie."""

from . import gpt2, gpt_neox, llama
from .spec import BLOCK_NORMS, BLOCK_READERS, BLOCK_WRITERS, Entry, Family, Spec

FAMILIES: dict[str, Family] = {module.FAMILY.name: module.FAMILY for module in (gpt_neox, gpt2, llama)}

__all__ = ["BLOCK_NORMS", "BLOCK_READERS", "BLOCK_WRITERS", "FAMILIES", "Entry", "Family", "Spec"]
