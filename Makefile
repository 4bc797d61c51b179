# The only entry for people and CI. `make` alone says what there is. Written for GNU make 3.81, which macOS has.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FIXTURES_VENV := .venv-fixtures
FIXTURES_STAMP := $(FIXTURES_VENV)/.installed
OUT := build/demo
MLX_PYTHON ?= $(FIXTURES_VENV)/bin/python
PYTEST_ARGS ?= -n 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint format types contracts bench bench-kernels bench-convert bench-store bench-llama fixtures clean

help: ## say what each target does
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP) ## make the environment in .venv (again only when pyproject.toml changed)

$(STAMP): pyproject.toml $(wildcard runtime/native/*.[ch] runtime/native/*.py)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## convert the embedded checkpoint, inspect it, and let it write
	@rm -rf $(OUT) && mkdir -p $(dir $(OUT))
	$(BIN)/repack convert demo $(OUT)
	@echo
	$(BIN)/repack inspect $(OUT)
	@echo
	$(BIN)/stream-run $(OUT) -p "It was a fine morning, and Elizabeth" --raw -n 64 --seed 1

test: $(STAMP) ## run the tests (PYTEST_ARGS="-k name" to choose)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: lint types contracts test ## everything a change must pass

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## ruff: put the format right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

contracts: $(STAMP) ## who may import whom
	$(BIN)/lint-imports

bench: $(STAMP) ## what this disk allows, and how fast the demo is
	@test -f $(OUT)/index.json || { mkdir -p $(dir $(OUT)) && $(BIN)/repack convert demo $(OUT); }
	$(BIN)/stream-run bench $(OUT)

bench-kernels: $(STAMP) ## native kernels beside the memory read rate and BLAS
	$(BIN)/python -m runtime.bench_kernels

bench-store: $(STAMP) ## expert reads, their overlap and the cache beside what the disk allows; what a ceiling on memory costs
	$(BIN)/python -m runtime.bench_store
	$(BIN)/python -m tests.runtime.bench_memory

bench-convert: $(STAMP) ## conversion beside raw reading and writing, MLX (if `make fixtures` was run), a hub on loopback, and predicted speeds
	$(BIN)/python -m repack.bench_convert $(if $(wildcard $(MLX_PYTHON)),--mlx $(MLX_PYTHON))
	$(BIN)/python -m tests.repack.bench_hub
	$(BIN)/python -m tests.repack.bench_predict

bench-llama: $(STAMP) ## beside llama.cpp on the same weights, by hand (LLAMA_BENCH=path of its llama-bench)
	$(BIN)/python -m tests.runtime.bench_llama --llama-bench '$(LLAMA_BENCH)' --folder build/bench-llama

$(FIXTURES_STAMP): tests/fixtures/requirements.txt
	$(PYTHON) -m venv $(FIXTURES_VENV)
	$(FIXTURES_VENV)/bin/python -m pip install --quiet --requirement $<
	$(FIXTURES_VENV)/bin/python -m pip install --quiet --no-deps gptqmodel==7.7.0 # which asks for a later torch than it needs
	$(FIXTURES_VENV)/bin/python -m pip install --quiet --no-deps auto-round==0.16.1 amd-quark==0.13 # for their decoders
	@touch $@

fixtures: $(FIXTURES_STAMP) ## write the committed fixtures anew, with torch and transformers in an environment of their own
	@set -e; for maker in tests/fixtures/make_*.py; do \
		echo "$$maker"; PYTHONPATH=. $(FIXTURES_VENV)/bin/python "$$maker"; \
	done

clean: ## remove all that make has made
	rm -rf build dist $(VENV) $(FIXTURES_VENV)
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find formats repack runtime tests -name __pycache__ -type d -prune -exec rm -rf {} +
