# Each target makes .venv and installs into it first; a stamp makes that free while nothing changed.
# pip reads its usual settings, so PIP_INDEX_URL or PIP_FIND_LINKS choose another build of torch.
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(INSTALLED) ## train recurrent networks that fail, and the same networks healed (ARGS="--seed 1")
	$(BIN)/python -m recipes.lstm $(ARGS)

test: $(INSTALLED) ## run the tests and the examples in the docstrings, in two processes (ARGS="-k clipping", ARGS="-m 'not slow'")
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(INSTALLED) ## check style, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(INSTALLED) ## measure what each callback costs per step
	$(BIN)/python -m benchmarks.overhead $(ARGS)

clean: ## remove .venv, caches and builds; runs/ stays
	rm -rf $(VENV) build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into $(VENV); the first time takes minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
