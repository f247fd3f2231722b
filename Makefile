# Each target does all the set-up it needs.  On a machine with its own package index:
#   make quickstart PIP_ARGS="--index-url <address>"
# Recipe keys can be changed in passing:  make stories ARGS="policy.model=<directory> output_dir=<directory>"

PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
RANKS ?= 2
VENV := .venv
READY := $(VENV)/ready
BEGUN := $(VENV)/begun

.PHONY: setup quickstart stories test bench clean

setup: $(READY)

# `begun` outlives an install that was killed, and the next one then starts from nothing: pip takes a package that is
# half there for installed.  A change of the requirements installs what changed.
$(READY): requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name it: make PYTHON=python3.11 ..."; exit 1; }
	@if [ -e $(BEGUN) ]; then echo "the last install was not finished; starting over"; rm -rf $(VENV); fi
	mkdir -p $(VENV) && rm -f $(READY) && touch $(BEGUN)
	[ -x $(VENV)/bin/pip ] || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --no-deps $(PIP_ARGS) $$(grep '^torch==' requirements/cpu.txt)
	@$(VENV)/bin/python -c 'import importlib.metadata as m, sys; \
	  sys.exit(any("nvidia" in need or "cuda" in need for need in m.requires("torch") or ()))' || \
	  { rm -f $(BEGUN); echo "This package index has torch for CUDA only; name one with the CPU build:" \
	  "make $(MAKECMDGOALS) PIP_ARGS='--extra-index-url <address>'"; exit 1; }
	$(VENV)/bin/python -m pip install --disable-pip-version-check --no-deps $(PIP_ARGS) -r requirements/cpu.txt
	$(VENV)/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(VENV)/bin/python -c 'import torch'
	mv $(BEGUN) $(READY)

quickstart: setup
	$(VENV)/bin/align run recipes/quickstart.yaml --ranks $(RANKS) $(ARGS)

stories: setup
	$(VENV)/bin/align run recipes/stories.yaml --ranks $(RANKS) $(ARGS)

test: setup
	bash tests/check.sh $(ARGS)

bench: setup
	$(VENV)/bin/python benchmarks/dpo_vs_trl.py $(ARGS)
	$(VENV)/bin/python benchmarks/rl_vs_trl.py $(ARGS)
	$(VENV)/bin/python benchmarks/dpo_vs_openrlhf.py $(ARGS)

# Runs are yours and stay.
clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
