# Everything from nothing but Python: each target makes .venv if it is missing.
#   make demo       train on dirty digits, plain, auto and robust, and compare: demo/
#   make test       what every change must pass: mathematics, audit, data, training, every command (4 minutes on 2 cores)
#   make test-all   and processes, kills, faults, fuzzed files, the paper's experiments (20 minutes)
#   make test-long  fifty kills and thousands of fuzzed files, of which make test-all takes a sample
#   make check      lint, types, import order
#   make docs       the documents as a site: site/

PYTHON ?= python3
# The pinned torch comes from wherever your pip is configured to look; any build of that version works.
PIP_FLAGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
# A core each; who is done first takes tests from the others.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal --durations=15

.PHONY: demo test test-all test-long check docs format clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@sed -n 's/^#   //p' Makefile

$(STAMP): pyproject.toml constraints.txt
	@echo "== making .venv and installing the pinned versions (about a minute)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	@echo "== demo: diffusion models of dirty digits, plain, auto and robust, and a clean yardstick (about 8 minutes on 2 cores)"
	$(BIN)/python -m experiments.digits_demo --output demo

test: $(STAMP)
	@echo "== tests"
	$(PYTEST) tests

test-all: $(STAMP)
	@echo "== all tests"
	$(PYTEST) -m "not long"

test-long: $(STAMP)
	@echo "== the long tests"
	$(PYTEST) -m long

check: $(STAMP)
	@echo "== lint, types, import order"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)
	@echo "== documents"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist demo site src/*.egg-info
