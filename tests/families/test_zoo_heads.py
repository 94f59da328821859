"""Classifiers of texts and tokens, of every family that transformers has one of: its outputs, in float64."""

import re

import pytest
import torch
import transformers
import zoo

from lmc_fast.architectures import FAMILIES
from lmc_fast.checkpoints import Model
from lmc_fast.engine.model import logits

# of whose other classifiers one of each kind of table is compared, and all that the other rows share with them
EVERY_HEAD = ("llama", "gpt2", "neox", "bloom", "falcon-7b", "mpt", "gpt-neo", "gpt-bigcode", "bert", "distilbert")
EVERY_HEAD += ("modernbert", "deberta")


def heads():
    """(variant, class) of the first variant of each family with another head."""
    found = {}
    for name, build in zoo.ZOO.items():
        model = build()
        usual = type(model).__name__
        stem = re.sub("(For(CausalLM|MaskedLM)|LMHeadModel)$", "", usual)
        family = FAMILIES[model.config.model_type]
        endings = (end for head in family.heads for end in head.endings if end.startswith("For"))
        for ending in endings if stem != usual else ():
            cls = getattr(transformers, stem + ending, None)
            wanted = ending == "ForSequenceClassification" or name in EVERY_HEAD
            if wanted and cls is not None and cls.config_class is type(model.config):
                found.setdefault(stem + ending, name)
    return [(name, cls) for cls, name in found.items()]


@pytest.mark.parametrize(("name", "head"), heads())
def test_classifiers_compute_what_transformers_does(name, head, tmp_path):
    config = zoo.ZOO[name]().config
    config.num_labels = 2 if head.endswith("QuestionAnswering") else 5
    if head.endswith("SequenceClassification") and config.pad_token_id is None:
        config.pad_token_id = 0
    model = getattr(transformers, head)(config)
    zoo.randomize(model, 1)
    model.save_pretrained(tmp_path / "a")
    x = zoo.inputs(name)
    expected, found = zoo.reference(tmp_path / "a", x), logits(Model(tmp_path / "a").load(torch.float64), x)
    assert found.shape == expected.shape and (found - expected).abs().max() <= 1e-12 * expected.abs().max()
