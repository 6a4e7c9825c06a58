# Ferry. `make` or `make help` lists what there is.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PACKAGES := node_agent migrator hypervisor storage netfabric deploy tests
PIP := $(BIN)/python -m pip --disable-pip-version-check

# How many simulated clusters `make sim` runs; SEED=N replays one.
SEEDS ?= 200
SEED ?=
# What `make test` runs: TESTS=tests/unit, TESTS='tests -k lab'.
TESTS ?= tests
# Options of `make chaos`: CHAOS='--drivers iscsi --steps fence --faults "kill *" --repeats 1'.
CHAOS ?=
# Options of `make bench`, and a newer QEMU for it.
BENCH ?=
QEMU ?=

.PHONY: help install system demo test check types lint tidy bench sim chaos clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# Bytecode is made here, because each start of an agent or an engine compiles all of Ferry where
# Python may not write it (PYTHONDONTWRITEBYTECODE): half a second of a core.
install: system $(INSTALLED) ## System packages (apt, root) and Python packages (.venv); quick when done
	@$(BIN)/python -m compileall -q $(PACKAGES)

system:
	@deploy/setup/system.sh

# An editable install: only what packages and the C shim are made of makes it stale. By a path, not
# by an import hook, which each start of Python would load first: 44 ms of a core instead of 19.
$(INSTALLED): pyproject.toml setup.py hypervisor/qemu/uffd_shim.c hypervisor/qemu/iscsi_shim.c \
	hypervisor/qemu/shim.h | system
	@python=$$(deploy/setup/system.sh python); \
	$(BIN)/python -c 'import pip' 2>/dev/null || "$$python" -m venv --clear $(VENV)
	$(PIP) install --quiet --retries 3 --timeout 60 --config-settings editable_mode=compat \
		-e '.[test,demo]'
	@touch $@

demo: install ## Move a busy web server around three nodes, on this machine (root)
	$(BIN)/ferry demo

test: install ## Run all tests (root, else those on real networks are skipped); TESTS= picks
	$(BIN)/$(if $(filter-out tests,$(TESTS)),pytest $(TESTS),python -m tests.run)

check: install ## Lint, format, types, and the rule of imports
	@$(MAKE) --no-print-directory --jobs=2 --output-sync types lint tidy

types:
	$(BIN)/mypy

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

tidy:
	$(BIN)/pytest -q tests/tidy

bench: install ## Measure Ferry beside QEMU and libvirt (root); BENCH='--quick', '--cases 1,3', QEMU=trixie
	@deploy/setup/bench.sh $(if $(QEMU),--newer-qemu)
	$(BIN)/python -m tests.benchmarks.run $(if $(QEMU),--qemu $(QEMU)) $(BENCH)
	$(BIN)/python -m tests.benchmarks.network

sim: install ## Simulate clusters under faults; SEEDS=how many, SEED=replay one
	$(BIN)/python -m tests.simulation.run $(if $(SEED),--seed $(SEED),--seeds $(SEEDS))

chaos: install ## Break each process, link and server at each step of real handoffs (root, hours); CHAOS='--help'
	$(BIN)/python -m tests.chaos.run $(CHAOS)

clean: ## Take all labs down; remove .venv, builds and caches
	@if [ -x $(BIN)/python ] && [ "$$(id -u)" = 0 ]; then \
	    $(BIN)/python -m deploy.lab.cli down --all; fi
	rm -rf $(VENV) build dist ./*.egg-info hypervisor/qemu/*.so
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
