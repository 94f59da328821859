"""The examples in the docstrings of all public names run, in a directory with what they speak of.

That is: tiny models A, B and C, a SMALL one, IMAGES, a CHILD of B; DIR, which a run made of A and B; text.txt,
held-out.txt, images.npz.

And what they say of arguments, fields, results and errors is what there is.
"""

import ast
import builtins
import dataclasses
import doctest
import inspect
import logging
import re
import shutil
import textwrap

import numpy as np
import pytest
import torch
import zoo
from checkpoints_tiny import randomize, save_tokenizer, write_lines
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import lmc_fast as lmc
from lmc_fast.budget.demand import Item, Job
from lmc_fast.budget.devices import Device
from lmc_fast.budget.meter import Stage
from lmc_fast.budget.planner import Strategy
from lmc_fast.checkpoints.weights import Weights
from lmc_fast.evaluation.diagnosis import BlockReport

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


NAMES = [name for name in lmc.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
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


SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):\n((?:(?: {4}.*)?(?:\n|$))+)", re.M)
ENTRY = re.compile(r"^ {4}(\*{0,2})([\w.]+): \S", re.M)


def sections(documented):
    """{section: its text} of a docstring."""
    return dict(SECTION.findall(inspect.getdoc(documented) or ""))


def entries(text):
    return [name for _, name in ENTRY.findall(text)]


def members_of(found):
    """(name, function or property) of a class, as its own body has them."""
    for name, value in vars(found).items():
        if not name.startswith("_"):
            value = getattr(value, "__func__", value)
            if isinstance(value, property) or inspect.isfunction(value):
                yield name, value


PARTS = [Weights, BlockReport, Stage, Strategy, Item, Job, Device]  # of public objects; the reference shows them, too
PUBLIC = [*((name, getattr(lmc, name)) for name in NAMES), *((part.__name__, part) for part in PARTS)]
CLASSES = [(name, found) for name, found in PUBLIC if inspect.isclass(found)]
FUNCTIONS = [(name, found) for name, found in PUBLIC if not inspect.isclass(found)]
FUNCTIONS += [(f"{name}.{m}", f) for name, c in CLASSES for m, f in members_of(c) if not isinstance(f, property)]
PROPERTIES = [(f"{name}.{m}", p) for name, c in CLASSES for m, p in members_of(c) if isinstance(p, property)]


def by_name(pairs):
    return pytest.mark.parametrize("found", [pytest.param(found, id=name) for name, found in pairs])


def wrong_arguments(found, text):
    """Parameters without an entry, and entries without a parameter."""
    wanted = [name for name in inspect.signature(found).parameters if name not in ("self", "cls")]
    return set(wanted) ^ set(entries(text))


def unraised(found, text):
    """Errors that a function raises itself and does not name."""
    named = tuple(exception(name) for name in entries(text))
    raised = [node.exc.func.id for node in nodes(found) if isinstance(node, ast.Raise) and is_call(node.exc)]
    return [name for name in raised if not issubclass(exception(name), named)]


def nodes(found):
    """What its source is made of."""
    return list(ast.walk(ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(found))))))


def is_call(node):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)


def exception(name):
    if name.startswith("torch."):
        found = torch.linalg.LinAlgError if name == "torch.linalg.LinAlgError" else None
    else:
        found = getattr(lmc, name, None) or getattr(builtins, name, None)
    assert inspect.isclass(found) and issubclass(found, BaseException), f"{name} is no error"
    return found


@by_name(FUNCTIONS)
def test_arguments_results_and_errors_of_functions(found):
    said = sections(found)
    assert not wrong_arguments(found, said.get("Args", ""))
    returned = inspect.signature(found).return_annotation
    assert bool({"Returns", "Yields"} & said.keys()) == (returned not in (None, "None"))
    assert not unraised(found, said.get("Raises", ""))


@by_name(CLASSES)
def test_fields_and_arguments_of_classes(found):
    said, made = sections(found), "__dataclass_params__" in vars(found)
    fields = [field.name for field in dataclasses.fields(found)] if made else list(getattr(found, "_fields", ()))
    if "__init__" in vars(found) and not made:
        assert not wrong_arguments(found, said.get("Args", ""))
        stored = [n for n in nodes(found.__init__) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
        fields = [node.attr for node in stored if not node.attr.startswith("_")]
    attributes = entries(said.get("Attributes", ""))
    assert set(fields) <= {*attributes, *(entries(said.get("Args", "")) if made else [])}
    assert all(hasattr(found, name) or name in fields for name in attributes)
    if "__post_init__" in vars(found):
        assert not unraised(found.__post_init__, said.get("Raises", ""))
    for name in entries(said.get("Raises", "")):
        exception(name)


@by_name(PROPERTIES)
def test_properties_are_explained(found):
    assert inspect.getdoc(found)


def test_what_is_wrong_in_a_docstring_is_found():
    def function(first, second):
        """Nothing.

        Args:
            first: one.
            third: another.

        Raises:
            TypeError: never.
        """
        raise ValueError("x")

    said = sections(function)
    assert wrong_arguments(function, said["Args"]) == {"second", "third"}
    assert unraised(function, said["Raises"]) == ["ValueError"]
    with pytest.raises(AssertionError, match="Imaginary"):
        exception("Imaginary")
