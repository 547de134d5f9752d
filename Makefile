# make help lists the targets. Everything that a target needs, it installs into .venv by itself.

PYTHON      ?= $(shell command -v python3.11 || command -v python3)
CONSTRAINTS ?= constraints.txt
VENV        := .venv
BIN         := $(VENV)/bin
INSTALL     := $(BIN)/pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
STAMPS      := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help venv demo servers test check bench readme clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; give make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(STAMPS)-%: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) --editable '.$(if $(filter-out base,$*),[$*])'
	@touch $@

venv: $(STAMPS)-base ## .venv/bin/shardmerge, without torch

demo: $(STAMPS)-demo ## fine-tune, merge and score a real encoder (a few minutes)
	$(BIN)/python -m benchmarks.demo

# Swift and DeepSpeed come from PyPI, Ceph and Slurm from Debian: without apt (and root, for Slurm)
# or a C++ compiler (for DeepSpeed) their tests are skipped, and say so.
servers: $(STAMPS)-test ## the real servers that tests start
	@$(BIN)/python -m tests.servers.swift --install
	@$(BIN)/python -m tests.servers.rgw --install || true
	@$(BIN)/python -m tests.servers.slurm --install || true
	@$(BIN)/python -m tests.servers.deepspeed --install || true

test: servers ## all tests
	$(BIN)/python -m pytest -rs

check: $(STAMPS)-test ## style, types, import direction, generated parts of README
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.readme --check
	$(BIN)/python -m pytest -q tests/test_structure.py

readme: $(STAMPS)-test ## write the generated parts of README
	$(BIN)/python -m tests.readme

bench: servers ## every figure of README; takes about an hour, mostly mergekit's
	$(BIN)/python -m benchmarks.bench_merge
	$(BIN)/python -m benchmarks.bench_io
	$(BIN)/python -m benchmarks.bench_memory
	$(BIN)/python -m benchmarks.bench_peers
	$(BIN)/python -m benchmarks.bench_cluster
	$(BIN)/python -m benchmarks.bench_opcm
	$(BIN)/python -m benchmarks.bench_continual

clean: ## remove everything that was made
	rm -rf $(VENV) .venvs .demo .bench .quality build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
