"""What is released agrees: the Pythons that are named, built and tested, and what the workflows run."""

import os
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
if not WORKFLOWS:
    pytest.skip("needs a checkout", allow_module_level=True)
PROJECT = (ROOT / "pyproject.toml").read_text()
PYTHONS = re.findall(r"Python :: (3\.\d+)", PROJECT)
JOBS = {(file.stem, name): job for file in WORKFLOWS for name, job in yaml.safe_load(file.read_text())["jobs"].items()}


def test_the_same_pythons_are_named_built_and_tested():
    lowest, highest = PYTHONS[0], PYTHONS[-1]
    assert len(PYTHONS) == len(set(PYTHONS)) > 1
    assert f'requires-python = ">={lowest}"' in PROJECT and f'python_version = "{lowest}"' in PROJECT
    built = re.search(r'^build = "(.*)"$', PROJECT, re.M)[1].split()
    assert built == [f"cp{version.replace('.', '')}-*" for version in PYTHONS]
    assert JOBS["ci", "all"]["strategy"]["matrix"]["python"] == PYTHONS
    for page in ("README.md", "CHANGELOG.md"):
        assert f"Python {lowest} to {highest}" in (ROOT / page).read_text()


def test_what_the_workflows_run_is_there():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    commands = [step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step]
    for command in commands:
        program, *rest = command.split()
        if program == "make":
            assert rest[0] in targets
        elif "/" in program:
            assert os.access(ROOT / program, os.X_OK), program
    assert {".ci/run", "make docs"} <= set(commands)
