# make test: every check that CI runs.  make demo: the guided tour.  Both set up .venv on their first run.
#   PYTHON=python3.12      which Python to build .venv with (3.11 or 3.12; default: the first that fits)
#   TORCH_INDEX=<url>      package index to take torch from, e.g. the CPU builds; everything else comes from PyPI

PYTHON ?=
TORCH_INDEX ?=

BIN := .venv/bin
READY := .venv/.installed
PIP := $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --log .venv/install.log \
  --progress-bar $(shell if [ -t 2 ]; then echo on; else echo off; fi) -c constraints.txt
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help test test-all lint demo clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile
	@sed -n '2,3s/^# */  /p' Makefile

test test-all demo: export TOKENIZERS_PARALLELISM = false
test test-all demo: export HF_HUB_OFFLINE = 1
demo: export TRANSFORMERS_VERBOSITY = error
# Two pytest workers with a thread for every core each would fight for the cores.
test test-all: export OMP_NUM_THREADS = 1

test: lint  ## ruff, mypy and the tests (GPU and slow ones deselected)
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 40

test-all: lint  ## everything that needs no GPU: slow tests (100 kills), 2 minutes of fuzzing; not in CI
	$(BIN)/python -m pytest -n 2 --dist worksteal --durations 40 -m 'not gpu'
	$(BIN)/python -m tests.fuzz --minutes 2 --seed $$(date +%j)

lint: $(READY)  ## ruff and mypy only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(READY)  ## train, sample and compare on the miniature; the result lies in out/demo
	$(BIN)/python -m ztrain.demo --out out/demo

clean:  ## removes caches (not .venv, not out/)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find ztrain data_tools miniature tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: only it may come from another index, and the second step then finds it already there.
$(READY): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/pip ]; then \
	  for python in $(or $(PYTHON),python3 python3.12 python3.11); do \
	    if $$python -c '$(FITS)' 2>/dev/null; then exec $$python -m venv .venv; fi; \
	  done; \
	  echo "ztrain needs Python 3.11 or 3.12; tried: $(or $(PYTHON),python3 python3.12 python3.11)" >&2; \
	  echo "Install one of them and name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; \
	fi
	@$(BIN)/python -c '$(FITS)' || { echo ".venv holds another Python than 3.11 or 3.12: remove it and run make again" >&2; exit 1; }
	@echo "installing into .venv (about 2 minutes; torch is the large part; details in .venv/install.log) ..."
	@$(PIP) --no-deps $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') torch
	@echo "installing the rest ..."
	@$(PIP) -e '.[dev]'
	@touch $@
