# Every target sets up what it needs: nothing has to be installed by hand beforehand but Python 3.11+, make and pip.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help demo test lint type bench docs clean

help:            ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Longspan needs Python 3.11 or newer; run: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)   ## ask two questions of the Python language reference (about 5 minutes on two cores)
	@$(BIN)/longspan demo

test: $(STAMP)   ## format, lint, types, then every test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --numprocesses=logical --maxprocesses=4 --dist=loadfile

lint: $(STAMP)   ## format and lint, mending what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

type: $(STAMP)   ## mypy --strict on src
	$(BIN)/mypy

bench: $(STAMP)  ## speed against plain transformers, and needles, on this machine
	$(BIN)/python -m longspan.bench.model --json
	$(BIN)/python -m longspan.evals.needle --lengths 4K,8K --json

docs: $(STAMP)   ## regenerate tables and pictures in README and docs from benchmarks/results
	$(BIN)/python -m benchmarks.planner
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python -m benchmarks.pictures

clean:           ## remove the environment and caches of tools
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
