# Everything runs inside .venv, which the first target that needs it makes. `make quickstart` is the tour.
VENV   := .venv
BIN    := $(VENV)/bin
PYTHON ?= python3
STAMP  := $(VENV)/.installed
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_FIGURES ?=
ENGINES ?= .engines
# Tests of one file run in one process, and files in the order of their folders: the longest come first.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --no-loadscope-reorder

.PHONY: quickstart smaller-student cross-family unified-agent install test test-dist engines test-engines test-gpu check format clean help

quickstart: $(STAMP)  ## tiny experts, the merge, the result
	$(BIN)/python tools/make_tiny_experts.py
	$(BIN)/mergeopd run recipes/quickstart.yaml

smaller-student: $(STAMP)  ## the same, with a student smaller than its experts
	$(BIN)/python tools/make_tiny_experts.py
	$(BIN)/mergeopd run recipes/smaller_student.yaml

cross-family: $(STAMP)  ## the same, with a teacher of another architecture and tokenizer
	$(BIN)/python tools/make_tiny_experts.py --foreign
	$(BIN)/mergeopd run recipes/cross_family.yaml

unified-agent: $(STAMP)  ## tiny experts for math, code, search, tools and chat, two of which call tools
	$(BIN)/python tools/make_tiny_experts.py --agent
	$(BIN)/mergeopd run recipes/unified_agent_tiny.yaml

install: $(STAMP)  ## .venv with the package and the development tools

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

test: $(STAMP)  ## the CPU test suite
	$(PYTEST) -m 'not long and not engines'

test-dist: $(STAMP)  ## its long part: several processes, minutes
	$(PYTEST) -m long

engines: $(STAMP)  ## the environments of vLLM and SGLang for the CPU in ENGINES; 7 GB, minutes, kept
	$(BIN)/python tools/engines/build.py vllm sglang --out $(ENGINES)

test-engines: engines  ## the tests with real vLLM and SGLang servers
	MERGEOPD_ENGINES="$(abspath $(ENGINES))" OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/engines --durations=10

# Not through the stamp: a machine with a GPU often has Python and torch of its own, and no network. There
# `make test-gpu PYTHON=python3` runs the checkout as it is.
test-gpu:  ## the tests that need a GPU; GPU_FIGURES=FILE keeps what they measure
	@if $(GPU_PYTHON) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		PYTHONPATH="$(CURDIR):$$PYTHONPATH" MERGEOPD_GPU_FIGURES="$(GPU_FIGURES)" \
		MERGEOPD_ENGINES="$(if $(wildcard $(ENGINES)),$(abspath $(ENGINES)))" \
		$(GPU_PYTHON) -m pytest tests/gpu tests/engines --durations=10; \
	else echo "test-gpu: torch sees no CUDA device, nothing was tested"; fi

check: $(STAMP) docs  ## lint, types, import contracts, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)  ## the documentation as a site in build/docs; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(STAMP)  ## what lint can repair by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment, the experts, all runs and caches
	rm -rf $(VENV) .engines runs experts experts.partial experts_agent experts_agent.partial .mergeopd build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1: \2/p' $(MAKEFILE_LIST)
