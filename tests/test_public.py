"""What `import lmc_fast` offers: names, types, short representations, and inspect and plan as functions."""

import argparse
import ast
import inspect as python_inspect
import json
import pkgutil
import subprocess
import sys
from importlib import import_module, resources
from pathlib import Path
from types import ModuleType

import pytest

import lmc_fast as lmc
from lmc_fast.cli import main
from lmc_fast.cli.arguments import parser

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def paths(make_checkpoint):
    return make_checkpoint("neox", 1), make_checkpoint("neox", 2)


def test_only_public_names_show():
    assert sorted(dir(lmc)) == sorted(lmc.__all__) and len(set(lmc.__all__)) == len(lmc.__all__)
    for name in lmc.__all__:
        found = getattr(lmc, name)
        assert not isinstance(found, ModuleType), name
        assert isinstance(found, str) or python_inspect.getdoc(found), name
    assert callable(lmc.backends) and callable(lmc.inspect) and callable(lmc.plan)


def test_names_are_imported_when_they_are_used():
    tree = ast.parse(Path(lmc.__file__).read_text())
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and isinstance(n.test, ast.Name)]
    assert sorted(alias.name for line in block.body for alias in line.names) == sorted(lmc.__all__)
    modules = {module.name for module in pkgutil.iter_modules(lmc.__path__)}
    assert not modules & set(lmc.__all__)  # importing a module would put it in the place of the name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        lmc.nonsense  # noqa: B018
    for started in ("import lmc_fast", "from lmc_fast.cli.arguments import parser; parser().format_help()"):
        script = f"import sys; {started}; print(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
        assert done.stdout == "[]\n"


def test_every_command_is_there():
    (commands,) = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    for sub in commands.choices.values():
        module, function = sub.get_default("function")
        assert callable(getattr(import_module(f"lmc_fast.cli.{module}"), function))


def test_what_functions_hand_out_is_public(paths, tokens):
    pair = lmc.open_pair(*paths)
    found, seen, meter = [], [], lmc.Meter()
    alignment = lmc.align(pair, tokens, steps=1, batch=1, progress=seen.append, meter=meter)
    found += [pair, pair.a, alignment, alignment.a, alignment.members[1], seen[0], meter, lmc.backends()]
    found += [lmc.inspect(*paths), lmc.inspect(paths[0]).groups[0], lmc.plan(*paths, memory="2GiB", length=16)]
    found += [lmc.barrier(pair, tokens, alignment, 3), lmc.verify(paths[0], paths[0], tokens)[0], lmc.Schedule()]
    with pytest.raises(lmc.TooSmall) as small:
        lmc.plan(*paths, memory=1, length=16)
    found.append(small.value)
    for thing in found:
        assert getattr(lmc, type(thing).__name__) is type(thing)
    assert isinstance(small.value, lmc.LmcError) and small.value.smallest > 1
    for shown in (repr(alignment), repr(alignment.a), repr(alignment.matched[1])):
        assert len(shown) < 400 and "tensor(" not in shown


def test_types_reach_users():
    assert resources.files("lmc_fast").joinpath("py.typed").is_file()
    for name in lmc.__all__:
        found = getattr(lmc, name)
        if callable(found):
            signature = python_inspect.signature(found if not isinstance(found, type) else found.__init__)
            untyped = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
            assert not untyped or issubclass(found, Exception), (name, untyped)
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["lmc_fast"]


def test_inspect_is_what_the_command_prints(paths, make_checkpoint, capsys):
    found = lmc.inspect(*paths)
    assert found.match and found.problem is None and found.model.spec.family == "gpt_neox"
    assert main(["inspect", *map(str, paths), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.to_json()))
    alone = lmc.inspect(paths[0])
    assert alone.match is None and "match" not in alone.to_json()
    other = lmc.inspect(paths[0], make_checkpoint("llama"))
    assert other.match is False and "architectures differ" in other.problem
    with pytest.raises(lmc.LmcError, match="nowhere"):
        lmc.inspect(paths[0], "nowhere/at/all/x")


def test_plan_is_what_the_command_prints(paths, capsys):
    found = lmc.plan(*paths, memory="4GiB", profile="rtx4090", tokens=64, length=32)
    command = ["plan", *map(str, paths), "--memory", "4GiB", "--device-profile", "rtx4090", "--tokens", "64"]
    assert main([*command, "--length", "32", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert json.loads(json.dumps(found.to_json())).items() <= shown.items()
    same = lmc.plan(*paths, memory=4 << 30, profile="rtx4090", length=32, schedule=lmc.Schedule(batch=2))
    assert same.job == found.job
    assert (
        lmc.plan(*paths, memory="4GiB", profile="t4", length=32, schedule=lmc.Schedule(objective="text")).job.teachers
        == 0
    )
    for wrong, words in (({"tokens": 0}, "tokens"), ({"length": -1}, "length"), ({"profile": "x"}, "'x' is unknown")):
        with pytest.raises(lmc.LmcError, match=words):
            lmc.plan(*paths, memory="4GiB", **wrong)
    with pytest.raises(lmc.LmcError, match="lots"):
        lmc.plan(*paths, memory="lots")
