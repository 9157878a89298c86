# One command per chore; CI runs the same ones.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# A test process per core (each of one thread); one that has no tests left takes over those of others.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

.PHONY: install demo test test-fast lint docs dist bench bench-report gpu-check clean

install: $(VENV)/.installed

# What the demos need. torch first, alone and pinned, so that no later requirement can pull another build in.
$(VENV)/.demo: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[examples]'
	touch $@

# What tests and lint need beside that.
$(VENV)/.installed: $(VENV)/.demo
	$(PIP) --editable '.[dev]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/villa_uniter.py --resume

test: install
	$(PYTEST)

# Without the tests that are marked slow; some of every room are left.
test-fast: install
	$(PYTEST) -m 'not slow'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What the site is made with.
$(VENV)/.docs: $(VENV)/.installed
	$(PIP) --editable '.[dev,docs]'
	touch $@

# The site of the documentation, in site/; a dead link or a page that no menu lists fails.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The archives of a release, in dist/, and the check that a package index would take and show them.
$(VENV)/.dist: $(VENV)/.demo
	$(PIP) --editable '.[examples,dist]'
	touch $@

dist: $(VENV)/.dist
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

# The libraries that the benchmarks compare with.
$(VENV)/.bench: $(VENV)/.installed
	$(PIP) --editable '.[dev,bench]'
	touch $@

bench: $(VENV)/.bench
	mkdir -p benchmarks/results
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds \
		--benchmark-json=benchmarks/results/latest.json

bench-report: $(VENV)/.bench
	$(BIN)/python benchmarks/report.py

# On a machine with torch, Triton, transformers, pytest and pytest-benchmark alone: nothing is installed. Results in $OUT,
# else in benchmarks/results/gpu.
gpu-check:
	$(PYTHON) -m benchmarks.gpu

clean:
	rm -rf $(VENV) build dist *.egg-info runs
