# make demo   create the environment and run the demo on the bundled model
# make test   create the environment, lint, type-check and test
# make zoo    try every causal-LM type that transformers knows
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := autospec passes kernels model_zoo tests

.PHONY: demo test lint zoo env clean
.DEFAULT_GOAL := test

env: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "autospec needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: env
	$(BIN)/autospec demo

lint: env
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -n $(shell env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2) --dist loadgroup

zoo: env
	$(BIN)/autospec zoo

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
