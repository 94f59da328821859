"""lmc-fast env: what it says is what there is, and nothing that is secret."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

import lmc_fast
from lmc_fast.cli import env, main


def test_env_says_what_there_is(capsys, monkeypatch):
    monkeypatch.setenv("LMC_FAST_ROUTE", "weight")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["env", "--json"]) == 0
    shown = capsys.readouterr().out
    found = json.loads(shown)
    assert found["lmc_fast"] == lmc_fast.__version__ and platform.python_version() in found["python"]
    for name in ("torch", "transformers", "safetensors", "numpy"):
        assert found["packages"][name] == version(name)
    assert found["backends"]["isa"] == lmc_fast.backends().isa
    assert found["processor"]["torch threads"] == torch.get_num_threads() and found["processor"]["cores"] >= 1
    assert found["memory"]["available"] > 1 << 20
    assert found["settings"]["LMC_FAST_ROUTE"] == "weight"
    assert "hf_secret" not in shown
    assert len(found["gpus"]) == torch.cuda.device_count()


def test_env_in_words_without_metadata(capsys, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(env, "requires", missing)
    assert main(["env"]) == 0
    words = capsys.readouterr().out
    assert f"  torch: {version('torch')}\n" in words and "isa: " in words and "GiB" in words


def test_a_setting_that_is_nonsense_is_named(capsys, monkeypatch):
    monkeypatch.setenv("LMC_FAST_GPU_SOLVERS", "nonsense")
    assert main(["env"]) == 2
    assert 'LMC_FAST_GPU_SOLVERS is "nonsense"' in capsys.readouterr().err


@pytest.mark.parametrize("name", env.OPTIONAL)
def test_what_is_not_installed_is_said(name):
    assert env.environment()["packages"][name]
