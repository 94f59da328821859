"""What users should know of a checkpoint that is read."""

from __future__ import annotations

from ..architectures.rope import changing_rope
from .weights import Model

_STRANGERS = {"gemma": "Gemma", "roberta": "RoBERTa"}  # docs/mergekit.md


def notes_on(model: Model) -> list[str]:
    """Where it is not what config.json says, where aligned checkpoints will look different, where reading ends."""
    notes, spec = [], model.spec
    if spec.tied:
        lost = _STRANGERS.get(model.family.name)
        notes.append(
            "its head is tied to the embedding; aligned checkpoints store it apart (tie_word_embeddings: false), since "
            "the final norm's gain moves into it"
            + (f"; mergekit's table of {lost} has no place for it" if lost else "")
        )
    elif (
        model.checkpoint.values
        and spec.task in ("causal", "masked")
        and getattr(model.config, "tie_word_embeddings", False)
    ):
        notes.append(
            "config.json ties the head to the embedding, but another one is stored: as in transformers, it is used"
        )
    notes += [f"{fold.option} is folded into the weights; aligned checkpoints have it off" for fold in model.folds]
    kind = changing_rope(model.config)
    if kind:
        notes.append(
            f"its RoPE ({kind}) changes with texts beyond {spec.max_positions} tokens; "
            "it is aligned, and exact, up to there"
        )
    return notes
