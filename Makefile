# Every target makes what it needs; nothing has to be activated.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime
ENGINES := $(VENV)/.engines
DEV := $(VENV)/.dev
TRL_VENV := .venv-trl

RUN := PYTHON="$(CURDIR)/$(BIN)/python" bash
QUICKSTART := $(RUN) examples/quickstart/run_onpolicy_distill_pipeline.sh

INSTALL_GEM := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-gem.txt

.PHONY: help install install-engines install-gem quickstart quickstart-agentic quickstart-vllm quickstart-megatron test test-long test-trl bench bench-check bench-ceilings bench-gpu check format clean

help:
	@echo "make quickstart   distil a tiny student on this machine (a few minutes, no GPU)"
	@echo "make quickstart-agentic  ... in an environment, over several turns"
	@echo "make quickstart-vllm, make quickstart-megatron"
	@echo "                  the same, the student sampled by vLLM or trained by Megatron-core (tensor parallel 2)"
	@echo "make test         the test suite"
	@echo "make check        ruff and mypy"
	@echo "make test-long    slow soaks and run-to-run variation"
	@echo "make test-trl     compare the divergences with TRL, installed into $(TRL_VENV)"
	@echo "make bench        one step beside TRL's: speed, memory, time to a held-out KL (an idle machine, three hours)"
	@echo "make bench-check  ... shorter, against the stored result: what got slower or larger"
	@echo "make bench-ceilings  what share of this machine each part of a step reaches (a quarter of an hour)"
	@echo "make bench-gpu    a step of distillation on one GPU beside its roofline; without a GPU the roofline on paper"
	@echo "make install      only make $(VENV)"
	@echo "make install-engines  ... with vLLM (CPU build) and Megatron-core"
	@echo "make install-gem      ... with GEM's environments"

$(RUNTIME): requirements.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# --no-deps: see the head of the file.
$(ENGINES): $(RUNTIME) requirements-engines.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-engines.txt
	@touch $@

$(DEV): $(ENGINES) requirements-dev.txt requirements-gem.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(INSTALL_GEM) || echo "GEM is not installed (it needs a C compiler); its tests will be skipped"
	@touch $@

install-gem: $(RUNTIME)
	$(INSTALL_GEM)

# The inner .gitignore keeps git, ruff and editors out of it.
$(TRL_VENV)/.ready: requirements-trl.txt
	$(PYTHON) -m venv $(TRL_VENV)
	@echo "*" > $(TRL_VENV)/.gitignore
	$(TRL_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-trl.txt
	@touch $@

install: $(RUNTIME)

install-engines: $(ENGINES)

quickstart: $(RUNTIME)
	$(QUICKSTART)

quickstart-agentic: $(RUNTIME)
	$(RUN) examples/quickstart_agentic/run_quickstart_agentic.sh

quickstart-vllm: $(ENGINES)
	$(QUICKSTART) output_dir=./output/quickstart-vllm student_infer.strategy_args.strategy_name=vllm

quickstart-megatron: $(ENGINES)
	$(QUICKSTART) output_dir=./output/quickstart-megatron student_train.strategy_args.strategy_name=megatron_train \
	    +student_train.strategy_args.strategy_config.tensor_model_parallel_size=2 student_train.world_size=2

test: $(DEV)
	$(BIN)/python -m pytest -m "not long"

test-long: $(DEV)
	$(BIN)/python -m pytest -m long

test-trl: $(DEV) $(TRL_VENV)/.ready
	TRL_PYTHON=$(abspath $(TRL_VENV))/bin/python $(BIN)/python -m pytest tests/integration/test_trl_comparison.py

bench: $(RUNTIME) $(TRL_VENV)/.ready
	$(BIN)/python -m benchmarks.opd_step

bench-check: $(RUNTIME) $(TRL_VENV)/.ready
	$(BIN)/python -m benchmarks.opd_step.guard

bench-ceilings: $(RUNTIME)
	$(BIN)/python -m benchmarks.ceilings

# Not $(ENGINES): that would put the CPU build of vLLM into an environment for GPUs.
bench-gpu: $(RUNTIME)
	$(BIN)/python -m benchmarks.gpu_step

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(TRL_VENV) output *.egg-info .pytest_cache .mypy_cache .ruff_cache
