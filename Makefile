# Every target makes what it needs; nothing has to be activated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime
DEV := $(VENV)/.dev
TRL_VENV := .venv-trl

.PHONY: help install quickstart test test-long test-trl check format clean

help:
	@echo "make quickstart   distil a tiny student on this machine (a few minutes, no GPU)"
	@echo "make test         the test suite"
	@echo "make check        ruff and mypy"
	@echo "make test-long    slow soaks and run-to-run variation"
	@echo "make test-trl     compare the divergences with TRL, installed into $(TRL_VENV)"
	@echo "make install      only make $(VENV)"

$(RUNTIME): requirements.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

$(DEV): $(RUNTIME) requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# The inner .gitignore keeps git, ruff and editors out of it.
$(TRL_VENV)/.ready: requirements-trl.txt
	$(PYTHON) -m venv $(TRL_VENV)
	@echo "*" > $(TRL_VENV)/.gitignore
	$(TRL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-trl.txt
	@touch $@

install: $(RUNTIME)

quickstart: $(RUNTIME)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/quickstart/run_onpolicy_distill_pipeline.sh

test: $(DEV)
	$(BIN)/python -m pytest -m "not long"

test-long: $(DEV)
	$(BIN)/python -m pytest -m long

test-trl: $(DEV) $(TRL_VENV)/.ready
	TRL_PYTHON=$(abspath $(TRL_VENV))/bin/python $(BIN)/python -m pytest tests/integration/test_trl_comparison.py

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(TRL_VENV) output *.egg-info .pytest_cache .mypy_cache .ruff_cache
