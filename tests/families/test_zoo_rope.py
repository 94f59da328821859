"""Rotary frequencies of every family are those of the buffers in transformers' own modules."""

import copy

import pytest
import zoo

from lmc_fast.architectures import FAMILIES
from lmc_fast.errors import LmcError

SCALED = {
    "linear": {"factor": 3.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
}


def rotary(model):
    """The model's rotary embedding; None where it has none."""
    return next((m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")), None)


def changed(config, kind):
    config = copy.deepcopy(config)
    parts = [p for p in config.rope_parameters.values() if isinstance(p, dict)] or [config.rope_parameters]
    for part in parts:
        part.update({"rope_type": kind} | SCALED.get(kind, {}))
    return config


@pytest.mark.parametrize("name", zoo.DISTINCT)
def test_frequencies_are_those_of_the_module(name):
    model = zoo.ZOO[name]()
    module = rotary(model)
    if module is None or getattr(model.config, "alibi", False):
        pytest.skip("no rotary embedding")
    same = 0
    for kind in ("as it is", "default", *SCALED):
        config = model.config if kind == "as it is" else changed(model.config, kind)
        try:
            rope = FAMILIES[config.model_type].spec(config).rope
        except LmcError:
            assert kind in SCALED, kind  # a scaled RoPE in windows is refused
            continue
        theirs = type(module)(config)
        prefix = "full_attention_" if hasattr(theirs, "full_attention_inv_freq") else ""
        assert rope.inv_freq == tuple(getattr(theirs, f"{prefix}inv_freq").tolist()), kind
        assert rope.scaling == getattr(theirs, f"{prefix}attention_scaling"), kind
        same += 1
    assert same >= 2
