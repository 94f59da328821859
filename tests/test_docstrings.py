"""The examples in the docstrings of all public names run, in a directory with what they speak of.

That is: tiny models A, B and C, a SMALL one, IMAGES, a CHILD of B; DIR, which a run made of A and B; text.txt,
held-out.txt, images.npz.
"""

import doctest
import logging
import shutil

import numpy as np
import pytest
import torch
import zoo
from checkpoints_tiny import randomize, save_tokenizer, write_lines
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import lmc_fast as lmc

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module")
def place(make_checkpoint, tmp_path_factory):
    here = tmp_path_factory.mktemp("examples")
    for name, seed in (("A", 1), ("B", 2), ("C", 3), ("CHILD", 2)):
        shutil.copytree(make_checkpoint("neox", seed), here / name)
    weights = load_file(here / "CHILD" / "model.safetensors")
    noise = torch.Generator().manual_seed(0)
    moved = {name: t + 0.01 * torch.randn(t.shape, generator=noise) for name, t in weights.items()}
    save_file(moved, here / "CHILD" / "model.safetensors", {"format": "pt"})
    small = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(here / "A", num_hidden_layers=1))
    randomize(small, 4)
    small.save_pretrained(here / "SMALL")
    save_tokenizer(here / "SMALL")
    zoo.write("vit", here / "IMAGES")
    size, channels = (lmc.Model(here / "IMAGES").stored_config[name] for name in ("image_size", "num_channels"))
    images = np.random.default_rng(0).integers(256, size=(6, channels, size, size), dtype=np.uint8)
    np.savez(here / "images.npz", images=images, labels=np.arange(6) % 3)
    write_lines(here / "text.txt", 600)
    write_lines(here / "held-out.txt", 200)
    pair = lmc.open_pair(here / "A", here / "B")
    lmc.run(pair, lmc.read_tokens(here / "text.txt", pair.a, 16), here / "DIR", steps=2, batch=2)
    lmc.merge([here / "DIR" / "a", here / "DIR" / "b"], here / "DIR" / "merged")
    return here


@pytest.fixture
def quiet():
    """Examples print no notes, whatever a command that ran before has turned on."""
    log = logging.getLogger("lmc_fast")
    before = log.level
    log.setLevel(logging.WARNING)
    yield
    log.setLevel(before)


@pytest.mark.parametrize("name", [name for name in lmc.__all__ if name != "__version__"])
def test_the_example_runs(name, place, quiet, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(logging.getLogger("lmc_fast"), "handlers", [])  # what a command left there prints
    torch.manual_seed(0)
    found = getattr(lmc, name)
    examples = doctest.DocTestParser().get_doctest(found.__doc__, {"lmc": lmc, "torch": torch}, name, None, 0)
    assert examples.examples, f"{name} has no example in its docstring"
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=OPTIONS).run(examples, out=said.append)
    assert not result.failed, "".join(said)


def test_what_an_example_says_is_checked(place, monkeypatch):
    monkeypatch.chdir(place)
    wrong = doctest.DocTestParser().get_doctest(">>> lmc.Schedule().batch\n17\n", {"lmc": lmc}, "wrong", None, 0)
    assert doctest.DocTestRunner(verbose=False).run(wrong, out=[].append).failed == 1
