# Everything is done by the `warmstart` command and by pytest; this file installs them and calls them.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help lab test test-fast prove mutants grade course lint bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

lab: .venv/installed  ## set up if needed, then open JupyterLab on the first chapter
	$(BIN)/warmstart lab

test: .venv/installed  ## set up if needed, then run all tests, in two processes
	$(BIN)/python -m pytest --numprocesses 2

test-fast: .venv/installed  ## the tests that take a minute together
	$(BIN)/python -m pytest --numprocesses 2 -m fast

prove: .venv/installed  ## prove every check on twenty draws of its inputs
	$(BIN)/warmstart prove

mutants: .venv/installed  ## count the small mistakes that the checks notice, beside the table in docs/proofs.md
	$(BIN)/warmstart mutants

grade: .venv/installed  ## grade a sample class with nbgrader and print a table
	$(BIN)/warmstart grade

course: .venv/installed  ## write everything that is generated: notebooks, releases, truth tables
	$(BIN)/warmstart course

lint: .venv/installed  ## check style and formatting
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

bench: .venv/installed  ## compare speed with peers' and write benchmarks/results.md, on an idle machine
	$(BIN)/python -m benchmarks

clean:  ## remove the environment and all caches
	rm -rf .venv .pytest_cache .ruff_cache build artefacts *.egg-info
