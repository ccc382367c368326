# Every target does its own set-up. `make quickstart` and `make test` are all that a new user needs.
#
#   PYTHON=python3.12   which interpreter makes the virtual environment (3.10 or newer)
#   VENV=.venv          where it goes
#   ARGS="..."          passed on to quickstart, pytest or the benchmarks
#
# pip's own settings apply (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL): use them to take torch from an
# index of CPU builds if the default one would bring CUDA to a machine without a GPU.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt
# The tests run the GPU kernels in Triton's interpreter and compile them for GPUs that are not there.
TRITON := $(if $(filter Linux,$(shell uname -s)),triton)
WORKERS := -n auto --dist worksteal
KERNELS := $(shell find csrc -type f)

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all test-levels test-arm lint format bench build clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/.built ## train an SAE on the embedded model, steer with it, write a page
	$(BIN)/fastsae quickstart $(ARGS)

test: $(VENV)/.built $(VENV)/.test ## the tests of all that can fail on this machine
	$(BIN)/python -m pytest -q $(WORKERS) -m "not slow" $(ARGS)

test-all: $(VENV)/.built $(VENV)/.test ## what `make test` leaves out: other CPU levels, GPU compilers
	$(BIN)/python tools/cpu_levels.py $(ARGS)
	$(BIN)/fastsae verify --device cpu
	# the Triton compilers, the oldest and the newest, come by themselves
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m slow --ignore tests/triton/test_compile.py $(ARGS)
	$(BIN)/python tests/support/triton_versions.py $(ARGS)

test-levels: $(VENV)/.built $(VENV)/.test ## the C++ kernels at the CPU's lower levels
	$(BIN)/python tools/cpu_levels.py $(ARGS)

test-arm: $(VENV)/.built $(VENV)/.test ## the C++ kernels for ARM, under qemu
	$(BIN)/python tools/emulate_arm.py $(ARGS)

lint: $(VENV)/.lint ## ruff, mypy, clang-format; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.lint ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' | xargs $(BIN)/clang-format -i

bench: $(VENV)/.built $(VENV)/.bench ## every benchmark with its peers, into docs/benchmarks.md (many minutes)
	PYTHON=$(BIN)/python benchmarks/run_all.sh $(ARGS)

build: $(VENV)/.built ## environment and compiled kernels only

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) build dist *.egg-info fastsae/*.so .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch: constraints.txt
	@test -n "$(PYTHON)" || { echo "fastsae needs Python 3.10 or newer: install one, or set PYTHON"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { echo "$(PYTHON) lacks the venv module (on Debian and Ubuntu: install python3-venv)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch (the largest download) ..."
	$(PIP) setuptools torch numpy
	touch $@

# An editable install: Python sources are live, the kernels are rebuilt when csrc changes.
$(VENV)/.built: $(VENV)/.torch setup.py pyproject.toml $(KERNELS)
	@echo "installing fastsae and compiling its kernels ..."
	FASTSAE_BUILD=$(or $(FASTSAE_BUILD),1) $(PIP) --no-build-isolation -e '.[quickstart,serve]'
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) pytest pytest-xdist hypothesis fastapi uvicorn openai httpx websockets $(TRITON)
	# nvcc and its headers (100 MB), so that the tests compile csrc/cuda on any Linux machine
	command -v nvcc || $(PIP) nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl || \
		echo "no nvcc: the tests do not compile csrc/cuda"
	touch $@

# The type checker reads the installed libraries' types.
$(VENV)/.lint: $(VENV)/.built
	$(PIP) ruff mypy clang-format fastapi uvicorn
	touch $@

$(VENV)/.bench: $(VENV)/.built
	$(PIP) --no-build-isolation -e '.[bench]'
	# the SAE libraries pull a torchvision that does not match a CPU build of torch
	$(BIN)/python -c 'import transformers.image_utils' 2>/dev/null || $(BIN)/python -m pip uninstall -q -y torchvision
	touch $@
