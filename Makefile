# `make pipeline` runs the nano pipeline, data to device benchmark; `make test` checks everything.
# Each target does its own set-up into .venv. PYTHON and CXX choose the interpreter and the compiler;
# PIP_FIND_LINKS, when set, is searched for wheels first (a CPU build of torch, say).

SHELL := /bin/bash
RECIPE ?= nano
ARGS ?=
PY := .venv/bin/python
ENGINE_SOURCES := $(shell find runtime_cpu/csrc -type f 2>/dev/null) CMakeLists.txt
export DO_NOT_TRACK := 1
export MLFLOW_DISABLE_TELEMETRY := true
export HF_HUB_DISABLE_TELEMETRY := 1
# Spinning threads starve whatever shares their cores.
export OMP_WAIT_POLICY := PASSIVE

PYTHONS := 3.11 3.12 3.13
TYPES := $(addprefix types-,$(PYTHONS))

.PHONY: help setup teacher pipeline plan test unit smoke most rest lint docs format bench orchestrator wheels check-wheels lock lock-wheels clean $(TYPES)

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/.ready ## packages and engine into .venv

.venv/.ready: requirements.lock pyproject.toml runtime_cpu/__init__.py infra/setup/environment.sh $(ENGINE_SOURCES)
	@infra/setup/environment.sh

teacher: setup ## vLLM's CPU build, in an environment of its own
	@infra/vllm/setup.sh || echo "set-up: no vLLM here; the plan will name the alternatives" >&2

pipeline: setup teacher ## the whole pipeline (RECIPE=nano, ARGS="--set field=value")
	@$(PY) -m flows.pipeline --recipe $(RECIPE) $(ARGS)

plan: setup ## what `make pipeline` would run, and why
	@$(PY) -m flows.pipeline --recipe $(RECIPE) --plan $(ARGS)

test: lint docs ## everything: style, types, API reference, tests, sanitizers, the smallest pipeline end to end
	@$(MAKE) --no-print-directory -j2 --output-sync=target most rest # each keeps about one core busy

unit: setup
	$(PY) -m pytest $(ARGS)

smoke: setup
	$(PY) -m pytest -m pipeline tests/flows $(ARGS)

# Two halves of about the same length.
LONGEST := tests/runtime_cpu/test_sanitizers.py
most: setup
	$(PY) -m pytest --deselect $(LONGEST) $(ARGS)
rest: smoke
	$(PY) -m pytest $(LONGEST) $(ARGS)

lint: setup ## ruff, mypy for every Python from 3.11 to 3.13, clang-format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	@$(MAKE) --no-print-directory -j2 --output-sync=target $(TYPES)
	find runtime_cpu/csrc tests -name '*.cpp' -o -name '*.hpp' -o -name '*.h' | xargs .venv/bin/clang-format --dry-run --Werror

# mypy keeps a cache per version: a second run takes seconds.
$(TYPES): types-%: setup
	.venv/bin/mypy --python-version $*

docs: setup ## API reference from the docstrings into build/docs; whatever Sphinx finds wrong fails it
	.venv/bin/sphinx-build --fail-on-warning --keep-going --fresh-env --quiet -b html docs build/docs

format: setup ## rewrite files in the project's style
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .
	find runtime_cpu/csrc tests -name '*.cpp' -o -name '*.hpp' -o -name '*.h' | xargs .venv/bin/clang-format -i

bench: setup ## the engine on this machine, on the newest nano model
	@model=$$(ls -t runs/nano/export/*/gguf/nano-q4_0.gguf 2>/dev/null | head -1); \
	[ -n "$$model" ] || { echo "no exported model yet; run 'make pipeline' first" >&2; exit 1; }; \
	$(PY) -m runtime_cpu.bench "$$model" $(ARGS)

orchestrator: setup ## Prefect server, deployments and a worker, until Ctrl-C
	@infra/prefect/orchestrator.sh

wheels: ## the engine for edge boxes into dist/: x86_64 and aarch64, CPython 3.11 and later
	@infra/packaging/wheels.sh $(ARGS)

check-wheels: setup wheels ## install and run them where there is no compiler, aarch64 under qemu
	$(PY) -m pytest -m wheels tests/packaging $(ARGS)

lock: setup ## resolve requirements.lock again (without the peer, which is compiled from source)
	.venv/bin/uv pip compile --quiet --python-version 3.11 $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) \
		--no-emit-find-links --no-emit-index-url --no-annotate --custom-compile-command 'make lock' \
		--extra pipeline --extra eval --extra dev pyproject.toml -o requirements.lock
	sed -i 's/^\(torch==[0-9.]*\)+cpu/\1/' requirements.lock # the index serves 2.13.0, a local folder may hold 2.13.0+cpu

lock-wheels: setup ## resolve infra/packaging/requirements.lock again
	.venv/bin/uv pip compile --quiet --python-version 3.11 --no-emit-find-links --no-emit-index-url --no-annotate \
		--custom-compile-command 'make lock-wheels' infra/packaging/requirements.in -o infra/packaging/requirements.lock

clean: ## remove environments and builds; runs/ stays
	rm -rf .venv .venv-* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
