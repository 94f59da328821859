"""Options with which transformers fails, often only when it computes, are refused when config.json is read."""

import shutil
from pathlib import Path

import pytest
from checkpoints_tiny import edit_config

from lmc_fast import LmcError
from lmc_fast.checkpoints import Model
from lmc_fast.checkpoints.plain_config import require_plain


@pytest.mark.parametrize(
    ("variant", "key", "value"),
    [
        ("neox", "hidden_dropout", 3),
        ("neox", "attention_dropout", None),
        ("gpt2", "resid_pdrop", "x"),
        ("llama", "pad_token_id", 40),
        ("llama", "pad_token_id", -41),
        ("llama", "sliding_window", "24"),
        ("llama", "sliding_window", [1]),
        ("llama", "output_hidden_states", "gelu"),
        ("llama", "attn_implementation", -1),
        ("llama", "text_config", {}),
        ("llama", "architectures", ""),
        ("llama", "architectures", [None]),
        ("llama", "transformers_weights", []),
        ("llama", "quantization_config", {}),
        ("llama", "num_hidden_layers", 10**9),
        ("llama", "num_labels", 10**9),
        ("llama", "image_size", [8, -8]),
        ("llama", "model_type", ["llama"]),
    ],
)
def test_it_is_named(variant, key, value, make_checkpoint, tmp_path):
    shutil.copytree(make_checkpoint(variant), tmp_path / "odd")
    edit_config(tmp_path / "odd", **{key: value})
    with pytest.raises(LmcError, match="quantised" if key == "quantization_config" else key):
        Model(tmp_path / "odd")


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("gpt2", {"pad_token_id": 50257}),  # its embeddings know no padding token
        ("llama", {"pad_token_id": -1}),
        ("llama", {"classifier_dropout": None, "architectures": None, "sliding_window": None, "use_cache": True}),
        ("llama", {"attention_dropout": 0, "output_attentions": False}),
    ],
)
def test_what_files_on_the_hub_really_say_is_read(variant, options, make_checkpoint, tmp_path):
    shutil.copytree(make_checkpoint(variant), tmp_path / "odd")
    edit_config(tmp_path / "odd", **options)
    Model(tmp_path / "odd")


def test_a_head_size_of_null_counts_where_models_take_it_as_given(make_checkpoint, tmp_path):
    shutil.copytree(make_checkpoint("llama"), tmp_path / "odd")
    for kind in ("qwen2", "phi3"):
        edit_config(tmp_path / "odd", model_type=kind, head_dim=None, architectures=None)
        with pytest.raises(LmcError, match="head_dim is None"):
            Model(tmp_path / "odd")


@pytest.mark.parametrize("value", [2, 1000, 0.5, "1", None, True])
def test_a_feed_forward_in_chunks_that_do_not_fit_every_length(value):
    for fine in ({}, {"chunk_size_feed_forward": 0}, {"chunk_size_feed_forward": 1}):
        require_plain({"model_type": "bert", **fine}, Path("config.json"))
    require_plain({"model_type": "llama", "chunk_size_feed_forward": value}, Path("config.json"))  # has none
    with pytest.raises(LmcError, match=r"config\.json: chunk_size_feed_forward is"):
        require_plain({"model_type": "bert", "chunk_size_feed_forward": value}, Path("config.json"))
